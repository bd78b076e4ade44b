"""What is foretold of a training is what is counted, sent and stored; limits not to be met are refused beforehand."""

import logging
from collections import Counter

import pytest

from clients.encrypted import costs
from clients.encrypted.evaluation import Evaluation
from clients.encrypted.limits import MemoryLimit, MemoryLimitError
from clients.encrypted.notes import BATCH, KEYS, NOTE
from clients.encrypted.plan import plan_of
from clients.encrypted.planner import Forecast, Settings, fitting, suited
from clients.encrypted.spec import Spec
from tests.support.encrypted import Bench, batch, network, parameters
from tests.support.party import Hand

SPECS = [
    Spec((20, 8, 5)),
    Spec((258, 2, 2)),
    Spec((20, 4, 5), loss="squared"),
    pytest.param(Spec((10, 4, 4, 3)), marks=pytest.mark.slow),
    Spec((20, 5)),
    pytest.param(Spec((20, 4, 5), activation="cubic"), marks=pytest.mark.slow),
]
LIMIT = MemoryLimit(limit_mb=400)
FIXED = Settings(base_mb=90.0)


class Counting:
    """SEAL's evaluator, and how often it switches a key."""

    def __init__(self, evaluator, counted):
        self._evaluator, self._counted = evaluator, counted

    def __getattr__(self, name):
        found = getattr(self._evaluator, name)

        def counting(*arguments):
            kinds = {"relinearize": costs.SWITCH, "apply": costs.TURN, "complex": costs.TURN}
            kind = kinds.get(name.split("_")[0])
            if kind:
                self._counted[kind, arguments[0].coeff_modulus_size()] += 1
            return found(*arguments)

        return counting


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_key_switches_are_counted_as_a_step_does_them(spec):
    counted: Counter[tuple[str, int]] = Counter()

    def counting(*arguments):
        evaluation = Evaluation(*arguments)
        evaluation._evaluator = Counting(evaluation._evaluator, counted)
        packer = evaluation._packer
        packer._evaluator = Counting(packer._evaluator, counted)
        return evaluation

    bench = Bench(spec, shares=2, make=counting)
    bench.step(parameters(network(spec)), *batch(spec, 50))
    shared, alone = costs.step(bench.plan, 2, 512)
    foretold = shared.operations + alone.operations
    kinds = (costs.SWITCH, costs.TURN)
    assert {one: n for one, n in foretold.items() if one[0] in kinds} == dict(counted)


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_bytes_are_those_that_are_sent(spec):
    hand, forecast = Hand(plan_of(spec)), Forecast(plan_of(spec), FIXED)

    def size(arrays):
        return sum(array.nbytes for name, array in arrays.items() if name != NOTE)

    assert size(hand.upload([KEYS])) == pytest.approx(forecast.key_bytes, rel=0.001)
    assert size(hand.upload([BATCH])) == pytest.approx(forecast.batch_bytes, rel=0.002)


def test_the_table_names_what_counts():
    text = Forecast(plan_of(SPECS[0]), FIXED).text()
    for told in ("N = 8192", "128-bit secure", "level 2", "s of CPU", "MB at the peak", "MB down"):
        assert told in text


def test_times_are_positive_and_measured_once():
    forecast = Forecast(plan_of(SPECS[4]), FIXED)
    assert 0 < forecast.wall_seconds <= forecast.cpu_seconds < 60
    assert costs.machine_of(forecast.plan.ring) is costs.machine_of(plan_of(SPECS[4]).ring)


def test_memory_grows_with_what_takes_it():
    small = Forecast(plan_of(Spec((64, 32, 10))), FIXED).memory_mb
    assert Forecast(plan_of(Spec((784, 32, 10))), FIXED).memory_mb > small
    assert Forecast(plan_of(Spec((64, 32, 10))), Settings(workers=4, base_mb=90)).memory_mb > small
    assert Forecast(plan_of(Spec((64, 32, 10))), FIXED.least).memory_mb < small


def test_what_fits_is_taken_as_it_is():
    spec = Spec((784, 32, 10))
    assert fitting(spec, FIXED, MemoryLimit()) is spec
    assert fitting(spec, FIXED, LIMIT) is spec


def test_a_limit_that_cannot_be_met_is_refused_with_what_would_do():
    with pytest.raises(MemoryLimitError, match="memory limit of 150 MB") as refused:
        fitting(Spec((784, 32, 10)), FIXED, MemoryLimit(limit_mb=150))
    assert "raise limit_mb to at least" in str(refused.value)
    needed = MemoryLimit(limit_mb=refused.value.needed_mb)
    assert fitting(Spec((784, 32, 10)), FIXED, needed) == Spec((784, 32, 10))


def test_a_smaller_batch_and_then_fewer_units_are_taken_where_allowed(caplog):
    wide = Spec((64, 64, 10), batch=8192)
    with caplog.at_level(logging.WARNING):
        smaller = fitting(wide, FIXED, MemoryLimit(limit_mb=350, allow=("batch",)))
    assert smaller.sizes == wide.sizes
    assert smaller.batch < wide.batch
    assert "MEMORY" in caplog.text
    assert f"mini-batches of {smaller.batch}" in caplog.text
    both = fitting(wide, FIXED, MemoryLimit(limit_mb=220, allow=("batch", "hidden units")))
    assert both.sizes[1] < 64
    with pytest.raises(MemoryLimitError, match=r"memory\.allow name 'batch' and 'hidden units'"):
        fitting(wide, FIXED, MemoryLimit(limit_mb=220))


@pytest.mark.parametrize(("limit", "workers"), [(None, 4), (2000, 4), (400, 1), (100, 1)])
def test_a_training_begins_with_as_many_workers_as_there_is_room_for(limit, workers):
    plan, wanted = plan_of(Spec((784, 32, 10))), Settings(workers=4, base_mb=90)
    memory = MemoryLimit(limit_mb=limit)
    chosen = suited(plan, wanted, memory)
    assert chosen.workers == workers
    if limit != 100:
        assert Forecast(plan, chosen).memory_mb < memory.critical * (limit or 1e9)
