"""DP-FTRL's noise by banded matrix factorisation: noise that later rounds partly take back, with no sampling assumed.

Independent noise adds up in a model that is the sum of all releases. DP-FTRL (Kairouz, McMahan, Song, Thakkar, Thakurta
& Xu 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling") correlates it, so that prefix sums A·G
of the rounds' aggregates G carry less. With A = B·C what is released is G + C⁻¹Z, and prefix sums err by B·Z. C here is
banded Toeplitz (Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta & Xu 2023, "(Amplified) Banded Matrix
Factorization: A unified approach to private training"): columns as many rounds apart as there are bands have no row in
common, so one client's k participations cost √k of one. Its coefficients are those of the square root of A, cut off
(Kalinin & Lampert 2024, "Banded Square Root Matrix Factorization for Differentially Private Model Training").
Gaussian noise makes this as private where aggregates depend on earlier releases as where they don't (Denisov, McMahan,
Rush, Smith & Thakurta 2022, "Improved Differential Privacy for SGD via Optimal Private Linear Operators on Adaptive
Streams", Theorem 2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from annotated_types import Ge, Lt
from numpy.typing import NDArray

from strategies.privacy.events import GaussianRelease
from strategies.ranges import Ranged

_BLOCK = 1 << 15
"""Elements at a time: what is summed of one block stays in a core's L2."""


@dataclass(frozen=True)
class BandedToeplitz(Ranged):
    """The strategy matrix C of a segment: lower triangular, c_{t-i} in row t of column i.

    **What a prefix costs.** In round t a client that is asked adds a vector of norm at most 1 (in units of what one
    client can change), and neighbours differ in that one client's vectors are zero: who is asked is the same in both
    (the zero-out relation of Kairouz et al. 2021), which adds or removes a client with a public place in the schedule.
    C is lower triangular, so rounds 1 … t of the release G + C⁻¹Z are G_t + C_t⁻¹Z_t = C_t⁻¹(C_t·G_t + Z_t) with the
    leading blocks of t rows: a function of the Gaussian mechanism C_t·G_t + z·N(0, 1), and C_t⁻¹ is public. Neighbours'
    C_t·G_t differ by C_t·u, of norm at most s(t) = `sensitivity(t, …)`. So the prefix is μ-GDP with

        μ²(t) = s²(t) / z²,

    for inputs chosen in the light of earlier releases too (Denisov et al.). Nothing is lost: C_t(release) gives
    C_t·G_t + Z_t back. μ² grows with t and does not depend on data, so a run may be charged
    μ²(t) - μ²(t - 1) in round t: Gaussian releases add up in μ², and after each round the sum is what the prefix costs.

    **s(t).** Let b be the separation and b ≥ bands. Columns of C_t that are b apart have no row in common, so ‖C_t·u‖²
    is the sum of ‖column i‖²·‖u_i‖². Column i holds c_0 … c_{min(bands, t - i + 1) - 1}: the last ones are cut, and
    norms never increase with i. The j-th participation is in round 1 + (j - 1)·b at the earliest, so the earliest k are
    the worst, and

        s²(t) = Σ_{j < min(k, ⌈t/b⌉)} Σ_{i < min(bands, t - j·b)} c_i².

    Round t adds c_i² with i = (t - 1) mod b, or nothing where i ≥ bands or k participations can all be over.

    **Rounds are rows.** Every round takes one row of the noise, a void one too: two participations b rounds apart
    must be b rows apart.

    **Segments.** Noise is never kept beyond a process: after a restart a fresh matrix begins at row 1, on fresh noise.
    Segments compose adaptively, so their μ² add up, each with s of its own rounds. Two participations in different
    segments may be closer than b: they meet different noise. Each segment is charged with k participations, which
    needs no trust in what a killed process had written down (`samplers.Spaced` says why that holds).

    Attributes:
        bands: diagonals of C that are not zero; 1 is independent noise.
        momentum: β of the server's momentum: A maps aggregates to m_t = β·m_{t-1} + g_t summed over rounds.
    """

    bands: Annotated[int, Ge(1)]
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0

    def coefficients(self) -> NDArray[np.float64]:
        """c_0 … c_{bands-1}: a (bands,) vector, read-only, c_0 = 1, decreasing.

        A has the generating function 1/((1 - x)(1 - βx)); with r_j = (2j choose j)/4^j its square root's coefficients
        are c_i = Σ_j r_{i-j}·r_j·β^j (Kalinin & Lampert 2024, Theorem 1). They decrease strictly, so C⁻¹ is stable: the
        polynomial Σ c_i·x^i has its zeros outside the unit circle (Eneström–Kakeya).
        """
        return self._coefficients

    def sensitivity(self, rounds: int, participations: int, separation: int) -> float:
        """s: how much one client can change C·G, in units of what it can change in one round.

        Args:
            rounds: of the segment so far, t.
            participations: of one client at most, k.
            separation: two participations are at least so many rounds apart, b.

        Raises:
            ValueError: rounds < 0, participations or separation < 1, or more bands than the separation.
        """
        self._refuse(rounds, participations, separation)
        columns = min(participations, -(-rounds // separation))
        squares = np.cumsum(self._coefficients**2)
        lengths = np.minimum(self.bands, rounds - separation * np.arange(columns))
        return math.sqrt(float(squares[lengths - 1].sum()))

    def prefix_cost(
        self, rounds: int, *, participations: int, separation: int, noise_multiplier: float
    ) -> float:
        """μ² of a segment's first `rounds` rounds.

        Args:
            rounds: see `sensitivity`.
            participations: see `sensitivity`.
            separation: see `sensitivity`.
            noise_multiplier: z: the standard deviation of Z over what one client can change in one round.

        Raises:
            ValueError: as `sensitivity`, or a noise multiplier that is not a positive number.
        """
        _positive(noise_multiplier)
        return (self.sensitivity(rounds, participations, separation) / noise_multiplier) ** 2

    def increment(
        self, round_number: int, *, participations: int, separation: int, noise_multiplier: float
    ) -> float:
        """μ²(t) - μ²(t - 1) for t = `round_number`, from 1 in each segment; without cancellation.

        Raises:
            ValueError: as `prefix_cost`, or a round before the first.
        """
        _positive(noise_multiplier)
        self._refuse(round_number, participations, separation)
        if round_number < 1:
            raise ValueError(f"round {round_number}: a segment's rounds count from 1")
        column, row = divmod(round_number - 1, separation)
        if column >= participations or row >= self.bands:
            return 0.0
        return float(self._coefficients[row] / noise_multiplier) ** 2

    def release(
        self, round_number: int, *, participations: int, separation: int, noise_multiplier: float
    ) -> GaussianRelease | None:
        """What a round is charged as: the Gaussian release of its increment, or None where it costs nothing more.

        Raises:
            ValueError: as `increment`.
        """
        cost = self.increment(
            round_number,
            participations=participations,
            separation=separation,
            noise_multiplier=noise_multiplier,
        )
        return GaussianRelease(1 / math.sqrt(cost)) if cost else None

    def errors(self, rounds: int, participations: int, separation: int) -> tuple[float, float]:
        """How far prefix sums are off at μ = 1, by element: root mean square over the rounds, and the last, worst one.

        In units of what one client can change. Z has the standard deviation s there, and the sums err by A·C⁻¹·Z,
        whose matrix is Toeplitz with coefficients w = C⁻¹·a:

            rms² = s²·Σ_i (1 - i/n)·w_i²,     max² = s²·Σ_i w_i²,     i < n.

        Independent noise: √(k(n + 1)/2) and √(k·n).

        Raises:
            ValueError: as `sensitivity`, or no rounds.
        """
        if rounds < 1:
            raise ValueError(f"rounds = {rounds}: there are no prefix sums of no rounds")
        scale = self.sensitivity(rounds, participations, separation)
        noise = BandedNoise(self, 1)
        powers = np.cumsum(self.momentum ** np.arange(rounds))
        squares = np.array([noise.next(powers[i : i + 1])[0] for i in range(rounds)]) ** 2
        share = 1 - np.arange(rounds) / rounds
        return scale * math.sqrt(share @ squares), scale * math.sqrt(squares.sum())

    @cached_property
    def _coefficients(self) -> NDArray[np.float64]:
        steps = np.arange(1, self.bands)
        root = np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])
        both = np.convolve(root, root * self.momentum ** np.arange(self.bands))[: self.bands]
        both.flags.writeable = False
        return both

    def _refuse(self, rounds: int, participations: int, separation: int) -> None:
        if rounds < 0 or participations < 1 or separation < 1:
            raise ValueError(
                f"{rounds} rounds, {participations} participations, {separation} rounds apart: at least 0, 1 and 1"
            )
        if self.bands > separation:
            raise ValueError(
                f"bands = {self.bands}: a client that is asked again after {separation} rounds would meet noise that"
                f" is still correlated with its last; at most {separation} bands, or a larger separation"
            )


