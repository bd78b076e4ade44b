"""A small GPT-2 trained from nothing, on a CPU, in minutes: a base for adapters where no weights can be fetched.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", the architecture (transformers'
GPT2LMHeadModel, without dropout: the corpus is read about once); AdamW (Loshchilov and Hutter 2019, "Decoupled Weight
Decay Regularization", Algorithm 2) with a warm-up and half a cosine. A budget of tokens gives the same model again
for the same seed, corpus and machine; one of minutes does not. Nothing is written before the training is over, and
then a folder appears as a whole. What the text is, `corpus` says.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from clients.base_model.corpus import Corpus
from clients.base_model.tokenizer import LEAST_VOCABULARY, train_tokenizer
from strategies.ranges import Ranged

RECORD: Final = "base_model.json"
"""The file that says what a folder holds; it is written last, with the hashes of the others."""

_FORMAT: Final = "trellis-base-model-1"
_WARM_UP, _LAST_RATE = 0.05, 0.1
"""The share of the budget in which the learning rate rises, and the share of it that is left at the end."""
_DECAY, _MOST_NORM = 0.1, 1.0

Told = Callable[[float, float], None]
"""Is told how much of the budget is spent, 0 to 1, and the loss of the last batch, nats a token."""


class BaseModelError(RuntimeError):
    """A base model that can't be made, or a folder that is another one; says what to do."""


@dataclass(frozen=True)
class BaseModelSettings(Ranged):
    """What is trained and for how long.

    Attributes:
        layers: blocks.
        width: of a token's state; a multiple of `heads`.
        heads: of attention.
        vocab: ids of the tokenizer at most.
        context: tokens of a row; the model takes no longer ones.
        tokens: that it is trained on, repeated ones counted again; None where `minutes` is given.
        minutes: of training; None where `tokens` is given.
        batch_size: rows of a step.
        lr: the learning rate at its highest.
        seed: of the first weights and of the order of rows.
    """

    layers: Annotated[int, Ge(2)] = 4
    width: Annotated[int, Ge(8)] = 128
    heads: Annotated[int, Ge(1)] = 4
    vocab: Annotated[int, Ge(LEAST_VOCABULARY)] = 4_096
    context: Annotated[int, Ge(8)] = 128
    tokens: Annotated[int, Ge(1)] | None = 2_500_000
    minutes: Annotated[float, Gt(0)] | None = None
    batch_size: Annotated[int, Ge(1)] = 16
    lr: Annotated[float, Gt(0), Lt(1)] = 2e-3
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width = {self.width}: must be a multiple of heads = {self.heads}")
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("a budget is given in tokens or in minutes: one of them")


