"""The client half for Flower apps of one's own: a mod that turns weights into an encoded update.

    app = ClientApp(mods=[pipeline_mod(stages=[Clip(norm=1.0)])])

The train function stays vanilla: it returns one ArrayRecord of weights and `num-examples`. A section beyond the model's
change (SCAFFOLD's `control`) is returned as an ArrayRecord of that name, laid out like the parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray

from strategies.collectors import PlainClient
from strategies.configuration import kept_in
from strategies.downlink import HeldModels
from strategies.encoding import encode
from strategies.protocols import ClientHalf, Maker, Stage
from strategies.replies import Expected, read_weights
from strategies.update import BUFFERS, COUNTERS, DELTA, Layout, Section, Update
from strategies.wire import (
    ARRAYS,
    TRAINS,
    Refused,
    config_of,
    integer_in,
    pack,
    unpack,
    unpack_model,
)

log = logging.getLogger(__name__)

MEMORY: Final = "stages-memory"
"""The record of Flower's `Context.state` in which stages keep what they remember; it lasts as long as the SuperNode."""


def pipeline_mod(
    stages: Sequence[Stage] = (),
    half: ClientHalf | None = None,
    held: HeldModels | None = None,
) -> Mod:
    """A mod that subtracts what was sent, applies the stages' client halves, and writes the reply.

    Args:
        stages: the server's, in the same order.
        half: the client half of the server's collector, the plain one's by default. Where that has several phases,
            the train function is called for the one that trains.
        held: the models that this client holds, where the server's pipeline has a `Downlink`: train and evaluate
            functions are given requests with the whole model in them.
    """
    collector = half or PlainClient()

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if held is not None:
            try:
                message = held.whole(message)
            except Refused as refused:
                return _refusal(message, refused)
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        request = message.content
        try:
            trains = config_of(request).get(TRAINS, True)
            ready = collector.prepare(request) if trains else collector.answer(request)
        except Refused as refused:
            return _refusal(message, refused)
        if ready is not None:
            return Message(ready, reply_to=message)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        update = _encoded(request, reply.content, stages, context)
        try:
            return Message(collector.reply(update, request), reply_to=message)
        except Refused as refused:
            return _refusal(message, refused)

    return mod


def _refusal(message: Message, refused: Refused) -> Message:
    """The half's refusal in a word: of an exception Flower would send the whole text."""
    log.warning("a %s request failed: %s", message.metadata.message_type, refused)
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, refused.told)
    return Message(error, reply_to=message)


def kinds_of(arrays: dict[str, NDArray[np.generic]], buffers: Sequence[str]) -> dict[str, str]:
    """The section that each array's change belongs to, as the server sees it."""

    def kind(name: str, array: NDArray[np.generic]) -> str:
        if array.dtype.kind in "iub":
            return COUNTERS
        return BUFFERS if name in buffers else DELTA

    return {name: kind(name, array) for name, array in arrays.items()}


def layouts_of(arrays: dict[str, NDArray[np.generic]], kinds: dict[str, str]) -> dict[str, Layout]:
    """The layouts of the sections that these arrays make."""
    present = [kind for kind in (DELTA, BUFFERS, COUNTERS) if kind in kinds.values()]
    return {
        kind: Layout.of({n: a for n, a in arrays.items() if kinds[n] == kind}) for kind in present
    }


def _encoded(
    request: RecordDict, reply: RecordDict, stages: Sequence[Stage], context: Context
) -> Update:
    config = config_of(request)
    sent = unpack_model(request.array_records[ARRAYS])
    named = config.get("buffers")
    kinds = kinds_of(sent, [str(name) for name in named] if isinstance(named, list) else [])
    layouts = layouts_of(sent, kinds)
    client, number, version = (
        integer_in(config, key) for key in ("client", "server-round", "version")
    )
    wanted = config.get("sections")
    made = {name for stage in stages if isinstance(stage, Maker) for name in stage.layouts}
    extra = sorted(set(map(str, wanted)) - {*layouts, *made}) if isinstance(wanted, list) else []
    weights = RecordDict({key: value for key, value in reply.items() if key not in extra})
    update = read_weights(weights, Expected(layouts, client, number, version), sent, kinds)
    for name in extra:
        update = update.with_section(
            name, _section(reply.array_records.get(name), layouts[DELTA], name)
        )
    proposed: dict[str, NDArray[np.float32]] = {}
    if not any(getattr(stage, "remembers", False) for stage in stages):
        return encode(update, stages, config, client)
    included = integer_in(config, "included")
    encoded = encode(update, stages, config, client, _remembered(context, included), proposed)
    _propose(context, {included, *kept_in(config)}, number, proposed)
    return encoded


def _remembered(context: Context, included: int) -> dict[str, NDArray[np.float32]]:
    """What the stages remembered with the last update that the server took."""
    record = context.state.get(MEMORY)
    if not isinstance(record, ArrayRecord):
        return {}
    found = {}
    for key in record:
        number, _, name = key.partition("/")
        if number == str(included):
            found[name] = unpack(record[key]).astype(np.float32)
    return found


def _propose(
    context: Context, stay: set[int], number: int, proposed: dict[str, NDArray[np.float32]]
) -> None:
    """Keeps what holds of the models that count, and what will hold if the server takes this round's update."""
    before = context.state.get(MEMORY)
    kept = before if isinstance(before, ArrayRecord) else ArrayRecord()
    record = ArrayRecord({k: kept[k] for k in kept if k.partition("/")[0] in map(str, stay)})
    for name, vector in proposed.items():
        record[f"{number}/{name}"] = pack(vector)
    context.state[MEMORY] = record


def _section(record: ArrayRecord | None, layout: Layout, name: str) -> Section:
    if record is None:
        raise Refused(
            "missing", f"the server asks for a section {name!r}: return an ArrayRecord of that name"
        )
    if set(record) == set(layout.names):
        return Section(
            layout.flatten({key: unpack(array) for key, array in record.items()}), layout
        )
    vectors = [unpack(array).astype(np.float32).ravel() for array in record.values()]
    return Section(np.concatenate(vectors), layout)
