"""What crosses the cut comes back within the error that each precision promises, and nothing hostile comes in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_of

from clients.fetch import MINILM, is_whole
from clients.split import cut
from clients.split.coding import (
    EXPONENT,
    STEPS,
    VALUES,
    decode,
    encode,
    encoded_bytes,
    pack_rows,
    relative_error,
    unpack_rows,
)
from strategies.records import bundle
from strategies.wire import Refused, pack_model, unpack_model

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MINILM_FOLDER = Path("models/minilm")
LARGEST = float(np.finfo(np.float32).max)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
finite = arrays_of(
    np.float32, shapes, elements=st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=True)
)
magnitudes = st.integers(-45, 38)


def there_and_back(tensor, precision):
    return decode(encode(tensor, precision), precision, tensor.shape)


def exact(tensor):
    return tensor.to(torch.float64)


def hold_bounds(tensor):
    """The error of each element is within what the precision says, in float64."""
    off = {p: exact(there_and_back(tensor, p)).sub(exact(tensor)).abs() for p in PRECISIONS}
    size, most = exact(tensor).abs(), exact(tensor).abs().amax()
    assert not off["fp32"].any()
    # A float16 has 11 significant bits down to 2⁻¹⁴; the largest is brought to 2¹⁵ at least.
    assert (off["fp16"] <= torch.maximum(size * 2.0**-11, most * 2.0**-40)).all()
    assert (off["bf16"] <= torch.maximum(size * 2.0**-8, size.new_tensor(2.0**-134))).all()
    steps = exact(torch.from_numpy(encode(tensor, "int8")[STEPS])).unsqueeze(-1)
    assert (off["int8"] <= (steps / 2).clamp(min=2.0**-136)).all()
    absmax = size.amax(dim=-1, keepdim=True)
    assert (steps <= absmax / 127 * (1 + 2.0**-16) + 2.0**-142).all()


class TestErrors:
    @given(finite)
    def test_each_element_is_within_its_bound(self, values):
        hold_bounds(torch.from_numpy(values))

    @given(magnitudes, st.integers(0, 2**32 - 1))
    def test_at_every_magnitude(self, magnitude, seed):
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
        tensor = tensor * 10.0**magnitude
        hold_bounds(tensor.clamp(-LARGEST, LARGEST).float())

    @given(finite, st.sampled_from(PRECISIONS))
    def test_what_was_decoded_is_encoded_to_the_same(self, values, precision):
        once = there_and_back(torch.from_numpy(values), precision)
        assert torch.equal(there_and_back(once, precision), once)
        for first, second in zip(
            encode(once, precision).values(),
            encode(there_and_back(once, precision), precision).values(),
            strict=True,
        ):
            assert np.array_equal(first, second)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("value", [LARGEST, -LARGEST, 2.0**-149, 1e-38, 65520.0, 3.4e38])
    def test_the_ends_of_float32(self, precision, value):
        tensor = torch.full((1, 2, 3), value)
        tensor[0, 1] = 0
        hold_bounds(tensor)
        assert there_and_back(tensor, precision).isfinite().all()

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_zeros_stay_zeros_also_beside_others(self, precision):
        tensor = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
        tensor[1] = 0
        tensor[2, 3] = 0
        back = there_and_back(tensor, precision)
        assert not back[1].any()
        assert not back[2, 3].any()
        assert not there_and_back(torch.zeros(1, 2, 3), precision).any()

    def test_small_gradients_do_not_vanish_in_fp16(self):
        """Bare float16 loses all below 3·10⁻⁸; here the error is that of 11 bits."""
        gradient = 1e-9 * torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(2))
        assert not gradient.half().any()
        assert relative_error(gradient, there_and_back(gradient, "fp16")) < 2**-11

    def test_one_large_token_takes_no_bits_from_the_others_in_int8(self):
        tensor = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(3))
        alone = there_and_back(tensor, "int8")
        tensor[0, 0] *= 1e6
        assert torch.equal(there_and_back(tensor, "int8")[0, 1:], alone[0, 1:])

    def test_int8_of_normal_numbers_has_the_error_of_uniform_rounding(self):
        """Step s, error s/√12 rms; 10⁵ numbers: the rms is within 1%, four standard errors."""
        tensor = torch.randn(400, 256, generator=torch.Generator().manual_seed(4))
        off = there_and_back(tensor, "int8") - tensor
        steps = torch.from_numpy(encode(tensor, "int8")[STEPS])
        expected = (steps.square().mean() / 12).sqrt()
        assert off.square().mean().sqrt().item() == pytest.approx(expected.item(), rel=0.01)


class TestEncode:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_does_not_leave(self, precision, wrong):
        tensor = torch.zeros(2, 3, 4)
        tensor[1, 2, 3] = wrong
        with pytest.raises(ValueError, match="1 of 24 elements are not finite"):
            encode(tensor, precision)

    def test_a_precision_that_is_none(self):
        with pytest.raises(ValueError, match="'fp8' is none of fp32, fp16, bf16, int8"):
            encode(torch.zeros(2, 3), "fp8")

    def test_a_single_number_is_refused(self):
        with pytest.raises(ValueError, match="no tokens"):
            encode(torch.tensor(1.0), "fp32")

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_graph_other_types_and_strides_are_taken(self, precision):
        tensor = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(5))
        plain = encode(tensor, precision)
        for other in (tensor.clone().requires_grad_() * 1, tensor.mT.contiguous().mT):
            found = encode(other, precision)
            assert all(np.array_equal(found[name], plain[name]) for name in plain)
        half = tensor.bfloat16()
        assert torch.equal(there_and_back(half, "fp32"), half.float())

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_the_tensor_stays_as_it_was(self, precision):
        tensor = torch.tensor([[LARGEST, 1.0], [-3.0, 2.0**-140]])
        kept = tensor.clone()
        there_and_back(tensor, precision).add_(1)
        assert torch.equal(tensor, kept)

    @given(shapes, st.sampled_from(PRECISIONS))
    def test_bytes_are_those_that_travel(self, shape, precision):
        sent = encode(torch.ones(shape), precision)
        assert sum(array.nbytes for array in sent.values()) == encoded_bytes(shape, precision)

    def test_bytes_of_a_sentence(self):
        shape = (1, 128, 384)
        sizes = [encoded_bytes(shape, precision) for precision in PRECISIONS]
        assert sizes == [196_608, 98_306, 98_304, 49_664]

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
    def test_nothing_is_encoded_to_nothing(self, precision, shape):
        assert there_and_back(torch.zeros(shape), precision).shape == shape


def sent(precision):
    tensor = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(6))
    return encode(tensor, precision)


class TestDecode:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_by_way_of_flower_s_records(self, precision):
        """Read-only views of a message's bytes, in either order."""
        tensor = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(7))
        record = bundle({"split": pack_model(encode(tensor, precision))})["split"]
        come = unpack_model(record)
        assert not any(array.flags.writeable for array in come.values())
        expected = there_and_back(tensor, precision)
        assert torch.equal(decode(come, precision, (2, 3, 4)), expected)
        turned = {name: np.asfortranarray(array) for name, array in come.items()}
        assert torch.equal(decode(turned, precision, (2, 3, 4)), expected)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("shape", [(2, 3, 5), (2, 12), (3, 2, 4), (24,), (2, 3, 4, 1)])
    def test_other_shapes(self, precision, shape):
        with pytest.raises(Refused, match="shape: 'values' has shape"):
            decode(sent(precision), precision, shape)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_other_names(self, precision):
        arrays = sent(precision)
        for wrong in ({}, {**arrays, "more": arrays[VALUES]}, {"x" * 500: arrays[VALUES]}):
            with pytest.raises(Refused) as refusal:
                decode(wrong, precision, (2, 3, 4))
            assert refusal.value.reason == "missing"
            assert len(str(refusal.value)) < 300

    @pytest.mark.parametrize("told", PRECISIONS)
    @pytest.mark.parametrize("agreed", PRECISIONS)
    def test_another_precision_than_agreed(self, told, agreed):
        if told == agreed:
            return
        with pytest.raises(Refused) as refusal:
            decode(sent(told), agreed, (2, 3, 4))
        assert refusal.value.reason in {"missing", "dtype"}

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("name", [VALUES, EXPONENT, STEPS])
    @pytest.mark.parametrize("dtype", [np.float64, np.complex64, np.int64, np.bool_])
    def test_other_types(self, precision, name, dtype):
        arrays = sent(precision)
        if name not in arrays:
            return
        arrays[name] = arrays[name].astype(dtype)
        with pytest.raises(Refused) as refusal:
            decode(arrays, precision, (2, 3, 4))
        assert refusal.value.reason == "dtype"

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite(self, bad):
        for precision, bits in (
            ("fp32", np.float32(bad)),
            ("fp16", np.float16(bad)),
            ("bf16", (np.float32(bad).view(np.uint32) >> 16).astype(np.uint16)),
        ):
            arrays = sent(precision)
            arrays[VALUES] = arrays[VALUES].copy()
            arrays[VALUES][1, 2, 3] = bits
            with pytest.raises(Refused) as refusal:
                decode(arrays, precision, (2, 3, 4))
            assert refusal.value.reason == "not_finite"

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0])
    def test_steps_that_are_none(self, bad):
        arrays = sent("int8")
        arrays[STEPS] = arrays[STEPS].copy()
        arrays[STEPS][1, 2] = bad
        with pytest.raises(Refused) as refusal:
            decode(arrays, "int8", (2, 3, 4))
        assert refusal.value.reason == "not_finite"

    def test_a_step_that_overflows(self):
        arrays = {VALUES: np.full((1, 2), 127, np.int8), STEPS: np.array([3e38], np.float32)}
        with pytest.raises(Refused) as refusal:
            decode(arrays, "int8", (1, 2))
        assert refusal.value.reason == "not_finite"

    def test_levels_and_exponents_out_of_range(self):
        levels = {VALUES: np.full((1, 2), -128, np.int8), STEPS: np.ones(1, np.float32)}
        with pytest.raises(Refused, match="range: an element has level -128"):
            decode(levels, "int8", (1, 2))
        for exponent in (-165, 113, 32_767, -32_768):
            arrays = {
                VALUES: np.ones((1, 2), np.float16),
                EXPONENT: np.array([exponent], np.int16),
            }
            with pytest.raises(Refused, match="range: an exponent of"):
                decode(arrays, "fp16", (1, 2))

    @given(
        st.sampled_from(PRECISIONS[1:]),
        st.binary(min_size=24, max_size=24),
        st.integers(-32_768, 32_767),
    )
    def test_any_bytes_are_decoded_to_finite_numbers_or_refused(self, precision, data, number):
        arrays = {VALUES: np.frombuffer(data, encode(torch.ones(1, 1), precision)[VALUES].dtype)}
        if precision == "fp16":
            arrays[EXPONENT] = np.array([number], np.int16)
        if precision == "int8":
            bits = np.uint32(number & 0xFFFF) << np.uint32(16)
            arrays[STEPS] = np.array([bits], np.uint32).view(np.float32)
        arrays[VALUES] = arrays[VALUES].reshape(1, -1)
        refused = None
        try:
            decoded = decode(arrays, precision, arrays[VALUES].shape)
        except Refused as refusal:
            refused = refusal.reason
        assert refused in {"not_finite", "range"} if refused else decoded.isfinite().all()


