"""How much each adapted layer matters to the loss: a running mean of |gradient · weight|.

|w·∂L/∂w| is to first order what the loss would change by without w (Molchanov et al. 2019, "Importance Estimation for
Neural Network Pruning"), and is how AdaLoRA tells which ranks are worth keeping (Zhang et al. 2023, "Adaptive Budget
Allocation for Parameter-Efficient Fine-Tuning", eq. 8; its running mean, eq. 9). A client has gradients; a server sees
changes, which are gradients summed over steps. Either way it is summed over both factors of a layer, for one unit of
rank, and told relative to the mean of the layers seen with it: neither learning rates nor rounds weigh more.

B is zero at first, so at the first step of round 1 both products vanish: B's because B is zero, A's because its
gradient is sent back through B. Such an observation says nothing and is left out. Changes are taken with the weights
after them: |ΔB·(B + ΔB)| is ΔB² in round 1, so that a server's first observation counts. Where a rule turns the basis
of factors (SVD, stacking), an aggregate's change says more of their size than of gradients. This file knows no budgets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Lt
from numpy.typing import NDArray
from torch import nn

from strategies.parts import narrowed
from strategies.ranges import Ranged
from strategies.state import State, mapping_in
from strategies.update import Section, Vector

FACTOR = re.compile(r"(?:.*\.)?adapters\.(?P<layer>[^.]+)\.(?P<kind>[AB])\.weight")
"""Names of the arrays of adapters."""

Arrays = Mapping[str, NDArray[np.floating]]


@dataclass
class Importance(Ranged):
    """The running mean, by layer.

    Attributes:
        decay: β of mean ← β·mean + (1 − β)·observation, started without bias.
    """

    decay: Annotated[float, Ge(0), Lt(1)] = 0.85
    _sums: dict[str, float] = field(default_factory=dict, init=False)
    _weights: dict[str, float] = field(default_factory=dict, init=False)

    def observe(self, weights: Arrays, changes: Arrays) -> None:
        """Takes one observation.

        Args:
            weights: arrays by name; those of adapters are looked at: A is (r, n), B is (m, r).
            changes: gradients or changes, of the same names and shapes. A layer that is in neither is left as it was.
        """
        found: dict[str, float] = {}
        for name, change in changes.items():
            match = FACTOR.fullmatch(name)
            if match is None or not change.size:
                continue
            rank = change.shape[0 if match["kind"] == "A" else 1]
            product = np.abs(change * weights[name]).sum(dtype=np.float64) / rank
            found[match["layer"]] = found.get(match["layer"], 0.0) + float(product)
        mean = sum(found.values()) / max(1, len(found))
        if not (mean > 0 and np.isfinite(mean)):
            return
        for layer, value in found.items():
            self._sums[layer] = self._mixed(self._sums.get(layer, 0.0), value / mean)
            self._weights[layer] = self._mixed(self._weights.get(layer, 0.0), 1.0)

    def _mixed(self, before: float, now: float) -> float:
        return self.decay * before + (1 - self.decay) * now

    def observe_gradients(self, module: nn.Module) -> None:
        """Takes the gradients that a module's parameters hold (`.grad`)."""
        held = {n: p for n, p in module.named_parameters() if p.grad is not None}
        self.observe(
            {name: _numpy(parameter) for name, parameter in held.items()},
            {name: _numpy(parameter.grad) for name, parameter in held.items()},
        )

    def observe_change(self, change: Section, sent: Vector) -> None:
        """Takes what one client, or an aggregate, changes.

        Args:
            change: of the parameters, (d,); of its part alone, where it has one.
            sent: the parameters before, (d,) float32 in the same layout.
        """
        part = change.part or change.layout
        changes = narrowed(change.layout.views(change.vector), part)
        before = narrowed(change.layout.views(sent), part)
        factors = {n: c for n, c in changes.items() if FACTOR.fullmatch(n)}
        self.observe({n: before[n] + c for n, c in factors.items()}, factors)

    @property
    def means(self) -> dict[str, float]:
        """What each layer seen is worth; 1 is the mean of the layers it was seen with."""
        return {layer: total / self._weights[layer] for layer, total in self._sums.items()}

    def state_dict(self) -> State:
        """Sums and their weights."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: State) -> None:
        """Takes up that state; raises `ValueError` for what is none."""
        sums, weights = (_numbers(mapping_in(state, key)) for key in ("sums", "weights"))
        if sums.keys() != weights.keys() or not all(0 < w <= 1 for w in weights.values()):
            raise ValueError("sums and weights of the layers' importance do not belong together")
        self._sums, self._weights = sums, weights


def _numpy(tensor: Any) -> NDArray[np.floating]:
    array: NDArray[np.floating] = tensor.detach().float().cpu().numpy()
    return array


def _numbers(state: State) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in state.items():
        if not isinstance(value, float) or not np.isfinite(value) or value < 0:
            raise ValueError(f"the importance of {name} is {value!r}")
        found[name] = value
    return found
