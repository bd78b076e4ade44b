"""The server's model: what it holds, what it sends, and how an aggregate moves it.

Parameters live in one float64 vector, so that thousands of small steps do not drift; clients are sent them in their
own dtype. The model knows arrays by name and nothing of torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from strategies.server_models.optimizers import ServerOptimizer
from strategies.state import State, array_in, array_like, integer_in, mapping_in
from strategies.update import BUFFERS, COUNTERS, DELTA, Layout, Update

Arrays = Mapping[str, NDArray[np.generic]]

RUNNING_STATISTICS = ("*running_mean", "*running_var")
"""How float buffers are told from parameters in a bare state dict (the names of torch's batch and instance norm)."""


class ServerModel:
    """A model and its version.

    Args:
        arrays: the whole initial model by name, float or integer.
        optimizer: what turns an aggregate into a step.
        travel: shell patterns of the names that are sent and trained; the others stay as they are everywhere.
        buffers: names of the float arrays that are running statistics; told by their names when None.

    Attributes:
        version: number of aggregates applied; 0 is the initial model.
        layouts: the sections that a client's update must have, with their layouts.
        kinds: the section that each travelling array's change belongs to.

    Raises:
        ValueError: no parameter travels, or an array is neither of floats nor of integers.
    """

    def __init__(
        self,
        arrays: Arrays,
        optimizer: ServerOptimizer,
        *,
        travel: Sequence[str] = ("*",),
        buffers: Collection[str] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        self._names = tuple(arrays)
        travelling = [
            name for name in arrays if any(fnmatchcase(name, pattern) for pattern in travel)
        ]
        self.kinds, parts = sections_of({name: arrays[name] for name in travelling}, buffers)
        self._home = {name: np.array(arrays[name]) for name in arrays if name not in self.kinds}
        if not parts[DELTA].size:
            raise ValueError(
                f"no parameter travels: of {len(arrays)} arrays none matches {', '.join(travel)}"
            )
        # Integers in float64 are exact to 2^53.
        self._layouts = {kind: layout for kind, layout in parts.items() if layout.names}
        self._vectors = {kind: _gather(layout, arrays) for kind, layout in self._layouts.items()}
        self.layouts = self._layouts | dict.fromkeys(optimizer.sections, parts[DELTA])
        optimizer.begin(parts[DELTA].size)
        self.version = 0

    @property
    def parameters(self) -> NDArray[np.float64]:
        """The travelling parameters, (d,) float64: the model's own vector, to be read only."""
        return self._vectors[DELTA]

    def view(self) -> dict[str, NDArray[np.generic]]:
        """What a client is sent: the travelling arrays in their own order, shape and dtype."""
        flat = {
            name: array
            for kind, lay in self._layouts.items()
            for name, array in lay.views(self._vectors[kind]).items()
        }
        return {name: _restore(flat[name], self._dtypes[name]) for name in self.kinds}

    def broadcast(self) -> Mapping[str, NDArray[np.float32]]:
        """Vectors that the optimiser sends along with the model (SCAFFOLD's control variate)."""
        return self._optimizer.broadcast()

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The whole model, with what does not travel, in its first order."""
        whole = {**self._home, **self.view()}
        return {name: whole[name] for name in self._names}

    def apply(self, aggregate: Update, scale: float = 1.0) -> None:
        """One server step; the version grows by one.

        Args:
            aggregate: the combined update, with every section of `layouts`.
            scale: of the optimiser's step: a learning rate times so much, whatever the optimiser makes of aggregates.
        """
        parameters = self._vectors[DELTA]
        before = None if scale == 1 else parameters.copy()
        self._optimizer.step(parameters, aggregate)
        if before is not None:
            parameters -= before
            parameters *= scale
            parameters += before
        for kind in (BUFFERS, COUNTERS):
            if kind in self._vectors:
                self._vectors[kind] += aggregate.sections[kind].vector
        self.version += 1

    def skip(self) -> None:
        """A void round: the version grows, the model stays."""
        self.version += 1

    def state_dict(self) -> State:
        """The travelling vectors in full precision, what stays at home, the version and the optimiser's state.

        The arrays are the model's own: write or copy them before the next `apply`, which changes them in place.
        """
        return {
            "version": self.version,
            "vectors": dict(self._vectors),
            "home": dict(self._home),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up a state of the same architecture, selector and optimiser.

        Raises:
            ValueError: an array of the state has another shape or dtype than the model's, or the optimiser is another.
        """
        vectors, home = mapping_in(state, "vectors"), mapping_in(state, "home")
        loaded = {
            kind: array_in(vectors, kind, vector.shape) for kind, vector in self._vectors.items()
        }
        at_home = {name: array_like(home, name, array) for name, array in self._home.items()}
        version = integer_in(state, "version")
        self._optimizer.load_state_dict(mapping_in(state, "optimizer"))
        self._vectors, self._home, self.version = loaded, at_home, version


_KINDS = (DELTA, BUFFERS, COUNTERS)


def sections_of(
    arrays: Arrays, buffers: Collection[str] | None
) -> tuple[dict[str, str], dict[str, Layout]]:
    """The section that each travelling array's change belongs to, and the layout of each kind of section.

    Args:
        arrays: those that travel, in their order.
        buffers: as for `ServerModel`.

    Raises:
        ValueError: an array is neither of floats nor of integers.
    """
    kinds = {name: _kind(name, array, buffers) for name, array in arrays.items()}
    layouts = {
        kind: Layout.of({name: arrays[name] for name, its in kinds.items() if its == kind})
        for kind in _KINDS
    }
    return kinds, layouts


def _kind(name: str, array: NDArray[np.generic], buffers: Collection[str] | None) -> str:
    if np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_:
        return COUNTERS
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"array {name!r} holds {array.dtype}: a model is made of floats and integer counters"
        )
    statistics = (
        name in buffers
        if buffers is not None
        else any(fnmatchcase(name, p) for p in RUNNING_STATISTICS)
    )
    return BUFFERS if statistics else DELTA


def _gather(layout: Layout, arrays: Arrays) -> NDArray[np.float64]:
    vector = np.empty(layout.size)
    for name, view in layout.views(vector).items():
        view[...] = arrays[name]
    return vector


def _restore(array: NDArray[np.floating], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    if not np.issubdtype(dtype, np.integer):
        return array.astype(dtype)
    # A counter stops at the end of its type: a cast past it is undefined, and a client may report any increase.
    limits = np.iinfo(dtype.name)
    highest = float(limits.max)
    if highest > limits.max:  # 64 bits: the nearest float64 lies past the end
        highest = float(np.nextafter(highest, 0.0))
    whole = np.empty(array.shape)
    np.rint(array, out=whole)
    np.clip(whole, float(limits.min), highest, out=whole)
    return whole.astype(dtype)
