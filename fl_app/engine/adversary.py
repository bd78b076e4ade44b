"""Omniscient attackers on the engine: the honest answer first, then an adversary tells the attackers what to send.

The attackers' own client code puts the lie in place of its update before it encodes, so that a clip or any other stage
acts on it as on anyone's, and weight, metrics and state are those of a client that trained. The adversary sees neither
more nor less than the server will: what the honest send, decoded by the pipeline's stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType

from fl_app.engine.flwr_internals import copied, whole_message
from fl_app.engine.pool import ClientPool
from strategies.attacks import LIE, Memory, Omniscient, Sight
from strategies.encoding import packing_of, reshaped
from strategies.protocols import Stage
from strategies.records import bundle, record_in
from strategies.replies import Expected, read_update
from strategies.server_models.model import sections_of
from strategies.state import State
from strategies.update import DELTA, Layout, Update
from strategies.wire import ARRAYS, CONFIG, Refused, pack, unpack_model

_REMEMBERED = 32
"""Honest updates that attackers know, where they come one after the other."""

Exchanged = tuple[Message, Message]
"""A request and its reply."""


class Adversary:
    """One mind behind all attackers of a run.

    Args:
        attack: what it does.
        stages: the pipeline's; only their server halves are used.
        seed: the run's.
        layouts: the model's own sections, where requests may come without a model; read out of each where None.
    """

    def __init__(
        self,
        attack: Omniscient,
        stages: Sequence[Stage],
        seed: int,
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        self.attack, self._layouts = attack, layouts
        self._stages, self._seed = tuple(stages), seed
        self._memory: Memory = {}
        self._seen: dict[int, Update] = {}

    def state_dict(self) -> State:
        """What it remembers from round to round."""
        return dict(self._memory)

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's memory."""
        self._memory = dict(state)

    def lie(
        self, number: int, seen: Sequence[Exchanged], attackers: Sequence[int]
    ) -> ArrayRecord | None:
        """What the attackers of a round are to send; None where no honest update is to be seen.

        Args:
            number: the round's.
            seen: requests to honest clients of one round, and their replies.
            attackers: logical ids of those who were asked in it.
        """
        layouts: dict[int, Mapping[str, Layout]] = {}
        found = [self._read(request, reply, layouts) for request, reply in seen]
        honest = sorted((one for one in found if one is not None), key=lambda one: one.members)
        # Where nobody waits for a round to be whole, the attackers know what the honest sent last.
        for one in honest:
            self._seen.pop(one.members[0], None)
            self._seen[one.members[0]] = one
        self._seen = dict(list(self._seen.items())[-_REMEMBERED:])
        honest = honest or [self._seen[client] for client in sorted(self._seen)]
        if not honest:
            return None
        sight = Sight(honest, tuple(sorted(attackers)), number, self._seed)
        with np.errstate(
            over="ignore"
        ):  # a lie past float32's range is an infinity, and admission's to refuse
            lies = self.attack.plot(sight, self._memory)
        record = ArrayRecord()
        for name, vector in lies.items():
            record[name] = pack(vector.astype(np.float32, copy=False))
        return record

    def _read(
        self, request: Message, reply: Message, layouts: dict[int, Mapping[str, Layout]]
    ) -> Update | None:
        """The update as the server will have it; None of one that failed, is malformed or not finite."""
        if reply.has_error():
            return None
        model = record_in(request.content, ARRAYS, ArrayRecord)
        if id(model) not in layouts:  # a cohort shares the model's record
            config = _config(request)
            asked = _layouts(self._layouts or _parts(model, config), config)
            layouts[id(model)] = reshaped(asked, self._stages)
        client, round_number, version = (
            _integer(request, key) for key in ("client", "server-round", "version")
        )
        try:
            expected = Expected(
                layouts[id(model)], client, round_number, version, packing_of(self._stages)
            )
            update = read_update(reply.content, expected)
            for stage in reversed(self._stages):
                update = stage.decode(update)
        except Refused:
            return None
        finite = all(np.isfinite(one.vector).all() for one in update.sections.values())
        return update if finite else None


