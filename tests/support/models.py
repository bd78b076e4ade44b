"""Models and trainers that a configuration of a test names."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from clients.models import Mlp
from clients.resident import ResidentModel
from clients.tasks import Task
from clients.trainers import SGD, Fit, FitJob


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


@dataclass(frozen=True)
class Unlucky(SGD):
    """A trainer whose disk fails: for one client always, for another at its first attempt at each job.

    Attributes:
        always: the one.
        first: the other.
    """

    always: int = -1
    first: int = -1

    stackable: ClassVar[bool] = False
    _tried: ClassVar[set[int]] = set()

    def fit_one(self, job: FitJob, model: ResidentModel, task: Task) -> Fit:
        if job.client == self.always or (job.client == self.first and job.seed not in self._tried):
            self._tried.add(job.seed)
            raise OSError(5, "Input/output error")
        return super().fit_one(job, model, task)
