"""Models and trainers that a configuration of a test names."""

from torch import nn

from clients.models import Mlp
from clients.trainers import SGD


class Dropped(Mlp):
    """A perceptron behind dropout: it draws random numbers as it trains."""

    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.dropout = nn.Dropout(0.2)

    def forward(self, inputs):
        return super().forward(self.dropout(inputs))


class Broken(SGD):
    """A trainer that fails."""

    def step(self, parameters, gradient, start, correction, velocity):
        raise RuntimeError("a step of the user's own")


class Unchecked:
    """A combiner without its contract."""

    def begin(self, layouts, cohort):
        return None


class Forgetful(Unchecked):
    """A combiner that forgets to return the claim."""

    def check(self, claim):
        pass
