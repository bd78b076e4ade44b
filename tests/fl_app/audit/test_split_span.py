"""Tokens of a batch from the gradient of the first adapters: all of them, where they are no more than its rank."""

import copy

import pytest
import torch
import torch.nn.functional as F
from split_helpers import encoder, needs_minilm, words

from clients.lora import adapted
from clients.pretrained import mean_state
from fl_app.audit.split.span import closest, distances, in_span, row_space

RANK, LENGTH = 4, 16


@pytest.fixture(scope="module")
def model():
    """MiniLM with adapters that have been trained: B is not zero."""
    whole = copy.deepcopy(encoder())
    torch.manual_seed(0)
    laid = adapted(whole, rank=RANK, alpha=8.0)
    for name, weight in laid.adapters.named_parameters():
        if name.endswith("B.weight"):
            torch.nn.init.normal_(weight, std=0.02)
    return whole, laid.adapters


@pytest.fixture(scope="module")
def vocabulary():
    return torch.cat(
        [words(("matplotlib", "sklearn"), 15).ids.unique(), torch.arange(2000, 3000)]
    ).unique()


def inputs(whole):
    """What the first block is given for a token at each place."""
    return lambda tokens: whole.embeddings(tokens.unsqueeze(1).expand(-1, LENGTH))


def gradients(model, ids, noise=0.0):
    whole, adapters = model
    adapters.zero_grad()
    states = mean_state(whole, ids, torch.ones_like(ids))
    F.cross_entropy(states[:, :4] * 10, torch.arange(len(ids)) % 4).backward()
    first = [part["A"].weight.grad.clone() for name, part in adapters.items() if "layer_0" in name]
    random = torch.Generator().manual_seed(0)
    return [g + noise * g.norm() * torch.randn(g.shape, generator=random) for g in first]


@needs_minilm
class TestMiniLM:
    @pytest.mark.parametrize("length", [4, 2 * RANK])
    def test_a_text_of_no_more_tokens_than_rows_is_read_exactly(self, model, vocabulary, length):
        for row in words(("matplotlib", "sklearn"), 15).ids[:4, :length]:
            basis = row_space(gradients(model, row.unsqueeze(0)))
            assert len(basis) == length
            (apart,) = distances([basis], inputs(model[0]), vocabulary)
            assert in_span(apart, vocabulary).tolist() == row.unique().tolist()

    def test_of_a_longer_one_a_part_of_the_span_is_left(self, model, vocabulary):
        row = words(("matplotlib", "sklearn"), 15).ids[0, :LENGTH]
        basis = row_space(gradients(model, row.unsqueeze(0)))
        assert len(basis) == 2 * RANK
        (apart,) = distances([basis], inputs(model[0]), vocabulary)
        assert not len(in_span(apart, vocabulary))
        guessed = closest(apart, vocabulary, len(row.unique()))
        right = torch.isin(guessed, row).float().mean()
        assert right > 10 * len(row.unique()) / len(vocabulary)

    def test_noise_on_the_update_takes_the_tokens_out_of_the_span(self, model, vocabulary):
        row = words(("matplotlib", "sklearn"), 15).ids[0, :6]
        basis = row_space(gradients(model, row.unsqueeze(0), noise=0.1))
        assert not len(in_span(distances([basis], inputs(model[0]), vocabulary)[0], vocabulary))

    def test_before_the_first_step_a_has_no_gradient_and_nothing_is_told(self, vocabulary):
        whole = copy.deepcopy(encoder())
        fresh = whole, adapted(whole, rank=RANK, alpha=8.0).adapters
        basis = row_space(gradients(fresh, words(("matplotlib", "sklearn"), 15).ids[:1, :6]))
        assert basis.shape == (0, 384)
        assert (distances([basis], inputs(whole), vocabulary) == 1).all()


def test_a_gradient_s_rows_are_in_the_span_of_the_inputs():
    random = torch.Generator().manual_seed(0)
    table = torch.randn(60, 3, 32, generator=random)
    held = torch.tensor([7, 7, 20, 41])
    x = torch.stack([table[token, place] for place, token in zip((0, 2, 1, 1), held, strict=True)])
    rows = torch.randn(5, 4, generator=random) @ x
    bases = [row_space([rows[:2], rows[2:]]), row_space([rows])]
    apart, same = distances(bases, lambda ids: table[ids], torch.arange(60), batch=7)
    torch.testing.assert_close(apart, same, atol=2e-3, rtol=0)
    assert in_span(apart, torch.arange(60)).tolist() == [7, 20, 41]
    assert sorted(closest(apart, torch.arange(60), 3).tolist()) == [7, 20, 41]
    others = torch.tensor([i for i in range(60) if i not in (7, 20, 41)])
    assert apart[others].min() > 0.5


def test_a_distance_is_the_residual_of_least_squares():
    random = torch.Generator().manual_seed(1)
    rows, table = torch.randn(3, 10, generator=random), torch.randn(8, 1, 10, generator=random)
    apart = distances([row_space([rows])], lambda ids: table[ids], torch.arange(8))[0]
    for token in range(8):
        x = table[token, 0]
        solved = torch.linalg.lstsq(rows.T, x.unsqueeze(1)).solution
        residual = (x - (rows.T @ solved)[:, 0]).norm() / x.norm()
        assert apart[token].item() == pytest.approx(residual.item(), abs=1e-5)


@pytest.mark.parametrize(
    "given", [[], [torch.ones(2, 3), torch.ones(2, 4)], [torch.full((2, 3), torch.inf)]]
)
def test_what_has_no_span_is_refused(given):
    with pytest.raises(ValueError, match=r"same input|not finite"):
        row_space(given)