class AdversaryPool:
    """A pool whose attackers answer last, and know what the others have answered.

    A stream's chunks must hold whole rounds (`EngineGrid(whole_rounds=True)`). All honest replies of a stream are held
    in memory until the lies are made; then replies come as from any pool. Requests that train nothing pass through.

    Args:
        pool: runs client code; closed with this one.
        adversary: makes the lies.
        attackers: logical ids of the run's attackers.
    """

    def __init__(self, pool: ClientPool, adversary: Adversary, attackers: frozenset[int]) -> None:
        self._pool, self._adversary, self._attackers = pool, adversary, attackers

    def start(self) -> None:
        """See `ClientPool.start`."""
        self._pool.start()

    def close(self) -> None:
        """See `ClientPool.close`."""
        self._pool.close()

    def stream(self, chunks: Sequence[Sequence[Message]]) -> Iterator[list[Message]]:
        """See `ClientPool.stream`."""
        lying = [[self._lies(request) for request in chunk] for chunk in chunks]
        if not any(map(any, lying)):
            yield from self._pool.stream(chunks)
            return
        honest = _where(chunks, lying, wanted=False)
        replies = list(self._pool.stream(honest))
        seen = [
            pair
            for asked, said in zip(honest, replies, strict=True)
            for pair in zip(asked, said, strict=True)
        ]
        told = self._instructed(_where(chunks, lying, wanted=True), seen)
        for flags, truths, lies in zip(lying, replies, self._pool.stream(told), strict=True):
            said = {False: iter(truths), True: iter(lies)}
            yield [next(said[flag]) for flag in flags]

    def _lies(self, request: Message) -> bool:
        return _trains(request) and _integer(request, "client") in self._attackers

    def _instructed(
        self, chunks: Sequence[Sequence[Message]], seen: Sequence[Exchanged]
    ) -> list[list[Message]]:
        """The attackers' requests, each with the lie of its round."""
        asked = [
            (_integer(request, "server-round"), request) for chunk in chunks for request in chunk
        ]
        lies: dict[int, ArrayRecord | None] = {}
        for number in sorted({number for number, _ in asked}):
            lies[number] = self._adversary.lie(
                number,
                [
                    pair
                    for pair in seen
                    if _trains(pair[0]) and _integer(pair[0], "server-round") == number
                ],
                [_integer(request, "client") for its, request in asked if its == number],
            )
        return [
            [_with_lie(request, lies[_integer(request, "server-round")]) for request in chunk]
            for chunk in chunks
        ]


def _where(
    chunks: Sequence[Sequence[Message]], flags: Sequence[Sequence[bool]], *, wanted: bool
) -> list[list[Message]]:
    return [
        [request for request, flag in zip(chunk, marks, strict=True) if flag is wanted]
        for chunk, marks in zip(chunks, flags, strict=True)
    ]


def _with_lie(request: Message, lie: ArrayRecord | None) -> Message:
    """The request with a further record; the one that was pushed stays as it is."""
    if lie is None:
        return request
    return whole_message(copied(request.metadata), bundle({**request.content, LIE: lie}))


def _trains(request: Message) -> bool:
    return request.metadata.message_type == MessageType.TRAIN


def _config(request: Message) -> ConfigRecord:
    record = record_in(request.content, CONFIG, ConfigRecord)
    assert record is not None
    return record


def _integer(request: Message, key: str) -> int:
    value = _config(request)[key]
    assert isinstance(value, int)
    return value


def _parts(model: ArrayRecord | None, config: ConfigRecord) -> Mapping[str, Layout]:
    """The model's own sections, by what a request says of them."""
    buffers = config["buffers"]
    assert model is not None
    assert isinstance(buffers, list)
    return sections_of(unpack_model(model), [str(name) for name in buffers])[1]


def _layouts(parts: Mapping[str, Layout], config: ConfigRecord) -> dict[str, Layout]:
    """The sections that the server asked for."""
    sections = config["sections"]
    assert isinstance(sections, list)
    return {str(name): parts.get(str(name), parts[DELTA]) for name in sections}
