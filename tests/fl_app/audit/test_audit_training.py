"""A training for an audit is the run's own, leaves nothing behind, and says why where it fails."""

import numpy as np
import pytest
from audit_helpers import CLIPPED, made, silent

from fl_app.assembly import Assembly
from fl_app.audit.target import load
from fl_app.audit.training import AuditError, train
from strategies.attacks import NotANumber


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load(made(tmp_path_factory.mktemp("runs"), *CLIPPED))


def test_the_same_settings_make_the_same_model(target):
    assembly = Assembly(target.trained_anew("again"))
    again = train(assembly, target.num_clients, progress=silent).model.arrays()
    for name, array in target.model().items():
        np.testing.assert_array_equal(again[name], array)
    assert not assembly.config.run_dir.exists()


def test_a_training_without_a_good_round_says_so(target):
    assembly = Assembly(target.trained_anew("void"))
    assembly.attack = NotANumber(fraction=1.0)
    with pytest.raises(AuditError, match=r"no round of void was good; the last one: \w"):
        train(assembly, target.num_clients, progress=silent)
    assert not assembly.config.run_dir.exists()
