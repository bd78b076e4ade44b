"""Where to cut a model: the fastest of the cuts that fit, by what each costs in memory, time and bytes.

A step of split learning is a relay: the client's half forward, activations up, the server's half both ways, gradients
down, the client's half backward (Vepakomma et al. 2018, "Split learning for health"; Thapa et al. 2022, "SplitFed",
Algorithm 2). So its time is a sum:

    step(k) = client(k) / client_speed + cohort · server(k) + bytes(k) / bandwidth,

since the clients of a cohort compute at the same time, and one server serves them all. Where time is all the same, the
deepest cut is taken, whose activations are the furthest from the text. Here is only a choice among numbers;
`clients.split.profile` finds them on a real model. Nothing is known of a second cut above the first, nor of messages
or configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from annotated_types import Ge, Gt

from strategies.ranges import Ranged

_MB: Final = 10**6


class NoCutFitsError(ValueError):
    """No cut is within the limits; the message names the least that is needed."""


@dataclass(frozen=True)
class Limits(Ranged):
    """What clients and the server have.

    Attributes:
        client_memory_mb: for one client's half of the model and its training, in 10⁶ bytes, beside what a process holds
            that has loaded the libraries and the data; None for no limit.
        server_memory_mb: the server's, likewise.
        bandwidth_mbit: of a client's line, each way, in 10⁶ bits a second; None for one that costs no time.
        client_speed: of a client's machine, in units of the machine on which was measured: 0.1 takes ten times as long.
        cohort: clients that the server serves in turn.
        tolerance: a step that takes no longer than this share beyond the fastest counts as fast.
    """

    client_memory_mb: Annotated[float, Gt(0)] | None = None
    server_memory_mb: Annotated[float, Gt(0)] | None = None
    bandwidth_mbit: Annotated[float, Gt(0)] | None = None
    client_speed: Annotated[float, Gt(0)] = 1.0
    cohort: Annotated[int, Ge(1)] = 1
    tolerance: Annotated[float, Ge(0)] = 0.02


@dataclass(frozen=True)
class CutCost:
    """What a cut costs, of one batch.

    Attributes:
        at: blocks below the cut.
        client_bytes: that the client's half holds at most.
        server_bytes: likewise.
        client_seconds: of its computation, at speed 1.
        server_seconds: likewise.
        wire_bytes: up and down.
    """

    at: int
    client_bytes: int
    server_bytes: int
    client_seconds: float
    server_seconds: float
    wire_bytes: int


@dataclass(frozen=True)
class Plan:
    """The cut that was chosen.

    Attributes:
        at: blocks below it.
        seconds: of a step.
        bound_by: names of the limits that forbid the cut which would be taken without any; empty where time alone
            decided.
        table: a line for each cut, for the log.
    """

    at: int
    seconds: float
    bound_by: tuple[str, ...]
    table: str


def plan(costs: Sequence[CutCost], limits: Limits) -> Plan:
    """The cut with the fastest step within the limits; of those as fast, the deepest.

    Less memory for the client never moves the cut up, as long as a deeper cut costs it no less.

    Raises:
        NoCutFitsError: there is none within the limits, or none at all.
    """
    if not costs:
        raise NoCutFitsError("a model of one block can't be cut")
    fitting = [cost for cost in costs if not _broken(cost, limits)]
    if not fitting:
        raise NoCutFitsError(_least_need(costs, limits))
    chosen, free = _fastest(fitting, limits), _fastest(costs, limits)
    return Plan(
        at=chosen.at,
        seconds=_seconds(chosen, limits),
        bound_by=_broken(free, limits),
        table=_table(costs, chosen, limits),
    )


def _fastest(costs: Sequence[CutCost], limits: Limits) -> CutCost:
    most = min(_seconds(cost, limits) for cost in costs) * (1 + limits.tolerance)
    return max((cost for cost in costs if _seconds(cost, limits) <= most), key=lambda cost: cost.at)


def _seconds(cost: CutCost, limits: Limits) -> float:
    """Of a step."""
    return (
        cost.client_seconds / limits.client_speed
        + limits.cohort * cost.server_seconds
        + _on_the_wire(cost, limits)
    )


def _on_the_wire(cost: CutCost, limits: Limits) -> float:
    return 8e-6 * cost.wire_bytes / limits.bandwidth_mbit if limits.bandwidth_mbit else 0.0


def _broken(cost: CutCost, limits: Limits) -> tuple[str, ...]:
    """Names of the limits that a cut does not keep."""
    held = (
        ("client_memory_mb", limits.client_memory_mb, cost.client_bytes),
        ("server_memory_mb", limits.server_memory_mb, cost.server_bytes),
    )
    return tuple(name for name, most, needed in held if most is not None and needed > most * _MB)


def _least_need(costs: Sequence[CutCost], limits: Limits) -> str:
    """Why no cut fits."""
    client = min(costs, key=lambda cost: cost.client_bytes)
    server = min(costs, key=lambda cost: cost.server_bytes)
    if "client_memory_mb" in _broken(client, limits):
        return (
            f"no cut fits the client: the smallest half, of the cut at {client.at}, needs "
            f"{client.client_bytes / _MB:.1f} MB, and client_memory_mb={limits.client_memory_mb:g}"
        )
    if "server_memory_mb" in _broken(server, limits):
        return (
            f"no cut fits the server: the smallest half, of the cut at {server.at}, needs "
            f"{server.server_bytes / _MB:.1f} MB, and server_memory_mb={limits.server_memory_mb:g}"
        )
    deepest = max(
        (cost for cost in costs if "client_memory_mb" not in _broken(cost, limits)),
        key=lambda cost: cost.at,
    )
    return (
        f"no cut fits both: the deepest that client_memory_mb={limits.client_memory_mb:g} allows, at {deepest.at}, "
        f"leaves {deepest.server_bytes / _MB:.1f} MB to the server, and server_memory_mb={limits.server_memory_mb:g}"
    )


def _table(costs: Sequence[CutCost], chosen: CutCost, limits: Limits) -> str:
    lines = ["cut  client MB  server MB  client s  server s   wire MB    wire s    step s"]
    for cost in costs:
        broken = _broken(cost, limits)
        remark = "  taken" if cost is chosen else f"  over {' and '.join(broken)}" if broken else ""
        lines.append(
            f"{cost.at:>3}  {cost.client_bytes / _MB:>9.1f}  {cost.server_bytes / _MB:>9.1f}"
            f"  {cost.client_seconds / limits.client_speed:>8.4f}  {limits.cohort * cost.server_seconds:>8.4f}"
            f"  {cost.wire_bytes / _MB:>8.3f}  {_on_the_wire(cost, limits):>8.4f}"
            f"  {_seconds(cost, limits):>8.4f}{remark}"
        )
    return "\n".join(lines)
