"""Flower's entry point on the server: composes the configuration, then runs."""

import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose, parse_overrides
from fl_app.config.faults import ConfigError
from fl_app.flower.bundle import enter_bundle, launch_directory
from fl_app.run import serve

enter_bundle()

app = ServerApp()
"""Named by pyproject.toml."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs what the run-config's `overrides` say; a failure is raised, so that Flower knows of it."""
    try:
        config = compose([*parse_overrides(str(context.run_config["overrides"])), "backend=flower"])
        config = config.within(launch_directory())
        result = serve(config, grid, PlainConsole(sys.stdout))
    except ConfigError as error:
        print(error, flush=True)
        raise
    if result.status == "failed":
        raise RuntimeError(result.reason)
