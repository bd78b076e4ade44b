"""Adapters in all families: the layer is W·x + s·B·A·x + L·R·x, whatever its rank, and names and draws are fixed."""

import copy

import pytest
import torch
import transformers as tf

from clients.lora import adapted
from clients.lora.adapters import _draw

RANK, ALPHA, LENGTH, VOCABULARY = 4, 6.0, 8, 40
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = tf.BertConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
    max_position_embeddings=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **TEXT,
)  # fmt: skip
GPT2 = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **TEXT)
LLAMA = tf.LlamaConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=24, max_position_embeddings=16, **TEXT,
)  # fmt: skip
EACH = pytest.mark.parametrize("config", [BERT, GPT2, LLAMA], ids=["bert", "gpt2", "llama"])
LAYERS = {
    "bert": "encoder_layer_{}_attention_self_{}",
    "gpt2": "h_{}_attn_{}",
    "llama": "layers_{}_self_attn_{}",
}
PARTS = {"bert": ("query", "value"), "gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}


def base(config, dtype=torch.float32):
    torch.manual_seed(0)
    return tf.AutoModel.from_config(config).to(dtype).eval().requires_grad_(False)


def tokens():
    return torch.randint(3, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def states(model):
    return model(input_ids=tokens()).last_hidden_state


def fill(*modules):
    """Any factors but zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_(std=0.3)


def merged(config, parts):
    """The same model with each layer's product in its own weight."""
    model = base(config)
    for path, layer in model.named_modules():
        name = path.replace(".", "_")
        change = 0
        if name in parts.adapters:
            factors = parts.adapters[name]
            change = ALPHA / RANK * factors["B"].weight @ factors["A"].weight
        if name in parts.residual:
            change = change + parts.residual[name]["left"] @ parts.residual[name]["right"]
        if torch.is_tensor(change):
            layer.weight += change.T if config is GPT2 else change
    return model


@EACH
@pytest.mark.parametrize("own", [None, {0: 1}, {0: 0, 1: 3}], ids=["full", "one", "two"])
@pytest.mark.parametrize("residual_rank", [0, 2])
def test_a_layer_is_its_weight_and_the_scaled_product_at_every_rank(config, own, residual_rank):
    family, model = config.model_type, base(config)
    ranks = None
    if own is not None:
        ranks = {
            LAYERS[family].format(block, part): rank
            for block, rank in own.items()
            for part in PARTS[family]
        }
    parts = adapted(model, rank=RANK, alpha=ALPHA, ranks=ranks, residual_rank=residual_rank)
    assert torch.equal(states(model), states(base(config)))  # nothing has changed yet
    fill(parts.adapters, parts.residual)
    with torch.no_grad():
        torch.testing.assert_close(states(model), states(merged(config, parts)))
    for name in parts.layers:
        rank = RANK if ranks is None else ranks.get(name, 0)
        assert (name in parts.adapters) == (rank > 0)
        assert (name in parts.residual) == (residual_rank > 0)
        if rank:
            assert parts.adapters[name]["A"].weight.shape == (rank, 16)
            assert parts.adapters[name]["B"].weight.shape[1] == rank


@EACH
def test_names_are_the_layers_without_dots(config):
    family = config.model_type
    expected = [LAYERS[family].format(block, part) for block in (0, 1) for part in PARTS[family]]
    parts = adapted(base(config), rank=RANK, alpha=ALPHA, residual_rank=1)
    assert list(parts.layers) == list(parts.adapters) == list(parts.residual) == expected
    assert set(parts.adapters.state_dict()) == {f"{e}.{f}.weight" for e in expected for f in "AB"}
    assert set(parts.residual.state_dict()) == {f"{e}.{s}" for e in expected for s in ("left", "right")}  # fmt: skip


@EACH
def test_gradients_reach_both_factors_and_nothing_else(config):
    model = base(config)
    parts = adapted(model, rank=RANK, alpha=ALPHA, residual_rank=1)
    fill(parts.adapters, parts.residual)
    states(model).square().sum().backward()
    assert all(p.grad.any() for p in parts.adapters.parameters())
    assert not any(p.requires_grad for p in parts.residual.parameters())
    trained = {id(p) for p in parts.adapters.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


@EACH
def test_less_rank_is_a_leading_block_and_the_rest_stays_zero_in_training(config):
    """A client of rank 2 in a model of rank 4 whose other rows and columns are zero trains as one that lacks them."""
    small, large = base(config), base(config)
    ours = adapted(small, rank=RANK, alpha=ALPHA, ranks=dict.fromkeys(_names(config), 2))
    theirs = adapted(large, rank=RANK, alpha=ALPHA)
    fill(ours.adapters)
    with torch.no_grad():
        for name, factors in theirs.adapters.items():
            factors["A"].weight.zero_()[:2] = ours.adapters[name]["A"].weight
            factors["B"].weight.zero_()[:, :2] = ours.adapters[name]["B"].weight
    for model in (small, large):
        states(model).square().sum().backward()
    for name, factors in theirs.adapters.items():
        a, b = factors["A"].weight.grad, factors["B"].weight.grad
        torch.testing.assert_close(a[:2], ours.adapters[name]["A"].weight.grad)
        torch.testing.assert_close(b[:, :2], ours.adapters[name]["B"].weight.grad)
        assert not a[2:].any()
        assert not b[:, 2:].any()


def _names(config):
    return adapted(base(config), rank=1, alpha=1.0).layers


@EACH
def test_ranks_do_not_change_what_is_drawn(config):
    """The seed of a run gives all clients the same leading rows, and what is drawn afterwards is the same."""
    drawn = []
    for ranks in (None, dict.fromkeys(_names(config), 1)):
        model = base(config)
        torch.manual_seed(5)
        parts = adapted(model, rank=RANK, alpha=ALPHA, ranks=ranks)
        drawn.append(([a["A"].weight[:1] for a in parts.adapters.values()], torch.rand(3)))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)


class TestSharedA:
    @EACH
    def test_only_b_is_there_and_a_has_no_gradient(self, config):
        model = base(config)
        parts = adapted(model, rank=RANK, alpha=ALPHA, share_a=True)
        assert all(name.endswith(".B.weight") for name in parts.adapters.state_dict())
        states(model).square().sum().backward()
        assert all(p.grad.any() for p in parts.adapters.parameters())
        a = [p for name, p in model.named_parameters() if ".lora_A." in name]
        assert len(a) == len(parts.layers)
        assert not any(p.requires_grad for p in a)

    def test_it_is_the_same_everywhere_whatever_the_seed_and_leads_at_less_rank(self):
        found = []
        for seed, rank in ((1, RANK), (2, RANK), (3, 2)):
            model = base(BERT)
            torch.manual_seed(seed)
            adapted(model, rank=rank, alpha=ALPHA, share_a=True)
            found.append([p for name, p in model.named_parameters() if ".lora_A." in name])
        for one, other, less in zip(*found, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one[:2], less)
        assert not torch.equal(found[0][0], found[0][1])  # layers differ

    def test_its_numbers_are_uniform_as_peft_draws_them(self):
        """Mean, variance and the range of 24 × 4096 numbers, each within 5 standard errors: alarms below 2e-6."""
        weight = torch.nn.Parameter(torch.empty(24, 4096))
        _draw(weight, "a")
        scaled, count = weight * 64, weight.numel()
        assert abs(scaled.mean()) < 5 * (1 / 3 / count) ** 0.5
        assert abs(scaled.square().mean() - 1 / 3) < 5 * (4 / 45 / count) ** 0.5
        assert 0.999 < scaled.abs().max() < 1

    def test_what_was_drawn_once_is_drawn_for_ever(self):
        """Clients and servers of other versions and machines must agree: these bits are the law."""
        weight = torch.nn.Parameter(torch.empty(1, 4))
        _draw(weight, "encoder_layer_0_attention_self_query")
        expected = [
            -0.21612176299095154, 0.10641539096832275, 0.4330403804779053, -0.26132920384407043,
        ]  # fmt: skip
        assert weight[0].tolist() == expected


class TestHalfPrecision:
    @EACH
    @pytest.mark.parametrize("share_a", [False, True])
    def test_adapters_are_float32_over_a_bfloat16_base(self, config, share_a):
        model = base(config, torch.bfloat16)
        parts = adapted(model, rank=RANK, alpha=ALPHA, share_a=share_a, residual_rank=1)
        fill(parts.adapters, parts.residual)
        output = states(model)
        output.float().square().sum().backward()
        assert output.dtype == torch.bfloat16
        ours = [*parts.adapters.parameters(), *parts.residual.parameters()]
        assert {p.dtype for p in ours} == {torch.float32}
        assert all(p.grad.isfinite().all() and p.grad.any() for p in parts.adapters.parameters())

    @EACH
    def test_it_is_close_to_float32(self, config):
        """bfloat16 has 8 bits: each of two blocks rounds a handful of times; 4% of the states' length is ample."""
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            model = base(config, torch.bfloat16).to(dtype)
            parts = adapted(model, rank=RANK, alpha=ALPHA, residual_rank=1)
            fill(parts.adapters, parts.residual)
            with torch.no_grad():
                found.append(states(model).float())
        assert (found[0] - found[1]).norm() < 0.04 * found[0].norm()


@EACH
def test_a_copy_has_adapters_and_residuals_of_its_own(config):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = base(config)
            self.parts = adapted(self.base, rank=RANK, alpha=ALPHA, residual_rank=1)
            self.residual = self.parts.residual

    whole = Whole()
    other = copy.deepcopy(whole)
    before = states(whole.base).detach()
    fill(other.residual)
    assert torch.equal(states(whole.base), before)
    assert not torch.equal(states(other.base), before)


@pytest.mark.parametrize("rank", [-1, RANK + 1])
def test_a_rank_that_the_model_does_not_have_is_refused(rank):
    with pytest.raises(ValueError, match=r"are not in 0\.\.4, the model's rank"):
        adapted(base(BERT), rank=RANK, alpha=ALPHA, ranks={_names(BERT)[0]: rank})


def test_layers_that_a_half_lacks_are_left_to_the_other():
    parts = adapted(
        base(GPT2), rank=RANK, alpha=ALPHA, ranks={"h.7.attn.c_attn": 2, "h.0.attn.c_attn": 3}
    )
    assert [a["A"].out_features for a in parts.adapters.values()] == [3]


def test_layers_of_both_kinds_are_adapted_without_a_warning():
    """GPT-2's projections are Conv1D, its classifier's score is Linear."""
    torch.manual_seed(0)
    model = tf.GPT2ForSequenceClassification(GPT2).eval().requires_grad_(False)
    whole = copy.deepcopy(model)
    parts = adapted(model, rank=RANK, alpha=ALPHA, targets=["c_attn", "score"])
    fill(parts.adapters)
    factors = parts.adapters["score"]
    with torch.no_grad():
        whole.score.weight += ALPHA / RANK * factors["B"].weight @ factors["A"].weight
        for block in (0, 1):
            factors = parts.adapters[f"transformer_h_{block}_attn_c_attn"]
            product = ALPHA / RANK * factors["B"].weight @ factors["A"].weight
            whole.transformer.h[block].attn.c_attn.weight += product.T
        torch.testing.assert_close(model(tokens()).logits, whole(tokens()).logits)


@EACH
def test_halves_have_the_whole_s_names_and_the_same_products(config):
    from clients.split import cut

    whole = base(config)
    bottom, top = cut(base(config), at=1)
    settings = {"rank": RANK, "alpha": ALPHA, "residual_rank": 1, "share_a": True}
    ours = adapted(whole, **settings)
    halves = [adapted(half, **settings) for half in (bottom, top)]
    assert ours.layers == halves[0].layers + halves[1].layers
    fill(ours.adapters, ours.residual)
    for half in halves:
        for name in half.layers:
            half.adapters[name].load_state_dict(ours.adapters[name].state_dict())
            half.residual[name].load_state_dict(ours.residual[name].state_dict())
    mask = torch.ones_like(tokens())
    activation = bottom(input_ids=tokens(), attention_mask=mask)
    output = top(activation, attention_mask=mask).last_hidden_state
    expected = whole(input_ids=tokens(), attention_mask=mask).last_hidden_state
    assert torch.equal(output, expected)