class TestRelativeError:
    def test_by_hand(self):
        assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == 0.1
        assert relative_error(torch.tensor([1e-38]), torch.tensor([2e-38])) == pytest.approx(1)
        assert relative_error(torch.tensor([3e38, 3e38]), torch.tensor([-3e38, 3e38])) > 1.4

    def test_of_nothing(self):
        assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
        assert relative_error(torch.zeros(3), torch.ones(3)) == float("inf")


class TestRows:
    @given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 3))
    def test_only_tokens_travel_and_come_back_to_their_places(self, lengths, more):
        length = max(lengths) + more
        kept = torch.tensor(lengths)
        activation = torch.randn(len(lengths), length, 4)
        rows = pack_rows(activation, kept)
        assert rows.shape == (sum(lengths), 4)
        back = unpack_rows(rows, kept, length)
        for row, count in enumerate(lengths):
            assert torch.equal(back[row, :count], activation[row, :count])
            assert not back[row, count:].any()
        assert torch.equal(pack_rows(back, kept), rows)

    def test_gradients_go_through_both(self):
        activation = torch.randn(2, 3, 4, requires_grad=True)
        lengths = torch.tensor([3, 1])
        unpack_rows(pack_rows(activation, lengths), lengths, 5).sum().backward()
        assert torch.equal(activation.grad[0], torch.ones(3, 4))
        assert torch.equal(activation.grad[1], torch.tensor([[1.0], [0], [0]]).expand(3, 4))

    @pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [4, 1], [-1, 2], [[1, 2]]])
    def test_lengths_that_do_not_fit(self, lengths):
        with pytest.raises(ValueError, match="of 2 rows of 3 positions"):
            pack_rows(torch.zeros(2, 3, 4), torch.tensor(lengths))

    @pytest.mark.parametrize("shape", [(2, 4), (4, 4), (3,), (3, 1, 4)])
    def test_rows_that_are_not_as_many(self, shape):
        with pytest.raises(ValueError, match="of 3 tokens"):
            unpack_rows(torch.zeros(shape), torch.tensor([2, 1]), 2)


