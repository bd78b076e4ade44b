"""Split learning: clients train the lower part of a model, the server the upper; activations and gradients pass.

P. Vepakomma et al. 2018, "Split learning for health", arXiv:1812.00564; C. Thapa et al. 2022, "SplitFed: When Federated
Learning Meets Split Learning", arXiv:2004.12088, Algorithms 1 and 2: v1 trains a copy of the upper part for each client
and averages them as it does the lower parts; v2 trains one upper part on what all clients send, one after the other.

This file holds the settings and what they mean for the contract; `split_session` is the exchange. What a batch's
activations are, and what is trained with them, is no affair of either: the server's half of the model is handed in.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Literal, get_args

from annotated_types import Ge, Gt

from strategies.collectors.plain import PlainClient
from strategies.collectors.split_session import Served, SplitSession
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import ClientOwn, Job
from strategies.ranges import Ranged
from strategies.wire import ARRAYS, METRICS, NUM_EXAMPLES, unpack_model

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


@dataclass(frozen=True)
class Split(Ranged):
    """Turns of activations and gradients with each client of the cohort.

    Attributes:
        variant: `v1`: a copy of the upper part for each client, averaged as the lower parts are. `v2`: one upper part,
            trained on what clients send as it comes.
        batches_per_exchange: m, mini-batches in one turn. 1 trains exactly as the whole model would; of m batches in a
            turn, all activations are of the adapters before the turn, so that the gradient of the j-th is j − 1 steps
            old when it is applied. There are m times fewer trips.
        precision: of activations and of their gradients on the wire: `int8` has a scale for each token.
        metrics: clients say how many examples they have, and rounds what training came to; without, as a promise needs,
            vectors and activations are all that travels.
        lr: the server's learning rate for its part; None for the clients'.
        most_turns: after which a client is out.
        served: the server's half of the model; None on clients.
    """

    variant: Literal["v1", "v2"] = "v1"
    batches_per_exchange: Annotated[int, Ge(1)] = 1
    precision: Precision = "fp32"
    metrics: bool = True
    lr: Annotated[float, Gt(0)] | None = None
    most_turns: Annotated[int, Ge(1)] = 100_000
    served: Served | None = field(default=None, repr=False, compare=False)

    label: ClassVar[str] = "collector=split"
    phases: ClassVar[int] = 2

    def check(self, claim: Claim) -> Claim:
        """The server sees each client's update, and its activations besides; it trains a part of each itself.

        Raises:
            ContractError: clients are asked one by one, without rounds.
        """
        if claim.staleness is not None:
            raise ContractError(
                claim.source("staleness"),
                name_of(self),
                "a client's turns are on one version of the server's part, which a buffer would have left behind",
                "use scheduler=synchronous; scheduler.deadline ends the turns of all that are not through by then",
            )
        return claim.given(
            self,
            visibility=Visibility.EACH,
            clear=claim.clear
            | (frozenset({NUM_EXAMPLES, METRICS}) if self.metrics else frozenset()),
            summed=None if self.metrics else "uniform",
            served="each" if self.variant == "v1" else "shared",
            parts=claim.parts or (self.served is not None and self.served.partial),
        )

    def open(self, job: Job, cohort: Sequence[int]) -> SplitSession:
        """A session over the clients with these logical ids.

        Raises:
            ValueError: there is no server's half.
        """
        if self.served is None:
            raise ValueError("collector=split needs the server's half of a split model")
        return SplitSession(
            job=job,
            cohort=cohort,
            served=self.served,
            sent=unpack_model(job.records[ARRAYS]),
            shared=self.variant == "v2",
            settings={
                **self.served.settings(),
                "split.batches": self.batches_per_exchange,
                "split.precision": self.precision,
            },
            most_turns=self.most_turns,
            metrics=self.metrics,
            token=secrets.token_hex(8),
        )

    @property
    def most_arrays(self) -> int:
        """Of one turn: of each mini-batch an activation with what coded it, lengths and targets."""
        return 16 + 4 * self.batches_per_exchange

    def describe(self, clients: int) -> str:
        """Who holds what, and how they speak."""
        upper = (
            "a copy of the upper part each" if self.variant == "v1" else "one upper part for all"
        )
        told = "" if self.served is None else f"{self.served.describe()}; "
        return f"{told}{upper}, {self.batches_per_exchange} batches a turn, {self.precision}"

    def client_half(self, own: ClientOwn) -> PlainClient:
        """What a client's last turn comes to goes in clear; the turns before are its trainer's."""
        return PlainClient(metrics=self.metrics)
