"""Privacy of single examples, which each client sees to by itself: DP-SGD in its own training.

The server adds no noise and keeps no account: clients do (`clients.trainers.DpSgd`), each with its own, and tell what
they have spent, which depends on how many examples they have and on no example. The run's ε is the largest of them: a
person with examples at one client has at most that. The server need not be trusted. Here the contract is held: nothing
travels beside what was trained under noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, ClassVar

from annotated_types import Gt, Lt

from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import Stage
from strategies.state import State, mapping_in
from strategies.update import EPSILON, Update

log = logging.getLogger(__name__)


@dataclass
class OwnAccounts:
    """What clients say that they have spent.

    Attributes:
        delta: of each client's account.
        accountant: likewise, by name.
        budget: ε that no client passes; None where clients have no such bound.
        promised: whether noise is what it should be; without, nothing is reported.
        spent: ε by client, as last told.
    """

    delta: Annotated[float, Gt(0), Lt(1)]
    accountant: str
    budget: float | None = None
    promised: bool = True
    spent: dict[int, float] = field(default_factory=dict, init=False)
    _hidden: bool = field(default=False, init=False)

    label: ClassVar[str] = "client=dp_sgd"
    repeats: ClassVar[bool] = True
    unconditional: ClassVar[bool] = False

    def check(self, claim: Claim) -> Claim:
        """Refuses what would tell of examples beside what was trained under noise.

        Raises:
            ContractError: as said; or no client sees a single example's gradient; or sums hide what clients have spent,
                and nothing bounds it.
        """
        claim.need_model_sent(
            self,
            why="each example's gradient must be clipped by its own length, and on ciphertexts only the mean of a"
            " mini-batch's gradients is computed",
            instead="use privacy=local or privacy=central, which protect all that a client sends, or collector=bare",
        )
        claim.need_nothing_in_clear(self)
        claim.need_nothing_summed(self)
        claim.need_no_statistics(self)
        self._hidden = claim.visibility < Visibility.EACH
        if self._hidden and self.budget is None:
            raise ContractError(
                claim.source("visibility"),
                name_of(self),
                "what a client has spent can't be told beside a sum",
                "set client.target_epsilon, which no client passes",
            )
        return claim.given(self, private="dp-sgd")

    @property
    def epsilon(self) -> float | None:
        """The largest that was told, or the budget where sums hide it; None where nothing is promised."""
        if not self.promised:
            return None
        return self.budget if self._hidden else max(self.spent.values(), default=0.0)

    def stages(self, bounds: Callable[[], Mapping[str, float]]) -> Sequence[Stage]:
        """None: the noise is in the training."""
        return ()

    def charge(self, round_number: int) -> None:
        """Clients charge themselves."""

    def told(self, update: Update) -> None:
        """Takes note of what one client has spent."""
        spent = update.metrics.get(EPSILON)
        if len(update.members) == 1 and spent is not None and isfinite(spent) and spent >= 0:
            (client,) = update.members
            if self.budget is not None and spent > self.budget:
                log.warning(
                    "client %d says that it spent ε = %g, past its budget: that is not counted",
                    client,
                    spent,
                )
                return
            self.spent[client] = max(self.spent.get(client, 0.0), spent)

    def privatise(self, aggregate: Update, bounds: Mapping[str, float]) -> Update:
        """It is private already."""
        return aggregate

    def report(self) -> Mapping[str, object] | None:
        """The largest ε, and of how many clients."""
        if not self.promised:
            return None
        return {
            "unit": "example",
            "epsilon": self.epsilon,
            "delta": self.delta,
            "accountant": self.accountant,
            "adjacency": "add_or_remove_one",
            "protects": "each example, from everybody but the client that has it",
            "mechanism": "dp-sgd",
            "target_epsilon": self.budget,
            "clients": len(self.spent),
        }

    def describe(self, size: int) -> str:
        """Who promises what."""
        budget = (
            "no budget" if self.budget is None else f"budget of each client ε = {self.budget:g}"
        )
        nothing = "" if self.promised else "NOTHING IS PROMISED (reproducible_noise): "
        return (
            f"{nothing}each client's examples, by DP-SGD at the client; {budget}, δ = {self.delta:.2g}, ε by"
            f" {self.accountant}, each client's noise by its number of examples"
        )

    def state_dict(self) -> State:
        """What was told."""
        return {"spent": {str(client): spent for client, spent in self.spent.items()}}

    def load_state_dict(self, state: State) -> None:
        """Takes up what was told to an earlier process."""
        spent = mapping_in(state, "spent")
        self.spent = {int(client): float(str(value)) for client, value in spent.items()}
