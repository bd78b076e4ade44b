"""What a client's training costs its examples, and whether it may still be spent.

One step of DP-SGD releases a sum that holds each example with probability q, with Gaussian noise of z times what one
example can change (Abadi et al. 2016, "Deep Learning with Differential Privacy", Theorem 1 and §3.2); a round makes
T = E·⌈1/q⌉ of them. Neighbours differ by one example that is there or not. Each client accounts for itself, over all
that its ledger holds. q, z, T and therefore the number of examples count as public.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from clients.dp_ledger import ClientLedger
from strategies.privacy.events import GaussianRelease
from strategies.wire import Refused

AccountantName = Literal["pld", "rdp", "prv"]


class BudgetSpent(Refused):
    """A request that would spend more than the client's ε."""

    @property
    def told(self) -> str:
        """All of it: it holds nothing but settings and counts."""
        return str(self)


@dataclass(frozen=True)
class Round:
    """The releases that one round of a client makes.

    Attributes:
        rate: q, with which an example is in a batch.
        steps: T, one release each.
        batch: expected examples in a batch, q·n.
    """

    rate: float
    steps: int
    batch: float

    @classmethod
    def of(cls, examples: int, batch_size: int, epochs: int) -> Round:
        """A round over so many examples.

        Raises:
            ValueError: there are none.
        """
        if examples < 1:
            raise ValueError("this client has no examples to train on")
        rate = min(1.0, batch_size / examples)
        return cls(rate, epochs * math.ceil(1 / rate), rate * examples)

    def release(self, noise_multiplier: float) -> GaussianRelease:
        """One step's release."""
        if self.rate == 1:
            return GaussianRelease(noise_multiplier)
        return GaussianRelease(noise_multiplier, self.rate, "poisson")


@dataclass(frozen=True)
class Budget:
    """How a client counts, and how far it goes.

    Attributes:
        accountant: which.
        delta: δ.
        epsilon: ε that is never passed; None for no bound.
        participations: rounds that the noise is planned for, where it follows from ε.
    """

    accountant: AccountantName
    delta: float
    epsilon: float | None
    participations: int

    def noise_for(self, each: Round) -> float:
        """The least noise multiplier with which so many rounds stay within ε."""
        assert self.epsilon is not None
        count = each.steps * self.participations
        return _least_noise(self.accountant, self.epsilon, self.delta, each.rate, count)

    def charge(self, ledger: ClientLedger, release: GaussianRelease, steps: int) -> float:
        """Writes a round's steps down and returns the ε of all that was ever charged.

        Args:
            ledger: the client's.
            release: one step's.
            steps: how many.

        Raises:
            BudgetSpent: ε would be passed; nothing is charged then.
            OSError: the ledger could not be written.
            ValueError: the ledger is damaged or another mechanism's.
        """
        from strategies.privacy.accountants import make_accountant  # imports for seconds

        with ledger.locked():
            accountant = make_accountant(self.accountant, release.relation)
            charges = ledger.charges()
            for earlier, count in charges:
                accountant.step(earlier, count)
            accountant.step(release, steps)
            epsilon = accountant.epsilon(self.delta)
            if self.epsilon is not None and epsilon > self.epsilon:
                raise BudgetSpent(
                    "budget",
                    f"epsilon would be {epsilon:.4g} after this round, more than client.target_epsilon="
                    f"{self.epsilon:g} at delta={self.delta:g}; {len(charges)} rounds have been charged to this"
                    f" client, whether their updates were taken or not",
                )
            ledger.add(release, steps)
        return float(epsilon)


@lru_cache(maxsize=1024)
def _least_noise(
    accountant: AccountantName, epsilon: float, delta: float, rate: float, count: int
) -> float:
    from strategies.privacy.accountants import calibrate

    def plan(noise_multiplier: float) -> Iterable[tuple[GaussianRelease, int]]:
        return [(Round(rate, count, 0.0).release(noise_multiplier), count)]

    return float(calibrate(accountant, epsilon, delta, plan))
