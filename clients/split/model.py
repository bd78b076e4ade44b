"""A pretrained language model with low-rank adapters that is cut between two blocks, and its two halves.

Clients hold `Lower`: the embeddings, the blocks below the cut and their adapters; U-shaped, also what comes last, the
heads. The server holds `Upper`, the rest. `SplitLora` is both around one copy of the weights: what a server that
evaluates the whole model needs, and what says which half an array belongs to. Names of arrays are those of the whole,
wherever the cut is, so a checkpoint, an aggregate and an adapter know nothing of it.

Hu et al. 2021, "LoRA", eq. 3; Vepakomma et al. 2018, "Split learning for health", figure 2. Pretrained weights are
no part of a state: adapters and heads are trained, sent and saved. Nothing here knows of messages or of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clients.lora.adapters import Adapted, adapted
from clients.lora.model import sharing_weights
from clients.places import DataError, Place, require_folder
from clients.pretrained import check_rows, check_tokens, load_encoder
from clients.split.coding import Precision, mask_of
from clients.split.loading import load_bottom, load_middle, load_tail, load_top
from clients.split.planner import Limits, Plan, plan
from clients.split.profile import measure
from clients.tasks.text import MEND

SplitPoint = Annotated[int, Ge(1)] | Annotated[float, Gt(0)] | Literal["auto"]
Half = Literal["whole", "lower", "upper"]

_Lay = Callable[[nn.Module], Adapted]
"""Puts a model's adapters into a part of it."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SplitLora(nn.Module):
    """The whole of a split model, with low-rank adapters.

    Args:
        input_shape: (length,) of one row of tokens.
        num_classes: number of logits.
        vocab_size: how many ids the task's tokens have; must be those of this model's tokenizer.
        padding_id: the id that fills a row up behind its last token.
        goals: classes of each of the task's goals, by name, where it has several; each has a head of its own.
        pretrained: a folder with config.json, model.safetensors and the tokenizer's files, or a hub name.
        split_point: blocks that clients hold: a number of them, or a share of all below 1; `auto` measures what each
            cut costs.
        limits: what clients and the server have; `split_point=auto` looks at it, and nothing else does.
        u_shaped: labels stay with the clients, who hold what comes last.
        head: `classes`: a linear layer on the mean of the last states. `tokens`: the language model's own, frozen.
        rank: r, of A and B.
        alpha: α; B·A counts α/r times.
        targets: endings of the names of the layers that get adapters; None for those that peft names for the family.
        share_a: A is frozen and the same everywhere, and B alone is trained (FFA-LoRA).
        residual_rank: of the frozen product beside each layer, which exact aggregation needs; 0 for none.
        base_dtype: of the frozen weights; adapters are float32.
        auxiliary: whether clients have a head of their own at the cut, to train on without the server.
        at: blocks that clients hold, where that has been found out already.
        ranks: each layer's own rank; a layer that is not named, or with 0, has no adapter. None: `rank` for all.

    Raises:
        DataError: there is no such folder, or what is in it cannot be loaded.
        ValueError: the task has no tokens, or those of another tokenizer; the family can't be cut, or not there.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        vocab_size: int | None,
        padding_id: int = 0,
        goals: Mapping[str, int] | None = None,
        *,
        pretrained: Place,
        split_point: SplitPoint = 0.5,
        limits: Limits | None = None,
        u_shaped: bool = False,
        head: Literal["classes", "tokens"] = "classes",
        rank: Annotated[int, Ge(1)] = 8,
        alpha: Annotated[float, Gt(0)] = 16.0,
        targets: Sequence[str] | None = None,
        share_a: bool = False,
        residual_rank: Annotated[int, Ge(0)] = 0,
        base_dtype: Literal["float32", "bfloat16"] = "float32",
        auxiliary: bool = False,
        at: int | None = None,
        half: Half = "whole",
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        vocab_size = check_rows(vocab_size, input_shape)
        blocks = block_count(pretrained)
        if at is None and split_point == "auto":
            raise ValueError("split_point=auto is measured before a half is made: give `at`")
        self.at = cut_at(split_point, blocks) if at is None else at  # type: ignore[arg-type]
        if (head == "tokens") != (num_classes == vocab_size):
            asked = "every token" if num_classes == vocab_size else "whole texts"
            mend = "set model.head=tokens" if num_classes == vocab_size else "use task=prose"
            raise ValueError(f"head={head}, and this task asks about {asked}: {mend}")
        source = _Source(pretrained, self.at, blocks, u_shaped, head, base_dtype)
        self._lay = partial(
            adapted,
            rank=rank,
            alpha=alpha,
            targets=targets,
            ranks=ranks,
            share_a=share_a,
            residual_rank=residual_rank,
        )
        classes = goals if goals and len(goals) > 1 else {"": num_classes}
        if auxiliary and (u_shaped or head == "tokens"):
            raise ValueError("an auxiliary head has classes, and goes with labels that travel")
        lower = upper = None
        if half != "upper":
            lower = Lower(source, self._lay, padding_id)
            check_tokens(lower.bottom, pretrained, vocab_size, input_shape[0])
        if half != "lower":
            upper = Upper(source, self._lay)
        # Drawn after the adapters, so that the whole begins as it would if it were not cut.
        heads = _heads(source.hidden, classes) if head == "classes" else None
        last = lower if u_shaped else upper
        if last is not None:
            last.heads = heads
        if lower is not None and auxiliary:
            lower.auxiliary = _heads(source.hidden, classes)
        self.factors: Literal["both", "shared_a"] = "shared_a" if share_a else "both"
        self.padding_id, self.blocks, self.hidden = padding_id, blocks, source.hidden
        self.u_shaped, self.longest = u_shaped, input_shape[0]
        self.of_tokens = head == "tokens"
        self._source, self._limits = source, limits or Limits()
        self._register(lower, upper)

    def _register(self, lower: Lower | None, upper: Upper | None) -> None:
        """Both halves' arrays under the whole's names; the halves themselves are no submodules."""
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "upper", upper)
        halves = [half for half in (lower, upper) if half is not None]
        for kind in ("adapters", "residual"):
            merged = {name: part for half in halves for name, part in getattr(half, kind).items()}
            if merged or kind == "adapters":
                setattr(self, kind, nn.ModuleDict(merged))
        heads = next((half.heads for half in halves if half.heads is not None), None)
        auxiliary = None if lower is None else lower.auxiliary
        for name, found in (("head", heads), ("auxiliary", auxiliary)):
            if found is not None and "" in found:
                setattr(self, name, found[""])
            elif found is not None:
                setattr(self, "heads" if name == "head" else name, found)

    lower: Lower
    upper: Upper

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes) or (batch, length, vocabulary), of tokens, (batch, length) long."""
        activation, lengths = self.lower(inputs)
        output = self.upper(activation, lengths)
        logits = self.lower.finish(output, lengths) if self.u_shaped else output
        missing = inputs.shape[1] - logits.shape[1] if logits.dim() == 3 else 0
        return F.pad(logits, (0, 0, 0, missing)) if missing else logits

    def clients_names(self) -> frozenset[str]:
        """The arrays of the clients' half."""
        own = {id(tensor) for tensor in self.lower.parameters()}
        return frozenset(name for name, tensor in self.named_parameters() if id(tensor) in own)

    def planned(
        self, inputs: Tensor, precision: Precision, *, batches: int, clients: int, copies: int
    ) -> Plan:
        """The cut that costs least within the limits, measured on the whole model here and now.

        Args:
            inputs: a batch of tokens, (batch, length) long.
            precision: of what crosses the cut.
            batches: mini-batches in one turn.
            clients: that the server serves in turn.
            copies: of its half, one for each client at work where each has its own.

        Raises:
            NoCutFitsError: none is within the limits.
        """
        encoder = load_encoder(self._source.place).eval().requires_grad_(False)
        self._lay(encoder)
        lengths = self.lower.lengths(inputs)
        longest = int(lengths.max())
        mask = mask_of(lengths, longest).long()
        batch = {"input_ids": inputs[:, :longest], "attention_mask": mask}
        costs = measure(encoder, batch).cuts(precision, batches=batches, copies=copies)
        return plan(costs, replace(self._limits, cohort=clients))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for half in (self.lower, self.upper):
            if half is not None:
                half.move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True)
