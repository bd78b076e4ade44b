"""One more training for an audit: the run's own strategy on the real engine, without files of a run of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import numpy as np

from fl_app.assembly import Assembly, composed, engine_grid
from strategies.hooks import Hook, RoundView
from strategies.strategy import PipelineStrategy

Progress = Callable[[int, int], None]
"""Told of each round: how many are done, of how many."""


class AuditError(RuntimeError):
    """An audit that can't be brought to its end; the message says why."""


def train(
    assembly: Assembly,
    num_clients: int,
    *,
    progress: Progress,
    prepare: Callable[[PipelineStrategy], Sequence[Hook]] = lambda strategy: (),
) -> PipelineStrategy:
    """Trains from the initial model to the configuration's last round.

    What clients keep between rounds lies in the configuration's run folder, which is removed before and after.

    Args:
        assembly: of a configuration with a folder that nothing else uses.
        num_clients: how many.
        progress: told of each round.
        prepare: gives hooks that look at each version, once the strategy is checked and before it starts.

    Returns:
        The strategy, with the final model.

    Raises:
        ConfigError: parts may not be composed.
        AuditError: no round was good, or the model is not finite.
    """
    config = assembly.config
    void: list[RoundView] = []

    def watch(view: RoundView) -> None:
        if view.void:
            void.append(view)
        progress(view.round, config.rounds)

    shutil.rmtree(config.run_dir, ignore_errors=True)
    try:
        strategy = composed(assembly, num_clients)
        strategy.hooks += [*prepare(strategy), watch]
        with engine_grid(assembly, num_clients, 0.0) as grid:
            strategy.start(
                grid,
                assembly.network.arrays(),
                num_rounds=config.rounds,
                timeout=config.round_timeout,
            )
    finally:
        shutil.rmtree(config.run_dir, ignore_errors=True)
    if len(void) == config.rounds:
        reason = void[-1].void_reason
        raise AuditError(f"no round of {config.run_name} was good; the last one: {reason}")
    assert strategy.model is not None  # it has been trained
    if not np.isfinite(strategy.model.parameters).all():
        raise AuditError(f"{config.run_name} diverged: its model holds what is not finite")
    return strategy
