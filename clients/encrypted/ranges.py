"""Whether a step's values stay clear of half the modulus: what the compute party can say of that from the weights.

Sums that wrap round are not noticed where it happens. The compute party sees no value, but it knows the weights, and
that features have a root mean square of at most `FEATURE_RMS`, which owners see to before they encrypt. From these
follow bounds on mean magnitudes, which is what a polynomial's coefficients can reach (`plan`), by Cauchy and Schwarz;
where higher moments are needed, those of a Gaussian. Only sums before the last one are looked at: they have 20 bits to
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

FEATURE_RMS: Final = 4.0
"""The largest root mean square of a mini-batch's features."""
_GAUSSIAN: Final = {2: 1.0, 4: 3.0, 6: 15.0}
"""Moments of a standard Gaussian."""


class RangeError(ArithmeticError):
    """A step would leave less than the headroom."""


def check(plan: Plan, weights: Mapping[str, NDArray[np.generic]]) -> dict[str, float]:
    """Bits that each inner value has left above its bound; by the names of `Plan.formats`.

    Raises:
        RangeError: one has less than `HEADROOM`; it names the value, and the mend.
    """
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
    spec, found = plan.spec, {}
    power, hidden = spec.power, spec.layers - 1
    below = FEATURE_RMS * sqrt(spec.sizes[0])  # root mean square norm of what goes into a layer
    slopes = []
    for layer in range(hidden):
        matrix = np.asarray(weights[weight(layer)], np.float64)
        rms = np.linalg.norm(matrix, axis=1) * below + np.abs(
            np.asarray(weights[bias(layer)], np.float64)
        )
        largest = float(rms.max())
        found[f"z{layer}"] = largest
        found[f"h{layer}*"] = largest**power * _GAUSSIAN[4]
        below = sqrt(_GAUSSIAN[2 * power]) * float(np.linalg.norm(rms**power))
        slopes.append(power * rms ** (power - 1) * sqrt(_GAUSSIAN[2 * power - 2]))
    above = sqrt(2.0)  # of softmax less a label
    if spec.loss == "squared":
        last = np.asarray(weights[weight(hidden)], np.float64)
        above = 1 + float(np.linalg.norm(last, 2)) * below
        above = min(above, 2.0**8)
    for layer in range(hidden - 1, -1, -1):
        matrix = np.asarray(weights[weight(layer + 1)], np.float64)
        errors = np.linalg.norm(matrix, axis=0) * above
        found[f"e{layer}"] = float(errors.max())
        gradients = errors * slopes[layer]
        found[f"g{layer}*"] = float(gradients.max())
        above = float(np.linalg.norm(gradients))
    return found
