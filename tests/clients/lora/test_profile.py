"""Memory of a step: what is counted, what is saved at other ranks than those measured, and real peaks of processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.fetch import MINILM, is_whole
from clients.lora import LoraClassifier
from clients.lora.profile import COPIES, OVERHEAD, _Live, _weights, measure, memory_of
from tests.clients.test_dp_sgd_lora import VOCABULARY, _config
from tests.support.bert import save_tiny_bert

LENGTH, BATCH, RANK, CLASSES, WIDTH = 10, 6, 8, 3, 16
FAMILIES = ("bert", "gpt2", "llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    import transformers

    found = {}
    for family in FAMILIES:
        folder = save_tiny_bert(tmp_path_factory.mktemp(family))
        if family != "bert":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                transformers.AutoModel.from_config(_config(family)).save_pretrained(folder)
        found[family] = str(folder)
    return found


def made(folder, **settings) -> LoraClassifier:
    return LoraClassifier(
        (LENGTH,), CLASSES, VOCABULARY, pretrained=folder, **{"rank": RANK, **settings}
    )


def rows() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (BATCH, LENGTH))


def step(model: LoraClassifier, inputs: torch.Tensor) -> None:
    loss = F.cross_entropy(model(inputs), torch.zeros(len(inputs), dtype=torch.long))
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def saved_by(model: LoraClassifier, inputs: torch.Tensor) -> int:
    """Bytes of storages that autograd saves, as torch itself tells them."""
    weights = {t.untyped_storage().data_ptr() for t in _weights(model)}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(model, inputs)
    return sum(found.values())


def saved_of(profile, ranks) -> int:
    """What the estimate holds for saved tensors."""
    state = sum(
        (4 * COPIES * c.travelling + c.frozen) * ranks[n] for n, c in profile.layers.items()
    )
    fixed = OVERHEAD + profile.frozen + 4 * COPIES * profile.travelling + profile.transient
    return memory_of(profile, ranks) - state - fixed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share_a", [False, True])
def test_at_the_measured_ranks_it_is_what_is_saved_to_the_byte(folders, family, share_a):
    model, inputs = made(folders[family], share_a=share_a), rows()
    profile = measure(model, inputs)
    full = dict.fromkeys(profile.layers, RANK)
    assert saved_of(profile, full) == saved_by(model, inputs) > 0
    assert (profile.batch, profile.length) == (BATCH, LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_at_other_ranks_no_step_takes_more_than_was_said(folders, family, data):
    inputs = rows()
    profile = measure(made(folders[family]), inputs)
    ranks = {name: data.draw(st.sampled_from([0, 1, 2, 4, RANK])) for name in profile.layers}
    model = made(folders[family], ranks=ranks)
    saved = saved_of(profile, ranks)
    assert saved_by(model, inputs) <= saved
    with _Live(_weights(model)) as live:
        step(model, inputs)
    assert live.peak <= saved + profile.transient


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_is_saved_below_the_lowest_adapter(folders, family):
    """Without adapters in the lower of two blocks, what is said is within a tenth of what is saved."""
    inputs = rows()
    profile = measure(made(folders[family]), inputs)
    order = list(profile.layers)
    ranks = {name: RANK * (place >= len(order) // 2) for place, name in enumerate(order)}
    actual = saved_by(made(folders[family], ranks=ranks), inputs)
    full = saved_of(profile, dict.fromkeys(order, RANK))
    assert actual <= saved_of(profile, ranks) < 1.1 * actual < 0.7 * full


class TestCounts:
    def test_weights_by_dtype_and_numbers_that_travel(self, folders):
        model = made(folders["bert"], residual_rank=2)
        profile = measure(model, rows())
        base = model._encoder.base_model.state_dict()
        count = sum(t.numel() for n, t in base.items() if "lora" not in n)
        ids = sum(b.numel() for b in model._encoder.buffers())  # int64, not in the state
        assert profile.frozen == 4 * count + 8 * ids
        residuals = 2 * 2 * (WIDTH + WIDTH)
        assert profile.travelling == CLASSES * (WIDTH + 1) + residuals
        assert {c.travelling for c in profile.layers.values()} == {WIDTH + WIDTH}
        assert {c.saved for c in profile.layers.values()} == {4 * BATCH * LENGTH}
        half = measure(made(folders["bert"], base_dtype="bfloat16"), rows())
        assert half.frozen == 2 * count + 8 * ids

    def test_a_shared_a_stays_and_needs_no_input(self, folders):
        both, shared = (measure(made(folders["bert"], share_a=s), rows()) for s in (False, True))
        assert {(c.travelling, c.frozen) for c in shared.layers.values()} == {(WIDTH, 4 * WIDTH)}
        assert both.frozen == shared.frozen
        full = dict.fromkeys(both.layers, RANK)
        assert memory_of(shared, full) < memory_of(both, full)

    def test_no_adapter_at_all_leaves_the_head(self, folders):
        model = made(folders["bert"])
        profile = measure(model, rows())
        none = dict.fromkeys(profile.layers, 0)
        without = made(folders["bert"], ranks=none)
        assert saved_of(profile, none) == saved_by(without, rows())


def test_the_clients_half_of_a_split_model_is_measured_alone(folders):
    """Its layers are those below the cut, and what it saves is what a step of it saves."""
    from clients.split import SplitLora

    model = SplitLora(
        (LENGTH,), CLASSES, VOCABULARY, pretrained=folders["gpt2"], rank=RANK, split_point=1
    )
    inputs = rows()
    profile = measure(model.lower, inputs, lambda given: given[0].square().sum())
    assert list(profile.layers) == list(model.lower.adapters) == ["h_0_attn_c_attn"]
    whole = measure(model, inputs)
    assert list(whole.layers) == ["h_0_attn_c_attn", "h_1_attn_c_attn"]
    assert profile.frozen < whole.frozen
    lower, both = (dict.fromkeys(found.layers, RANK) for found in (profile, whole))
    assert saved_of(profile, lower) < saved_of(whole, both)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_more_rank_is_never_less_memory(profile, data):
    ranks = {name: data.draw(st.integers(0, RANK)) for name in profile.layers}
    more = {name: data.draw(st.integers(rank, RANK)) for name, rank in ranks.items()}
    assert memory_of(profile, ranks) <= memory_of(profile, more)


@pytest.fixture(scope="module")
def profile(folders):
    return measure(made(folders["gpt2"]), rows())


def test_the_model_is_left_as_it_was(folders):
    model = made(folders["bert"]).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, rows())
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    modules = [*model.modules(), *model._encoder.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_what_cannot_be_measured_is_refused(folders, profile):
    with pytest.raises(ValueError, match="Linear has no adapters"):
        measure(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"ranks of \['elsewhere'\]: the layers measured are"):
        memory_of(profile, {"elsewhere": 1})


@pytest.mark.slow
@pytest.mark.skipif(not is_whole(Path("models/minilm"), MINILM), reason="make models")
@pytest.mark.parametrize(
    ("batch", "length", "rank", "lowest"),
    [(16, 128, 8, 0), (16, 128, 64, 6), (8, 64, 32, 3), (3, 40, 32, 0), (1, 16, 4, 5)],
)
def test_a_process_never_takes_more_than_was_said(batch, length, rank, lowest):
    """Peak of the resident set over the imports, of three steps of AdamW on MiniLM; and it is not said far too much."""
    ranks = {
        f"encoder_layer_{block}_attention_self_{part}": rank if block >= lowest else 0
        for block in range(6)
        for part in ("query", "value")
    }
    asked = json.dumps({"batch": batch, "length": length, "ranks": ranks})
    done = subprocess.run(
        [sys.executable, "benchmarks/lora_ranks.py", "--cell", asked],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert 0 < figures["peak_bytes"] <= figures["predicted_bytes"]
    assert figures["predicted_bytes"] < figures["peak_bytes"] + 60 * 2**20
