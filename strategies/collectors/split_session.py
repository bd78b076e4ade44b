"""One cohort's split training on the server: turns between the two halves of a model.

What a turn holds is between the two halves; here it is named arrays. The last turn's reply is the change of the
client's half, and the update that comes of it is that change and the server's own beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Protocol

import numpy as np

from strategies.collectors.portions import part_of
from strategies.collectors.turns import LAST, Arrays, Member, TurnSession
from strategies.collectors.turns import Learner as Answering
from strategies.parts import returned
from strategies.protocols import ConfigValue, Event
from strategies.update import DELTA, Layout, Section, Update, Vector

__all__ = ["LAST", "SESSION", "SPLIT", "TURN", "Learner", "Served", "SplitSession"]

SPLIT: Final = "split"
"""The record of what crosses the cut, both ways; and, before a dot, the settings that go with it."""
TURN: Final = f"{SPLIT}.turn"
SESSION: Final = f"{SPLIT}.session"


class Learner(Answering, Protocol):
    """The server's half of the model, at work on what one client sends in a session, or on what all do."""

    def change(self, client: int) -> tuple[Vector, Layout, Mapping[str, float]]:
        """What has changed of the server's parameters, (d,) float32 and its layout, and figures of a client's turns."""
        ...


class Served(Protocol):
    """The server's half of a model."""

    @property
    def partial(self) -> bool:
        """Whether clients train different parts of it."""
        ...

    def describe(self) -> str:
        """Who holds what of the model."""
        ...

    def clients_names(self, client: int) -> frozenset[str]:
        """The parameters that a client holds."""
        ...

    def settings(self) -> Mapping[str, ConfigValue]:
        """What clients must know of the cut, by name."""
        ...

    def begin(self, sent: Arrays) -> Learner:
        """A learner that starts from the whole model as it was sent, and shares nothing with others."""
        ...


@dataclass
class _Half(Member):
    """A client that holds a half of the model.

    Attributes:
        learner: the other half's, in this session.
    """

    learner: Learner = field(kw_only=True)


@dataclass(kw_only=True)
class SplitSession(TurnSession[_Half]):
    """Turns over the cut with each client of a cohort.

    Attributes:
        served: the server's half.
        sent: the model as it is sent, by name.
        shared: whether one upper part learns of all clients, whose change all updates then have.
    """

    record: ClassVar[str] = SPLIT

    served: Served
    sent: Arrays
    shared: bool
    _one: Learner | None = field(default=None, init=False)

    def _member(self, client: int) -> _Half:
        learner = self._one or self.served.begin(self.sent)
        if self.shared:
            self._one = learner
        names = self.served.clients_names(client)
        mine = {n: s for n, s in _shapes(part_of(self.job, client)).items() if n in names}
        return _Half(_ordered(mine, self.job.layouts[DELTA]), learner=learner)

    def _answer(self, client: int, member: _Half, arrays: Arrays, *, last: bool) -> list[Event]:
        return [self._next(client, member, member.learner.answer(client, arrays), last=last)]

    def _released(self) -> list[Event]:
        """At once; or, where all share the upper part, when its last step is taken."""
        return [] if self.shared and self._members else super()._released()

    def _concluded(self, member: _Half, update: Update) -> Update:
        """One update of both halves: what the client has changed of its own, and the server's change beside it."""
        whole = self.job.layouts[DELTA]
        vector, own, figures = member.learner.change(update.members[0])
        filled = np.zeros(whole.size, np.float32)
        views = whole.views(filled)
        theirs = returned(member.part)
        for layout, values in ((theirs, update.delta.vector), (own, vector)):
            for name, block in layout.views(values).items():
                views[name][tuple(map(slice, block.shape))] = block
        both = _ordered({**_shapes(theirs), **_shapes(own)}, whole)
        section = Section(filled, whole, part=None if both == whole else both)
        joined = update.with_section(DELTA, section)
        return super()._concluded(member, replace(joined, metrics={**update.metrics, **figures}))


def _shapes(part: Layout) -> dict[str, tuple[int, ...]]:
    return dict(zip(part.names, part.shapes, strict=True))


def _ordered(shapes: Mapping[str, tuple[int, ...]], whole: Layout) -> Layout:
    """A part of these blocks, in the whole's order."""
    names = tuple(name for name in whole.names if name in shapes)
    return Layout(names, tuple(shapes[name] for name in names))
