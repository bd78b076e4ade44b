"""How evenly clients were asked stands in the summary, unless a promise rests on nobody's knowing."""

import io
import json

import pytest

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine


def run_small(folder, *overrides):
    small = ["task=digits", "model=linear", "rounds=2", "runtime.workers=1", "num_clients=4"]
    config = compose([*small, f"output_dir={folder}", *overrides])
    return json.loads(run_engine(config, PlainConsole(io.StringIO())).summary_path.read_text())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], {"jain_index": 1.0, "least": 2, "most": 2}),
        (
            ["sampler.fraction=0.25", "sampler=fair"],
            {"jain_index": 0.5, "least": 0, "most": 1},
        ),
    ],
    ids=["everybody", "two of four"],
)
def test_it_is_told(tmp_path, overrides, told):
    assert run_small(tmp_path, *overrides)["participation"] == told


def test_it_is_not_told_where_coins_must_stay_unknown(tmp_path):
    assert "participation" not in run_small(tmp_path, "strategy=dp")