class _Source:
    """Where a model's frozen parts come from."""

    place: Place
    at: int
    blocks: int
    u_shaped: bool
    head: Literal["classes", "tokens"]
    dtype: str

    def part(self, kind: Literal["bottom", "middle", "top", "tail"]) -> Any:
        """A frozen part in layers of its own around tensors that a process has once."""
        return sharing_weights(_loaded(self, kind))

    @property
    def hidden(self) -> int:
        """Numbers of an activation at one token."""
        return int(_config(self.place).hidden_size)


@lru_cache(maxsize=4)
def _loaded(source: _Source, kind: str) -> Any:
    import transformers  # takes a second

    cls = transformers.AutoModelForCausalLM if source.head == "tokens" else transformers.AutoModel
    common: dict[str, Any] = {"cls": cls, "dtype": _DTYPES[source.dtype]}
    with torch.random.fork_rng(
        devices=[]
    ):  # what is loaded once must not move the draws of a model made twice
        if kind == "bottom":
            part = load_bottom(source.place, at=source.at, **common)
        elif kind == "middle":
            part = load_middle(source.place, at=source.at, tail=source.blocks, **common)
        elif kind == "tail":
            part = load_tail(source.place, at=source.blocks, **common)
        else:
            part = load_top(source.place, at=source.at, **common)
    return part.eval().requires_grad_(False)


