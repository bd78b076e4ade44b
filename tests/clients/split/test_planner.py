"""The cut that is chosen is the fastest that fits, and what was measured is what halves hold."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from clients.fetch import MINILM, is_whole
from clients.lora.adapters import adapted
from clients.pretrained import load_encoder
from clients.split import cut
from clients.split.planner import CutCost, Limits, NoCutFitsError, plan
from clients.split.profile import Profile, Stretch, measure

MINILM_FOLDER = Path("models/minilm")
needs_minilm = pytest.mark.skipif(
    not is_whole(MINILM_FOLDER, MINILM), reason="models/minilm is not there: make models"
)

MB = 10**6


def cost(at, **changes):
    """Of a model whose every cut costs the same 2 seconds."""
    usual = CutCost(at, 10 * at * MB, 10 * (5 - at) * MB, at / 2, (4 - at) / 2, MB)
    return replace(usual, **changes)


COSTS = [cost(at) for at in (1, 2, 3, 4)]

sizes = st.integers(0, 50 * MB)
seconds = st.floats(0, 1)
stretches = st.builds(Stretch, sizes, sizes, sizes, seconds, seconds)
profiles = st.builds(
    Profile,
    stretches,
    st.lists(stretches, min_size=2, max_size=8).map(tuple),
    stretches,
    st.just(100),
    st.integers(1, 100),
    st.just(32),
)
memory = st.one_of(st.none(), st.floats(1, 2_000))
all_limits = st.builds(
    Limits,
    memory,
    memory,
    st.one_of(st.none(), st.floats(0.1, 1_000)),
    st.floats(0.01, 10),
    st.integers(1, 20),
    st.floats(0, 0.2),
)


def step(one, limits):
    wire = 8 * one.wire_bytes / (limits.bandwidth_mbit * 1e6) if limits.bandwidth_mbit else 0.0
    return one.client_seconds / limits.client_speed + limits.cohort * one.server_seconds + wire


def fits(one, limits):
    return (
        limits.client_memory_mb is None or one.client_bytes <= limits.client_memory_mb * MB
    ) and (limits.server_memory_mb is None or one.server_bytes <= limits.server_memory_mb * MB)


def planned(costs, limits):
    """The cut; None where none fits."""
    try:
        return plan(costs, limits).at
    except NoCutFitsError:
        return None


class TestPlan:
    @given(profiles, all_limits)
    def test_it_is_the_fastest_that_fits_and_no_faster_one_is_deeper(self, profile, limits):
        costs = profile.cuts()
        fitting = [one for one in costs if fits(one, limits)]
        if not fitting:
            with pytest.raises(NoCutFitsError):
                plan(costs, limits)
            return
        found = plan(costs, limits)
        best = min(step(one, limits) for one in fitting)
        near = [one.at for one in fitting if step(one, limits) <= best * (1 + limits.tolerance)]
        assert found.at == max(near)
        assert found.seconds == pytest.approx(step(costs[found.at - 1], limits))

    @given(profiles, all_limits, st.floats(0, 1))
    def test_less_memory_for_clients_never_moves_the_cut_up(self, profile, limits, share):
        costs = profile.cuts()
        most = limits.client_memory_mb or 2_000
        before = planned(costs, replace(limits, client_memory_mb=most))
        after = planned(costs, replace(limits, client_memory_mb=max(most * share, 1e-3)))
        assert after is None or (before is not None and after <= before)

    @given(profiles, all_limits, st.floats(0, 1))
    def test_less_memory_for_the_server_never_makes_a_step_faster(self, profile, limits, share):
        costs, exact = profile.cuts(), replace(limits, tolerance=0.0)
        most = exact.server_memory_mb or 2_000
        wide = replace(exact, server_memory_mb=most)
        narrow = replace(exact, server_memory_mb=max(most * share, 1e-3))
        if planned(costs, narrow) is not None:
            assert plan(costs, narrow).seconds >= plan(costs, wide).seconds

    def test_of_cuts_as_fast_the_deepest(self):
        found = plan(COSTS, Limits())
        assert (found.at, found.bound_by, found.seconds) == (4, (), 2.0)

    def test_a_slow_client_gets_few_blocks_and_a_busy_server_few(self):
        assert plan(COSTS, Limits(client_speed=0.5)).at == 1
        assert plan(COSTS, Limits(client_speed=0.5, cohort=3)).at == 4

    def test_it_says_which_limit_bound(self):
        found = plan(COSTS, Limits(client_memory_mb=25))
        assert (found.at, found.bound_by) == (2, ("client_memory_mb",))
        found = plan(COSTS, Limits(client_speed=0.5, server_memory_mb=20))
        assert (found.at, found.bound_by) == (3, ("server_memory_mb",))
        found = plan(COSTS, Limits(client_memory_mb=100, server_memory_mb=100))
        assert (found.at, found.bound_by) == (4, ())

    def test_a_limit_is_kept_to_the_byte(self):
        assert plan([cost(1, client_bytes=10 * MB)], Limits(client_memory_mb=10)).at == 1
        with pytest.raises(NoCutFitsError):
            plan([cost(1, client_bytes=10 * MB + 1)], Limits(client_memory_mb=10))

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            (
                Limits(client_memory_mb=9),
                r"no cut fits the client: .* cut at 1, needs 10\.0 MB, and client_memory_mb=9$",
            ),
            (
                Limits(server_memory_mb=9),
                r"no cut fits the server: .* cut at 4, needs 10\.0 MB, and server_memory_mb=9$",
            ),
            (
                Limits(client_memory_mb=20, server_memory_mb=20),
                r"no cut fits both: .* client_memory_mb=20 allows, at 2, leaves 30\.0 MB",
            ),
        ],
    )
    def test_where_none_fits_the_least_need_is_named(self, limits, message):
        with pytest.raises(NoCutFitsError, match=message):
            plan(COSTS, limits)

    def test_a_model_of_one_block_has_no_cut(self):
        stretch = Stretch(1, 1, 1, 1.0, 1.0)
        with pytest.raises(NoCutFitsError, match="one block"):
            plan(Profile(stretch, (stretch,), stretch, 8, 8, 4).cuts(), Limits())

    def test_the_table_has_a_line_for_each_cut(self):
        limits = Limits(client_memory_mb=25, bandwidth_mbit=8, client_speed=0.5, cohort=2)
        assert plan(COSTS, limits).table.splitlines() == [
            "cut  client MB  server MB  client s  server s   wire MB    wire s    step s",
            "  1       10.0       40.0    1.0000    3.0000     1.000    1.0000    5.0000",
            "  2       20.0       30.0    2.0000    2.0000     1.000    1.0000    5.0000  taken",
            "  3       30.0       20.0    3.0000    1.0000     1.000    1.0000    5.0000"
            "  over client_memory_mb",
            "  4       40.0       10.0    4.0000    0.0000     1.000    1.0000    5.0000"
            "  over client_memory_mb",
        ]

    def test_settings_are_held_to_their_ranges(self):
        with pytest.raises(ValueError, match=r"Limits\.client_speed = 0"):
            Limits(client_speed=0.0)


class TestCuts:
    def test_by_hand(self):
        profile = Profile(
            Stretch(1000, 0, 8, 0.1, 0.0),
            (Stretch(100, 10, 4, 1.0, 2.0), Stretch(200, 20, 6, 3.0, 4.0)),
            Stretch(500, 50, 2, 0.3, 0.2),
            places=3,
            tokens=2,
            hidden=5,
        )
        (one,) = profile.cuts("int8", moments=1, batches=2, copies=3, slack=1.5)
        crossing = 2 * 2 * 4 * 3 * 5
        assert one.client_bytes == 1100 + 3 * 10 + 1.5 * (12 + 8 + crossing)
        assert one.server_bytes == 700 + 3 * 3 * 70 + 1.5 * (8 + 6 + crossing)
        assert one.client_seconds == pytest.approx(0.1 + 2.0 + 0.1 + 2.0)
        assert one.server_seconds == pytest.approx(3.0 + 4.0 + 0.3 + 0.2)
        assert one.wire_bytes == 2 * (2 * 5 + 2 * 4)


def tiny(family):
    """A random model of four blocks and a batch for it."""
    import transformers

    small = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    torch.manual_seed(0)
    match family:
        case "bert":
            model = transformers.BertModel(transformers.BertConfig(**small))
        case "gpt2":  # the embedding matrix is the head's, too
            config = transformers.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=16
            )
            model = transformers.GPT2LMHeadModel(config)
        case _:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    model = model.eval().requires_grad_(False)
    adapted(model, rank=2, alpha=4)
    ids = torch.randint(3, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    if family != "bert":
        batch["labels"] = ids
    return model, batch


def held_by(half):
    tensors = {id(tensor): tensor for tensor in (*half.parameters(), *half.buffers())}.values()
    return sum(t.nbytes for t in tensors if not t.requires_grad), sum(
        t.nbytes for t in tensors if t.requires_grad
    )


def saved_by(half, run):
    """Bytes of all storages that a forward pass keeps, but for the half's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*half.parameters(), *half.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


