"""`trellis privacy-audit`: the command line of `fl_app.audit`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fl_app.cli.main import DONE, FAILED, Parser
from fl_app.config.faults import ConfigError, Fault

if TYPE_CHECKING:
    from fl_app.audit.conduct import Plan
    from fl_app.audit.split.exposure import Sizes
    from fl_app.audit.target import Target

_EXAMPLES = """examples:
  trellis privacy-audit runs/dp-mnist-s0-1a2b3c4d
      the loss attack on the model; canary clients where the run clips its clients or promises them an epsilon
  trellis privacy-audit RUN --canaries 500
      canaries only, more of them: with all of m coins right the bound at 95% is about ln(m / 4.4)
  trellis privacy-audit RUN --membership --shadows 16
      examples only: the loss attack, and LiRA with 16 shadow models (kept, so that more can follow)
  trellis privacy-audit RUN --inversion
      pictures from single updates, plain, clipped, noised and masked: RUN/audit/inversion.png
  trellis privacy-audit RUN --split --seconds 600 --texts 200
      a split run (the default for one, beside the loss attack): tokens from activations and gradients, labels from
      gradients, senders from updates, each beside what a guess gets: RUN/audit/split.json and split.png

RUN is a run's folder, which stays as it is but for RUN/audit. Canaries and each shadow train as long as the run did, on
the in-process engine. What lies in RUN/audit is made of the data and covered by no promise: keep it as you keep the
data. A bound below the promise proves nothing; one above it refutes the promise at the confidence given. The last line
printed is the path of audit.json. docs/privacy_audit.md says what each figure means.