def padded_batch(vocabulary, lengths=(9, 5, 1)):
    ids = torch.randint(5, vocabulary, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return ids * mask, mask, torch.tensor(lengths)


def gradient_and_loss(top, activation, loss):
    """The loss of a top half at an activation, and its gradient there."""
    leaf = activation.detach().clone().requires_grad_()
    value = loss(top, leaf)
    value.backward()
    return leaf.grad, value.detach()


def padding_is_idle(bottom, top, ids, mask, lengths, loss):
    """Whatever stands at padding: the same loss and the same gradient, which is zero there, to the bit."""
    with torch.no_grad():
        activation = bottom(input_ids=ids, attention_mask=mask)
    gradient, value = gradient_and_loss(top, activation, loss)
    packed = unpack_rows(pack_rows(activation, lengths), lengths, ids.shape[1])
    other, other_value = gradient_and_loss(top, packed, loss)
    assert torch.equal(value, other_value)
    assert gradient.abs().sum() > 0
    assert not gradient[mask == 0].any()
    assert torch.equal(gradient, other)
    assert torch.equal(gradient, unpack_rows(pack_rows(gradient, lengths), lengths, ids.shape[1]))


class TestPaddingOfRealModels:
    @pytest.mark.skipif(
        not is_whole(MINILM_FOLDER, MINILM), reason="models/minilm is not there: make models"
    )
    @pytest.mark.parametrize("at", [1, 5])
    def test_bert_under_a_mean_over_tokens(self, at):
        torch.manual_seed(0)
        bottom, top = cut(str(MINILM_FOLDER), at=at)
        ids, mask, lengths = padded_batch(30_000)
        target = torch.randn(3, 384)

        def loss(half, leaf):
            states = half(leaf, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(2).float()
            return ((states * weights).sum(1) / weights.sum(1) - target).square().sum()

        padding_is_idle(bottom.eval(), top.eval(), ids, mask, lengths, loss)

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_a_causal_language_model_whose_loss_ignores_padding(self, family):
        import transformers

        torch.manual_seed(0)
        if family == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16, pad_token_id=0
            )
            cls = transformers.GPT2LMHeadModel
        else:
            config = transformers.LlamaConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                pad_token_id=0,
            )
            cls = transformers.LlamaForCausalLM
        bottom, top = cut(cls(config).eval(), at=1)
        ids, mask, lengths = padded_batch(50)
        labels = torch.where(mask.bool(), ids, -100)

        def loss(half, leaf):
            return half(leaf, attention_mask=mask, labels=labels).loss

        padding_is_idle(bottom, top, ids, mask, lengths, loss)
