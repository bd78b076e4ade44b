"""Noise that members of a masked sum share: each adds a part of it, and the server sees the sum of all parts only.

Both halves of Kairouz, Liu & Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with
Secure Aggregation", Algorithms 1 and 2, or with Skellam noise of Agarwal, Kairouz & Liu 2021, "The Skellam Mechanism
for Differentially Private Federated Learning", Algorithm 1. A client rotates its clipped change, scales all sections to
steps, rounds them to whole ones no longer together than accounted for, and adds an integer share of noise. The masked
collector sums these without loss where its step is 1, so what the server sees is an integer sum and integer noise, to
the bit what was accounted for. The server divides by the scale and turns back; that is post-processing.

The rotation's seed is no secret, and no ε rests on it. It comes of the run's seed and the model's version, not of a
fresh draw: a sum that was opened before a server was killed is still turned back rightly after it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import hypot

import numpy as np
from numpy.typing import NDArray

from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.privacy.integers import Entropy, discrete_gaussian, skellam
from strategies.privacy.rotation import Rotation
from strategies.privacy.rounding import rounded, rounded_l2
from strategies.privacy.steps import Steps
from strategies.protocols import ClientContext, Settings
from strategies.stages.clip import bounded, l2_norm
from strategies.update import DELTA, Section, Update
from strategies.wire import Refused

_MOST = 2**24 - 1
"""Whole numbers up to it are exact in float32."""
_SLACK = 1e-6
"""By how much scales times bounds may exceed the norm, from float64 arithmetic and a clip's hair."""
_LAWS = {"discrete_gaussian": discrete_gaussian, "skellam": skellam}


