"""What a user is told: near names are found, refusals list everything, values are shown as they are written."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fl_app.config.faults import (
    ABSENT,
    ConfigError,
    Fault,
    nearest,
    shown,
    unknown_choice,
    unknown_key,
)

KEYS = ["local_epochs", "batch_size", "lr", "momentum", "weight_decay", "max_grad_norm"]
words = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=5, max_size=20)


def edited(word: str, position: int, kind: str) -> str:
    position %= len(word)
    if kind == "drop":
        return word[:position] + word[position + 1 :]
    if kind == "double":
        return word[: position + 1] + word[position:]
    if kind == "swap":
        return word[:position] + word[position : position + 2][::-1] + word[position + 2 :]
    return word.upper()


@given(
    st.sampled_from(KEYS).filter(lambda key: len(key) > 4),
    st.integers(0, 30),
    st.sampled_from(["drop", "double", "swap", "case"]),
)
def test_one_slip_in_a_key_still_finds_it(key: str, position: int, kind: str) -> None:
    assert nearest(edited(key, position, kind), KEYS) == key


@given(st.lists(words, min_size=1, max_size=8, unique_by=str.casefold), st.data())
def test_a_known_word_is_nearest_to_itself(known: list[str], data: st.DataObject) -> None:
    word = data.draw(st.sampled_from(known))
    assert nearest(word, known) == word


@given(words, st.lists(words, max_size=8))
def test_a_suggestion_is_always_a_known_word(word: str, known: list[str]) -> None:
    assert nearest(word, known) in {None, *known}


def test_a_word_like_nothing_gets_no_suggestion() -> None:
    assert nearest("qqqq", KEYS) is None
    assert "did you mean" not in unknown_choice("strategy", "zzz", ["fedavg"]).message


def test_a_key_at_the_wrong_place_is_told_the_right_one() -> None:
    fault = unknown_key("lr", ["rounds", "seed"], ["client.lr", "server.lr", "rounds", "seed"])
    assert fault.message == "unknown key; did you mean client.lr or server.lr?"


def test_a_slip_in_the_groups_name_keeps_the_rest_of_the_path() -> None:
    fault = unknown_key("cleint", ["client", "clip"], leaf="cleint.lr")
    assert (fault.path, fault.message) == ("cleint.lr", "unknown key; did you mean client.lr?")


def test_a_key_with_no_namesake_is_told_what_there_is() -> None:
    fault = unknown_key("server.zzz", ["tau", "lr"])
    assert fault.message == "unknown key (server takes lr, tau)"
    assert unknown_key("model.zzz", []).message == "unknown key (model takes no keys)"


def test_a_refusal_lists_every_fault_in_one_table() -> None:
    error = ConfigError(
        [
            Fault("client.lr", "must be greater than 0", -1),
            Fault("client.epochs", "unknown key; did you mean client.local_epochs?"),
        ]
    )
    assert str(error).splitlines() == [
        "configuration refused, 2 faults:",
        "  client.lr = -1  must be greater than 0",
        "  client.epochs   unknown key; did you mean client.local_epochs?",
    ]


def test_a_refusal_survives_a_process_boundary() -> None:
    error = ConfigError([Fault("seed", "must be a whole number", "x")])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.faults) == (str(error), error.faults)


def test_the_absence_of_a_value_is_told_from_null() -> None:
    assert Fault("seed", "missing").place == "seed"
    assert Fault("seed", "missing", None).place == "seed = null"
    assert repr(ABSENT) == "ABSENT"


def test_a_refusal_without_a_fault_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="needs a fault"):
        ConfigError([])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-3, "0.001"),
        ([1, "a"], "[1, a]"),
        ({"x": None}, "{x: null}"),
        ("", "''"),
        ("a\nb", "'a\\nb'"),
    ],
)
def test_values_are_shown_as_the_user_writes_them(value: object, text: str) -> None:
    assert shown(value) == text


@given(st.text(min_size=61, max_size=500))
def test_a_long_value_does_not_flood_the_table(value: str) -> None:
    assume(value.strip())
    assert len(shown(value)) <= 60
    assert "\n" not in shown(value)
