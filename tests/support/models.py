"""Models that a configuration of a test names."""

from torch import nn

from clients.models import Mlp


class Dropped(Mlp):
    """A perceptron behind dropout: it draws random numbers as it trains."""

    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.dropout = nn.Dropout(0.2)

    def forward(self, inputs):
        return super().forward(self.dropout(inputs))
