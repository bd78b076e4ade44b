"""Weighted means of what clients report in clear.

A number that is not finite, or that would carry the sum past a float, is left out, as is its weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

from flwr.app import MetricRecord, RecordDict

from strategies.replies import read_metrics
from strategies.wire import Refused

log = logging.getLogger(__name__)

Sums = dict[str, tuple[float, float]]
"""For each metric Σ wᵢ·mᵢ and Σ wᵢ."""


def add_metrics(sums: Sums, metrics: Mapping[str, float], weight: float) -> None:
    """Adds one client's metrics to the running sums."""
    for name, value in metrics.items():
        total, weights = sums.get(name, (0.0, 0.0))
        total += weight * value
        if math.isfinite(total):
            sums[name] = (total, weights + weight)


def mean_metrics(sums: Sums) -> dict[str, float]:
    """The means."""
    return {name: total / weights for name, (total, weights) in sums.items()}


def evaluated(contents: Iterable[RecordDict], most: float) -> dict[str, float]:
    """Means over evaluations, weighted by `num-examples`; one that claims more than `most` of these is left out.

    Clients without test examples say 0, which is no fault.
    """
    sums: Sums = {}
    for content in contents:
        try:
            weight, metrics = read_metrics(content)
        except Refused as refusal:
            log.warning("an evaluation was left out: %s", refusal)
            continue
        if 0 < weight <= most:
            add_metrics(sums, metrics, weight)
        elif weight != 0:
            log.warning("an evaluation on %g examples was left out", weight)
    return mean_metrics(sums)


def scalars(record: MetricRecord) -> dict[str, float]:
    """The single numbers of a record; lists are left out."""
    return {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
