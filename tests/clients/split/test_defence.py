"""Noise has the size and the source that it says, and distance correlation is what its definition says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.split.defence import GaussianNoise, NoPeek, distance_correlation
from strategies.privacy.noise import Seeded


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestGaussianNoise:
    def test_its_size_is_that_of_the_median_token(self):
        """2·10⁵ numbers: mean within 4.5 standard errors of 0, variance within 4.5 of 0.25: a false alarm in 7·10⁴."""
        activation = 3 * drawn(4, 130, 384).float()
        activation[:, 0] *= 500  # as the first token of some models
        activation[3, 60:] = 0  # padding
        unit = activation[:, 1:].norm(dim=-1).div(math.sqrt(384))
        noise = (GaussianNoise(0.5)(activation) - activation) / unit[unit > 0].median()
        noise = noise[
            :, 1:
        ].double()  # where the activation is small, so is the rounding of the sum
        count = noise.numel()
        assert abs(noise.mean()) < 4.5 * 0.5 / math.sqrt(count)
        # The median of all tokens, the first ones too, is a hair above that of the others.
        assert noise.square().mean() == pytest.approx(0.25, rel=4.5 * math.sqrt(2 / count) + 0.005)

    def test_scaling_the_activation_scales_the_noise(self):
        activation = drawn(2, 5, 8)
        once = GaussianNoise(1.0)(activation, Seeded(1, "test"))
        assert torch.allclose(GaussianNoise(1.0)(1000 * activation, Seeded(1, "test")), 1000 * once)

    def test_padding_has_no_say_in_its_size(self):
        tokens = drawn(1, 6, 8)
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, 20))
        alone, beside = (
            GaussianNoise(1.0)(one, Seeded(1, "test")) - one for one in (tokens, padded)
        )
        assert beside[:, 6:].std() > 0.5 * alone.std()

    def test_it_does_not_follow_a_seed(self):
        activation = drawn(2, 5, 8)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - nothing of the kind may matter
        first = GaussianNoise(1.0)(activation)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        assert not torch.isclose(GaussianNoise(1.0)(activation), first).any()

    def test_it_leaves_the_program_s_random_numbers_alone(self):
        before = torch.get_rng_state()
        GaussianNoise(1.0)(drawn(2, 5, 8))
        assert torch.equal(torch.get_rng_state(), before)

    def test_gradients_pass_as_if_it_were_not_there(self):
        activation = drawn(2, 3, 4).requires_grad_()
        weights = drawn(2, 3, 4, seed=1)
        (GaussianNoise(2.0)(activation) * weights).sum().backward()
        assert torch.equal(activation.grad, weights)

    def test_none_and_nothing(self):
        activation = drawn(2, 3, 4)
        assert torch.equal(GaussianNoise()(activation), activation)
        assert not GaussianNoise(1.0)(torch.zeros(2, 3, 4)).any()
        assert GaussianNoise(1.0)(torch.zeros(0, 4)).shape == (0, 4)

    def test_type_and_argument_are_kept(self):
        activation = drawn(2, 3, 4).bfloat16()
        kept = activation.clone()
        assert GaussianNoise(1.0)(activation).dtype == torch.bfloat16
        assert torch.equal(activation, kept)

    def test_a_negative_size_is_refused(self):
        with pytest.raises(ValueError, match=r"GaussianNoise\.std = -1"):
            GaussianNoise(-1.0)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Székely et al. 2007, eq. 2.8 to 2.10, one pair after the other."""

    def centred(rows):
        n = len(rows)
        a = np.array([[math.dist(rows[k], rows[j]) for j in range(n)] for k in range(n)])
        return np.array(
            [
                [a[k, j] - a[k].mean() - a[:, j].mean() + a.mean() for j in range(n)]
                for k in range(n)
            ]
        )

    first, second = centred(x), centred(y)
    n = len(x)
    covariance = (first * second).sum() / n**2
    variances = (first**2).sum() / n**2, (second**2).sum() / n**2
    if variances[0] * variances[1] == 0:
        return 0.0
    return math.sqrt(max(0.0, covariance) / math.sqrt(variances[0] * variances[1]))


