"""What crosses the cut: activations and their gradients as a few plain arrays, and back.

`fp32` is exact. `fp16` and `bf16` round to the nearest number of 11 or 8 significant bits; a power of two goes with
`fp16`, one for the whole tensor, which brings the largest element to 2¹⁵ … 2¹⁶: gradients of a mean over a batch are
often below 6·10⁻⁸, the smallest float16. `int8` scales each token's vector by its largest element, a step of
max|x| / 127: "vector-wise" absmax quantisation (Dettmers, Lewis, Belkada & Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix
Multiplication for Transformers at Scale", §2.1 and §3.1), rounded to the nearest step. All four are deterministic, and
what was decoded is encoded again to the same.

Nothing is known here of models, of batches in a turn or of messages. Arrays that come in are a peer's: they are held
against the shape that is expected before a number of them is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.wire import Refused

Precision = Literal["fp32", "fp16", "bf16", "int8"]

Arrays = Mapping[str, NDArray[np.generic]]

VALUES: Final = "values"
"""One number an element, in the tensor's shape (..., h): float32, float16, uint16 (bfloat16's bits) or int8."""
EXPONENT: Final = "exponent"
"""Of two, by whose power `fp16` values are multiplied: (1,) int16."""
STEPS: Final = "steps"
"""What a unit of `int8` is worth, by token: (...) float32."""

_VALUES: Final[Mapping[str, np.dtype[np.generic]]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}
_MOST_FP16: Final = 65504.0
_MOST_BF16: Final = torch.finfo(torch.bfloat16).max
_EXPONENTS: Final = (-164, 112)
"""From the smallest float32, 2⁻¹⁴⁹, and from the largest, below 2¹²⁸, to 2¹⁵ … 2¹⁶."""
_MOST_LEVEL: Final = 127


def encode(tensor: Tensor, precision: Precision) -> dict[str, NDArray[np.generic]]:
    """A tensor's arrays, by name.

    Args:
        tensor: (..., h), a token's vector last, of any floating type; may be in a graph. `fp32` shares its memory.
        precision: of the numbers that travel.

    Returns:
        `values`, and with `fp16` an `exponent`, with `int8` the `steps`.

    Raises:
        ValueError: an element is NaN or infinite, or the tensor has no axes, or there is no such precision.
    """
    values = tensor.detach().to("cpu", torch.float32)
    if not values.dim():
        raise ValueError("a single number has no tokens: a tensor (..., h) is needed")
    most = _most(values)
    if not math.isfinite(most):
        wrong = int(values.numel() - values.isfinite().sum())
        raise ValueError(
            f"{wrong} of {values.numel()} elements are not finite: training has diverged, or the half of the model "
            f"in fewer bits has overflowed"
        )
    match precision:
        case "fp32":
            return {VALUES: values.numpy()}
        case "fp16":
            exponent = math.frexp(most)[1] - 16 if most else 0
            # Past the largest float16 by less than half its last bit: no element is moved by more than rounding does.
            halves = _times_power(values, -exponent).clamp_(-_MOST_FP16, _MOST_FP16).half()
            return {VALUES: halves.numpy(), EXPONENT: np.array([exponent], np.int16)}
        case "bf16":
            if most > _MOST_BF16:
                values = values.clamp(-_MOST_BF16, _MOST_BF16)
            return {VALUES: values.bfloat16().view(torch.uint16).numpy()}
        case "int8":
            return _levels(values)
    raise ValueError(f"precision {precision!r} is none of {', '.join(get_args(Precision))}")


def decode(arrays: Arrays, precision: Precision, shape: Sequence[int]) -> Tensor:
    """The tensor that was encoded, on the CPU: of the given shape, float32, memory of its own.

    Args:
        arrays: a peer's, by name.
        precision: that was agreed upon.
        shape: (..., h) that the receiver expects; never the peer's word.

    Raises:
        Refused: `missing`, for other names; `dtype`; `shape`; `range`, for an exponent or a level that no tensor has;
            `not_finite`, where an element or a step is, or a step is negative.
    """
    beside = {"fp16": {EXPONENT}, "int8": {STEPS}}.get(precision, set())
    if arrays.keys() != {VALUES} | beside:
        raise Refused(
            "missing", f"arrays {_few(arrays)} came, {precision} is {sorted({VALUES} | beside)}"
        )
    shape = tuple(shape)
    # A copy, since torch takes no read-only memory, of the few bytes that came.
    values = torch.from_numpy(np.array(_held(arrays, VALUES, _VALUES[precision], shape), order="C"))
    match precision:
        case "fp32":
            decoded = values
        case "fp16":
            (exponent,) = _held(arrays, EXPONENT, np.dtype(np.int16), (1,)).tolist()
            if not _EXPONENTS[0] <= exponent <= _EXPONENTS[1]:
                raise Refused("range", f"an exponent of {exponent} is that of no float32")
            decoded = _times_power(values.float(), exponent)
        case "bf16":
            decoded = values.view(torch.bfloat16).float()
        case "int8":
            steps = np.array(_held(arrays, STEPS, np.dtype(np.float32), shape[:-1]), order="C")
            if steps.size and not (steps.min() >= 0 and np.isfinite(steps.max())):
                raise Refused("not_finite", "a step is negative or not finite")
            if values.numel() and values.min() < -_MOST_LEVEL:
                raise Refused("range", "an element has level -128, which no encoder gives")
            decoded = values.float().mul_(torch.from_numpy(steps).unsqueeze(-1))
    if not math.isfinite(_most(decoded)):
        raise Refused("not_finite", "an element is NaN or infinite")
    return decoded


def encoded_bytes(shape: Sequence[int], precision: Precision) -> int:
    """Bytes of what `encode` gives of a tensor of this shape; a `.npy` header of 128 bytes for each array is not in."""
    elements = math.prod(shape)
    beside = {"fp16": 2, "int8": 4 * math.prod(shape[:-1])}.get(precision, 0)
    return elements * _VALUES[precision].itemsize + beside


def relative_error(before: Tensor, after: Tensor) -> float:
    """‖after − before‖₂ / ‖before‖₂ over all elements; where `before` is zero, 0 for the same and ∞ for another."""
    first, second = before.detach().double(), after.detach().double()
    length, off = float(first.norm()), float((second - first).norm())
    if length:
        return off / length
    return math.inf if off else 0.0


def mask_of(lengths: Tensor, length: int) -> Tensor:
    """Where the tokens are, (b, length) bool, in rows padded on the right that have (b,) `lengths`."""
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)


def pack_rows(activation: Tensor, lengths: Tensor) -> Tensor:
    """The tokens of a padded batch, (b, l, h), one below the other: (Σ lengths, h). Padding does not travel.

    Sound for every model that makes nothing of what stands at padding: its keys are masked, and no pooling or loss
    takes it. Then no result depends on it, and the gradient there is zero, to the bit. For any other model (a pooling
    over all positions, images, a mask that is not used) each row's length is l.

    Raises:
        ValueError: `lengths` is not (b,), or one of them is not from 0 to l.
    """
    return activation[_tokens(lengths, *activation.shape[:2])]


def unpack_rows(rows: Tensor, lengths: Tensor, length: int) -> Tensor:
    """A padded batch, (b, length, h), of its tokens (Σ lengths, h): zeros at the padding.

    Raises:
        ValueError: a length is not from 0 to `length`, or their sum is not the number of rows.
    """
    tokens = _tokens(lengths, len(lengths), length)
    if rows.dim() != 2 or len(rows) != int(tokens.sum()):
        raise ValueError(f"rows {tuple(rows.shape)} of {int(tokens.sum())} tokens")
    batch = rows.new_zeros((*tokens.shape, rows.shape[1]))
    batch[tokens] = rows
    return batch


def _tokens(lengths: Tensor, count: int, length: int) -> Tensor:
    """Where tokens are, (count, length) bool."""
    if lengths.shape != (count,) or not bool(((lengths >= 0) & (lengths <= length)).all()):
        raise ValueError(f"lengths {lengths.tolist()} of {count} rows of {length} positions")
    return mask_of(lengths, length)


def _levels(values: Tensor) -> dict[str, NDArray[np.generic]]:
    """`int8` of finite values (..., h): |x − level·step| ≤ max(step/2, 2⁻¹³⁶)."""
    largest = values.abs().amax(dim=-1) if values.numel() else values.new_zeros(values.shape[:-1])
    # 17 significant bits: a step times a level is then a float32 without rounding, so that decoding is exact.
    steps = ((largest / _MOST_LEVEL).view(torch.int32) + 64).bitwise_and_(~127).view(torch.float32)
    divisors = torch.where(steps > 0, steps, torch.ones(())).unsqueeze(-1)
    levels = (values / divisors).round_().clamp_(-_MOST_LEVEL, _MOST_LEVEL).to(torch.int8)
    return {VALUES: levels.numpy(), STEPS: steps.numpy()}


def _times_power(values: Tensor, exponent: int) -> Tensor:
    """A new tensor, values·2^exponent; in two steps, since a float32 reaches 2¹²⁷ only."""
    half = exponent // 2
    return values.mul(2.0**half).mul_(2.0 ** (exponent - half))


def _most(values: Tensor) -> float:
    """The largest magnitude; NaN or ∞ where there is one, 0 of nothing."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return max(-low.item(), high.item()) if not math.isnan(low.item()) else math.nan


def _held(
    arrays: Arrays, name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> NDArray[np.generic]:
    array = arrays[name]
    if array.dtype != dtype:
        raise Refused("dtype", f"{name!r} holds {array.dtype}, {dtype} was agreed upon")
    if array.shape != shape:
        raise Refused("shape", f"{name!r} has shape {array.shape}, {shape} was expected")
    return array


def _few(arrays: Arrays) -> list[str]:
    return [name[:40] for name in sorted(arrays)[:4]]
