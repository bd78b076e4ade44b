"""The masked collector: the server learns the sum of a cohort's updates and nothing else of them.

Server half of SecAgg+ (Bell, Bonawitz, Gascón, Lepoint & Raykova 2020, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead"); with `complete=True` its graph is that of Bonawitz et al. 2017. The client half is
`strategies.secagg.MaskedClient`. Four phases, a message each way in each: keys, shares, upload, unmask; the malicious
mode has a fifth, in which the survivors are agreed on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil, sqrt
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from strategies.collectors.groups import Grouped
from strategies.collectors.masked_session import MaskedSession
from strategies.collectors.once import Once, Settled
from strategies.configuration import config_digest
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import ClientOwn, Job, Session, Void
from strategies.ranges import Ranged
from strategies.secagg.fixed_point import LARGEST
from strategies.secagg.masking import room
from strategies.secagg.member import MaskedClient
from strategies.secagg.parameters import LEAST_MEMBERS, Parameters, choose
from strategies.secagg.policy import LEAST_COHORT, least_cohort, node_policy, simulation_policy
from strategies.secagg.terms import DIGEST_BYTES, ID_BYTES, ModelDigest, Terms, ids_digest
from strategies.seeds import generator
from strategies.state import State

FOLDER = "secagg"
"""Among a client's own files."""


