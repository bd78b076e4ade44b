"""What a hostile client may answer: every one of these is to be refused, whatever the random numbers say."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from strategies.wire import METRICS, NUM_EXAMPLES, RECEIPT, UPDATE, pack, pack_model
from tests.support.grids import Node

Rng = np.random.Generator
Attack = Callable[[RecordDict, Rng], object]
"""Turns an honest reply's content, which it may change, into a hostile one."""

SCALARS = [
    -1,
    0,
    2**31,
    2**63 - 1,
    -(2**63),
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "7",
    "",
    b"x",
]
LISTS = [[], [0], [1.0], ["0" * 16], [b""], [True]]


def pick(rng: Rng, choices):
    return choices[rng.integers(len(choices))]


def vector_of(content: RecordDict, name: str) -> np.ndarray:
    return content[UPDATE][name].numpy()


def drop_a_record(content: RecordDict, rng: Rng) -> None:
    del content[pick(rng, [UPDATE, METRICS, RECEIPT])]


def swap_a_records_type(content: RecordDict, rng: Rng) -> None:
    name = pick(rng, [UPDATE, METRICS, RECEIPT])
    others = [
        r
        for r in (ArrayRecord(), MetricRecord(), ConfigRecord())
        if type(r) is not type(content[name])
    ]
    content[name] = pick(rng, others)


def lie_in_the_receipt(content: RecordDict, rng: Rng) -> None:
    key = pick(rng, ["client", "round", "version"])
    told = content[RECEIPT][key]
    lies = [value for value in [*SCALARS, *LISTS, told + 1, told - 1] if value != told]
    content[RECEIPT][key] = pick(rng, lies)


def lie_about_the_layout(content: RecordDict, rng: Rng) -> None:
    content[RECEIPT]["layouts"] = pick(rng, [*SCALARS, *LISTS])


def forget_a_word_of_the_receipt(content: RecordDict, rng: Rng) -> None:
    del content[RECEIPT][pick(rng, ["client", "round", "version", "layouts"])]


def claim_absurd_examples(content: RecordDict, rng: Rng) -> None:
    absurd = [
        0,
        -1,
        -(2**63),
        0.5,
        float("nan"),
        float("inf"),
        1e18,
        2**63 - 1,
        10**400,
        [],
        [5],
        [1e3],
    ]
    content[METRICS][NUM_EXAMPLES] = pick(rng, absurd)


def claim_no_examples(content: RecordDict, rng: Rng) -> None:
    del content[METRICS][NUM_EXAMPLES]


def flood_with_metrics(content: RecordDict, rng: Rng) -> None:
    content[METRICS].update({f"metric-{index}": float(index) for index in range(65)})


def poison_an_element(content: RecordDict, rng: Rng) -> None:
    name = pick(rng, sorted(content[UPDATE]))
    vector = vector_of(content, name).copy()
    vector[rng.integers(len(vector))] = pick(rng, [np.nan, np.inf, -np.inf, 3e38, -3e38, 1.1e10])
    content[UPDATE][name] = pack(vector)


def change_a_vectors_form(content: RecordDict, rng: Rng) -> None:
    name = pick(rng, sorted(content[UPDATE]))
    vector = vector_of(content, name)
    forms = [
        vector.astype(np.float64),
        vector.astype(np.int64),
        vector.astype(">f4"),
        vector.reshape(1, -1),
        vector[:-1],
        np.append(vector, vector),
        vector[0],
    ]
    content[UPDATE][name] = pack(np.asarray(pick(rng, forms)))


def send_broken_bytes(content: RecordDict, rng: Rng) -> None:
    name = pick(rng, sorted(content[UPDATE]))
    whole = content[UPDATE][name].data
    broken = [
        whole[: rng.integers(len(whole))],
        whole + b"\0",
        rng.bytes(rng.integers(1, 300)),
        b"cos\nsystem\n(S'true'\ntR.",
        whole.replace(b"'<f4'", b"'|O' ", 1),
        whole.replace(b"<f4", b"<c8", 1),
        b"\x93NUMPY\x01\x00\x76\x00" + rng.bytes(118) + whole[128:],
    ]
    content[UPDATE][name] = Array("float32", (3,), "numpy.ndarray", pick(rng, broken))


def rename_a_section(content: RecordDict, rng: Rng) -> None:
    name = pick(rng, sorted(content[UPDATE]))
    content[UPDATE][pick(rng, ["", "weights", "control", "delta "])] = content[UPDATE].pop(name)


def add_a_section(content: RecordDict, rng: Rng) -> None:
    content[UPDATE]["control"] = pack(np.zeros(3, np.float32))


def add_a_metric_record(content: RecordDict, rng: Rng) -> None:
    content["more"] = MetricRecord({NUM_EXAMPLES: 10**6})


def send_weights(content: RecordDict, rng: Rng) -> RecordDict:
    return RecordDict({"arrays": pack_model({"w": np.zeros(3)}), METRICS: content[METRICS]})


def send_nothing(content: RecordDict, rng: Rng) -> RecordDict:
    return RecordDict()


def send_what_no_wire_carries(content: RecordDict, rng: Rng) -> None:
    content["more"] = ConfigRecord({"n": pick(rng, [10**400, -(10**30), "\ud800", [1, 2**70]])})


ATTACKS: list[Attack] = [
    drop_a_record,
    swap_a_records_type,
    lie_in_the_receipt,
    lie_about_the_layout,
    forget_a_word_of_the_receipt,
    claim_absurd_examples,
    claim_no_examples,
    flood_with_metrics,
    poison_an_element,
    change_a_vectors_form,
    send_broken_bytes,
    rename_a_section,
    add_a_section,
    add_a_metric_record,
    send_weights,
    send_nothing,
    send_what_no_wire_carries,
]

ATTACKS_ON_EVALUATION: list[Attack] = [
    claim_absurd_examples,
    claim_no_examples,
    flood_with_metrics,
    add_a_metric_record,
    send_nothing,
    send_what_no_wire_carries,
]


def hostile_node(honest: Node, rng: Rng) -> Node:
    """A node each of whose answers is to be refused: an attack, an error, silence, doubles, or replies to nobody."""

    def answer(message: Message) -> Iterable[Message]:
        way = rng.random()
        if way < 0.04:
            return
        if way < 0.1:
            reason = pick(rng, [None, "", "out of memory", "\x1b[31m" * 50])
            yield Message(Error(int(rng.integers(0, 2**16)), reason), reply_to=message)
            return
        (reply,) = honest(message)
        if way < 0.14:
            stranger = Message(RecordDict(), message.metadata.dst_node_id, "train")
            stranger.metadata.__dict__["_message_id"] = f"request-{rng.integers(10**9, 10**10)}"
            yield Message(reply.content, reply_to=stranger)
            return
        training = message.metadata.message_type == "train"
        attacks = ATTACKS if training else ATTACKS_ON_EVALUATION
        hostile = pick(rng, attacks)(reply.content, rng)
        content = hostile if isinstance(hostile, RecordDict) else reply.content
        bad = Message(content, reply_to=message)
        yield from [bad] * int(rng.integers(1, 3))
        if way < 0.3:
            yield from honest(message)  # too late: this client has answered

    return answer
