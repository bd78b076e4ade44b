"""Small models for vectors, images and text.

None of them keeps running statistics: a federated mean of them has no meaning, and they would travel
in clear beside a masked or noised update. Initial weights come from torch's default generator, so
whoever builds a model seeds it first (``torch.manual_seed``).
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn


class Cnn(nn.Module):
    """Two convolutions and a linear layer: 10,554 parameters for 28 × 28 digits at width 8.

    The order convolution, pooling, ReLU gives what convolution, ReLU, pooling gives, with a quarter
    of the ReLU's work. After LeNet: Y. LeCun et al., "Gradient-based learning applied to document
    recognition", 1998.

    Args:
        input_shape: (channels, height, width) of one image, both sides at least 4.
        num_classes: number of logits.
        width: channels after the first convolution; the second has four times as many.

    Raises:
        ValueError: `input_shape` is not that of an image, or the image is too small.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, *, width: Annotated[int, Ge(1)] = 8
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 4:
            raise ValueError(
                f"Cnn takes images of shape (channels, height, width) with sides of at least 4, "
                f"not {tuple(input_shape)}: use Mlp or Linear for other inputs"
            )
        channels, height, across = input_shape
        # Unpadded convolutions are a quarter faster; small images cannot spare their border.
        margin = 0 if min(height, across) >= 16 else 1
        self.conv1 = nn.Conv2d(channels, width, kernel_size=5, padding=2 * margin)
        self.conv2 = nn.Conv2d(width, 4 * width, kernel_size=3, padding=margin)
        sides = [((side - 4 + 4 * margin) // 2 - 2 + 2 * margin) // 2 for side in (height, across)]
        self.head = nn.Linear(4 * width * prod(sides), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of images, (batch, channels, height, width) float32."""
        hidden = F.relu(F.max_pool2d(self.conv1(inputs), 2))
        hidden = F.relu(F.max_pool2d(self.conv2(hidden), 2))
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


class Mlp(nn.Module):
    """Fully connected layers with ReLU between them, on the flattened input.

    Args:
        input_shape: shape of one input.
        num_classes: number of logits.
        vocab_size: of a task with tokens, which is refused: an id is no quantity.
        hidden: units of each hidden layer, from the input to the output.

    Raises:
        ValueError: the inputs are tokens.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        vocab_size: int | None = None,
        *,
        hidden: Sequence[Annotated[int, Ge(1)]] = (64,),
    ) -> None:
        super().__init__()
        _refuse_tokens(vocab_size)
        units = [prod(input_shape), *hidden, num_classes]
        self.layers = nn.ModuleList(nn.Linear(fan_in, out) for fan_in, out in pairwise(units))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of inputs, (batch, *input_shape) float32."""
        hidden = inputs.flatten(1)
        for index, layer in enumerate(self.layers):
            hidden = layer(F.relu(hidden) if index else hidden)
        return hidden


class Linear(nn.Module):
    """Multinomial logistic regression on the flattened input; convex under cross-entropy.

    Args:
        input_shape: shape of one input.
        num_classes: number of logits.
        vocab_size: of a task with tokens, which is refused: an id is no quantity.

    Raises:
        ValueError: the inputs are tokens.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, vocab_size: int | None = None
    ) -> None:
        super().__init__()
        _refuse_tokens(vocab_size)
        self.head = nn.Linear(prod(input_shape), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of inputs, (batch, *input_shape) float32."""
        logits: Tensor = self.head(inputs.flatten(1))
        return logits


class Hog(nn.Module):
    """Histograms of oriented gradients, then a linear layer: 970 parameters for ten classes, whatever the image's size.

    N. Dalal and B. Triggs, "Histograms of Oriented Gradients for Human Detection", 2005, §4: each pixel votes for the
    two nearest of its unsigned orientations with its gradient's magnitude, votes are averaged over square cells, and
    the whole is normalised (their L2, after a square root). The features are public: they are made of no data, so that
    under differential privacy all of the noise's budget is the linear layer's (after F. Tramèr and D. Boneh,
    "Differentially Private Learning Needs Better Features (or Much More Data)", 2021).

    Args:
        input_shape: (channels, height, width) of one image, both sides at least `cells`; channels are averaged.
        num_classes: number of logits.
        cells: on a side.
        orientations: bins of half a turn.

    Raises:
        ValueError: `input_shape` is not that of an image, or the image is too small.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        cells: Annotated[int, Ge(1)] = 4,
        orientations: Annotated[int, Ge(2)] = 6,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < cells:
            raise ValueError(
                f"Hog takes images of shape (channels, height, width) with sides of at least {cells}, "
                f"not {tuple(input_shape)}: use Mlp or Linear for other inputs"
            )
        self.cells, self.orientations = cells, orientations
        self.head = nn.Linear(cells * cells * orientations, num_classes)

    def features(self, inputs: Tensor) -> Tensor:
        """Histograms of norm 1, (batch, cells² · orientations), of images, (batch, channels, height, width)."""
        gray = inputs.mean(1, keepdim=True)
        across = F.pad(gray[..., 2:] - gray[..., :-2], (1, 1))
        down = F.pad(gray[..., 2:, :] - gray[..., :-2, :], (0, 0, 1, 1))
        magnitude = (across.square() + down.square()).sqrt()
        place = torch.atan2(down, across) * (self.orientations / torch.pi)
        bins = torch.arange(self.orientations, device=inputs.device).view(-1, 1, 1)
        half = self.orientations / 2
        distance = (place - bins + half).remainder(self.orientations).sub(half).abs()
        votes = magnitude * (1 - distance).clamp(min=0)
        histograms = F.adaptive_avg_pool2d(votes, self.cells).flatten(1)
        return F.normalize(histograms.sqrt(), dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of images, (batch, channels, height, width) float32."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class Gru(nn.Module):
    """An embedding of tokens, one layer of gated recurrent units, their mean, and a linear layer.

    K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014,
    arXiv:1406.1078. The mean is over a text's own tokens: what fills a row up changes nothing.

    Args:
        input_shape: (length,) of one row of tokens.
        num_classes: number of logits.
        vocab_size: how many ids there are; None for a task without tokens, which is refused.
        padding_id: the id that fills a row up behind its last token.
        embedding: numbers of a token's vector.
        hidden: units.

    Raises:
        ValueError: the task has no tokens.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        vocab_size: int | None,
        padding_id: int = 0,
        *,
        embedding: Annotated[int, Ge(1)] = 64,
        hidden: Annotated[int, Ge(1)] = 64,
    ) -> None:
        super().__init__()
        if vocab_size is None or len(input_shape) != 1:
            raise ValueError(
                f"Gru takes rows of tokens, and this task's inputs of shape {tuple(input_shape)} "
                "are none: use Mlp or Linear, or a task with text"
            )
        self.padding_id = padding_id
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=padding_id)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, num_classes), of tokens, (batch, length) long; padding stands at the end."""
        lengths = (inputs != self.padding_id).sum(dim=1).clamp(min=1)
        # Steps that are padding in every row would be computed in vain.
        longest = int(lengths.max())
        inputs = inputs[:, :longest]
        states, _ = self.gru(self.embedding(inputs))
        mask = torch.arange(longest, device=inputs.device) < lengths.unsqueeze(1)
        mean = (states * mask.unsqueeze(2)).sum(dim=1) / lengths.unsqueeze(1)
        logits: Tensor = self.head(mean)
        return logits


def _refuse_tokens(vocab_size: int | None) -> None:
    if vocab_size is not None:
        raise ValueError("takes numbers, and this task's inputs are tokens: use Gru (model=gru)")
