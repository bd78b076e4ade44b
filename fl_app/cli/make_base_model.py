"""`trellis make-base-model`: the command line of `clients.base_model`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_app.cli.main import DONE, FAILED, REFUSED, Parser

if TYPE_CHECKING:
    from clients.base_model.pretrain import BaseModelSettings, Told

_OUTPUT = Path("models", "base-gpt2")
_SETTINGS = ("layers", "width", "heads", "vocab", "context", "batch_size", "lr", "seed")
_EXAMPLES = """examples:
  trellis make-base-model
      4 layers of 128 units and 4,096 tokens, into models/base-gpt2
  trellis make-base-model --minutes 20 --layers 6 --width 256 --output models/larger
  trellis make-base-model --corpus notes --output models/notes
      of every .txt and .md file in notes/ and below
  trellis run task=prose model=lora_lm
      adapts it, on the docstrings of packages that it has not read

Without --corpus the text is the docstrings of networkx, numpy, ray, sympy and transformers as they are installed. A
folder that holds the model of the same settings and text is left as it is, another one is never written over. What is
stopped by Ctrl-C leaves nothing. The last line printed is the path of the folder; base_model.json in it has the
settings and the figures. A budget of tokens gives the same model again, one of minutes does not.

exit codes: 0 done; 1 stopped, or it can't be trained; 2 the command is wrong, or the folder holds something else
"""


def main(arguments: Sequence[str]) -> int:
    """Makes a base model and returns the exit code."""
    options = _parser().read(arguments)
    from clients.base_model.corpus import corpus_source, read_corpus  # torch takes a second
    from clients.base_model.pretrain import BaseModelError, is_made, make_base_model, read_record

    output: Path = options.output.expanduser()
    try:
        settings = _settings(options)
        folder = None if options.corpus is None else options.corpus.expanduser()
        source = corpus_source(folder)
    except ValueError as error:
        print(f"trellis make-base-model: {error}", file=sys.stderr)
        return REFUSED
    if is_made(output, settings, source):
        print("made before, of the same settings and text", file=sys.stderr)
        _conclude(output, read_record(output) or {})
        return DONE
    if output.exists():
        told = "holds something else, or a model of other settings or text"
        print(
            f"trellis make-base-model: {output} {told}: remove it, or name another --output",
            file=sys.stderr,
        )
        return REFUSED
    try:
        print("reading the text", file=sys.stderr, flush=True)
        corpus = read_corpus(folder)
        with _progress() as told_of:
            record = make_base_model(settings, corpus, source, output, told_of)
    except (BaseModelError, OSError, ValueError) as error:
        print(f"trellis make-base-model: {error}", file=sys.stderr)
        return FAILED
    _conclude(output, record)
    return DONE


def _parser() -> Parser:
    parser = Parser(
        "trellis make-base-model",
        usage="trellis make-base-model [-h] [--output DIR] [--corpus DIR] [--tokens N | --minutes M] [--layers N] …",
        description="Trains a tokenizer and a small GPT-2 from nothing, on a CPU, as a base for adapters.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("--output", type=Path, default=_OUTPUT, metavar="DIR", help=f"default {_OUTPUT}")
    add("--corpus", type=Path, metavar="DIR", help="a folder of .txt and .md files to learn from")
    add(
        "--tokens", type=int, metavar="N", help="to train on (default 2500000: minutes on one core)"
    )
    add("--minutes", type=float, metavar="M", help="to train for, in the place of --tokens")
    add("--layers", type=int, metavar="N", help="blocks (default 4)")
    add("--width", type=int, metavar="N", help="of a token's state (default 128)")
    add("--heads", type=int, metavar="N", help="of attention (default 4)")
    add("--vocab", type=int, metavar="N", help="ids of the tokenizer (default 4096)")
    add("--context", type=int, metavar="N", help="tokens of a row at most (default 128)")
    add("--batch-size", type=int, metavar="N", help="rows of a step (default 16)")
    add("--lr", type=float, metavar="X", help="the learning rate at its highest (default 0.002)")
    add("--seed", type=int, metavar="N", help="of the first weights and the order (default 0)")
    return parser


def _settings(options: Any) -> BaseModelSettings:
    """The settings that were named, over the defaults.

    Raises:
        ValueError: one is out of its range, or two budgets are given.
    """
    from clients.base_model.pretrain import BaseModelSettings

    given = {name: getattr(options, name) for name in _SETTINGS}
    named = {name: value for name, value in given.items() if value is not None}
    if options.minutes is not None:
        named |= {"minutes": options.minutes, "tokens": options.tokens}
    elif options.tokens is not None:
        named["tokens"] = options.tokens
    return BaseModelSettings(**named)


def _conclude(output: Path, record: dict[str, Any]) -> None:
    figures = record["figures"]
    print(
        f"{figures['parameters']:,} parameters, trained on {figures['trained_tokens']:,} tokens in "
        f"{figures['seconds']:,.0f} s; perplexity on held-out text {figures['perplexity_before']:,.0f} -> "
        f"{figures['perplexity_after']:.1f}"
    )
    print(output.absolute())


@contextmanager
def _progress() -> Iterator[Told]:
    """A bar with the time that is left on a terminal, a line for each tenth anywhere else; both on standard error."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training", total=1.0)

        def told(spent: float, loss: float) -> None:
            progress.update(bar, completed=spent, description=f"training, loss {loss:.2f}")

        yield told


def _lines() -> Told:
    began = time.monotonic()
    said = 0

    def told(spent: float, loss: float) -> None:
        nonlocal said
        tenth = int(10 * spent)
        if tenth > said:
            said = tenth
            seconds = time.monotonic() - began
            left = seconds / spent - seconds
            print(
                f"{10 * tenth:>3}%  loss {loss:.2f}  {seconds:.0f} s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return told
