"""Two rounds and three more are five, for every strategy that has a name: the same bits, or what is said here."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fl_app.config.catalogue import names
from tests.fl_app.test_encrypted_runs import ENCRYPTED, EXACT
from tests.fl_app.test_own_tasks import DOCSTRINGS
from tests.fl_app.test_run import assert_same_model, model_of, rows, run
from tests.support.split import save_tiny

SMALL = ["model=linear", "num_clients=6", "task.partition=iid"]
NOISY = [
    "privacy.reproducible_noise=true",
    "privacy.noise_multiplier=1",
    "privacy.target_epsilon=null",
]
BUSY = ["num_clients=8", "runtime.devices.speed_sigma=1", "runtime.dropout=0.1"]
PART = ["sampler.fraction=0.6"]
MORE = {
    **dict.fromkeys(("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"), PART),
    "bulyan": ["num_clients=10"],
    "dp": NOISY,
    "dp_distributed": [*NOISY, "num_clients=8"],
    "dp_ftrl": [*NOISY, "num_clients=12", "sampler.fraction=0.25", "sampler.separation=4"],
    "dp_local": [*NOISY, "num_clients=40"],
    "fedasync": [*BUSY, "scheduler.concurrency=4"],
    "fedbuff": [*BUSY, "scheduler.concurrency=6", "scheduler.buffer=3"],
    "fltrust": ["task.root_examples=50"],
    "scaffold": PART,
    "secure_grouped": ["num_clients=15"],
}
ENCRYPTING = {"ckks_mean": 5e-6, "encrypted": 2e-3}
"""Ciphertexts have an error of their own, of the system's entropy: how far apart two models of one run may be."""
ROBUST = {
    "robust", "krum", "multi_krum", "bulyan", "median", "trimmed_mean", "geometric_median", "centered_clipping",
    "norm_bounding", "fltrust",
}  # fmt: skip
SLOW = {"encrypted", "secure_grouped", "split_lora"} | ROBUST
"""Those that take long, and those that test_robust_runs.py takes up in the middle, among liars."""


def chosen(strategy: str, folder) -> list[str]:
    if strategy == "split_lora":
        bert = save_tiny(folder / "bert", blocks=2)
        return [
            *DOCSTRINGS, "strategy=split_lora", "task.partition=iid", "task.max_length=12", "client.batch_size=16",
            "num_clients=3", f"model.pretrained={bert}", "model.split_point=1",
        ]  # fmt: skip
    if strategy == "encrypted":
        return [*ENCRYPTED, *EXACT]
    return [*SMALL, f"strategy={strategy}", *MORE.get(strategy, [])]


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names("strategy")],
)
def test_two_rounds_and_three_more_are_five(tmp_path, strategy):
    settings = chosen(strategy, tmp_path)
    whole, summary, _ = run(tmp_path / "whole", *settings, "rounds=5")
    run(tmp_path / "parts", *settings, "rounds=2")
    parts, resumed, lines = run(tmp_path / "parts", *settings, "rounds=5")
    said = r"resumes from version-00000002\.safetensors, of round 2, written \d+ (s|min) ago"
    assert any(re.fullmatch(said, line) for line in lines)
    assert "goes on after round 2" in lines
    assert [row["round"] for row in resumed["history"]] == [1, 2, 3, 4, 5]
    one, other = rows(summary), rows(resumed)
    if strategy in ENCRYPTING:
        assert_nearly_the_same(whole, parts, one, other, ENCRYPTING[strategy])
        return
    if strategy in ("fedasync", "fedbuff"):  # who was at work is asked again, which takes bytes
        assert one[2].pop("download_bytes") < other[2].pop("download_bytes")
    assert one == other
    assert_same_model(whole, parts)
    first, second = (
        result.summary_path.with_name("model.safetensors") for result in (whole, parts)
    )
    assert first.read_bytes() == second.read_bytes()


def assert_nearly_the_same(whole, parts, one, other, error) -> None:
    first, second = model_of(whole), model_of(parts)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=error)
    for before, after in zip(one, other, strict=True):
        assert before["loss"] == pytest.approx(after["loss"], abs=100 * error)
        counted = before.keys() - {"loss", "train", "accuracy", "upload_bytes", "download_bytes"}
        assert {key: before[key] for key in counted} == {key: after[key] for key in counted}