class TestDistanceCorrelation:
    @given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
    def test_it_is_the_definition(self, n, p, q, seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, p))
        y = np.tanh(x[:, :1] + rng.normal(size=(n, q)))
        found = distance_correlation(torch.from_numpy(x), torch.from_numpy(y)).item()
        assert found == pytest.approx(by_definition(x, y), abs=1e-7)
        assert 0 <= found <= 1 + 1e-9

    def test_rows_that_are_the_same_are_at_distance_zero(self):
        x = drawn(12, 3) + 1000
        x[4:8] = x[3]
        y = drawn(12, 2, seed=1)
        found = distance_correlation(x, y).item()
        assert found == pytest.approx(by_definition(x.numpy(), y.numpy()), abs=1e-9)

    @given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-100, 100))
    def test_moving_turning_and_scaling_make_it_one(self, seed, scale, shift):
        x = drawn(20, 6, seed=seed)
        turn, _ = torch.linalg.qr(drawn(6, 6, seed=seed + 1))
        assert distance_correlation(x, scale * x @ turn + shift).item() == pytest.approx(
            1, abs=1e-9
        )
        line = x[:, :1]
        assert distance_correlation(line, -scale * line + shift).item() == pytest.approx(
            1, abs=1e-9
        )

    def test_it_is_symmetric_and_sees_what_pearson_does_not(self):
        x = torch.linspace(-1, 1, 201, dtype=torch.float64).unsqueeze(1)
        y = x.square()
        assert abs(torch.corrcoef(torch.cat([x, y], dim=1).T)[0, 1]) < 1e-9
        assert distance_correlation(x, y) > 0.45
        assert distance_correlation(y, x).item() == pytest.approx(distance_correlation(x, y).item())

    def test_between_independent_ones_it_vanishes_as_they_grow_in_number(self):
        """n·V²/S₂ is above 3.29² in 0.1% of samples at most (Theorem 6); for normal ones S₂ = 4/π and V²(X) = 0.40."""
        few, many = (
            distance_correlation(drawn(n, 1, seed=1), drawn(n, 1, seed=2)).item()
            for n in (20, 2_000)
        )
        assert many < math.sqrt(3.29**2 * 4 / math.pi / 0.40 / 2_000)
        assert many < few

    @pytest.mark.parametrize("constant", [0, 1])
    def test_of_a_constant_it_is_zero_with_a_zero_gradient(self, constant):
        pair = [drawn(5, 2), drawn(5, 3)]
        pair[constant] = torch.ones_like(pair[constant])
        pair = [one.requires_grad_() for one in pair]
        found = distance_correlation(*pair)
        found.backward()
        assert found == 0
        assert all(one.grad is None or not one.grad.any() for one in pair)

    def test_gradients_are_those_of_finite_differences(self):
        x, y = drawn(6, 2).requires_grad_(), drawn(6, 3, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(distance_correlation, (x, y))

    def test_gradients_are_finite_where_rows_are_the_same(self):
        x = drawn(6, 2)
        x[1] = x[0]
        y = drawn(6, 3, seed=1)
        y[1] = y[0]
        y.requires_grad_()
        distance_correlation(x, y).backward()
        assert y.grad.isfinite().all()
        assert y.grad.any()

    def test_type_follows_the_second(self):
        assert distance_correlation(drawn(4, 2), drawn(4, 2).float()).dtype == torch.float32
        assert distance_correlation(drawn(2, 3), drawn(2, 3, seed=1)).item() == pytest.approx(1)

    @pytest.mark.parametrize(
        ("first", "second"), [((1, 2), (1, 2)), ((3, 2), (4, 2)), ((3,), (3,)), ((3, 2, 2), (3, 2))]
    )
    def test_what_is_no_sample_of_pairs(self, first, second):
        with pytest.raises(ValueError, match="two or more observations"):
            distance_correlation(torch.zeros(first), torch.zeros(second))


class TestNoPeek:
    def test_it_compares_the_tokens_and_no_padding(self):
        embeddings, activation = drawn(3, 5, 4), drawn(3, 5, 6, seed=1)
        lengths = torch.tensor([5, 2, 1])
        tokens = torch.arange(5) < lengths.unsqueeze(1)
        expected = distance_correlation(embeddings[tokens], activation[tokens])
        embeddings[~tokens] = 1e6
        assert NoPeek().correlation(embeddings, activation, lengths) == expected
        assert NoPeek(0.3)(embeddings, activation, lengths) == 0.3 * expected

    def test_of_many_tokens_it_takes_as_many_as_are_asked_for_over_the_whole_batch(self):
        embeddings, activation = drawn(4, 25, 3), drawn(4, 25, 3, seed=1)
        lengths = torch.full((4,), 25)
        activation.requires_grad_()
        NoPeek(most=10).correlation(embeddings, activation, lengths).backward()
        touched = activation.grad.view(100, 3).abs().sum(dim=1) > 0
        assert torch.equal(
            touched.nonzero()[:, 0], torch.tensor([0, 11, 22, 33, 44, 55, 66, 77, 88, 99])
        )

    @pytest.mark.parametrize("lengths", [[0, 0], [1, 0]])
    def test_of_fewer_than_two_tokens_it_is_zero(self, lengths):
        activation = drawn(2, 3, 4).requires_grad_()
        term = NoPeek(1.0)(drawn(2, 3, 4, seed=1), activation, torch.tensor(lengths))
        term.backward()
        assert term == 0
        assert not activation.grad.any()

    def test_going_down_it_takes_activations_away_from_their_inputs(self):
        """A linear layer, 50 steps: what it gives is less like what it got, on other tokens too."""
        embeddings, others = drawn(4, 32, 4), drawn(4, 32, 4, seed=2)
        lengths = torch.full((4,), 32)
        layer = torch.nn.Linear(4, 8, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(drawn(8, 4, seed=1))
            before = NoPeek().correlation(others, layer(others).tanh(), lengths).item()
        optimizer = torch.optim.Adam(layer.parameters(), 0.05)
        for _ in range(50):
            optimizer.zero_grad()
            NoPeek(1.0)(embeddings, layer(embeddings).tanh(), lengths).backward()
            optimizer.step()
        with torch.no_grad():
            after = NoPeek().correlation(others, layer(others).tanh(), lengths).item()
        assert after < before - 0.1

    def test_settings_are_held_to_their_ranges(self):
        with pytest.raises(ValueError, match=r"NoPeek\.most = 1"):
            NoPeek(most=1)
        with pytest.raises(ValueError, match=r"NoPeek\.alpha = -1"):
            NoPeek(alpha=-1.0)
