"""The client half for Flower apps of one's own: a mod that turns weights into an encoded update.

    app = ClientApp(mods=[pipeline_mod(stages=[Clip(norm=1.0)])])

The train function stays vanilla: it returns one ArrayRecord of weights and `num-examples`. A section beyond the model's
change (SCAFFOLD's `control`) is returned as an ArrayRecord of that name, laid out like the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from numpy.typing import NDArray

from strategies.pipeline import encode
from strategies.protocols import Stage
from strategies.update import BUFFERS, COUNTERS, DELTA, Layout, Section
from strategies.wire import (
    ARRAYS,
    CONFIG,
    Expected,
    Refused,
    read_weights,
    unpack,
    unpack_model,
    write_update,
)


def pipeline_mod(stages: Sequence[Stage] = ()) -> Mod:
    """A mod that subtracts what was sent, applies the stages' client halves, and writes the reply."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        return Message(_encoded(message.content, reply.content, stages), reply_to=message)

    return mod


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


def _encoded(request: RecordDict, reply: RecordDict, stages: Sequence[Stage]) -> RecordDict:
    config = request.config_records[CONFIG]
    sent = unpack_model(request.array_records[ARRAYS])
    named = config.get("buffers")
    kinds = kinds_of(sent, [str(name) for name in named] if isinstance(named, list) else [])
    layouts = layouts_of(sent, kinds)
    client, number, version = (config.get(key) for key in ("client", "server-round", "version"))
    if not (isinstance(client, int) and isinstance(number, int) and isinstance(version, int)):
        raise Refused("malformed", "the request lacks client, server-round or version")
    wanted = config.get("sections")
    extra = sorted(set(map(str, wanted)) - set(layouts)) if isinstance(wanted, list) else []
    weights = RecordDict({key: value for key, value in reply.items() if key not in extra})
    update = read_weights(weights, Expected(layouts, client, number, version), sent, kinds)
    for name in extra:
        update = update.with_section(
            name, _section(reply.array_records.get(name), layouts[DELTA], name)
        )
    return write_update(encode(update, stages, config, client), client=client, round_number=number)


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
