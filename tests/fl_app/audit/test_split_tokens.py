"""Tokens from activations of a real model: what the attacks find, and what they find in noise."""

import numpy as np
import pytest
import torch
from split_helpers import activations, bottom, encoder, needs_minilm, words

from fl_app.audit.split.inverter import fit_inverter
from fl_app.audit.split.matching import dictionary, nearest
from fl_app.audit.split.score import most_frequent

PUBLIC, PRIVATE = ("numpy", "transformers"), ("matplotlib", "sklearn")


@pytest.fixture(scope="module")
def texts():
    return words(PUBLIC, 60), words(PRIVATE, 15)


@pytest.fixture(scope="module")
def candidates(texts):
    """The private texts' tokens among two thousand others."""
    return torch.cat([texts[1].ids.unique(), torch.arange(1000, 21_000, 10)]).unique()


@pytest.fixture(scope="module")
def embeddings():
    return encoder().get_input_embeddings().weight.detach()


def accuracy(found, text) -> float:
    return float((found == text.ids[text.inner]).float().mean())


def noisy(x, relative, seed):
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + relative * x.square().mean().sqrt() * drawn


@needs_minilm
class TestInverter:
    @pytest.mark.parametrize(("at", "least"), [(1, 0.99), (3, 0.95), (5, 0.7)])
    def test_it_reads_the_tokens_of_texts_it_never_saw(self, texts, embeddings, at, least):
        public, private = texts
        learnt = fit_inverter(
            activations(at, public), public.ids[public.inner], embeddings, epochs=1
        )
        found = learnt.guess(activations(at, private))
        assert accuracy(found, private) > least

    def test_tokens_that_no_public_text_holds_are_found_too(self, texts, embeddings):
        public, private = texts
        learnt = fit_inverter(
            activations(1, public), public.ids[public.inner], embeddings, epochs=1
        )
        truth = private.ids[private.inner]
        unseen = ~torch.isin(truth, public.ids)
        assert unseen.sum() > 50
        right = learnt.guess(activations(1, private))[unseen] == truth[unseen]
        assert right.float().mean() > 0.9

    def test_noise_hides_them_and_then_it_does_no_better_than_the_most_frequent(
        self, texts, embeddings
    ):
        public, private = texts
        seen, truth = activations(1, public), public.ids[public.inner]
        told = []
        for relative in (0.0, 4.0, 100.0):
            learnt = fit_inverter(noisy(seen, relative, 1), truth, embeddings, epochs=1)
            found = learnt.guess(noisy(activations(1, private), relative, 2))
            told.append(accuracy(found, private))
        assert told[0] > told[1] + 0.2
        baseline = most_frequent(private.ids[private.inner].numpy())[1]
        assert told[2] < baseline + 0.05


def test_the_refined_map_is_kept_only_where_it_is_better():
    """Of activations that are no linear function of embeddings, so that ridge regression errs."""
    random = torch.Generator().manual_seed(0)
    table = torch.randn(40, 12, generator=random)
    y = torch.randint(0, 40, (2000,), generator=random)
    x = (table @ torch.randn(12, 20, generator=random)).tanh()[y]
    x = x + 0.4 * torch.randn(x.shape, generator=random)
    right = [(fit_inverter(x, y, table, epochs=n).guess(x) == y).float().mean() for n in (0, 8)]
    assert right[1] > right[0] + 0.02


def test_ridge_regression_is_the_closed_form():
    """Against scikit-learn's, on random numbers."""
    from sklearn.linear_model import Ridge

    random = torch.Generator().manual_seed(0)
    x, table = torch.randn(200, 6, generator=random), torch.randn(9, 4, generator=random)
    y = torch.randint(0, 9, (200,), generator=random)
    learnt = fit_inverter(x, y, table, epochs=0)
    centred = (table - table.mean(dim=0))[y]
    reference = Ridge(alpha=1e-3 * 200, fit_intercept=False)
    reference.fit(learnt.standardised(x).numpy(), centred.numpy())
    np.testing.assert_allclose(learnt.weight.numpy().T, reference.coef_, atol=1e-4)


@pytest.mark.parametrize("x", [torch.zeros(10, 2), torch.full((40, 2), torch.nan)])
def test_what_nothing_can_be_learnt_of_is_refused(x):
    with pytest.raises(ValueError, match=r"too few|not finite"):
        fit_inverter(x, torch.zeros(len(x), dtype=torch.long), torch.eye(2))


@needs_minilm
class TestMatching:
    CLS, SEP = 101, 102

    def test_one_block_hides_nothing(self, texts, candidates):
        private = texts[1]
        told = []
        entries = dictionary(
            bottom(1), candidates, before=[self.CLS], after=[self.SEP],
            progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        found = nearest(activations(1, private), entries, candidates)
        assert accuracy(found, private) > 0.99
        assert told[-1] == (len(candidates), len(candidates))

    def test_an_entry_is_the_token_s_own_activation(self, candidates):
        entries = dictionary(bottom(1), candidates[:5], before=[self.CLS], after=[self.SEP])
        with torch.no_grad():
            alone = bottom(1)(torch.tensor([[self.CLS, int(candidates[3]), self.SEP]]))[0, 1]
        torch.testing.assert_close(entries[3], alone)


def test_the_nearest_entry_is_found_by_brute_force_too():
    random = torch.Generator().manual_seed(2)
    entries, x = torch.randn(50, 7, generator=random), torch.randn(30, 7, generator=random)
    names = torch.arange(100, 150)
    expected = names[torch.cdist(x, entries).argmin(dim=1)]
    assert torch.equal(nearest(x, entries, names), expected)
    assert nearest(x[:0], entries, names).shape == (0,)
