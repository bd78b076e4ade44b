"""A job as one client sees it: its own part of the parameters, down and up.

Sessions send what `records_for` gives, hold replies against `expected_of`, and hand on what `whole` makes of them.
Where all clients train all parameters, each of the three gives what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import ArrayRecord

from strategies.parts import narrowed, returned, widened
from strategies.protocols import Job
from strategies.replies import Expected
from strategies.update import DELTA, Layout, Update
from strategies.wire import ARRAYS, pack_model, unpack_model


def part_of(job: Job, client: int) -> Layout:
    """What of the parameters a client is sent and trains."""
    return job.layouts[DELTA] if job.part is None else job.part(client)


def records_for(job: Job, part: Layout) -> Mapping[str, ArrayRecord]:
    """The job's records with no more of the parameters than a part; what is no parameter travels whole."""
    whole = job.layouts[DELTA]
    if part == whole:
        return job.records
    arrays = unpack_model(job.records[ARRAYS])
    others = {name: array for name, array in arrays.items() if job.kinds[name] != DELTA}
    return {**job.records, ARRAYS: pack_model({**narrowed(arrays, part), **others})}


def expected_of(job: Job, client: int, part: Layout) -> Expected:
    """What a client's reply must be."""
    expected, part = Expected.of(job, client), returned(part)
    if part == job.layouts[DELTA]:
        return expected
    return replace(expected, sections={**expected.sections, DELTA: part})


def whole(update: Update, part: Layout, job: Job) -> Update:
    """An update in the layout that combiners see."""
    layout, part = job.layouts[DELTA], returned(part)
    if part == layout:
        return update
    return update.with_section(DELTA, widened(update.delta.vector, part, layout))
