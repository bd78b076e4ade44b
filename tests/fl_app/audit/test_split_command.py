"""`trellis privacy-audit` of a split run: the attacks meet real parts, and what comes out is whole and honest."""

import json
import time
from pathlib import Path

import pytest
import torch
from audit_helpers import contents, made, silent
from split_helpers import FOLDER, needs_minilm

from fl_app.audit.split.conduct import conduct, cuts_of, wires_of
from fl_app.audit.split.exposure import Exposure, NotApplicableError, Sizes, Wire
from fl_app.audit.split.first import first_layers, inputs_of
from fl_app.audit.split.reading import inverted, spanned
from fl_app.audit.split.watching import labelled, senders
from fl_app.audit.target import load
from fl_app.cli.main import main
from fl_app.config.faults import ConfigError

SPLIT = [
    "strategy=split_lora", "task=docstrings", f"model.pretrained={FOLDER}", "task.max_length=16",
    "task.packages=[flwr,sklearn]", "task.max_per_package=30", "num_clients=2", "rounds=1",
    "client.lr=0.01", "model.rank=4", "model.split_point=1", "runtime.workers=1", "evaluate.every=0",
    "task.partition=iid",
]  # fmt: skip
SMALL = Sizes(private=8, public=30, labelled=32, spans=2, senders=2, rounds=2, examples=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("split"), *SPLIT)


@pytest.fixture(scope="module")
def exposure(run):
    return Exposure(load(run), SMALL)


@needs_minilm
class TestExposure:
    def test_the_model_is_the_released_one_wherever_it_is_cut(self, exposure):
        ids = exposure.private.examples.inputs
        with torch.no_grad():
            whole = exposure.module()(ids)
            torch.testing.assert_close(exposure.module(4)(ids), whole)
        assert (exposure.at, exposure.module().at, exposure.module(4).at) == (1, 1, 4)
        released = exposure.target.model()
        assert all(
            torch.equal(value, torch.from_numpy(released[name]))
            for name, value in exposure.module().state_dict().items()
        )

    def test_gradients_are_those_of_the_whole_model(self, exposure):
        batch, module = exposure.batches(exposure.labelled)[0], exposure.module()
        found = exposure.gradients(batch, Wire(), mean=True)
        module.zero_grad()
        exposure.task.losses(module(batch.inputs), batch.targets).mean().backward()
        expected = [one.grad.flatten() for one in module.lower.adapters.parameters()]
        torch.testing.assert_close(found["adapters"], torch.cat(expected))
        assert found.keys() == {"cut", "adapters"}

    def test_public_text_is_none_of_the_task_s(self, exposure):
        private = {tuple(row) for row in exposure.task.train().inputs.tolist()}
        public = exposure.public.examples.inputs.tolist()
        assert len(public) == 60
        assert not private & {tuple(row) for row in public}

    def test_tokens_that_all_texts_share_are_not_scored(self, exposure):
        assert exposure.frame == ([101], [102])
        for texts in (exposure.public, exposure.private):
            assert not {101, 102, 0} & set(texts.truth.tolist())
            assert len(texts.truth) == int((texts.lengths - 2).sum())

    def test_a_wire_does_what_it_says(self, exposure):
        activation = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Wire().seen(activation), activation)
        coded = Wire("int8").seen(activation)
        steps = activation.abs().amax(dim=2, keepdim=True) / 127
        assert ((coded - activation).abs() <= steps * 0.5001).all()
        drawn = [Wire(noise=2.0).seen(activation) for _ in range(2)]
        assert not torch.equal(*drawn)
        assert [Wire().name, Wire("int8", 1.0).name] == ["none", "noise 1, int8"]


