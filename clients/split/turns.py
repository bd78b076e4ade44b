"""What a turn holds, as named arrays: of each mini-batch its activation, which tokens are real, and its targets.

Both halves of the model read and write it here; how it travels is the collector's affair. Arrays of the j-th batch are
named `j.activation.…`, `j.lengths`, `j.targets`; `j.gradient.…` and `j.states.…` answer them. Padding behind a text's
end does not travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.split.coding import Precision, decode, encode, pack_rows, unpack_rows
from strategies.wire import Refused

Arrays = Mapping[str, NDArray[np.generic]]
Kind = Literal["states", "gradient"]
"""What the server's half gave, where what comes last is the client's; a gradient of an activation or of these."""


@dataclass(frozen=True)
class Batch:
    """One mini-batch at the cut.

    Attributes:
        activation: (b, l, h) float32, zero behind each text's end.
        lengths: real tokens of each text, (b,) long; texts are padded on the right.
        targets: (b, …) long; None where they stay with the client.
    """

    activation: Tensor
    lengths: Tensor
    targets: Tensor | None


def write_batches(batches: Sequence[Batch], precision: Precision) -> dict[str, NDArray[np.generic]]:
    """A turn going up."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for number, batch in enumerate(batches):
        rows = pack_rows(batch.activation, batch.lengths)
        for name, array in encode(rows, precision).items():
            arrays[f"{number}.activation.{name}"] = array
        arrays[f"{number}.lengths"] = batch.lengths.to(torch.int32).numpy()
        if batch.targets is not None:
            arrays[f"{number}.targets"] = batch.targets.numpy()
    return arrays


def read_batches(
    arrays: Arrays,
    precision: Precision,
    *,
    hidden: int,
    longest: int,
    most_tokens: int,
    most_batches: int,
) -> list[Batch]:
    """The batches of a turn that a client sent.

    Args:
        arrays: as they came.
        precision: of the activations.
        hidden: h, of the model.
        longest: tokens of a row at most.
        most_tokens: places, padding among them, of one batch at most.
        most_batches: of the turn.

    Raises:
        Refused: `malformed`, `missing`, `dtype`, `shape`, `too_large` or `not_finite`.
    """
    parts = _by_batch(arrays)
    if len(parts) > most_batches:
        raise Refused("too_large", f"{len(parts)} batches in a turn of {most_batches}")
    return [_read(part, precision, hidden, longest, most_tokens) for part in parts]


def _read(
    part: dict[str, NDArray[np.generic]],
    precision: Precision,
    hidden: int,
    longest: int,
    most_tokens: int,
) -> Batch:
    lengths, targets = part.pop("lengths", None), part.pop("targets", None)
    if lengths is None or lengths.dtype != np.int32 or lengths.ndim != 1 or not len(lengths):
        raise Refused("malformed", "a batch's lengths are no row of int32")
    if lengths.min() < 1 or lengths.max() > longest:
        raise Refused("shape", f"texts of {lengths.min()} to {lengths.max()} of {longest} tokens")
    widest = int(lengths.max())
    if len(lengths) * widest > most_tokens:
        raise Refused("too_large", f"a batch of {len(lengths)} x {widest} of {most_tokens} tokens")
    if targets is not None and (targets.dtype != np.int64 or targets.shape[:1] != lengths.shape):
        raise Refused("dtype", f"targets {targets.dtype} {targets.shape} of {len(lengths)} texts")
    kept = torch.from_numpy(lengths.astype(np.int64))
    activation = _spread(part, "activation.", kept, precision, hidden)
    return Batch(activation, kept, None if targets is None else torch.tensor(targets))


def write_rows(
    kind: Kind, tensors: Sequence[Tensor], lengths: Sequence[Tensor], precision: Precision
) -> dict[str, NDArray[np.generic]]:
    """Tensors (b, l, h) at their batches' real tokens: states or gradients, up or down."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for number, (tensor, kept) in enumerate(zip(tensors, lengths, strict=True)):
        for name, array in encode(pack_rows(tensor, kept), precision).items():
            arrays[f"{number}.{kind}.{name}"] = array
    return arrays


def read_rows(
    kind: Kind, arrays: Arrays, lengths: Sequence[Tensor], precision: Precision, hidden: int
) -> list[Tensor]:
    """What `write_rows` wrote for batches of these lengths, (b, l, h) float32 each, zero at padding.

    Raises:
        Refused: as `read_batches`.
    """
    parts = _by_batch(arrays)
    if len(parts) != len(lengths):
        raise Refused("missing", f"{kind} of {len(parts)} batches, {len(lengths)} were sent")
    return [
        _spread(part, f"{kind}.", kept, precision, hidden)
        for part, kept in zip(parts, lengths, strict=True)
    ]


def _spread(
    part: Arrays, prefix: str, lengths: Tensor, precision: Precision, hidden: int
) -> Tensor:
    """Coded rows of real tokens, (b, l, h) float32."""
    coded = {name.removeprefix(prefix): a for name, a in part.items() if name.startswith(prefix)}
    if len(coded) != len(part):
        raise Refused("malformed", f"arrays {sorted(part)[:4]} where {prefix}… was asked for")
    rows = decode(coded, precision, (int(lengths.sum()), hidden))
    return unpack_rows(rows, lengths, int(lengths.max()))


def _by_batch(arrays: Arrays) -> list[dict[str, NDArray[np.generic]]]:
    """Arrays by the batch that their names begin with."""
    parts: dict[int, dict[str, NDArray[np.generic]]] = {}
    for name, array in arrays.items():
        number, _, rest = name.partition(".")
        if not number.isascii() or not number.isdigit() or not rest or len(number) > 5:
            raise Refused("malformed", f"an array named {name[:40]!r} in a turn")
        parts.setdefault(int(number), {})[rest] = array
    if sorted(parts) != list(range(len(parts))) or not parts:
        raise Refused("missing", f"batches {sorted(parts)[:8]} of a turn")
    return [parts[number] for number in range(len(parts))]
