"""A pipeline: the parts of a run, the contract that they must satisfy, and what of them must last.

What they do in a round is `strategies.rounds`'s; the scheduler decides when.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from strategies.contract import Checked, Claim, ContractError, check, name_of
from strategies.parting import check_parts
from strategies.privacy import Distributed
from strategies.protocols import (
    Informed,
    Learner,
    Maker,
    Packing,
    Persistent,
    Picker,
)
from strategies.rounds import Rounds
from strategies.schedulers import Scheduler, Synchronous
from strategies.state import State, Value, mapping_in
from strategies.update import MODEL_SECTIONS


@dataclass
class Pipeline(Rounds):
    """All parts by their place; the defaults are FedAvg's.

    Attributes:
        scheduler: when who is asked, and when what came becomes a step; the other parts are those of `Rounds`.
    """

    scheduler: Scheduler = field(default_factory=Synchronous)

    def check(self, model_sections: frozenset[str] = frozenset()) -> Claim:
        """Folds the contract through all parts.

        Args:
            model_sections: those of the model's own kinds, once the model is there: buffers travel too.

        Returns:
            What holds of the aggregate.

        Raises:
            ContractError: two parts may not be composed.
        """
        if isinstance(self.sampler, Informed):
            self.sampler.informed(self.timings)
        self._check_stages()
        claim = check(
            self._order(),
            Claim(
                sections=self.client_sections | model_sections,
                root=self.root is not None,
                factors=self.factors,
                set_by={"sections": "the clients' trainer", "factors": "the model's adapters"},
            ),
        )
        self._check_sections(claim)
        check_parts(self, self.scheduler, claim)
        self._check_scheduler(claim)
        self.claim = claim
        return claim

    def _check_stages(self) -> None:
        """Refuses what no order of stages makes sense of."""
        names = [stage.name for stage in self.stages]
        for twice in {name for name in names if names.count(name) > 1}:
            raise ContractError(
                twice, twice, "a stage stands twice in one pipeline", "leave one of them out"
            )
        for stage in self.stages[:-1]:
            if isinstance(stage, Packing):
                raise ContractError(
                    name_of(stage),
                    name_of(self.stages[-1]),
                    "what is packed is bytes, which no stage behind it can change",
                    "put the stage that packs last",
                )

    def _check_sections(self, claim: Claim) -> None:
        """Refuses sections that nobody reads, and such as are rounded for no noise."""
        # The wire refuses a section that was not asked for: without this every reply of the run would be refused.
        made = {name for stage in self.stages if isinstance(stage, Maker) for name in stage.layouts}
        unread = sorted(claim.sections - MODEL_SECTIONS - made - set(self.optimizer.sections))
        if unread:
            raise ContractError(
                claim.source("sections"),
                name_of(self.optimizer),
                f"clients send a section {', '.join(unread)} that no part of the server reads",
                "use the server optimiser that reads it (server=scaffold for control), or another client",
            )
        if claim.whole and claim.private != Distributed.mechanism:
            raise ContractError(
                claim.source("whole"),
                "a pipeline without privacy=distributed",
                "its updates are no whole numbers, and would be rounded to such",
                "use collector=masked, or privacy=distributed",
            )

    def _check_scheduler(self, claim: Claim) -> None:
        """Refuses what the scheduler can't call, and what it must not look at under a promise."""
        if claim.staleness is not None and not isinstance(self.sampler, Picker):
            raise ContractError(
                name_of(self.sampler),
                claim.source("staleness"),
                "it draws whole cohorts, and clients are asked one after the other",
                "use sampler=uniform, or give the sampler methods pick and took",
            )
        if self.privacy is not None and getattr(self.scheduler, "pace", None) is not None:
            raise ContractError(
                name_of(self.scheduler),
                name_of(self.privacy),
                "local steps by measured speed make what one client sends depend on the time that others took",
                "leave scheduler.pace out",
            )

    def _order(self) -> Iterable[Checked]:
        # The collector decides whether clients run their halves at all, so it speaks before the stages do; the
        # scheduler, of how many clients a session is.
        return (
            self.sampler,
            self.scheduler,
            *(() if self.parts is None else (self.parts,)),
            self.collector,
            *self.stages,
            *(() if self.downlink is None else (self.downlink,)),
            self.admission,
            *(() if self.quarantine is None else (self.quarantine,)),
            *(() if self.breaker is None else (self.breaker,)),
            *(() if self.clusters is None else (self.clusters,)),
            self.combiner,
            *(() if self.privacy is None else (self.privacy,)),
            self.optimizer,
        )

    def state_dict(self) -> State:
        """What of the parts must last: counts, suspicions, whose updates are in the model, the combiner's memory."""
        state: dict[str, Value] = {
            "admission": self.admission.state_dict(),
            "included": {str(client): number for client, number in self.included.items()},
            "timings": self.timings.state_dict(),
        }
        if isinstance(self.combiner, Learner):
            state["combiner"] = self.combiner.state_dict()
        if self.quarantine is not None:
            state["quarantine"] = self.quarantine.state_dict()
        state |= {name: part.state_dict() for name, part in self._persistent()}
        return state

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's state."""
        self.admission.load_state_dict(mapping_in(state, "admission"))
        included = mapping_in(state, "included")
        self.included = {
            int(client): number for client, number in included.items() if isinstance(number, int)
        }
        if "timings" in state:  # a checkpoint may be older than they are
            self.timings.load_state_dict(mapping_in(state, "timings"))
        if isinstance(self.combiner, Learner):
            self.combiner.load_state_dict(mapping_in(state, "combiner"))
        if self.quarantine is not None:
            self.quarantine.load_state_dict(mapping_in(state, "quarantine"))
        for name, part in self._persistent():
            part.load_state_dict(mapping_in(state, name))

    def _persistent(self) -> Iterable[tuple[str, Persistent]]:
        parts: dict[str, object] = {
            "collector": self.collector,
            "sampler": self.sampler,
            "downlink": self.downlink,
            "scheduler": self.scheduler,
            "privacy": self.privacy,
            "breaker": self.breaker,
            "clusters": self.clusters,
            "parts": self.parts,
            **{f"stage {stage.name}": stage for stage in self.stages},
        }
        return [(name, part) for name, part in parts.items() if isinstance(part, Persistent)]