class IntegerNoise:
    """Whole numbers with a share of noise, in place of each section.

    Args:
        steps: the numbers as the server has them, asked when settings are sent down and when a sum comes back.
        bounds: L2 bounds of the sections in the round that comes, as the clip has them; asked likewise.
        seed: of the rotations; the run's will do.
        least: the smallest standard deviation of a share, over the largest norm of this client's rounded vector, that
            it adds, whatever the server says; 0 for any.
        entropy: of rounding and noise; the operating system's unless a study is to repeat.
    """

    name = "integers"
    label = "privacy=distributed"

    def __init__(
        self,
        steps: Callable[[], Steps],
        bounds: Callable[[], Mapping[str, float]],
        *,
        seed: int = 0,
        least: float = 0.0,
        entropy: Callable[[ClientContext], Entropy] = lambda context: os.urandom,
    ) -> None:
        self._steps, self._bounds, self._seed = steps, bounds, seed
        self._least, self._entropy = least, entropy

    def check(self, claim: Claim) -> Claim:
        """Makes sums private, and their bounds void.

        Raises:
            ContractError: a section has no bound, the server sees single updates, or sums weight their members.
        """
        claim.need_client_half(self)
        claim.need_no_statistics(self)
        if claim.support != "per_version":  # members of one sum have one version
            claim.need_shared_support(self)
        claim.need_bounds(self)
        if claim.visibility is Visibility.EACH:
            raise ContractError(
                claim.source("visibility"),
                name_of(self),
                "a client's own share of the noise hides little, and the server sees each update",
                "use collector=masked, or privacy=local",
            )
        if claim.summed != "uniform":
            raise ContractError(
                claim.source("summed"),
                name_of(self),
                "whole numbers that are multiplied by weights are whole no more",
                "set collector.max_weight=null",
            )
        return claim.given(self, bounds={}, private="distributed noise")

    def configure(self) -> Settings:
        """What clients must know of the round that comes."""
        steps = self._steps()
        scales = steps.scales(self._bounds())
        return {
            "noise": steps.noise,
            "variance": steps.variance,
            "norm": steps.norm,
            "dimension": steps.dimension,
            "most": steps.most,
            "seed": self._seed,
            **{f"scale.{name}": scale for name, scale in scales.items()},
        }

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half: whole numbers below 2²⁴ in float32, and nothing else of the update.

        Raises:
            Refused: `terms`, where a section has no bound, or what the server sent does not fit the update or asks
                for less noise than this client adds at least.
        """
        settings = context.settings
        norm, variance = float(settings["norm"]), float(settings["variance"])
        scales = self._agreed(update, settings, norm)
        law = _LAWS.get(str(settings["noise"]))
        dimension = sum(section.layout.size for section in update.sections.values())
        if law is None or dimension != settings["dimension"]:
            raise Refused("terms", f"{settings['noise']} on {settings['dimension']} elements")
        if not variance**0.5 >= self._least * rounded_l2(norm, dimension):
            raise Refused("terms", f"noise of variance {variance:g} is less than is added here")
        entropy = self._entropy(context)
        scaled = [
            self._turned(name, bounded(section), int(settings["seed"]), update.version)
            * np.float64(scales[name])
            for name, section in sorted(update.sections.items())
        ]
        values = rounded(np.concatenate(scaled), norm, entropy=entropy)
        values += law(variance, dimension, entropy)
        if int(np.abs(values).max()) > min(_MOST, int(settings["most"])):
            raise Refused("terms", "steps and noise are too many for the sum, or for float32")
        return _split(update, values)

    def decode(self, update: Update) -> Update:
        """Server half: the mean of the members' whole numbers in the sections' own units.

        Nobody sees what one member of a sum has sent, and one that skips its clip may fill the ring. What all together
        have sent is seen: it is as long as their clips and their noise may make it, or somebody has lied.

        Raises:
            Refused: `too_large`, where the sum is longer than honest members make one in 2⁴⁰ sums.
        """
        steps = self._steps()
        members, scales = len(update.members), steps.scales(self._bounds())
        length = members * hypot(*(l2_norm(one.vector) for one in update.sections.values()))
        if not length <= (most := steps.longest(members)) * (1 + _SLACK):
            raise Refused(
                "too_large",
                f"{length:.3g} steps long, where {members} honest members make {most:.3g} at most: one has skipped its"
                f" clip",
            )
        for name, section in update.sections.items():
            vector = section.vector
            if name == DELTA:
                seed = rotation_seed(self._seed, update.version)
                vector = Rotation(seed, len(vector)).inverse(vector)
            units = (vector / np.float64(scales[name])).astype(np.float32)
            update = update.with_section(name, Section(units, section.layout))
        return update

    @staticmethod
    def _agreed(update: Update, settings: Settings, norm: float) -> dict[str, float]:
        """The scales; refuses those that would make the update longer than what noise was chosen for."""
        scales, total = {}, 0.0
        for name, section in update.sections.items():
            scale = settings.get(f"scale.{name}")
            if section.bound is None or not isinstance(scale, float) or not scale > 0:
                raise Refused("terms", f"section {name!r} has no bound or no scale")
            scales[name] = scale
            total += (scale * section.bound) ** 2
        if not total <= (norm * (1 + _SLACK)) ** 2:
            raise Refused("terms", f"{total**0.5:g} steps, where noise is for {norm:g}")
        return scales

    @staticmethod
    def _turned(
        name: str, vector: NDArray[np.float32], seed: int, version: int
    ) -> NDArray[np.float32]:
        if name != DELTA:
            return vector
        return Rotation(rotation_seed(seed, version), len(vector)).forward(vector)


def rotation_seed(seed: int, version: int) -> bytes:
    """32 bytes for the rotation of what is trained on one version of the model."""
    return hashlib.sha256(f"trellis rotation {seed} {version}".encode()).digest()


def _split(update: Update, values: NDArray[np.int64]) -> Update:
    """One long vector as the update's sections, in the order of their names; what else it held is left out."""
    sections, begin = {}, 0
    for name, section in sorted(update.sections.items()):
        end = begin + section.layout.size
        sections[name] = Section(values[begin:end].astype(np.float32), section.layout)
        begin = end
    return replace(update, sections=sections, weight=1.0, metrics={})
