"""The jobs that engines are compared on: random data of stated shapes, so that nothing but speed is measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clients.tasks import Examples, Task


class RandomImages(Task):
    """Standard normal pixels with random labels, equally many for each client of an IID cut.

    Args:
        examples: how many.
        shape: of one image.
    """

    num_classes = 10

    def __init__(self, examples: int, shape: Sequence[int]) -> None:
        self.input_shape = tuple(shape)
        self._count = examples

    def train(self) -> Examples:
        """(examples, *shape) float32 and (examples,) long."""
        return _drawn(self._count, self.input_shape)

    def test(self) -> Examples:
        """The first ten of them: nobody looks at the accuracy."""
        return self.train().take(range(10))


@functools.lru_cache(maxsize=1)
def _drawn(count: int, shape: tuple[int, ...]) -> Examples:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, *shape, generator=generator)
    return Examples(inputs, torch.randint(0, 10, (count,), generator=generator))


class CifarCnn(nn.Module):
    """The two-layer CNN of pfl-research's CIFAR-10 benchmark (Granqvist et al. 2024): 1,626,442 parameters.

    3 × 3 convolutions to 32 and 64 channels, pooling, dropout 0.25, a hidden layer of 128, dropout 0.5.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, side = input_shape[0], (input_shape[1] - 4) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * side * side, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, num_classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of images (batch, channels, height, width)."""
        logits: Tensor = self.layers(inputs)
        return logits
