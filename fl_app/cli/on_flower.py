"""A run on Flower's simulation from the command line: what `trellis run` and a sweep's jobs both begin.

Looks the configuration over here, where a refusal has a reader, then starts Flower for it and passes on what it
prints. Must not know the command's options, nor what a sweep makes of the exit code. Nothing heavy is imported before
it is called: `trellis run --help` comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.cli.main import FAILED

if TYPE_CHECKING:
    from fl_app.config.schema import Config


def on_flower(config: Config, overrides: Sequence[str]) -> int:
    """Runs on Flower's simulation; what it prints is passed on line by line.

    Args:
        config: what `overrides` compose to.
        overrides: in Hydra's syntax.

    Returns:
        The exit code.

    Raises:
        ConfigError: the configuration is refused.
    """
    from fl_app.assembly import check_for_flower
    from fl_app.compose import override
    from fl_app.config.schema import DEFAULT_NUM_CLIENTS
    from fl_app.flower import FlowerError, run_flower

    # The run's processes have working directories of their own.
    output_dir = override("output_dir", str(config.output_dir.expanduser().resolve()))
    nodes = DEFAULT_NUM_CLIENTS if config.num_clients == "auto" else config.num_clients
    check_for_flower(config, nodes)
    project = Path(__file__).resolve().parents[2]
    try:
        return run_flower(
            [*overrides, output_dir], num_supernodes=nodes, project=project, echo=_echo
        )
    except FlowerError as error:
        print(error, file=sys.stderr)
        return FAILED


def _echo(line: str) -> None:
    print(line, flush=True)
