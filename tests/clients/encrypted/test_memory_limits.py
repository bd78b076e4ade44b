"""Real training under memory limits: never killed, the same gradients, and below the limit or refused."""

import pytest

from tests.support.limited import Record, difference, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[64, 784])
def free(request):
    """Features, what all trainings on them share, and one without a limit."""
    record = Record()
    return request.param, record, trained(request.param, None, 2, record)


@pytest.mark.parametrize("limit", [4000.0, 1000.0, 400.0, 300.0])
def test_training_stays_below_its_limit_with_the_same_gradients(free, limit):
    features, record, wanted = free
    least = {64: 210, 784: 350}[features]
    if limit < least:
        pytest.skip("below what the planner lets begin")
    found = trained(features, limit, 2, record)
    assert found["exitcode"] == 0
    assert found["peak_mb"] < limit
    # One worker packs means into other trees than two, whose keys add other noise.
    assert difference(found["gradients"], wanted["gradients"]) < 1e-6
    assert list(found["shed"]) in (
        [],
        ["cached ciphertexts"],
        ["cached ciphertexts", "chunks in flight"],
        ["cached ciphertexts", "chunks in flight", "workers"],
    )


def test_without_a_limit_little_is_taken_and_it_was_foretold(free):
    features, _, found = free
    assert found["peak_mb"] < {64: 400, 784: 600}[features]
    assert found["peak_mb"] == pytest.approx(found["planned_mb"], rel=0.25)


def test_a_limit_that_cannot_be_met_is_refused_before_any_work(free):
    features, record, _ = free
    found = trained(features, 150.0, 2, record)
    assert found["exitcode"] == 0
    assert "memory limit of 150 MB" in found["refused"]
    assert "raise limit_mb" in found["refused"]
