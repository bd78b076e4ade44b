"""Settings outside their range are refused wherever a part is made, with the name, the value and the range."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen

from clients.trainers import SGD, Scaffold
from strategies import server_models
from strategies.admission import Admission
from strategies.combiners import Mean
from strategies.ranges import Ranged
from strategies.samplers import Uniform
from strategies.stages import Clip


@dataclass
class Settings(Ranged):
    rate: Annotated[float, Gt(0), Lt(2)] = 1.0
    share: Annotated[float, Ge(0), Le(1)] | None = None
    mode: Literal["a", "b"] = "a"
    names: Annotated[tuple[str, ...], MinLen(1)] = ("x",)
    free: float = float("inf")
    limit: Annotated[float, Gt(0)] | Literal["auto"] | None = None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rate": 0}, r"Settings.rate = 0: must be greater than 0"),
        ({"rate": 2.0}, "less than 2"),
        ({"rate": float("nan")}, "finite"),
        ({"share": -0.1}, "at least 0"),
        ({"share": 1.5}, "at most 1"),
        ({"mode": "c"}, "choose one of 'a', 'b'"),
        ({"names": ()}, "at least 1 entries"),
        ({"limit": 0.0}, "must be greater than 0"),
        ({"limit": "car"}, "choose one of 'auto'"),
    ],
)
def test_a_setting_outside_its_range_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        Settings(**setting)


def test_settings_on_the_edge_of_their_range_pass():
    settings = Settings(rate=1e-9, share=1.0, mode="b")
    assert (settings.share, Settings().share) == (1.0, None)
    assert (Settings(limit="auto").limit, Settings(limit=2.0).limit) == ("auto", 2.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clip(norm=-1),
        lambda: Mean(weighting="typo"),
        lambda: Uniform(fraction=0),
        lambda: Admission(quorum=0),
        lambda: server_models.Adam(beta2=1.0),
        lambda: server_models.Scaffold(population=-1),
        lambda: SGD(lr=0),
        lambda: SGD(max_grad_norm=0),
        lambda: Scaffold(batch_size=0),
    ],
)
def test_every_part_holds_its_own_ranges(make):
    with pytest.raises(ValueError, match=" = "):
        make()
