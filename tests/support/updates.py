"""Updates and layouts of tests, in one line each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from strategies.protocols import Plan
from strategies.update import COUNTERS, DELTA, Layout, Section, Update


def flat(size: int, name: str = "w") -> Layout:
    """A layout of one array."""
    return Layout((name,), ((size,),))


def section(values: object, bound: float | None = None) -> Section:
    vector = np.array(values, np.float32)
    return Section(vector, flat(vector.size), bound)


def update(
    values: object = (0.0,),
    *,
    weight: float = 1.0,
    client: int = 0,
    version: int = 0,
    metrics: Mapping[str, float] | None = None,
    **others: object,
) -> Update:
    """One client's update: its delta, and other sections by name."""
    sections = {DELTA: section(values)} | {name: section(value) for name, value in others.items()}
    return Update(sections, weight, (client,), version, dict(metrics or {}))


def plan_of(one: Update, *, cohort: int, **others: object) -> Plan:
    """A round's plan for updates laid out like this one."""
    layouts = {name: item.layout for name, item in one.sections.items()}
    return Plan(layouts, **{"cohort": cohort, "inputs": cohort} | others)


def parameters(*values: float) -> dict[str, np.ndarray]:
    """A model of one array."""
    return {"w": np.array(values, np.float32)}


def with_counters(deltas: object, counters: object, **keywords: object) -> Update:
    return update(deltas, **{COUNTERS: counters}, **keywords)