def is_made(folder: Path, settings: BaseModelSettings, source: Mapping[str, str]) -> bool:
    """Whether a folder holds the whole model of these settings and this source, each file as it was written."""
    record = read_record(folder)
    return (
        record is not None
        and record.get("settings") == asdict(settings)
        and record.get("source") == dict(source)
        and isinstance(files := record.get("files"), dict)
        and bool(files)
        and all(
            (folder / name).is_file() and _sha256(folder / name) == digest
            for name, digest in files.items()
        )
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a folder says of the base model that it holds; None where it says nothing that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


def make_base_model(
    settings: BaseModelSettings,
    corpus: Corpus,
    source: Mapping[str, str],
    output: Path,
    told: Told = lambda spent, loss: None,
) -> dict[str, Any]:
    """Trains a tokenizer and a model and writes both into a new folder.

    Args:
        settings: of the model and its training.
        corpus: the text.
        source: what the corpus is read from, for the record.
        output: the folder; there must be nothing yet.
        told: of the progress.

    Returns:
        The record, as in `base_model.json`: perplexities are of the held-out text, a token.

    Raises:
        BaseModelError: there is something at `output`, the corpus is shorter than a row, or the loss is not finite.
        OSError: the folder can't be written.
    """
    if output.exists():
        raise BaseModelError(f"{output} is there already: remove it, or choose another folder")
    tokenizer = train_tokenizer(corpus.train, settings.vocab)
    train, held_out = (stream(tokenizer, texts) for texts in (corpus.train, corpus.held_out))
    if min(len(train), len(held_out)) <= settings.context:
        raise BaseModelError(
            f"{corpus.described}: {len(train):,} tokens to train on and {len(held_out):,} held out; each must be more "
            f"than a row's {settings.context}: add text, or lower the context"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _new_model(settings, tokenizer)
    before = mean_loss(model, held_out, settings.context)
    began = time.monotonic()
    seen = _descend(model, train, settings, told)
    seconds = time.monotonic() - began
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "corpus_tokens": len(train),
        "held_out_tokens": len(held_out),
        "trained_tokens": seen,
        "seconds": round(seconds, 1),
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(mean_loss(model, held_out, settings.context)),
    }
    record = {
        "format": _FORMAT,
        "settings": asdict(settings),
        "source": dict(source),
        "corpus_sha256": corpus.sha256,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "figures": figures,
    }
    return _write(model, tokenizer, record, output)


def stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The tokens of all texts one behind the other, (n,) long, an end before the first and behind each."""
    found: list[int] = [tokenizer.eos_token_id]
    for ids in tokenizer(list(texts))["input_ids"]:
        found += ids
        found.append(tokenizer.eos_token_id)
    return torch.tensor(found, dtype=torch.long)


def mean_loss(model: nn.Module, tokens: Tensor, context: int, batch_size: int = 64) -> float:
    """Cross-entropy of the next token, nats, over rows of `context` tokens that follow each other; the rest is left."""
    rows = (len(tokens) - 1) // context
    starts = torch.arange(rows) * context
    model.eval()
    with torch.no_grad():
        total = sum(
            _loss(model, tokens, some, context).item() * len(some)
            for some in torch.split(starts, batch_size)
        )
    return float(total) / rows


def _loss(model: nn.Module, tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    rows = tokens[starts.unsqueeze(1) + torch.arange(context + 1)]
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _new_model(settings: BaseModelSettings, tokenizer: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # takes a second

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _descend(model: nn.Module, tokens: Tensor, settings: BaseModelSettings, told: Told) -> int:
    """Trains in place until the budget is spent; returns the tokens that were trained on."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": _DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, 0.95),
    )
    model.train()
    began, seen = time.monotonic(), 0
    for starts in _batches(len(tokens), settings):
        spent = _spent(settings, seen, time.monotonic() - began)
        if spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _rate(spent)
        optimizer.zero_grad()
        loss = _loss(model, tokens, starts, settings.context)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), _MOST_NORM)
        optimizer.step()
        seen += starts.numel() * settings.context
        value = loss.item()
        if not math.isfinite(value):
            raise BaseModelError(f"the loss is {value} after {seen:,} tokens: lower the lr")
        told(min(1.0, _spent(settings, seen, time.monotonic() - began)), value)
    return seen


def _batches(length: int, settings: BaseModelSettings) -> Iterator[Tensor]:
    """Where the rows of each step begin, without end: every pass has another order and begins elsewhere in the text."""
    generator = torch.Generator().manual_seed(settings.seed)
    context = settings.context
    while True:
        first = int(torch.randint(context, (1,), generator=generator))
        rows = (length - 1 - first) // context
        if rows:
            order = torch.randperm(rows, generator=generator)
            yield from torch.split(first + order * context, settings.batch_size)


def _spent(settings: BaseModelSettings, seen: int, seconds: float) -> float:
    if settings.tokens is not None:
        return seen / settings.tokens
    assert settings.minutes is not None  # the settings have one of the two
    return seconds / (60 * settings.minutes)


def _rate(spent: float) -> float:
    """The share of the highest learning rate, at a share of the budget."""
    if spent < _WARM_UP:
        return _LAST_RATE + (1 - _LAST_RATE) * spent / _WARM_UP
    angle = math.pi * (spent - _WARM_UP) / (1 - _WARM_UP)
    return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(angle)) / 2


def _write(model: Any, tokenizer: Any, record: dict[str, Any], output: Path) -> dict[str, Any]:
    """Everything into a folder of another name beside `output`, which then gets its name."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as temporary:
        new = Path(temporary) / output.name
        model.save_pretrained(new)
        tokenizer.save_pretrained(str(new))
        files = {path.name: _sha256(path) for path in sorted(new.iterdir())}
        whole = {**record, "files": files}
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        (new / RECORD).write_text(text, encoding="utf-8")
        new.rename(output)
    return whole


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