@needs_minilm
class TestAttacks:
    def test_tokens_at_a_shallow_cut_are_read(self, exposure):
        (score,) = inverted(exposure, 1, [Wire()], 0.95, silent)
        assert score.value > 0.9 > score.baseline
        assert score.interval[0] <= score.value <= score.interval[1]
        assert (score.n, score.units) == (len(exposure.private.truth), 8)

    @pytest.mark.slow
    def test_the_span_check_reads_what_its_rows_can_hold_and_not_a_step_of_adamw(self, exposure):
        scores = {(one.measure, one.setting): one for one in spanned(exposure, 0.95, silent)}
        short = "a text's first 8 tokens, one gradient, 8 rows"
        assert scores["recall", short].value == 1
        assert scores["precision", short].value == 1
        stepped = "the same, one step of the run's optimiser, 8 rows"
        assert scores["recall", stepped].value < 0.2
        assert scores["recall", "a batch of 16, one gradient, 8 rows"].value == 0

    def test_first_layers_share_one_input_that_is_a_token_s_own(self, exposure):
        module = exposure.module()
        layers = first_layers(module, exposure.private.examples.inputs)
        assert sorted(layers) == [
            "encoder_layer_0_attention_self_query", "encoder_layer_0_attention_self_value",
        ]  # fmt: skip
        found = inputs_of(module, layers, 3)(torch.tensor([2000, 3000]))
        embedded = module.lower.part.embeddings(torch.tensor([[2000] * 3, [3000] * 3]))
        torch.testing.assert_close(found, embedded)

    def test_labels_and_senders_have_a_score_each(self, exposure):
        labels = labelled(exposure, [Wire()], 0.95, silent)
        assert [one.attack for one in labels] == [
            "labels by gradient norm", "labels by gradient direction", "labels by gradient clusters",
        ]  # fmt: skip
        assert labels[1].value > 0.9  # a mean over tokens under a linear head gives them away
        before = {n: v.clone() for n, v in exposure.module().state_dict().items()}
        (sent,) = senders(exposure, 0.95, silent)
        assert (sent.n, sent.units, sent.baseline) == (4, 2, 0.5)
        after = exposure.module().state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_one_client_is_no_choice(self, exposure, monkeypatch):
        monkeypatch.setattr(exposure, "target", load(exposure.target.path))
        vars(exposure.target)["num_clients"] = 1
        with pytest.raises(NotApplicableError, match="one client"):
            senders(exposure, 0.95, silent)


@needs_minilm
@pytest.mark.slow
def test_a_user_audits_a_split_run(run, capsys):
    before = contents(run)
    began = time.monotonic()
    assert main(["privacy-audit", str(run), "--texts", "8", "--seconds", "60"]) == 0
    assert time.monotonic() - began < 180
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(run / "audit" / "audit.json")
    assert any("| learned inverter" in line for line in lines)
    document = json.loads((run / "audit" / "split.json").read_text())
    assert document["scores"][0]["attack"] == "learned inverter"
    assert document["sizes"]["private"] == 8
    for one in document["scores"]:
        low, high = one["interval"]
        assert 0 <= low <= one["value"] <= high <= 1
        assert one["n"] > 0
        assert one["meaning"]
    assert "reconstruction of pictures" in document["not_applicable"]
    assert (run / "audit" / "split.png").read_bytes().startswith(b"\x89PNG")
    assert contents(run) == before


@needs_minilm
def test_an_audit_without_time_tries_nothing_and_says_so(run):
    document = conduct(load(run), Sizes(seconds=1e-9), lambda title: silent)
    assert document["scores"] == []
    assert "senders of updates" in document["no_time_for"]
    assert Path(run / "audit" / "split.json").is_file()


def test_a_run_that_is_not_cut_has_no_cut_to_attack(tmp_path):
    whole = made(tmp_path)
    with pytest.raises(ConfigError, match="needs a run of a split model"):
        main_of(["privacy-audit", str(whole), "--split"])


def main_of(words):
    from fl_app.cli.privacy_audit import main as command

    return command(words[1:])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--seconds", "0"], "greater than 0"), (["--texts", "1"], "at least 2")],
)
def test_options_out_of_range_are_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        main_of(["privacy-audit", "nowhere", *words])


def test_the_run_s_own_wire_comes_first_and_each_once():
    assert wires_of(Wire()) == [
        Wire(),
        *(Wire(noise=n) for n in (0.5, 1.0, 2.0, 4.0)),
        Wire("int8"),
    ]
    own = Wire("int8", 1.0, 0.1)
    found = wires_of(own)
    assert found[:2] == [own, Wire(nopeek=0.1)]
    assert len(set(found)) == len(found) == 7


@pytest.mark.parametrize("blocks", [2, 6, 30])
def test_other_cuts_are_inside_the_model(blocks):
    for at in range(1, blocks):
        found = cuts_of(at, blocks)
        assert at not in found
        assert all(1 <= cut < blocks for cut in found)
        assert len(found) <= 4
        assert len(set(found)) == len(found)