class TestMeasure:
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    @pytest.mark.parametrize("at", [1, 2, 3])
    def test_bytes_are_those_of_real_halves(self, family, at):
        model, batch = tiny(family)
        profile = measure(model, batch, runs=1)
        bottom, top = cut(model, at=at)
        lower, upper = (
            (profile.below, *profile.blocks[:at]),
            (*profile.blocks[at:], profile.above),
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for half, pieces in ((bottom, lower), (top, upper)):
            frozen, trained = held_by(half)
            assert sum(piece.trained for piece in pieces) == trained
            # Position ids and rotary tables may be in both halves, whatever runs first.
            assert abs(sum(piece.frozen for piece in pieces) - frozen) <= 256
        assert sum(piece.saved for piece in lower) == pytest.approx(
            saved_by(bottom, lambda: bottom(**inputs)), abs=1024
        )

    def test_tokens_and_places(self):
        model, batch = tiny("bert")
        profile = measure(model, batch, runs=1)
        assert (profile.places, profile.tokens, profile.hidden) == (14, 11, 16)
        assert len(profile.blocks) == 4
        del batch["attention_mask"]
        assert measure(model, batch, runs=1).tokens == 14

    def test_it_changes_nothing(self):
        model, batch = tiny("gpt2")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        measure(model, batch, runs=1)
        assert model.config.use_cache
        assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )

    def test_seconds_go_to_the_block_that_takes_them(self):
        """One that sleeps in its forward pass, and another in its backward pass, are the slowest by far."""
        model, batch = tiny("bert")
        layers = model.encoder.layer
        layers[1].register_forward_pre_hook(lambda *_: time.sleep(0.2))

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(_, tensor):
                return tensor.clone()

            @staticmethod
            def backward(_, gradient):
                time.sleep(0.2)
                return gradient

        layers[2].output.register_forward_hook(lambda _, __, output: Slow.apply(output))
        profile = measure(model, batch, runs=3)
        forward = [piece.forward for piece in (profile.below, *profile.blocks, profile.above)]
        backward = [piece.backward for piece in (profile.below, *profile.blocks, profile.above)]
        assert forward[2] >= 0.2 > 0.1 > max(forward[:2] + forward[3:])
        assert backward[3] >= 0.2 > 0.1 > max(backward[:3] + backward[4:])

    def test_blocks_that_no_gradient_reaches_take_no_time_backward(self):
        model, batch = tiny("bert")
        for layer in model.encoder.layer[:2]:
            layer.requires_grad_(False)
        profile = measure(model, batch, runs=1)
        assert profile.blocks[0].backward == pytest.approx(0, abs=1e-4)
        assert profile.blocks[0].saved == 0
        assert profile.blocks[3].backward > 0

    def test_a_loss_of_one_s_own(self):
        model, batch = tiny("bert")
        seen = []
        measure(
            model,
            batch,
            loss=lambda output: seen.append(1) or output.pooler_output.sum(),
            runs=2,
        )
        assert len(seen) == 3

    def test_a_model_in_which_nothing_is_trained(self):
        model, batch = tiny("bert")
        with pytest.raises(ValueError, match="nothing in the model is trained"):
            measure(model.requires_grad_(False), batch)

    def test_a_model_that_cannot_be_cut(self):
        with pytest.raises(ValueError, match="is no Hugging Face model"):
            measure(nn.Linear(2, 2), {})


