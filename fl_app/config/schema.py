"""The configuration of a run: what there is to set, and within which ranges.

The annotations are the checks, and the text of a refusal. What a part's node is stands in `nodes.py`, what of all this
makes a run another run in `identity.py`. Must not know Hydra, nor a class that a node names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen, doc
from pydantic import PrivateAttr, StringConstraints

from fl_app.config import identity
from fl_app.config.nodes import Part, Settings, TargetNode, TaskNode, plain_of

DEFAULT_NUM_CLIENTS = 10
"""Clients when `num_clients` is auto and no nodes are there to be counted."""

Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Le(1)]
FolderName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._=+-]{0,199}$"),
    doc("a folder's name of letters, digits and . _ = + -, at most 200 of them"),
]


class Evaluation(Settings):
    """When the model is measured.

    Attributes:
        every: centrally, every so many rounds and after the last; 0 for never.
        federated_every: on the clients' own test parts, every so many rounds; 0 for never.
        batch_size: examples at a time.
    """

    every: Annotated[int, Ge(0)] = 1
    federated_every: Annotated[int, Ge(0)] = 0
    batch_size: Count = 512


class Admission(Settings):
    """Which updates are let in, and what becomes of a round with too few of them.

    Attributes:
        max_examples: the most that one client may claim; more is refused.
        quorum: good updates that make a round.
        on_shortfall: `repeat` the round with another cohort, or `skip` it and keep the model.
        max_attempts: at one round, before it is void.
        max_value: the largest magnitude of any element of an update.
        max_reply_mb: 10⁶ bytes of one reply, beyond which a server of Flower's does not read it; auto for what the
            model and the collector can need.
    """

    max_examples: Count = 1_000_000
    quorum: Count = 1
    on_shortfall: Literal["repeat", "skip"] = "repeat"
    max_attempts: Count = 3
    max_value: Positive = 1e10
    max_reply_mb: Positive | Literal["auto"] = "auto"


class Runtime(Settings):
    """The machine that runs it, and the devices that it plays.

    Attributes:
        workers: processes that train clients; auto for one a CPU, fewer where they would idle. The result is the same
            for any number.
        batch_clients: clients of the engine that are trained at once; `auto` where it is faster, `off` for one by one.
            Results of the two differ by rounding.
        dropout: probability, per client and round, that the client is gone at a uniformly drawn phase.
        devices: how fast they are, in virtual seconds (`fl_app.engine.DeviceModel`, which is given `dropout` too).
    """

    workers: Count | Literal["auto"] = "auto"
    batch_clients: Count | Literal["auto", "off"] = "auto"
    dropout: Fraction = 0.0
    devices: Annotated[TargetNode, Part(needs=("duration",), offered=frozenset({"dropout"}))]


class Saving(Settings):
    """How often a run is saved, and how much of it stays (docs/resume.md).

    Attributes:
        every: rounds between two checkpoints; 0 for the last round's alone. Rounds that a kill loses are run again.
            A run that ends in order, whatever ends it, saves its last whole state first.
        keep: checkpoints that are kept, whole ones.
    """

    every: Annotated[int, Ge(0)] = 1
    keep: Count = 2


class Compute(Settings):
    """Whoever computes on ciphertexts (`collector=encrypted`).

    Attributes:
        workers: processes that do; auto for one a CPU. The result is the same for any number, up to the ciphertexts'
            own error.
        cache_mb: MB of ciphertexts that are kept in memory; the others are read from the disk in each round.
        chunk: packed mean gradients that a worker has in the making at once.
        disk_mb: MB of owners' ciphertexts on the disk, and no more than half of what is free at the start. Where there
            is no room, those of who has most go, used longest ago first, and are asked for again.
        owner_disk_mb: the same, of one owner.
    """

    workers: Count | Literal["auto"] = "auto"
    cache_mb: Annotated[float, Ge(0)] = 64.0
    chunk: Count = 512
    disk_mb: Positive = 50_000.0
    owner_disk_mb: Positive = 20_000.0


class Config(Settings):
    """All that a run is told. Immutable; `fl_app.compose.compose` makes it.

    Attributes:
        strategy: the preset that chose the parts.
        experiment: the preset over that, None where there is none.
        task: data, loss and metrics, and their cut among clients.
        model: the network.
        client: the local trainer.
        clip: the clipping of updates, None where they go as they are.
        compression: how updates are made small, None where they travel as they are.
        attack: what lying clients send, None where all are honest; on the engine only.
        collector: how updates come out of a cohort, and what the server sees of them.
        combiner: the rule that makes one update of many.
        downlink: sends clients what has changed of the model since they held it, None where they are sent the whole.
        privacy: differential privacy for clients, None where none is promised.
        server: the server's optimiser.
        sampler: who is asked.
        scheduler: when who is asked, and when what came becomes a step.
        quarantine: who is left out for what it sent, None where nobody is watched.
        breaker: who is left out for sending nothing, None where nobody is.
        clusters: looks for groups of clients with one task, None where nobody does.
        ranks: which ranks each client's adapters have, None where all have the model's.
        runtime: the machine and the devices.
        compute: whoever computes on ciphertexts.
        memory: what its processes may take (`clients.encrypted.governor.MemoryLimit`), None for anything.
        retry: how often a client tries a training or an evaluation; None for once.
        checkpoint: how often the run is saved.
        travel: shell patterns of the names of the parameters that are sent and trained; the others stay as they began.
        num_clients: auto for as many as there are nodes.
        rounds: model versions to reach.
        seed: of all draws that no privacy rests on.
        output_dir: holds a folder for each run.
        run_name: the folder; auto for one that tells strategy, task, seed and configuration.
        resume: `auto` where there is something to resume, `never` to begin anew, `must` to refuse to begin anew.
        backend: the in-process engine, or Flower's simulation.
        round_timeout: seconds that a round waits for replies (virtual ones on the engine).
        evaluate: when the model is measured.
        admission: which updates are let in.
    """

    strategy: str
    experiment: str | None = None
    task: Annotated[
        TaskNode,
        Part(
            base="clients.tasks.Task",
            beside="clients.tasks.FederatedData",
            beside_offered=frozenset({"task", "num_clients", "seed"}),
        ),
    ]
    model: Annotated[
        TargetNode,
        Part(
            base="torch.nn.Module",
            offered=frozenset(
                {"input_shape", "num_classes", "vocab_size", "padding_id", "goals"}
                | {"at", "half", "ranks", "auxiliary"}
            ),
        ),
    ]
    client: Annotated[TargetNode, Part(needs=("fit",), offered=frozenset({"folder", "party"}))]
    clip: Annotated[TargetNode | None, Part(needs=("check", "encode", "decode"))] = None
    compression: Annotated[
        TargetNode | None, Part(needs=("stages",), offered=frozenset({"seed"}))
    ] = None
    attack: Annotated[TargetNode | None, Part(base="strategies.attacks.Attack")] = None
    collector: Annotated[
        TargetNode,
        Part(
            needs=("check", "open", "client_half"),
            offered=frozenset({"seed", "journal", "served"}),
        ),
    ]
    combiner: Annotated[TargetNode, Part(needs=("check", "begin"), offered=frozenset({"seed"}))]
    downlink: Annotated[
        TargetNode | None, Part(needs=("check", "release", "content", "answered", "lost"))
    ] = None
    privacy: Annotated[
        TargetNode | None,
        Part(
            needs=("check", "charge", "privatise", "report"),
            offered=frozenset({"population", "rounds", "ledger", "seed", "size"}),
        ),
    ] = None
    server: Annotated[
        TargetNode, Part(needs=("check", "begin", "step"), offered=frozenset({"population"}))
    ]
    sampler: Annotated[
        TargetNode,
        Part(needs=("check", "draw"), offered=frozenset({"population", "reproducible"})),
    ]
    scheduler: Annotated[
        TargetNode, Part(needs=("check", "run"), offered=frozenset({"population"}))
    ]
    quarantine: Annotated[
        TargetNode | None,
        Part(needs=("check", "allowed", "judge", "summary", "state_dict", "load_state_dict")),
    ] = None
    breaker: Annotated[
        TargetNode | None,
        Part(
            needs=(
                *("check", "allowed", "rests", "answered", "failed", "report"),
                *("state_dict", "load_state_dict"),
            )
        ),
    ] = None
    clusters: Annotated[
        TargetNode | None,
        Part(needs=("check", "observe", "report", "state_dict", "load_state_dict")),
    ] = None
    ranks: Annotated[
        TargetNode | None,
        Part(
            needs=("check", "measured", "observe", "part", "state_dict", "load_state_dict"),
            offered=frozenset({"batch_size"}),
        ),
    ] = None
    runtime: Runtime
    compute: Compute = Compute()
    memory: Annotated[TargetNode | None, Part(needs=("tier",))] = None
    retry: Annotated[TargetNode | None, Part(needs=("waits",))] = None
    checkpoint: Saving = Saving()
    travel: Annotated[tuple[str, ...], MinLen(1)] = ("*",)
    num_clients: Count | Literal["auto"] = "auto"
    rounds: Count = 10
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    output_dir: Path = Path("runs")
    run_name: FolderName = "auto"
    resume: Literal["auto", "never", "must"] = "auto"
    backend: Literal["engine", "flower"] = "engine"
    round_timeout: Positive = 3600.0
    evaluate: Evaluation = Evaluation()
    admission: Admission = Admission()

    _directory: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def directory(self) -> Path:
        """Where the relative paths among the parts' settings count from; the identity has them as they were written."""
        return self._directory

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration in plain JSON types, keys in the order of the schema."""
        return {name: plain_of(getattr(self, name)) for name in type(self).model_fields}

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, keys in the order of the schema."""
        import yaml

        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text

    def identity(self) -> dict[str, Any]:
        """What makes this run this run: dotted paths to plain values, without where and for how long it runs."""
        return identity.identity(self.to_dict())

    def identity_hash(self) -> str:
        """SHA-256, in hex, over the canonical JSON of the identity."""
        return identity.digest(self.identity())

    def difference(self, other: Config | Mapping[str, Any]) -> list[str]:
        """What another configuration has otherwise, of all that belongs to the identity.

        Args:
            other: a configuration, or what `to_dict` or `to_yaml` gave of one.

        Returns:
            Lines `path: mine → theirs`, sorted by path; none when the two describe the same run.
        """
        theirs = other.identity() if isinstance(other, Config) else identity.identity(other)
        return identity.difference(self.identity(), theirs)

    @property
    def rounds_are_planned(self) -> bool:
        """Whether noise was found for so many rounds, so that more of them are another run."""
        return identity.rounds_are_planned(self.to_dict())

    @property
    def folder_name(self) -> str:
        """`run_name`, with auto written out as `<strategy>-<task>-s<seed>-<hash8>`."""
        if self.run_name != "auto":
            return self.run_name
        return f"{self.strategy}-{self.task.name}-s{self.seed}-{self.identity_hash()[:8]}"

    @property
    def run_dir(self) -> Path:
        """The run's own folder, absolute; a relative `output_dir` counts from the working directory."""
        return self.output_dir.expanduser().resolve() / self.folder_name

    @property
    def client_state_dir(self) -> Path:
        """Where logical clients keep what they must remember, absolute."""
        return self.run_dir / "clients"

    def within(self, directory: Path) -> Config:
        """The same configuration with relative paths counted from `directory`."""
        output_dir = directory / self.output_dir.expanduser()
        copy = self.model_copy(update={"output_dir": output_dir})
        copy._directory = directory
        return copy
