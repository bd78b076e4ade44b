"""AdamW steps as torch's own does, whatever is set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.trainers import AdamW


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)]),
    st.integers(0, 2**31),
)
def test_steps_are_those_of_torch(size, steps, decay, betas, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator)
    theirs = start.clone().requires_grad_()
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=decay, betas=betas, eps=1e-8)
    trainer = AdamW(lr=0.01, weight_decay=decay, betas=betas)
    ours, moments = start.clone(), trainer.moments(start)
    for _ in range(steps):
        gradient = torch.randn(size, generator=generator)
        theirs.grad = gradient.clone()
        reference.step()
        trainer.step(ours, gradient, start, None, moments)
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=2e-7)


def test_momentum_is_refused_by_name():
    with pytest.raises(ValueError, match=r"momentum = 0\.9: AdamW has betas"):
        AdamW(momentum=0.9)