RESIDENT = """
import gc, re, sys
from pathlib import Path
import psutil, torch
from transformers import BertConfig, BertModel
from clients.lora.adapters import adapted
from clients.split import cut, load_bottom, load_top

side, at = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
ids = torch.randint(5, 30_000, (8, 128))
mask = torch.ones_like(ids)

def train(half, hidden, steps):
    half.eval().requires_grad_(False)
    adapted(half, rank=8, alpha=16)
    optimizer = torch.optim.Adam([p for p in half.parameters() if p.requires_grad])
    for _ in range(steps):
        if side == "client":
            output = half(input_ids=ids, attention_mask=mask)
        else:
            activation = torch.randn(8, 128, hidden, requires_grad=True)
            output = half(activation, attention_mask=mask).last_hidden_state
        output.backward(torch.ones_like(output))
        optimizer.step()
        optimizer.zero_grad()

small = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
train(cut(BertModel(small), at=1)[side == "server"], 16, 1)
gc.collect()
before = psutil.Process().memory_info().rss
half = (load_bottom if side == "client" else load_top)("models/minilm", at=at)
Path("/proc/self/clear_refs").write_text("5")
train(half, 384, 3)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(peak - before)
"""


def resident(side, at, **environment):
    """Bytes that a process takes at most for one half of MiniLM and its training."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, side, str(at)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def minilm():
    model = load_encoder(str(MINILM_FOLDER)).eval().requires_grad_(False)
    adapted(model, rank=8, alpha=16)
    ids = torch.randint(5, 30_000, (8, 128))
    return measure(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, runs=1)


@pytest.mark.slow
@needs_minilm
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
class TestMiniLm:
    @pytest.mark.parametrize(("side", "at"), [("client", 1), ("client", 5), ("server", 1)])
    def test_halves_take_the_memory_that_was_counted(self, minilm, side, at):
        """Within 15% where each tensor is mapped by itself; embeddings that no text uses are never read from disk."""
        counted = getattr(minilm.cuts(slack=1.0)[at - 1], f"{side}_bytes")
        found = resident(side, at, MALLOC_MMAP_THRESHOLD_="65536")
        assert found == pytest.approx(counted, rel=0.15)

    def test_glibc_s_heap_is_within_the_slack(self, minilm):
        counted = minilm.cuts()[4].client_bytes
        found = resident("client", 5)
        assert 0.6 * counted < found < 1.15 * counted
