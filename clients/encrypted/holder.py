"""Who holds a key: the settings of a data owner's training, and where its keys and what it has begun lie.

A key that is not there is made on first use, once and for all; one that is named must be there. What a turn asks of
them is not known here (`clients.encrypted.turn`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Self

from clients.encrypted.flooding import Flooding
from clients.encrypted.half_done import OwnerFolder
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ledger import ReleaseLedger
from clients.encrypted.owner import Owner
from clients.encrypted.plan import Plan
from clients.encrypted.spec import LOSSES, Mode
from clients.trainers.fedsgd import FedSgd
from strategies.ckks import KeyFileError
from strategies.wire import Refused

FOLDER: Final = "encrypted"
"""Where owners' own files lie, under the folder that they are given."""
_FLOODING: Final = Flooding()


@dataclass(frozen=True)
class KeyHolder(FedSgd):
    """Settings of a data owner, its keys and its folder.

    Attributes:
        mode: the collector's: whether the owner answers logits (`ce`), or decrypts mean gradients alone (`strict`).
        key: file of the owner's secret key; the same for several clients that share one. None for one in the client's
            own folder, made on first use.
        flooding: noise on all that is told of what was decrypted, and how often; None for tests, which compare: no
            device takes it.
        folder: where owners' files lie; given by the application.
    """

    mode: Mode = "ce"
    key: Path | None = None
    flooding: Flooding | None = _FLOODING
    loss: Literal["cross_entropy", "squared"] = field(
        default="cross_entropy", init=False, repr=False
    )
    folder: Path | None = field(default=None, repr=False, compare=False)
    _owners: dict[tuple[Path, Plan], tuple[OwnerKeys, Owner]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "loss", LOSSES[self.mode])

    def keeping(self, folder: Path) -> Self:
        """The same trainer, whose owners' files lie in a folder."""
        return replace(self, folder=folder / FOLDER)

    def owner(self, client: int, plan: Plan) -> tuple[OwnerKeys, Owner]:
        """A client's key and what works with it; made, the first time.

        Raises:
            Refused: `key`: its file can't be used.
        """
        path = self.key_of(client, plan)
        held = self._owners.get((path, plan))
        if held is None:
            try:
                # A key that is named is there: a slip of the pen must not make another one.
                read = OwnerKeys.load_or_make if self.key is None else OwnerKeys.load_for
                keys = read(path, plan.ring)
                ReleaseLedger(path, keys.fingerprint).check()
            except (KeyFileError, OSError) as error:
                raise Refused("key", str(error)) from error
            held = self._owners[path, plan] = keys, Owner(plan, keys)
        return held

    def key_of(self, client: int, plan: Plan) -> Path:
        """Where a client's key lies."""
        if self.key is not None:
            return self.key
        bits = "-".join(map(str, plan.ring.bits))
        return self.own(client).path / f"owner-key-{plan.ring.degree}-{bits}"

    def own(self, client: int, run: str = "") -> OwnerFolder:
        """A client's folder.

        Raises:
            ValueError: the application has named none.
        """
        if self.folder is None:
            raise ValueError("an owner needs a folder: EncryptedTrainer.keeping(folder)")
        return OwnerFolder(self.folder, client, run)
