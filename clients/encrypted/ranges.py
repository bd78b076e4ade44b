"""Whether a step's values stay clear of half the modulus: what the compute party can say of that from the weights.

Sums that wrap round are not noticed where it happens. The compute party sees no value, but it knows the weights, and
that features have a root mean square of at most `FEATURE_RMS`, which owners see to before they encrypt. From these
follow bounds on mean magnitudes, which is what a polynomial's coefficients can reach (`plan`), by Cauchy and Schwarz;
where higher moments are needed, those of a Gaussian. Only sums before the last one are looked at: some 20 bits are
spare in a sound run, so that coarse bounds do. What owners decrypt, they check themselves, value by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log2, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.plan import HEADROOM, Plan
from clients.encrypted.spec import bias, weight

FEATURE_RMS: Final = 2.0
"""The largest root mean square of a mini-batch's features."""
MOST_ERROR: Final = 2.0**4
"""Root mean square of the outputs' errors with squared loss: above half its square, the loss shows a divergence."""
_GAUSSIAN: Final = {2: 1.0, 4: 3.0, 6: 15.0}
"""Moments of a standard Gaussian."""


class RangeError(ArithmeticError):
    """A step would leave less than the headroom."""


def check(plan: Plan, weights: Mapping[str, NDArray[np.generic]]) -> dict[str, float]:
    """Bits that each inner value has left above its bound; by the names of `Plan.formats`.

    Raises:
        RangeError: one has less than `HEADROOM`; it names the value, and the mend.
    """
    for each in plan.spec.shapes:
        _array(weights, each)
    bounds = _bounds(plan, weights)
    left = {
        name: plan.formats[name].room - log2(max(bound, 1e-9)) for name, bound in bounds.items()
    }
    name = min(left, key=lambda each: left[each], default=None)
    if name is not None and left[name] < HEADROOM:
        raise RangeError(
            f"{name} may reach {bounds[name]:.3g}, and {left[name]:.1f} bits of its modulus are left where"
            f" {HEADROOM} must be: the weights have grown too large; lower server.lr, start from smaller weights"
            " (model.hidden_scale), or add a clip"
        )
    return left


def _bounds(plan: Plan, weights: Mapping[str, NDArray[np.generic]]) -> dict[str, float]:
    spec, found = plan.spec, dict[str, float]()
    power, hidden = spec.power, spec.layers - 1
    below = FEATURE_RMS * sqrt(spec.sizes[0])  # root mean square norm of what goes into a layer
    slopes = []
    for layer in range(hidden):
        matrix, biases = _array(weights, weight(layer)), _array(weights, bias(layer))
        rms = np.linalg.norm(matrix, axis=1) * below + np.abs(biases)
        largest = float(rms.max())
        found[f"z{layer}"] = largest
        if power > 2:
            found[f"s{layer}*"] = largest**2
        found[f"h{layer}*"] = largest**power * _GAUSSIAN[4]
        # Not all units are as large as one may be: their squares' sum is bounded by the largest singular value.
        together = min(float(np.linalg.norm(rms)), _spectral(matrix) * below + _norm(biases))
        below = sqrt(_GAUSSIAN[2 * power]) * largest ** (power - 1) * together
        slopes.append(power * rms ** (power - 1) * sqrt(_GAUSSIAN[2 * power - 2]))
    above = sqrt(2.0)  # of softmax less a label
    if spec.loss == "squared":
        last = _array(weights, weight(hidden))
        above = 1 + _spectral(last) * below + _norm(_array(weights, bias(hidden)))
        above = min(above, MOST_ERROR)
    for layer in range(hidden - 1, -1, -1):
        matrix = _array(weights, weight(layer + 1))
        errors = np.linalg.norm(matrix, axis=0) * above
        found[f"e{layer}"] = float(errors.max())
        gradients = errors * slopes[layer]
        found[f"g{layer}*"] = float(gradients.max())
        above = min(_norm(gradients), float(slopes[layer].max()) * _spectral(matrix) * above)
    return found


def _array(weights: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.float64]:
    found = np.asarray(weights[name], np.float64)
    if not np.isfinite(found).all():
        raise RangeError(f"{name} is not finite: the training has diverged; lower server.lr")
    return found


def _norm(array: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(array))


def _spectral(matrix: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(matrix, 2))
