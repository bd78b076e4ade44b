"""Checks in general: how they are run and shown, what is tried in a process of its own, what is wrong with data."""

import io
import os
import signal
import time

import numpy as np
import psutil
import pytest

from clients.tasks import Digits, Examples, FederatedData
from fl_app.checks import data
from fl_app.checks.check import Check, Finding, conduct, together
from fl_app.checks.show import Report, document
from fl_app.checks.trial import TrialError, tried

OK = Finding("ok", "good")


class Spoiled(Digits):
    """Digits with what the test puts in their place."""

    def __init__(self, train: Examples, test: Examples) -> None:
        super().__init__()
        self._spoiled = train, test

    def train(self) -> Examples:
        return self._spoiled[0]

    def test(self) -> Examples:
        return self._spoiled[1]


def spoiled(*, train=None, test=None) -> Spoiled:
    """Digits after a function has changed copies of their inputs and targets in place."""
    whole, sets = Digits(), []
    for change, examples in ((train, whole.train()), (test, whole.test())):
        inputs, targets = examples.inputs.clone(), examples.targets.clone()
        if change is not None:
            change(inputs, targets)
        sets.append(Examples(inputs, targets))
    return Spoiled(*sets)


# ---- the engine of checks ----


def test_a_failing_check_stops_only_those_that_need_it():
    def broken() -> Finding:
        raise ZeroDivisionError("by nothing")

    checks = [
        Check("first", broken),
        Check("second", lambda: OK, ("first",)),
        Check("third", lambda: OK, ("second",)),
        Check("apart", lambda: OK),
    ]
    found = {one.name: one.finding for one in conduct(checks)}
    assert [found[name].state for name in ("first", "second", "third", "apart")] == [
        "failed",
        "skipped",
        "skipped",
        "ok",
    ]
    assert "ZeroDivisionError: by nothing" in found["first"].said
    assert "'first'" in found["third"].said
    with pytest.raises(ValueError, match="not before it"):
        conduct([Check("late", lambda: OK, ("never",))])


def test_several_findings_come_to_the_gravest():
    both = together([OK, Finding("warning", "hm", "look"), Finding("skipped", "none")])
    assert (both.state, both.mend) == ("warning", "look")
    assert both.said == "good; hm; none"


def test_plain_lines_and_json_say_the_same():
    checks = [Check("one", lambda: OK), Check("two", lambda: Finding("failed", "bad\nall", "mend"))]
    stream = io.StringIO()
    report = Report("title", ["one", "two"], stream)
    done = conduct(checks, report.tell)
    report.end(done)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "title"
    assert lines[-1] == "no-go: 1 ok, 1 failed"
    assert any(line.strip() == "→ mend" for line in lines)
    told = document("title", done)
    assert told["go"] is False
    assert told["checks"][1] == {
        "name": "two",
        "state": "failed",
        "said": "bad\nall",
        "mend": "mend",
    }


# ---- work in a process of its own ----


def test_a_trial_gives_what_was_found_and_leaves_no_process():
    before = set(psutil.Process().children(recursive=True))
    assert tried(lambda: {"pid": os.getpid()}, seconds=20)["pid"] != os.getpid()
    with pytest.raises(TrialError, match=r"KeyError: 'gone'"):
        tried(lambda: {}["gone"], seconds=20)
    with pytest.raises(TrialError, match="longer than 0 s"):
        tried(lambda: time.sleep(60) or {}, seconds=0.2)
    with pytest.raises(TrialError, match="killed") as killed:
        tried(lambda: os.kill(os.getpid(), signal.SIGKILL) or {}, seconds=20)
    assert killed.value.memory
    assert set(psutil.Process().children(recursive=True)) == before


# ---- data ----


def test_labels_out_of_range_are_found_in_both_sets():
    def beyond(inputs, targets):
        targets[3] = 99

    with pytest.raises(ValueError, match="99"):
        data.labels(spoiled(train=beyond))
    found = data.labels(spoiled(test=beyond))
    assert found.state == "failed"
    assert "test() holds label 99" in found.said
    assert found.mend


def test_a_class_that_nobody_has_is_told_of():
    def without_seven(inputs, targets):
        targets[targets == 7] = 1

    assert "class 7: no training example" in data.labels(spoiled(train=without_seven)).said
    unseen = data.labels(spoiled(test=without_seven))
    assert unseen.state == "warning"
    assert "class 7: no test example" in unseen.said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_found(value):
    def spoil(inputs, targets):
        inputs[5, 0, 0, 0] = value

    found = data.inputs(spoiled(train=spoil))
    assert found.state == "failed"
    assert "the first is row 5" in found.said
    assert data.inputs(Digits()).state == "ok"


def test_test_examples_that_are_trained_on_are_counted():
    assert data.leaks(Digits()).state == "ok"
    first = Digits().train().inputs

    def some(inputs, targets):
        inputs[:9] = first[:9]

    found = data.leaks(spoiled(test=some))
    assert found.state == "warning"
    assert found.said.startswith("9 of 360")

    def most(inputs, targets):
        inputs[:300] = first[:300]

    assert data.leaks(spoiled(test=most)).state == "failed"


def test_clients_with_hardly_any_example_are_named():
    many = FederatedData(Digits(), 60, partition="dirichlet", alpha=0.5)
    found = data.clients(many, batch_size=20)
    few = np.flatnonzero(many.sizes < 10)
    assert found.state == "warning"
    assert f"clients {few[0]}" in found.said
    assert data.clients(FederatedData(Digits(), 4), batch_size=20).state == "ok"
