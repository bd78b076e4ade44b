"""Which ranks each client's adapters have, by its device's memory and by what its layers are worth.

In the first rounds all layers of a client have one rank, the largest that its budget holds. Meanwhile the importance of
layers is observed in what becomes of the model; after them each budget is given out once, and ranks stay (changing them
would end what clients keep from round to round). Each client's part of the model is the leading block of each layer's
factors (Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", HetLoRA, §3).
The aggregate says nothing that the model does not: so observing it costs no privacy, under masks and noise as well.

This file knows neither rounds' schedule nor messages. It is the same on a resumed run, from `state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from annotated_types import Ge, Gt, MinLen

from clients.lora.allocation import CHOICES, Memory, allocate, check_budget, uniform
from clients.lora.importance import FACTOR, Importance
from clients.lora.profile import Profile, memory_of
from strategies.contract import Claim, ContractError
from strategies.ranges import Ranged
from strategies.state import State, integer_in, mapping_in
from strategies.update import DELTA, Layout, Update, Vector

_MB = 1_000_000


@dataclass
class RankPlan(Ranged):
    """Ranks by client and layer.

    Attributes:
        budgets_mb: memory of a client's training process beyond its imports, in 10⁶ bytes: client c has the one at
            c modulo how many there are.
        choices: ranks that a layer may have, those up to the model's; 0 is always one.
        batch_size: examples a step that memory is measured for; the clients' own.
        warmup: rounds with one rank for all of a client's layers; with 0 nothing is observed, and it stays so.
        decay: of the running mean of importance.
    """

    budgets_mb: Annotated[Sequence[Annotated[float, Gt(0)]], MinLen(1)]
    choices: Annotated[Sequence[Annotated[int, Ge(0)]], MinLen(1)] = CHOICES
    batch_size: Annotated[int, Ge(1)] = 20
    warmup: Annotated[int, Ge(0)] = 1
    decay: float = 0.85
    _profile: Profile | None = field(default=None, init=False, repr=False)
    _rank: int = field(default=0, init=False, repr=False)
    _rounds: int = field(default=0, init=False, repr=False)
    _chosen: list[dict[str, int]] = field(default_factory=list, init=False, repr=False)

    label = "ranks"

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [budget for budget in self.budgets_mb if not budget > 0]
        if wrong or min(self.choices) < 0:
            raise ValueError(
                f"budgets must be greater than 0 and ranks at least 0, not {wrong or list(self.choices)}"
            )
        self._importance = Importance(self.decay)

    def check(self, claim: Claim) -> Claim:
        """Clients train different parts of a model that must have adapters."""
        if claim.factors is None:
            raise ContractError(
                claim.source("factors"),
                self.label,
                "the model has no low-rank adapters whose ranks could be planned",
                "use a model with adapters (model=lora), or ranks=none",
            )
        return claim.given(self, parts=True)

    def measured(self, profile: Profile, rank: int) -> None:
        """Takes what a client's step costs, before anything is asked of the plan.

        Args:
            profile: of what clients hold, on batches of `batch_size`.
            rank: the model's.

        Raises:
            BudgetError: a budget does not hold the model without adapters.
        """
        self._profile, self._rank = profile, rank
        for budget in self._budgets:
            check_budget(self._memory, profile.layers, budget)
        self._choose()

    @property
    def _known(self) -> Profile:
        if self._profile is None:
            raise RuntimeError("a plan of ranks needs `measured` first")
        return self._profile

    @property
    def _memory(self) -> Memory:
        return partial(memory_of, self._known)

    @property
    def _budgets(self) -> list[int]:
        return [int(budget * _MB) for budget in self.budgets_mb]

    @property
    def _choices(self) -> list[int]:
        return [rank for rank in self.choices if rank <= self._rank]

    def _choose(self) -> None:
        """Gives each budget out, from what is known of the layers now."""
        layers = self._known.layers
        means = self._importance.means
        if self._rounds < self.warmup or not means:
            self._chosen = [uniform(layers, self._memory, b, self._choices) for b in self._budgets]
        else:
            # A layer that nobody has trained yet is worth what the others are on average.
            average = sum(means.values()) / len(means)
            worth = {name: means.get(name, average) for name in layers}
            self._chosen = [allocate(worth, self._memory, b, self._choices) for b in self._budgets]

    def observe(self, change: Update, sent: Vector) -> None:
        """Sees what became of a round: its aggregate, and the parameters as they were sent, (d,) float32."""
        if self._rounds >= self.warmup:
            return
        self._importance.observe_change(change.sections[DELTA], sent)
        self._rounds += 1
        if self._rounds == self.warmup:
            self._choose()

    def ranks(self, client: int) -> Mapping[str, int]:
        """The client's rank of each layer in the round that comes."""
        self._known  # noqa: B018 - nothing is chosen before it is there
        return self._chosen[client % len(self._chosen)]

    def part(self, client: int, whole: Layout) -> Layout:
        """The client's part of the model: leading blocks of its adapters, and all else whole.

        Layers that were not measured are not the clients' (the upper half of a model that is cut), and stay whole.
        """
        ranks = self.ranks(client)
        kept: dict[str, tuple[int, ...]] = {}
        for name, shape in zip(whole.names, whole.shapes, strict=True):
            match = FACTOR.fullmatch(name)
            rank = ranks.get(match["layer"]) if match else None
            if match is None or rank is None:
                kept[name] = shape
            elif rank:
                kept[name] = (rank, shape[1]) if match["kind"] == "A" else (shape[0], rank)
        return Layout(tuple(kept), tuple(kept.values()))

    def table(self) -> str:
        """Which budget gives which ranks, a line a budget, for a log."""
        profile = self._known
        means = self._importance.means
        when = f"rounds 1 to {self.warmup}" if self._rounds < self.warmup else "by importance"
        lines = [
            f"ranks ({when}; batches of {profile.batch} x {profile.length}): bytes with them, of the budget"
        ]
        for budget, ranks in zip(self.budgets_mb, self._chosen, strict=True):
            total = self._memory(ranks) / _MB
            listed = " ".join(map(str, ranks.values()))
            lines.append(f"  {total:8.1f} of {budget:8.1f} MB: {listed}")
        worth = " ".join(f"{means.get(name, 1.0):.2f}" for name in profile.layers)
        return "\n".join(
            [*lines, f"  layers' importance: {worth}", f"  {' '.join(profile.layers)}"]
        )

    def state_dict(self) -> State:
        """What has been observed, and the ranks that came of it."""
        return {
            "rounds": self._rounds,
            "importance": self._importance.state_dict(),
            "chosen": {str(place): dict(ranks) for place, ranks in enumerate(self._chosen)},
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up that state, after `measured`; raises `ValueError` for another plan's."""
        chosen = mapping_in(state, "chosen")
        found = [mapping_in(chosen, str(place)) for place in range(len(chosen))]
        layers = set(self._known.layers)
        if len(found) != len(self.budgets_mb) or any(set(ranks) != layers for ranks in found):
            raise ValueError("the state's ranks are of another model, or of other budgets")
        self._importance.load_state_dict(mapping_in(state, "importance"))
        self._rounds = integer_in(state, "rounds")
        self._chosen = [{n: integer_in(ranks, n) for n in self._known.layers} for ranks in found]
