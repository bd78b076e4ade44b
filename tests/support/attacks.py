"""An attack and a combiner that remember what they met, and a trainer that fails: parts that a configuration names."""

from dataclasses import dataclass
from typing import ClassVar

from clients.trainers import SGD
from strategies.attacks import Ipm, Sight
from strategies.combiners import Mean
from strategies.update import Update


@dataclass(frozen=True)
class Recording(Ipm):
    """Inner product manipulation that remembers all it was shown and all it said."""

    rounds: ClassVar[list[tuple[Sight, dict]]] = []

    def plot(self, seen, memory):
        lies = super().plot(seen, memory)
        self.rounds.append((seen, lies))
        return lies


@dataclass(frozen=True)
class Watching(Mean):
    """A mean that remembers every update that it was given, round by round."""

    rounds: ClassVar[list[dict[int, Update]]] = []

    def begin(self, *arguments):
        self.rounds.append({})
        return _Watched(super().begin(*arguments), self.rounds[-1])


class _Watched:
    def __init__(self, inner, seen):
        self._inner, self._seen = inner, seen

    def add(self, update):
        self._seen[update.members[0]] = update
        self._inner.add(update)

    def result(self, *arguments, **keywords):
        return self._inner.result(*arguments, **keywords)


@dataclass(frozen=True)
class Fragile(SGD):
    """A trainer that fails for some clients.

    Attributes:
        failing: their logical ids.
    """

    failing: tuple[int, ...] = ()

    def fit_one(self, job, model, task):
        if job.client in self.failing:
            raise RuntimeError("out of battery")
        return super().fit_one(job, model, task)
