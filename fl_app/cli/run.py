"""`trellis run`: composes the configuration, and hands it to a back end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fl_app.cli.main import DONE, Parser
from fl_app.cli.on_flower import on_flower
from fl_app.cli.own_choices import add_choices, find_own_classes

if TYPE_CHECKING:
    from fl_app.config.schema import Config

_EXAMPLES = """examples:
  trellis run
      FedAvg on real MNIST images, 10 clients with Dirichlet(0.5) label skew
  trellis run strategy=fedadam task.partition=iid num_clients=50 rounds=20 seed=3
      another strategy, other data, other numbers
  trellis run strategy=fedadam server=yogi
      a part that is named wins over the strategy's
  trellis run experiment=quickstart output_dir=/tmp/runs run_name=first
      a whole setting by its name (trellis list experiments)
  trellis run backend=flower rounds=3
      on Flower's own simulation
  trellis run strategy=robust num_clients=20 attack=alie attack.fraction=0.3 quarantine=strikes
      a robust rule against clients that lie, on the in-process engine
  trellis run strategy=dp model=hog num_clients=1000 rounds=60 privacy.target_epsilon=3
      differential privacy for clients: the noise is found for the budget, which stops the run
  trellis run task._target_=my_module.MyTask
      a class of your own, from the working directory or PYTHONPATH
  trellis run strategy=scaffold --dry-run
      shows the resolved configuration and runs nothing
  trellis run -m strategy=fedavg,fedprox seed=1,2,3 --jobs 2
      a sweep: every combination, two at a time (also choice(a,b), range(1,4), glob(fed*), sort, shuffle)

The same command again takes up a run that was stopped (resume=auto | never | must). Ctrl-C stops one.
The last line printed is the path of summary.json; of a sweep, that of sweep.json.

exit codes: 0 done; 1 the run failed or was stopped; 2 the configuration is wrong; 3 a guard stopped the run
"""


def main(arguments: Sequence[str]) -> int:
    """Runs one training and returns its exit code.

    Raises:
        ConfigError: the configuration is refused.
    """
    parser = Parser(
        "trellis run",
        usage="trellis run [-h] [--dry-run] [-m [--jobs N]] [--config-dir DIR] [KEY=VALUE …]",
        description="Runs one federated training, or a sweep of them. Overrides are Hydra's: group=choice, key=value.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="`trellis list` shows the choices"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration as YAML; of a sweep, its jobs and their folders",
    )
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of the values listed"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="with -m: how many runs at a time (default 1)"
    )
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        help="a folder with choices of your own, as in docs/extending.md",
    )
    options = parser.read(arguments)
    add_choices(options.config_dir)
    if options.multirun:
        find_own_classes()
        from fl_app.cli.multirun import sweep

        at_once = 1 if options.jobs is None else options.jobs
        return sweep(options.overrides, at_once=at_once, dry_run=options.dry_run)
    if options.jobs is not None:
        parser.error("--jobs is for a sweep: add -m")
    return run(options.overrides, dry_run=options.dry_run)


def run(overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Composes, and runs unless it is a dry run.

    Args:
        overrides: in Hydra's syntax.
        dry_run: only print what would run.

    Returns:
        The exit code.

    Raises:
        ConfigError: the configuration is refused.
    """
    find_own_classes()
    from fl_app.compose import compose

    config = compose(overrides)
    if dry_run:
        from fl_app.assembly import check

        check(config)
        print(config.to_yaml(), end="")
        return DONE
    return on_flower(config, overrides) if config.backend == "flower" else _on_engine(config)


def _on_engine(config: Config) -> int:
    from fl_app.cli.console import open_console
    from fl_app.run import run_engine

    with open_console() as console:
        return run_engine(config, console).exit_code
