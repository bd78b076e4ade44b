"""Parts of a pretrained model, each read by itself: what a part does not hold is neither read nor made.

The model's class is built without memory, what belongs to other parts is taken out, and the rest is filled from
safetensors, tensor by tensor. So a client that holds a quarter of a model needs memory for a quarter of it. Nothing is
unpickled, and no code that comes with weights is run. A name on the hub is looked up only where a user names one
(`clients.places`).

It knows nothing of adapters or training.
"""

from __future__ import annotations

from typing import Any

import torch

from clients.places import DataError, Place, require_folder
from clients.split.halves import Bottom, Middle, Top, part_class
from clients.split.surgery import body_of, check_cut, family_of
from clients.tasks.text import MEND


def load_bottom(
    place: Place, *, at: int, cls: Any = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """The embeddings and the first `at` blocks of a pretrained model.

    Args:
        place: a folder with config.json and safetensors, or a hub name.
        at: how many blocks are below the cut, from 1 to all but one.
        cls: of the whole model: a class of transformers, or one of its Auto classes; None is AutoModel.
        dtype: of the weights in memory.
        settings: replace those of config.json, as `num_labels`.

    Raises:
        DataError: there is no such folder, or the part can't be loaded from it.
        ValueError: the model's family can't be cut, or not there.
    """
    return _loaded(place, Bottom, at, None, cls, dtype, settings)


def load_top(
    place: Place, *, at: int, cls: Any = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """The blocks from `at` on and the heads; heads that the folder does not have are random. See `load_bottom`."""
    return _loaded(place, Top, at, None, cls, dtype, settings)


def load_middle(
    place: Place,
    *,
    at: int,
    tail: int,
    cls: Any = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """The blocks from `at` on that are before `tail`. See `load_bottom`."""
    return _loaded(place, Middle, at, tail, cls, dtype, settings)


def load_tail(
    place: Place, *, at: int, cls: Any = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """A top that may have no block at all: `at` is up to the number of blocks. See `load_top`."""
    return _loaded(place, Top, 1, at, cls, dtype, settings)


def whole_class(config: Any, cls: Any) -> Any:
    """The class of the whole model of a configuration; `cls` as `load_bottom` takes it."""
    import transformers  # takes a second

    family_of(config)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    with torch.device("meta"):
        return type((cls or transformers.AutoModel).from_config(config, trust_remote_code=False))


def _loaded(
    place: Place,
    kind: Any,
    at: int,
    tail: int | None,
    cls: Any,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> Any:
    folder = require_folder(place, MEND)
    import transformers  # takes a second

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, **settings
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(place, error) from error
    count = config.num_hidden_layers
    check_cut(count, at, tail)
    if kind is Bottom:
        start, stop = 0, at
    elif kind is Middle:
        start, stop = at, tail or count
    else:
        start, stop = tail or at, count
    try:
        part, report = part_class(kind, whole_class(config, cls)).from_pretrained(
            folder,
            config=config,
            start=start,
            stop=stop,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, KeyError, RuntimeError) as error:
        raise _unloadable(place, error) from error
    body = tuple(f"{path}." for path in body_of(part))
    lost = sorted(name for name in report["missing_keys"] if name.startswith(body))
    if lost:
        raise DataError(f"no model can be loaded from {place}: it has no {lost[0]}")
    return part


def _unloadable(place: Place, error: Exception) -> DataError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"no model can be loaded from {place}: {first}")
