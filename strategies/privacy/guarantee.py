"""What a run promises: an ε for its unit and neighbours, the noise that keeps it, and what has been spent of it.

    guarantee = Central(target_epsilon=1.0, population=1000, rounds=100)
    guarantee.check(claim)          # the noise is found here, when the contract has said what a unit can change
    guarantee.charge(round)         # before a round: written down, or refused
    guarantee.privatise(aggregate)  # what is released

A mechanism says which `Release` it makes; accountants say what many come to; the ledger remembers. The subclasses know
where noise is put, and nothing here does.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from strategies import plain_json
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.privacy.accountants import calibrate, make_accountant
from strategies.privacy.budget import BudgetSpentError
from strategies.privacy.composition import Accountant
from strategies.privacy.events import GaussianRelease, Relation, Release
from strategies.privacy.ledger import Ledger
from strategies.protocols import Stage
from strategies.ranges import Ranged
from strategies.state import State
from strategies.update import Update

MOST_DELTA = 1e-5
"""δ where none is set, or N^−1.1 where that is smaller."""

_FOUND: dict[tuple[object, ...], float] = {}
"""Noise that was found for a budget: a pipeline is checked several times, and finding takes seconds."""


@dataclass
class Guarantee(Ranged, ABC):
    """A promise of differential privacy and its account.

    Attributes:
        target_epsilon: the budget: no round runs that would exceed it. Without `noise_multiplier` the noise is found
            with which all planned rounds come to it.
        noise_multiplier: z, the noise's standard deviation over the clip's bound; None to find it.
        delta: δ; None for N^−1.1 of N clients, at most 1e-5.
        accountant: `pld`, `rdp` or `prv`.
        reproducible_noise: noise and coins from the run's seed, for tests and studies: then nothing is promised.
        population: N, clients in all.
        rounds: planned.
        ledger: file of what has been spent; None keeps it in memory.
        seed: the run's, for reproducible noise.

    Raises:
        ValueError: neither a budget nor a noise multiplier is set, or a setting is out of its range.
    """

    target_epsilon: Annotated[float, Gt(0)] | None = None
    noise_multiplier: Annotated[float, Gt(0)] | None = None
    delta: Annotated[float, Gt(0), Lt(1)] | None = None
    accountant: Literal["pld", "rdp", "prv"] = "pld"
    reproducible_noise: bool = False
    population: Annotated[int, Ge(1)] | None = None
    rounds: Annotated[int, Ge(1)] = 1
    ledger: Path | None = None
    seed: int = 0

    unit: ClassVar[str] = "client"
    repeats: ClassVar[bool] = False
    unconditional: ClassVar[bool] = False
    mechanism: ClassVar[str]
    """What makes the noise, in a word."""
    protects: ClassVar[str]
    """What is protected, and from whom."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "set target_epsilon, for which the noise is found, or noise_multiplier"
            )
        if self.delta is not None and self.population and self.delta >= 1 / self.population:
            raise ValueError(
                f"delta = {self.delta:g} would allow one of {self.population} clients to be published: set it below"
                f" 1/{self.population} = {1 / self.population:.2g}"
            )
        self._z: float | None = None
        self._account: Accountant | None = None
        self._ledger: Ledger | None = None
        self._relation: Relation = "add_or_remove_one"
        self._claim = Claim()
        self._epsilon = 0.0

    # ---- the contract ----

    def check(self, claim: Claim) -> Claim:
        """Refuses what no noise of this kind makes private, finds the noise, and says that the rest is private.

        Raises:
            ContractError: something travels in clear or has no bound, or no noise keeps to the budget.
        """
        claim.need_nothing_in_clear(self)
        claim.need_nothing_summed(self)
        claim.need_no_statistics(self)
        claim = self.promised(claim)
        self._claim = claim
        self._relation = self.release(claim, 1.0).relation
        self._z = self._multiplier(claim)
        return claim.given(self, private=self.mechanism)

    @abstractmethod
    def promised(self, claim: Claim) -> Claim:
        """The claim that the noise makes true; raises `ContractError` where it can't."""

    @abstractmethod
    def release(self, claim: Claim, z: float) -> Release:
        """What one round releases with the noise multiplier z."""

    def releases(self, claim: Claim, z: float) -> Iterable[tuple[Release, int]]:
        """What all planned rounds release: each release, and how often."""
        return [(self.release(claim, z), self.rounds)]

    def next_release(self) -> Release | None:
        """What the round that comes releases; None where it costs nothing more."""
        return self.release(self._claim, self.z)

    def stages(self, bounds: Callable[[], Mapping[str, float]]) -> Sequence[Stage]:
        """The client halves: noise that clients add themselves."""
        return ()

    def told(self, update: Update) -> None:
        """What clients spend of their own accord is no part of this account."""

    def privatise(self, aggregate: Update, bounds: Mapping[str, float]) -> Update:
        """The aggregate as it may be released.

        Args:
            aggregate: of the round that has been charged.
            bounds: L2 bounds of one client's sections in this round.
        """
        return aggregate

    # ---- the account ----

    @property
    def z(self) -> float:
        """The noise multiplier, set or found; raises `RuntimeError` before `check`."""
        if self._z is None:
            raise RuntimeError("the noise is known when the pipeline has been checked")
        return self._z

    @property
    def resolved_delta(self) -> float:
        """δ as it is used."""
        if self.delta is not None:
            return self.delta
        return MOST_DELTA if self.population is None else min(MOST_DELTA, self.population**-1.1)

    @property
    def epsilon(self) -> float | None:
        """ε spent so far; None where nothing is promised."""
        return None if self.reproducible_noise else self._epsilon

    def charge(self, round_number: int) -> None:
        """Pays for a round before it begins: when this returns, the charge is on the disk.

        Raises:
            BudgetSpentError: the round would exceed the budget.
            OSError: the ledger can't be written.
        """
        release = self.next_release()
        if release is None:
            return
        account, ledger = self._accounts()
        after = account.fork()
        after.step(release)
        epsilon = after.epsilon(self.resolved_delta)
        # Found noise comes to the budget by its last planned round, up to rounding.
        if self.target_epsilon is not None and epsilon > self.target_epsilon * (1 + 1e-9):
            raise BudgetSpentError(
                f"round {round_number} would spend ε = {epsilon:.4g} of {self.target_epsilon:g}"
            )
        ledger.charge(release, round_number)
        self._account, self._epsilon = after, epsilon

    def report(self) -> dict[str, Any] | None:
        """What summary.json says; None where nothing is promised."""
        if self.reproducible_noise or self._z is None:
            return None
        self._accounts()  # what an earlier process has spent counts before the first charge of this one
        return {
            "unit": self.unit,
            "epsilon": self._epsilon,
            "delta": self.resolved_delta,
            "accountant": self.accountant,
            "adjacency": self.adjacency,
            "protects": self.protects,
            "mechanism": self.mechanism,
            "noise_multiplier": self.z,
            "target_epsilon": self.target_epsilon,
            "sampling": self._sampling,
            "releases": len(self._ledger.charges) if self._ledger is not None else 0,
        }

    @property
    def adjacency(self) -> str:
        """The neighbouring relation by its name in reports: `zero_out` where who takes part is the same in both."""
        return "zero_out" if self._claim.visibility < Visibility.EACH else self._relation

    def describe(self, size: int) -> str:
        """The plan in a line or two, for whoever starts the run.

        Args:
            size: parameters that travel.
        """
        account = self._fresh()
        if (first := self.next_release()) is not None:
            account.step(first)
        one = account.epsilon(self.resolved_delta)
        budget = (
            "no budget" if self.target_epsilon is None else f"budget ε = {self.target_epsilon:g}"
        )
        people = "" if self.population is None else f" (1/N = {1 / self.population:.2g})"
        nothing = "NOTHING IS PROMISED (reproducible_noise): " if self.reproducible_noise else ""
        return (
            f"{nothing}{self.mechanism}, z = {self.z:.4g}, {self._sampling}; {budget}, "
            f"δ = {self.resolved_delta:.2g}{people}, ε = {one:.3g} a round, "
            f"{self._planned_epsilon():.4g} after {self.rounds}; {self.signal(size)}"
        )

    @abstractmethod
    def drowning(self, size: int) -> float:
        """The noise's L2 norm over the most that what is released can have, for a model of so many parameters."""

    def signal(self, size: int) -> str:
        """How large the noise is beside what it hides."""
        return f"noise norm over signal norm at least {self.drowning(size):.3g}"

    def state_dict(self) -> State:
        """What has been spent; never the noise itself, so that a round that is run again draws afresh."""
        charges = [] if self._ledger is None else self._ledger.to_json()
        return {"header": self._header(), "charges": json.dumps(charges)}

    def load_state_dict(self, state: State) -> None:
        """Takes up what an earlier process spent; what the ledger has beyond it counts too.

        Raises:
            ValueError: the state is another mechanism's.
        """
        if state.get("header") != self._header():
            raise ValueError(
                f"the checkpoint's privacy account is of another mechanism: {state.get('header')}, not {self._header()}"
            )
        self._accounts()[1].take_up(plain_json.loads(str(state["charges"])))
        self._account = None  # made anew of all charges
        self._accounts()

    # ---- how ----

    def _accounts(self) -> tuple[Accountant, Ledger]:
        if self._ledger is None:
            if self.ledger is not None:
                self.ledger.parent.mkdir(parents=True, exist_ok=True)
            self._ledger = Ledger(self.ledger, self._header())
        if self._account is None:
            self._account = self._fresh()
            for release, _ in self._ledger.charges:
                self._account.step(release)
            if self._ledger.charges:
                self._epsilon = self._account.epsilon(self.resolved_delta)
        return self._account, self._ledger

    def _fresh(self) -> Accountant:
        return make_accountant(self.accountant, self._relation)

    def _header(self) -> str:
        return f"{self.mechanism}, unit {self.unit}, {self._relation}, {self.accountant}"

    def _multiplier(self, claim: Claim) -> float:
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None  # one of the two is set
        question = (self.accountant, self.target_epsilon, self.resolved_delta)
        key = (*question, *self.releases(claim, 1.0))
        try:
            if key not in _FOUND:
                _FOUND[key] = calibrate(*question, lambda z: self.releases(claim, z))
            return _FOUND[key]
        except ValueError as error:
            raise ContractError(
                name_of(self),
                name_of(self),
                str(error),
                "raise privacy.target_epsilon or privacy.delta, or plan fewer rounds",
            ) from error

    def _planned_epsilon(self) -> float:
        account = self._fresh()
        for release, count in self.releases(self._claim, self.z):
            account.step(release, count)
        return account.epsilon(self.resolved_delta)

    @property
    def _sampling(self) -> str:
        release = self.release(self._claim, self.z)
        if release.sampling == "none":
            return "no amplification by sampling"
        if release.sampling == "fixed" and self.accountant != "rdp":
            return f"cohorts of fixed size, of which {self.accountant} claims nothing (rdp claims some)"
        return f"{release.sampling} sampling, rate {release.rate:.4g}"


def gaussian_release(claim: Claim, z: float) -> GaussianRelease:
    """A round's release of Σ clipped + N(0, z²C²) by what the contract says of sampling.

    Poisson's coins: neighbours differ by one client, who moves the sum by C. A cohort of fixed size can only have
    another client in the place of one, who moves it by 2C. Elsewhere a client may be in every round.

    Where the server sees sums, a collector opens them only if enough clients took part, so that one client more or less
    may move the release by the sum of all. There neighbours differ in one client's update being there or zero, in a
    cohort that is known either way: C, and nothing can be claimed of sampling.
    """
    if claim.visibility < Visibility.EACH:
        return GaussianRelease(z)
    if claim.sampling == "poisson" and claim.rate is not None:
        return GaussianRelease(z, claim.rate, "poisson")
    if claim.sampling == "fixed" and claim.rate is not None:
        return GaussianRelease(z / 2, claim.rate, "fixed", "replace_one")
    return GaussianRelease(z)