class BandedNoise:
    """The rows of C⁻¹Z, one a round, from those of Z: y_t = z_t - Σ_{0<j<bands} c_j·y_{t-j}, as c_0 = 1.

    Holds the last bands - 1 rows in float64. They are the secret of the segment: nothing here can be saved.

    Args:
        matrix: C.
        size: elements of a row, d.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, matrix: BandedToeplitz, size: int) -> None:
        if size < 1:
            raise ValueError(f"size = {size}: a row has at least one element")
        self._weights = matrix.coefficients()[1:]
        self._last = np.zeros(
            (len(self._weights), size)
        )  # a ring: row t of y in place t mod (bands - 1)
        self._taken = np.empty(min(_BLOCK, size))
        self._size = size
        self._rows = 0

    @property
    def rows(self) -> int:
        """How many were given: the number of the segment's last round."""
        return self._rows

    def next(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """The next row of C⁻¹Z.

        Args:
            z: the next row of Z, (d,), independent of all before. It is used up: the result is written over it, so
                that no copy is made.

        Returns:
            `z`, which now holds y_t.

        Raises:
            ValueError: another shape than (d,), or not float64.
        """
        if z.shape != (self._size,) or z.dtype != np.float64:
            raise ValueError(
                f"a row of {z.dtype} with shape {z.shape}: needs float64 and ({self._size},)"
            )
        places = len(self._weights)
        if places:
            known = min(self._rows, places)
            lags = (self._rows - 1 - np.arange(known)) % places
            for begin in range(0, self._size, _BLOCK) if known else ():
                block = z[begin : begin + _BLOCK]
                taken = self._taken[: len(block)]
                earlier = self._last[:known, begin : begin + _BLOCK]
                np.dot(self._weights[lags], earlier, out=taken)
                block -= taken
            self._last[self._rows % places] = z
        self._rows += 1
        return z


def _positive(noise_multiplier: float) -> None:
    if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"noise_multiplier = {noise_multiplier!r}: must be a positive number")