exit codes: 0 done; 1 a bound lies above the promise, or the audit failed; 2 RUN or an option is wrong
"""


def main(arguments: Sequence[str]) -> int:
    """Audits a run and returns the exit code.

    Raises:
        ConfigError: the folder holds no run that can be audited, or an option is wrong.
    """
    parser = Parser(
        "trellis privacy-audit",
        usage="trellis privacy-audit [-h] RUN [--membership] [--shadows N] [--canaries N] [--inversion] "
        "[--split] [--seconds S] [--texts N] [--confidence P]",
        description="Attacks a run that has ended, and holds what was learnt against what the run promises.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, with summary.json")
    parser.add_argument(
        "--membership", action="store_true", help="which examples was the model trained on?"
    )
    parser.add_argument(
        "--shadows",
        type=int,
        metavar="N",
        help="shadow models for --membership (default 4; 0: none)",
    )
    parser.add_argument(
        "--canaries", type=int, metavar="N", help="which canary clients took part? at least 8"
    )
    parser.add_argument(
        "--inversion", action="store_true", help="what does one update tell of one picture?"
    )
    parser.add_argument(
        "--split", action="store_true", help="what do activations, gradients and updates tell?"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="for --split: no attack begins later (150)"
    )
    parser.add_argument(
        "--texts", type=int, metavar="N", help="for --split: clients' texts that are read (48)"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="P", help="of each bound (default 0.95)"
    )
    options = parser.read(arguments)
    if not 0.5 <= options.confidence < 1:
        raise ConfigError(
            [Fault("--confidence", "must be at least 0.5 and less than 1", options.confidence)]
        )
    if options.canaries is not None and options.canaries < 8:
        raise ConfigError([Fault("--canaries", "must be at least 8", options.canaries)])
    if options.shadows is not None and (options.shadows < 0 or options.shadows == 1):
        raise ConfigError([Fault("--shadows", "must be 0, or at least 2", options.shadows)])
    if options.seconds is not None and not options.seconds > 0:
        raise ConfigError([Fault("--seconds", "must be greater than 0", options.seconds)])
    if options.texts is not None and options.texts < 2:
        raise ConfigError([Fault("--texts", "must be at least 2", options.texts)])
    return _audit(options)


def _audit(options: Any) -> int:
    here = str(Path.cwd())
    if here not in sys.path:  # classes of the user's own, as for `trellis run`
        sys.path.append(here)
    from fl_app.audit.conduct import DOCUMENT, conduct, refuted
    from fl_app.audit.target import load
    from fl_app.audit.training import AuditError
    from fl_app.services.logs import log_to

    target = load(Path(options.run))
    plan, sizes = _plan(options, target), _sizes(options, target)
    print(f"audit of {target.path.name}: {_promise(target)}", flush=True)
    try:
        target.folder.mkdir(exist_ok=True)
        with log_to(target.folder / "audit.log", lambda text: print(text, file=sys.stderr)):
            document = conduct(target, plan, _Shown)
            if sizes is not None:
                from fl_app.audit.split.conduct import conduct as conduct_split

                _show_split(conduct_split(target, sizes, _Shown, options.confidence))
    except AuditError as error:
        print(f"the audit failed: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        raise ConfigError([Fault("RUN", f"{target.folder} can't be written ({error})")]) from error
    _show(document)
    print(target.folder / DOCUMENT)
    return FAILED if refuted(document) else DONE


def _plan(options: Any, target: Target) -> Plan:
    from fl_app.audit.conduct import DEFAULT_SHADOWS, Plan, default_plan

    membership = options.membership or options.shadows is not None
    if not (membership or options.canaries or options.inversion or options.split):
        return default_plan(target, options.confidence)
    shadows = DEFAULT_SHADOWS if options.shadows is None else options.shadows
    return Plan(
        membership=membership,
        shadows=shadows if membership else 0,
        canaries=options.canaries or 0,
        inversion=options.inversion,
        confidence=options.confidence,
    )


def _sizes(options: Any, target: Target) -> Sizes | None:
    """How much is tried at the cut; None where nothing is."""
    named = (options.membership, options.shadows, options.canaries, options.inversion)
    asked = options.split or options.seconds is not None or options.texts is not None
    if not asked and (
        any(one is not None and one is not False for one in named) or not target.assembly.split
    ):
        return None
    from fl_app.audit.split.exposure import Sizes

    if not target.assembly.split:
        raise ConfigError([Fault("--split", "needs a run of a split model: strategy=split_lora")])
    given = {"seconds": options.seconds, "private": options.texts}
    return Sizes(**{name: value for name, value in given.items() if value is not None})


def _promise(target: Target) -> str:
    promise = target.promise
    if promise is None:
        return "it promises no privacy"
    return f"it promises ε = {promise.epsilon:.4g}, δ = {promise.delta:.3g} for each {promise.unit}"


class _Shown:
    """Progress of one part: a line when it begins, and at most one every few seconds.

    Args:
        title: what begins.
    """

    _EVERY = 5.0

    def __init__(self, title: str) -> None:
        self._title, self._began = title.partition(":")[0], time.monotonic()
        self._last = self._began
        print(title, flush=True)

    def __call__(self, done: int, total: int) -> None:
        """Tells how far it is."""
        now = time.monotonic()
        if done < total and now - self._last < self._EVERY:
            return
        self._last = now
        print(f"  {self._title}: {done} of {total}, {now - self._began:.0f} s", flush=True)


def _show(document: dict[str, Any]) -> None:
    """Tables as Markdown, fitted to a terminal, whole in a pipe."""
    if document["verdicts"]:
        _table(
            ("attack", "unit", "ε at least", "confidence", "promised ε", "verdict"),
            [_verdict_row(one) for one in document["verdicts"]],
        )
    if (membership := document["membership"]) is not None:
        named = {"loss": membership["loss"], "LiRA": membership["lira"]}
        _table(
            ("attack", "AUC", "interval", "TPR at 1% FPR", "TPR at 0.1% FPR"),
            [_rank_row(name, one) for name, one in named.items() if one is not None],
        )
    if (inversion := document["inversion"]) is not None:
        views = inversion["views"].items()
        _table(
            ("update", "MSE", "PSNR, dB", "SSIM"),
            [(name, *_medians(figures)) for name, figures in views],
        )


def _show_split(document: dict[str, Any]) -> None:
    """Every score by itself, then what was not tried and why."""
    _table(
        ("attack", "measure", "cut", "setting", "value", "interval", "a guess", "n"),
        [_score_row(one) for one in document["scores"]],
    )
    for name, reason in document["not_applicable"].items():
        print(f"{name}: not applicable, {reason}")
    for name in document["no_time_for"]:
        print(f"{name}: no time; --seconds gives more")


def _score_row(one: dict[str, Any]) -> tuple[str, ...]:
    low, high = one["interval"]
    cut = "-" if one["cut"] is None else str(one["cut"])
    value, guess = f"{one['value']:.3f}", f"{one['baseline']:.3f}"
    span = f"{low:.3f} to {high:.3f}"
    return (one["attack"], one["measure"], cut, one["setting"], value, span, guess, str(one["n"]))


def _verdict_row(one: dict[str, Any]) -> tuple[str, ...]:
    promised = one["promised_epsilon"]
    return (
        one["attack"],
        one["unit"],
        f"{one['epsilon_lower_bound']:.3f}",
        f"{one['confidence']:g}",
        "-" if promised is None else f"{promised:.4g}",
        one["verdict"],
    )


def _rank_row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    low, high = one["auc_interval"]
    rates = (one["tpr_at_fpr_1_percent"], one["tpr_at_fpr_0.1_percent"])
    return (
        name,
        f"{one['auc']:.3f}",
        f"{low:.3f} to {high:.3f}",
        *(f"{rate:.2%}" for rate in rates),
    )


def _medians(figures: dict[str, list[float]]) -> tuple[str, ...]:
    return tuple(
        f"{median(figures[name]):.{digits}f}"
        for name, digits in (("mse", 4), ("psnr", 1), ("ssim", 2))
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN)
    for column in head:
        table.add_column(Text(column))
    for row in rows:
        table.add_row(*map(Text, row))
    width = None if sys.stdout.isatty() else 1000
    Console(file=sys.stdout, highlight=False, width=width).print(table)
