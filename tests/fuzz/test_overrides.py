"""Whatever stands in an override or in a run-config, it is a configuration or is refused with its faults."""

from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fl_app.compose import compose, parse_overrides
from fl_app.config.faults import ConfigError
from fl_app.node import Node
from tests.fuzz.mutations import NASTY
from tests.support.examples import many

KEYS = st.sampled_from(
    [
        "strategy", "task", "task.alpha", "model", "model.hidden", "client.lr", "num_clients", "combiner.f", "rounds",
        "seed", "output_dir", "run_name", "resume", "checkpoint.every", "retry", "runtime.devices", "travel",
        "hydra.run", "task._target_", "+x", "~task", "++a.b.c", "strategy@x", "",
    ]
)  # fmt: skip
VALUES = (
    st.text(max_size=30)
    | st.sampled_from([bytes(piece[:200]).decode("latin-1") for piece in NASTY])
    | st.sampled_from(
        [
            "null", "${oc.env:HOME}", "${seed}", "${a", "[1,2", "{a:{b:1}}", "1e999", "nan", "-1", "os.system",
            "'", "range(1,3)", "builtins.eval", "subprocess.Popen", "a,b", "!!python/name:os.system", "..", "/etc",
            "0x10", "1_000", "[[[[]]]]",
        ]
    )
)  # fmt: skip


@settings(max_examples=many(60))
@example(["task._target_=subprocess.Popen"])
@example(["model={_target_:builtins.eval}"])
@given(st.lists(st.builds("{}={}".format, KEYS, VALUES) | st.text(max_size=20), max_size=3))
def test_overrides_make_a_configuration_or_are_refused(overrides):
    with suppress(ConfigError):
        compose(overrides)


@given(st.text(max_size=200))
def test_a_run_config_comes_apart_or_is_refused(text):
    with suppress(ConfigError):
        assert all(isinstance(part, str) for part in parse_overrides(text))


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "partition-id",
                "client-folder",
                "dp-epsilon",
                "secagg-roster",
                "device-profile",
                "device-least-battery",
            ]
        )
        | st.text(max_size=12),
        st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        max_size=6,
    )
)
def test_a_node_config_is_one_or_is_refused(config):
    with suppress(ValueError):
        node = Node(config)
        assert node.client >= 0
        assert node.folder.is_absolute()


def test_a_class_that_is_no_part_is_never_made(tmp_path):
    """Configurations name classes; what a class is may be looked at, and nothing else is called."""
    for override in (
        f"task._target_=subprocess.check_output task.args='touch {tmp_path}/made'",
        "model._target_=os.system",
        "combiner._target_=builtins.exec",
        "sampler._target_=pathlib.Path",
    ):
        with pytest.raises(ConfigError):
            compose(parse_overrides(override))
    assert not list(tmp_path.iterdir())