@dataclass
class Masked(Ranged):
    """Secure aggregation over the cohort, or over random groups of it.

    Attributes:
        groups: sums a round: 1 hides all in one; more let a robust rule compare the groups' means.
        malicious: for clients that do not trust the server to follow the protocol (their own policy decides).
        complete: every client masks with every other, whatever the numbers ask for.
        dropouts: share of a cohort (or group) that may drop out.
        colluders: share of it that may collude with the server; in the malicious mode, of the population.
        least_cohort: the smallest cohort (or group) that clients of this machine's own take part in; a real client's is
            in its node config, and this is what the run counts on. None: 3, or in the malicious mode half of the
            population.
        population: clients in the roster of the malicious mode, out of whom a server may pick a cohort with all who
            collude. None: all are in every cohort.
        limit: largest magnitude of an element of an update; larger ones are cut. None: the pipeline's clip, else 1.
        headroom: how far noise may lift a sum beyond members times limit, in the same units.
        max_weight: largest weight that counts, in examples; None where all clients weigh alike.
        metrics: names of the training metrics that go along under the mask.
        metric_limit: largest magnitude of a metric.
        whole: members give whole numbers, and the sum is of these very numbers: a step is 1. For noise that is made of
            integers (`strategies.privacy.Distributed`), which nothing may round afterwards.
        stochastic: round to the neighbouring steps at random, without bias, instead of to the nearer one.
        roster: file of the clients' public identity keys, where clients are this machine's own (a simulation). A real
            client's roster never comes with a run: it is in its own node config.
        identities: folder of the private identity keys, likewise.
        seed: of the groups' draw; None for the operating system's entropy. Keys and masks never come of it.
        journal: folder of the sessions and sums of the last models; None keeps them in memory.

    Raises:
        ValueError: a setting is out of its range, or groups are weighted by examples.
    """

    groups: Annotated[int, Ge(1)] = 1
    malicious: bool = False
    complete: bool = False
    dropouts: Annotated[float, Ge(0), Le(0.9)] = 0.3
    colluders: Annotated[float, Ge(0), Le(0.9)] = 0.1
    least_cohort: Annotated[int, Ge(3)] | None = None
    population: Annotated[int, Ge(1)] | None = None
    limit: Annotated[float, Gt(0)] | None = None
    headroom: Annotated[float, Ge(0)] = 0.0
    max_weight: Annotated[int, Ge(1)] | None = None
    metrics: tuple[str, ...] = ("train_loss",)
    metric_limit: Annotated[float, Gt(0)] = 100.0
    whole: bool = False
    stochastic: bool = False
    roster: Path | None = None
    identities: Path | None = None
    seed: int | None = None
    journal: Path | None = None

    label = "collector masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups > 1 and self.max_weight is not None:
            raise ValueError(
                f"max_weight = {self.max_weight} with {self.groups} groups: a rule over groups weighs all alike, "
                f"leave max_weight out"
            )
        if self.whole and (self.max_weight is not None or self.headroom or self.limit is not None):
            raise ValueError(
                "whole = true sums whole numbers as they are: max_weight and limit must be null, headroom 0"
            )
        self._digest = ModelDigest()
        self._once = Once(self.journal)

    @property
    def phases(self) -> int:
        """Requests to a client that takes part in all of a session."""
        return 5 if self.malicious else 4

    def check(self, claim: Claim) -> Claim:
        """Narrows what is seen to sums. Nothing may travel beside them, and only sums are to be made of updates.

        Raises:
            ContractError: the model has running statistics, or the numbers of clients do not allow for masks.
        """
        claim.need_client_half(self)
        claim.need_no_statistics(self)
        if claim.cohort is not None:
            self.plan(claim.cohort // claim.sessions, claim)
            self._check_least(claim.cohort // claim.sessions, claim)
        sums = self.groups * claim.sessions
        return claim.given(
            self,
            visibility=Visibility.SUM if sums == 1 else Visibility.GROUP,
            groups=None if sums == 1 else sums,
            clear=frozenset[str](),
            metrics=frozenset(self.metrics),
            whole=self.whole,
            summed="uniform" if self.max_weight is None else "examples",
            **self._carriers(claim),
        )

    def _carriers(self, claim: Claim) -> dict[str, int]:
        """Members of the largest sum, and honest ones of the smallest that is opened, where a cohort is planned.

        A cohort of Poisson's coins may be larger than planned: eight standard deviations are left to it.
        """
        if claim.cohort is None:
            return {}
        most = claim.cohort // claim.sessions
        plans = self.plan(most, claim)
        if claim.sampling == "poisson" and claim.rate:
            spread = ceil(8 * sqrt(most * (1 - claim.rate)))
            most = min(most + spread, max(most, round(most / claim.rate)))
        return {
            "members": ceil(most / self.groups),
            "honest": max(1, min(max(2, p.quorum) - self._colluding(p.members) for p in plans)),
        }

    def _colluding(self, members: int) -> int:
        """Members that may collude with the server, of so many."""
        of = max(members, self.population or 0) if self.malicious else members
        return min(members, int(self.colluders * of))

    def least_clients(self) -> int:
        """Clients without which no round can be had."""
        return LEAST_MEMBERS * self.groups

    def plan(
        self, cohort: int, claim: Claim | None = None, groups: int | None = None
    ) -> list[Parameters]:
        """The protocol's numbers for each group of a cohort of this size; for all groups by default.

        Raises:
            ContractError: there are none.
        """
        sizes = [len(group) for group in _split(range(cohort), groups or self.groups)]
        if min(sizes) < LEAST_MEMBERS:
            least = LEAST_MEMBERS * len(sizes)
            made = f", as {len(sizes)} groups" if len(sizes) > 1 else ""
            raise ContractError(
                "the sampler" if claim is None else claim.source("cohort"),
                name_of(self),
                f"{cohort} clients{made} cannot hide: of two in a sum, each knows the other's update",
                f"ask {least} clients a round or more" + (", or make fewer groups" if made else ""),
            )
        try:
            found = {size: self._parameters(size) for size in set(sizes)}
        except ValueError as error:
            raise ContractError(
                "the sampler" if claim is None else claim.source("cohort"),
                name_of(self),
                str(error),
                "ask more clients a round"
                + (", make fewer groups" if self.groups > 1 else "")
                + ", or tolerate fewer drop-outs (collector.dropouts) and colluders (collector.colluders)",
            ) from error
        try:
            room(max(sizes), self.limit or 1.0, self.headroom, self.max_weight or 0)
        except ValueError as error:
            raise ContractError(
                name_of(self),
                name_of(self),
                str(error),
                "lower collector.max_weight or collector.headroom",
            ) from error
        return [found[size] for size in sizes]

    def _check_least(self, cohort: int, claim: Claim) -> None:
        """Refuses a cohort that all clients would refuse."""
        default = least_cohort((self.population or 0) if self.malicious else 0)
        least = default if self.least_cohort is None else self.least_cohort
        smallest = min(len(group) for group in _split(range(cohort), self.groups))
        if smallest < least:
            raise ContractError(
                claim.source("cohort"),
                name_of(self),
                f"a sum is of {smallest} clients, who take part in sums of {least} or more: the server could pick those"
                f" who collude with it",
                "raise sampler.fraction"
                + (", make fewer groups" if self.groups > 1 else "")
                + f", or set collector.least_cohort={smallest} ({LEAST_COHORT} in each real client's node config)",
            )

    def describe(self, cohort: int) -> str:
        """The protocol's numbers in one line."""
        plans = self.plan(cohort)
        return (
            f"masked, {self.groups} groups: {plans[0].describe()}"
            if self.groups > 1
            else (f"masked: {plans[0].describe()}")
        )

    def _parameters(self, members: int) -> Parameters:
        return choose(
            members,
            dropouts=self.dropouts,
            colluders=self.colluders,
            malicious=self.malicious,
            complete=self.complete,
            population=self.population if self.malicious else None,
        )

    def open(self, job: Job, cohort: Sequence[int]) -> Session:
        """A session, or one for each group; sums that were opened on this very model are taken up, not asked for again.

        A cohort that is too small to hide anybody is void at once.
        """
        digest = self._digest.of(job.records)
        sums = [
            one
            for one in self._once.recall(digest, job.wire)
            if not job.taken.issuperset(one.members)
        ]
        summed = {client for one in sums for client in one.members}
        order = [client for client in cohort if client not in summed]
        if self.groups > 1:
            self._shuffle(order, job)
        # Of groups that came to nothing last time, as many again as their clients make.
        missing = min(self.groups - len(sums), len(order) // LEAST_MEMBERS) if sums else self.groups
        settled: list[Session] = [Settled(sums)] if sums else []
        if missing < 1:
            return settled[0]
        try:
            plans = self.plan(len(order), groups=missing)
        except ContractError as error:
            return settled[0] if settled else Settled([Void(error.why)])
        void = self._once.void(digest)
        groups = _split(order, missing)
        if (lack := self._too_few_or_many(job, [len(group) for group in groups])) is not None:
            return settled[0] if settled else Settled([Void(lack)])
        sessions = [
            self._session(job, group, plan, digest, void)
            for group, plan in zip(groups, plans, strict=True)
        ]
        every: list[Session] = [*settled, *sessions]
        return every[0] if len(every) == 1 else Grouped(every)

    def _too_few_or_many(self, job: Job, sizes: Sequence[int]) -> str | None:
        """Why groups of these sizes can't carry the noise that the job's was planned for; None where they can."""
        for size in sizes:
            if job.members and size > job.members:
                return f"{size} clients are in a sum, the noise is for {job.members} at most"
            if job.honest + self._colluding(size) > size:
                return f"{size} clients are in a sum, too few to hold {job.honest} honest shares of the noise"
        return None

    def _session(
        self, job: Job, members: Sequence[int], plan: Parameters, digest: bytes, void: bytes
    ) -> MaskedSession:
        quorum = max(2, plan.quorum)
        if self.groups == 1:
            quorum = max(quorum, min(job.quorum, len(members)))
        if job.honest:
            quorum = max(quorum, job.honest + self._colluding(len(members)))
        terms = Terms(
            run=self._once.run,
            session=os.urandom(ID_BYTES),
            model=digest,
            round=job.round,
            version=job.version,
            settings=config_digest(
                {**job.config, "server-round": job.round, "version": job.version}
            ),
            members=len(members),
            cohort=ids_digest(members) if self.malicious else bytes(DIGEST_BYTES),
            degree=plan.degree,
            threshold=plan.threshold,
            quorum=quorum,
            malicious=self.malicious,
            limit=float(LARGEST // len(members)) if self.whole else self._limit(job),
            headroom=self.headroom,
            metrics=self.metrics,
            metric_limit=self.metric_limit,
            max_weight=float(self.max_weight or 0),
            stochastic=self.stochastic,
        )
        self._once.begin(digest, terms.session, beside=True)
        return MaskedSession(
            job,
            sorted(members),
            terms,
            void,
            keep=partial(self._once.keep, digest, terms.session),
            over=partial(self._once.over, terms.session),
        )

    def _limit(self, job: Job) -> float:
        if self.limit is not None:
            return self.limit
        return max(job.bounds.values(), default=1.0)

    def _shuffle(self, cohort: list[int], job: Job) -> None:
        attempt = job.config.get("attempt", 0)
        seed = int.from_bytes(os.urandom(8), "big") if self.seed is None else self.seed
        rng = generator(seed, "groups", job.round, attempt if isinstance(attempt, int) else 0)
        rng.shuffle(cohort)

    def client_half(self, own: ClientOwn) -> MaskedClient:
        """The client half, under the conditions of whoever runs the client.

        Raises:
            ValueError: the malicious mode without a roster, or a file of keys that can't be read.
        """
        policy = (
            simulation_policy(
                self.roster,
                self.identities,
                malicious=self.malicious,
                dropouts=self.dropouts,
                colluders=self.colluders,
                least_cohort=self.least_cohort,
            )
            if own.simulated
            else node_policy(own.settings, malicious=self.malicious)
        )
        named = None if policy.roster is None else len(policy.roster.keys)
        if own.simulated and named and self.population and named != self.population:
            raise ValueError(
                f"collector.roster names {named} clients and the run has {self.population}: make one by `trellis keys"
                f" identities DIR --clients {self.population}`"
            )
        return MaskedClient(own.folder / FOLDER, policy)

    def state_dict(self) -> State:
        """The run's id, and which sessions on the present model came to nothing: clients ask for both."""
        return self._once.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's id, so that clients know the models that they have been in a sum on."""
        self._once.load_state_dict(state)


def _split(cohort: Sequence[int], groups: int) -> list[Sequence[int]]:
    """So many runs of about equal length."""
    ends = [len(cohort) * number // groups for number in range(groups + 1)]
    return [cohort[begin:end] for begin, end in pairwise(ends)]
