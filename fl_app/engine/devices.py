"""How long virtual devices take, and when they drop out.

The cost model is the usual one of systems-aware federated learning: a round trip is communication plus computation,
and computation is log-normal over devices (heavy-tailed, as measured on real fleets: Lai et al. 2022, *FedScale*,
section 3; Bonawitz et al. 2019, *Towards federated learning at scale*, section 9 for drop-outs of 6–10%).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, get_type_hints

from annotated_types import Ge, Gt, Le

from strategies.seeds import generator


class Occasion(NamedTuple):
    """What a device's luck depends on: nothing else, so that a run can be repeated and resumed.

    Attributes:
        seed: the run's.
        client: logical id.
        round: the round's number; 0 for messages outside any round.
        attempt: how often this round was begun before, so that a repeated round meets new luck.
    """

    seed: int
    client: int
    round: int
    attempt: int = 0


@lru_cache(maxsize=65_536)
def _speed_normal(seed: int, client: int) -> float:
    return float(generator(seed, "device speed", client).standard_normal())


@dataclass(frozen=True)
class DeviceModel:
    """Speed, network and drop-outs of a population of devices.

    Attributes:
        seconds_per_example: what the median device takes to train on one example once.
        speed_sigma: σ of ln of a device's own slowness, fixed for the run; 0: all alike. 1 is heavy-tailed: one
            device in six is more than e = 2.7 times slower than the median.
        jitter_sigma: σ of ln of a further factor, drawn for each client and round.
        latency: seconds that any message takes one way, beside its bytes.
        bandwidth_mbps: megabits a second (10⁶ bits), each way.
        dropout: probability, per client and round, to stop answering at some phase of the round.
        detection_seconds: from a message sent to a device that has dropped out until the server learns of it;
            Flower notices after two missed heartbeats.

    Raises:
        ValueError: a value is outside its range.
    """

    seconds_per_example: Annotated[float, Ge(0)] = 0.001
    speed_sigma: Annotated[float, Ge(0)] = 0.0
    jitter_sigma: Annotated[float, Ge(0)] = 0.0
    latency: Annotated[float, Ge(0)] = 0.05
    bandwidth_mbps: Annotated[float, Gt(0)] = 20.0
    dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    detection_seconds: Annotated[float, Ge(0)] = 50.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for bound in hints[field.name].__metadata__:
                if not _within(value, bound):
                    raise ValueError(
                        f"DeviceModel: {field.name}={value!r} is out of range, it needs {bound}"
                    )

    def slowness(self, seed: int, client: int) -> float:
        """The factor on a device's time of computation: exp(speed_sigma · N(0, 1)), fixed for a run, median 1."""
        return math.exp(self.speed_sigma * _speed_normal(seed, client)) if self.speed_sigma else 1.0

    def duration(
        self, occasion: Occasion, *, examples: float, down_bytes: int, up_bytes: int
    ) -> float:
        """Virtual seconds from sending a request until its reply is there.

            2 · latency + 8 · (down_bytes + up_bytes) / (10⁶ · bandwidth_mbps)
              + examples · seconds_per_example · slowness(client) · exp(jitter_sigma · N(0, 1))

        A device is taken to be idle when a request comes: what it was asked before does not delay it, so that the
        answer depends on the occasion alone.

        Args:
            occasion: whose request, in which round.
            examples: training examples to process, epochs counted; 0 for messages that train nothing.
            down_bytes: size of the request.
            up_bytes: size of the reply.
        """
        network = 2 * self.latency + 8e-6 * (down_bytes + up_bytes) / self.bandwidth_mbps
        if not examples:
            return network
        computing = (
            examples * self.seconds_per_example * self.slowness(occasion.seed, occasion.client)
        )
        if self.jitter_sigma:
            normal = generator(occasion.seed, "device jitter", *occasion[1:]).standard_normal()
            computing *= math.exp(self.jitter_sigma * float(normal))
        return network + computing

    def drops_at(self, occasion: Occasion, phases: int = 1) -> int | None:
        """The phase of the round, in 0 … phases − 1, from which on the client does not answer; None if it stays.

        With probability `dropout` the client drops, at a uniformly drawn phase. The draw is one for the whole
        round, so that all its messages agree.
        """
        if not self.dropout:
            return None
        chance, moment = generator(occasion.seed, "device dropout", *occasion[1:]).random(2)
        return int(moment * phases) if chance < self.dropout else None


def _within(value: Any, bound: object) -> bool:
    match bound:
        case Ge(ge=limit):
            return bool(value >= limit)
        case Gt(gt=limit):
            return bool(value > limit)
        case Le(le=limit):
            return bool(value <= limit)
    raise TypeError(f"no check is written for the bound {bound!r}")