class _Hull(nn.Module):
    """Adapters, and the frozen part that they are in, which is no submodule."""

    def __init__(self, part: nn.Module, lay: _Lay) -> None:
        super().__init__()
        laid = lay(part)
        self.adapters, self.residual = laid.adapters, laid.residual
        self.heads: nn.ModuleDict | None = None
        object.__setattr__(self, "part", part)

    part: Any

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Changes device or dtype of what is frozen."""
        self.part._apply(fn)


class Lower(_Hull):
    """The clients' half: the bottom, and U-shaped what comes last."""

    def __init__(self, source: _Source, lay: _Lay, padding_id: int) -> None:
        super().__init__(source.part("bottom"), lay)
        self.padding_id = padding_id
        self.auxiliary: nn.ModuleDict | None = None
        tail = source.part("tail") if source.u_shaped else None
        object.__setattr__(self, "tail", tail)

    tail: Any

    @property
    def bottom(self) -> Any:
        """The frozen blocks with their adapters."""
        return self.part

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The activation at the cut, (batch, longest, hidden) float32, and the texts' lengths, (batch,) long.

        Args:
            inputs: tokens, (batch, length) long; padding stands at the end, and what all rows have of it is cut off.
        """
        lengths = self.lengths(inputs)
        longest = int(lengths.max()) if len(inputs) else 1
        mask = mask_of(lengths, longest).long()
        activation: Tensor = self.part(input_ids=inputs[:, :longest], attention_mask=mask)
        return activation.float(), lengths

    def lengths(self, inputs: Tensor) -> Tensor:
        """Tokens of each text up to the last that is no padding, (b,) long, at least 1."""
        places = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)
        return ((inputs != self.padding_id) * places).amax(dim=1).clamp(min=1)

    def embedded(self, inputs: Tensor) -> Tensor:
        """What the tokens are before the first block, (batch, length, embedding) float32, without gradients."""
        with torch.no_grad():
            vectors: Tensor = self.part.get_input_embeddings()(inputs)
        return vectors.float()

    def finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Logits of what the server's half gave, where the clients hold what comes last."""
        return _concluded(self.tail, self.heads, states, lengths)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Changes device or dtype of what is frozen."""
        super().move(fn)
        if self.tail is not None:
            self.tail._apply(fn)


class Upper(_Hull):
    """The server's half: the top, or U-shaped the middle."""

    def __init__(self, source: _Source, lay: _Lay) -> None:
        super().__init__(source.part("middle" if source.u_shaped else "top"), lay)
        self.u_shaped = source.u_shaped

    def forward(self, activation: Tensor, lengths: Tensor) -> Tensor:
        """Logits, or U-shaped the states before what comes last, of (batch, longest, hidden) float32."""
        if self.u_shaped:
            mask = mask_of(lengths, activation.shape[1]).long()
            states: Tensor = self.part(activation, attention_mask=mask)
            return states.float()
        return _concluded(self.part, self.heads, activation, lengths)


def _concluded(
    part: Any, heads: nn.ModuleDict | None, activation: Tensor, lengths: Tensor
) -> Tensor:
    """Logits of an activation: heads on the mean of the last states, or the language model's own."""
    mask = mask_of(lengths, activation.shape[1]).long()
    output = part(activation, attention_mask=mask)
    if heads is None:
        logits: Tensor = output.logits
        return logits.float()
    weights = mask.unsqueeze(2).float()
    mean = (output.last_hidden_state.float() * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.cat([head(mean) for head in heads.values()], dim=1)


def fitting(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets of as many tokens as there are logits, where each token has one: what all rows have of padding is cut."""
    return targets[:, : logits.shape[1]] if logits.dim() == 3 else targets


def _heads(hidden: int, classes: Mapping[str, int]) -> nn.ModuleDict:
    """One linear layer a goal; one goal's has no name."""
    heads = nn.ModuleDict()
    for goal, count in classes.items():
        # Past ModuleDict's own check, which wants a name.
        heads._modules[goal] = nn.Linear(hidden, count)
    return heads


def cut_at(split_point: float, blocks: int) -> int:
    """How many of so many blocks clients hold.

    Raises:
        ValueError: not one block at least would be on each side.
    """
    at = round(split_point * blocks) if split_point < 1 else split_point
    if at != int(at) or not 1 <= at < blocks:
        raise ValueError(
            f"split_point={split_point}: of {blocks} blocks, clients hold 1 to {blocks - 1}, or a share of them"
        )
    return int(at)


def block_count(place: Place) -> int:
    """Blocks of a pretrained model.

    Raises:
        DataError: there is no such folder, or no configuration in it.
    """
    return int(_config(place).num_hidden_layers)


@lru_cache(maxsize=4)
def _config(place: Place) -> Any:
    folder = require_folder(place, MEND)
    from transformers import AutoConfig  # takes a second

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no model can be loaded from {place}: {error!s:.200}") from error
