"""Our accountants behind Flower's `flwr.serverapp.PrivacyAccountant`, for strategies of Flower's own.

    config = PrivacyConfig(1e-5, 1000, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
    DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, 0.5, 50, accountant=FlowerAccountant(config, "pld"))

Flower 1.41 has one accountant, by Rényi divergences, which replays all events whenever it is asked whether one more
would be too many. A `FlowerAccountant` answers by any accountant of ours, at a cost that does not grow with the rounds.
What an event means is Flower's: how it samples is the configuration's word, and a noise multiplier is noise over the
sensitivity under the configuration's relation.
"""

from __future__ import annotations

import math
from typing import Any

from flwr.serverapp import GaussianPrivacyEvent, PrivacyConfig, PrivacySpent
from flwr.supercore.privacy_accounting import SamplingMethod

from strategies.privacy.accountants import AccountantName, make_accountant
from strategies.privacy.composition import require_delta
from strategies.privacy.events import GaussianRelease, Relation, Sampling

_RELATIONS: dict[str, Relation] = {
    "add-or-remove-one": "add_or_remove_one",
    "replace-one": "replace_one",
}
_SAMPLINGS: dict[SamplingMethod, Sampling] = {
    SamplingMethod.POISSON: "poisson",
    SamplingMethod.WITHOUT_REPLACEMENT: "fixed",
    SamplingMethod.NO_AMPLIFICATION: "none",
}


class FlowerAccountant:
    """Serves Flower's protocol `PrivacyAccountant`.

    Args:
        config: δ, the population, the relation, how is sampled, and perhaps a budget.
        accountant: by which accountant of ours.
    """

    def __init__(self, config: PrivacyConfig, accountant: AccountantName = "pld") -> None:
        self._config = config
        self._accountant = make_accountant(
            accountant, _RELATIONS[config.neighboring_relation.value]
        )

    @property
    def config(self) -> PrivacyConfig:
        """The configuration."""
        return self._config

    @property
    def num_releases(self) -> int:
        """How many releases were composed."""
        return sum(count for _, count in self._accountant.releases)

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Composes `count` equal events.

        Raises:
            ValueError: the event is of another population, or `count` is below 1.
        """
        self._accountant.step(self._release(event), count)

    def get_epsilon(self, delta: float) -> float:
        """Cumulative ε at δ in (0, 1)."""
        return self._accountant.epsilon(delta)

    def get_delta(self, epsilon: float) -> float:
        """Cumulative δ at ε ≥ 0."""
        return self._accountant.delta(epsilon)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Cumulative ε at δ, which is the configuration's where none is given."""
        delta = self._config.target_delta if delta is None else delta
        require_delta(delta)
        return PrivacySpent(
            epsilon=self.get_epsilon(delta),
            delta=delta,
            num_releases=self.num_releases,
            accounting_method=self._accountant.name,
        )

    def would_exceed(
        self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1
    ) -> bool:
        """Whether so many more events would pass the budget; composes nothing.

        Raises:
            ValueError: neither the call nor the configuration has a budget.
        """
        limit = self._config.max_epsilon if max_epsilon is None else max_epsilon
        if limit is None or not 0 < limit < math.inf:
            raise ValueError(
                f"max_epsilon = {limit!r}: set it in PrivacyConfig or in would_exceed, above 0"
            )
        further = self._accountant.fork()
        further.step(self._release(event), count)
        return further.epsilon(self._config.target_delta) > limit

    def state_dict(self) -> dict[str, object]:
        """The configuration and the releases, as plain data."""
        return {"config": self._described(), **self._accountant.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Takes up a state in place of its own.

        Raises:
            ValueError: it is of another configuration, accountant or relation, or holds a release of an unknown kind.
        """
        if state.get("config") != self._described():
            raise ValueError(
                f"a state of the configuration {state.get('config')!r} can't be taken up by {self._described()!r}"
            )
        releases: Any = {key: value for key, value in state.items() if key != "config"}
        self._accountant.load_state_dict(releases)

    def _described(self) -> dict[str, object]:
        return {
            "target_delta": self._config.target_delta,
            "population_size": self._config.population_size,
            "neighboring_relation": self._config.neighboring_relation.value,
            "sampling_method": self._config.sampling_method.value,
            "max_epsilon": self._config.max_epsilon,
        }

    def _release(self, event: GaussianPrivacyEvent) -> GaussianRelease:
        if event.population_size != self._config.population_size:
            raise ValueError(
                f"an event of {event.population_size} clients can't be accounted for among"
                f" {self._config.population_size}"
            )
        sampling = _SAMPLINGS[self._config.sampling_method]
        rate = 1.0 if sampling == "none" else event.sample_size / event.population_size
        return GaussianRelease(event.noise_multiplier, rate, sampling, self._accountant.relation)
