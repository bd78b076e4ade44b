"""Named strategies: each a few lines over `PipelineStrategy`, for any Flower app.

    from strategies import fedadam
    strategy = fedadam(lr=0.03)
    result = strategy.start(grid, initial_arrays, num_rounds=20)

All work with vanilla clients, which return weights (set `vanilla=False` where the ClientApp carries
`strategies.pipeline_mod`); SCAFFOLD needs its client half. Further keywords are `PipelineStrategy`'s.

The robust ones weight every client alike and bear f of a round's clients sending anything at all. A round with too few
replies for f is tried again, and then skipped; f is never lowered.

The secure ones evaluate on the server only, and need `pipeline_mod(half=MaskedClient(folder))` in the ClientApp. A
masked client can't be made to clip, or be judged by itself: one that lies can spoil the sum that it is in. `ckks_mean`
needs the client half of its own collector there, `Ckks(…).client_half(ClientOwn(folder, {"ckks-key": file},
simulated=False))`.

The private ones clip on the clients: `pipeline_mod(stages=[Clip(norm=…)])` with the strategy's own bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

from strategies.collectors import Ckks, Masked, Plain
from strategies.combiners import (
    Bulyan,
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBounding,
    Robust,
    TrimmedMean,
)
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Ftrl
from strategies.protocols import Collector, Combiner, ConfigValue, Job
from strategies.samplers import Poisson, Spaced, Uniform
from strategies.schedulers import Buffered, Polynomial, Scheduler, Staleness, Synchronous
from strategies.server_models import SGD, Adagrad, Adam, Scaffold, ServerOptimizer, Yogi
from strategies.stages import Clip
from strategies.strategy import PipelineStrategy
from strategies.update import CONTROL, DELTA, Update

PROXIMAL_MU = "proximal-mu"
"""The setting by which FedProx tells clients μ; Flower's own FedProx uses the same name."""

_SUMS: Final[dict[str, Any]] = {"federated_every": 0}
"""Where the server sees sums, no client tells it its own figures."""


def _strategy(
    optimizer: ServerOptimizer,
    *,
    collector: Collector | None = None,
    combiner: Combiner | None = None,
    root: Callable[[Job], Update] | None = None,
    scheduler: Scheduler | None = None,
    fraction: float = 1.0,
    vanilla: bool = True,
    train_config: dict[str, ConfigValue] | None = None,
    **keywords: Any,
) -> PipelineStrategy:
    pipeline = Pipeline(
        collector=collector or Plain(vanilla=vanilla),
        sampler=Uniform(fraction=fraction),
        scheduler=scheduler or Synchronous(),
        combiner=combiner or Mean(),
        optimizer=optimizer,
        train_config=train_config or {},
        root=root,
    )
    return PipelineStrategy(pipeline, **keywords)


def fedavg(**keywords: Any) -> PipelineStrategy:
    """Federated averaging (McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks …", Algorithm 1)."""
    return _strategy(SGD(), **keywords)


def fedprox(mu: float = 0.01, **keywords: Any) -> PipelineStrategy:
    """FedProx (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2).

    Clients add μ/2·‖w − w_t‖² to their loss; they find μ in the request's config as `proximal-mu`.
    """
    return _strategy(SGD(), train_config={PROXIMAL_MU: mu}, **keywords)


def fedavgm(lr: float = 1.0, momentum: float = 0.9, **keywords: Any) -> PipelineStrategy:
    """FedAvg with server momentum (Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", §4)."""
    return _strategy(SGD(lr=lr, momentum=momentum), **keywords)


def fedadagrad(lr: float = 0.1, tau: float = 1e-3, **keywords: Any) -> PipelineStrategy:
    """FedAdagrad (Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2)."""
    return _strategy(Adagrad(lr=lr, tau=tau), **keywords)


def fedadam(lr: float = 0.01, tau: float = 1e-3, **keywords: Any) -> PipelineStrategy:
    """FedAdam (Reddi et al. 2021, Algorithm 2)."""
    return _strategy(Adam(lr=lr, tau=tau), **keywords)


def fedyogi(lr: float = 0.01, tau: float = 1e-3, **keywords: Any) -> PipelineStrategy:
    """FedYogi (Reddi et al. 2021, Algorithm 2)."""
    return _strategy(Yogi(lr=lr, tau=tau), **keywords)


def fedbuff(
    buffer: int = 10,
    concurrency: int | None = None,
    *,
    lr: float = 1.0,
    staleness: Staleness | None = None,
    max_staleness: int = 10,
    damp: bool = False,
    deadline: float | None = None,
    **keywords: Any,
) -> PipelineStrategy:
    """FedBuff: a step for every K updates, whoever is still at work (Nguyen et al. 2022, Algorithm 1).

    Args:
        buffer: K.
        concurrency: clients kept busy; None for five buffers' worth, where so many are known of (`population`).
        lr: the server's step.
        staleness: what an update's age leaves of its influence; (1 + τ)^(−1/2) by default.
        max_staleness: versions past which an update is refused.
        damp: whether the server's step is divided by 1 + the mean staleness.
        deadline: seconds that a client may take; None for `timeout`.
        keywords: `PipelineStrategy`'s.
    """
    scheduler = Buffered(
        buffer=buffer,
        concurrency=concurrency,
        staleness=staleness or Polynomial(),
        max_staleness=max_staleness,
        damp=damp,
        deadline=deadline,
        population=keywords.get("population"),
    )
    return _strategy(SGD(lr=lr), scheduler=scheduler, **keywords)


def fedasync(
    mixing: float = 0.6,
    concurrency: int | None = None,
    *,
    staleness: Staleness | None = None,
    max_staleness: int = 10,
    **keywords: Any,
) -> PipelineStrategy:
    """FedAsync: each update moves the model towards the client's (Xie, Koyejo & Gupta 2019, Algorithm 1).

    Args:
        mixing: α, how far towards it, times s(τ).
        concurrency: clients kept busy; None for five, where so many are known of.
        staleness: s; (1 + τ)^(−1/2) by default.
        max_staleness: versions past which an update is refused.
        keywords: `PipelineStrategy`'s.
    """
    scheduler = Buffered(
        buffer=1,
        concurrency=concurrency,
        staleness=staleness or Polynomial(),
        max_staleness=max_staleness,
        mixing=mixing,
        population=keywords.get("population"),
    )
    return _strategy(SGD(), scheduler=scheduler, **keywords)


def scaffold(
    *, population: int, lr: float = 1.0, fraction: float = 1.0, **keywords: Any
) -> PipelineStrategy:
    """SCAFFOLD (Karimireddy et al. 2020, Algorithm 1). `population` is the number N of all clients.

    The ClientApp must carry `strategies.pipeline_mod` and return its control variate's change beside its weights, or
    use `clients.trainers.Scaffold`.
    """
    pipeline = Pipeline(
        sampler=Uniform(fraction=fraction),
        combiner=Mean(weighting="uniform"),
        optimizer=Scaffold(lr=lr, population=population),
        client_sections=frozenset({DELTA, CONTROL}),
    )
    return PipelineStrategy(pipeline, **keywords)


def _robust(rule: Robust, **keywords: Any) -> PipelineStrategy:
    return _strategy(SGD(), combiner=rule, **keywords)


def robust(f: int, rule: Robust | None = None, **keywords: Any) -> PipelineStrategy:
    """Nearest-neighbour mixing round a rule, the trimmed mean by default (Allouah et al. 2023, Algorithm 2); n > 2f."""
    return _robust(NearestNeighborMixing(f=f, rule=rule or TrimmedMean()), **keywords)


def krum(f: int, **keywords: Any) -> PipelineStrategy:
    """Krum (Blanchard et al. 2017, §4); n ≥ 2f + 3."""
    return _robust(Krum(f=f), **keywords)


def multi_krum(f: int, keep: int | None = None, **keywords: Any) -> PipelineStrategy:
    """Multi-Krum, the mean of the `keep` best (n − f for None; Blanchard et al. 2017, §5); n ≥ 2f + 3."""
    return _robust(MultiKrum(f=f, keep=keep), **keywords)


def bulyan(f: int, **keywords: Any) -> PipelineStrategy:
    """Bulyan, one choice after the other (El Mhamdi et al. 2018, §4); n ≥ 4f + 3."""
    return _robust(Bulyan(f=f), **keywords)


def median(f: int, **keywords: Any) -> PipelineStrategy:
    """The coordinate-wise median (Yin et al. 2018, Definition 1); n > 2f."""
    return _robust(Median(f=f), **keywords)


def trimmed_mean(f: int, **keywords: Any) -> PipelineStrategy:
    """The coordinate-wise trimmed mean (Yin et al. 2018, Definition 2); n > 2f."""
    return _robust(TrimmedMean(f=f), **keywords)


def geometric_median(f: int, **keywords: Any) -> PipelineStrategy:
    """RFA, the geometric median (Pillutla et al. 2022, Algorithm 2); n > 2f."""
    return _robust(GeometricMedian(f=f), **keywords)


def centered_clipping(
    f: int, tau: float | None = None, iterations: int = 1, **keywords: Any
) -> PipelineStrategy:
    """Centred clipping round the last aggregate (Karimireddy et al. 2021, eq. CC); n > 2f."""
    return _robust(CenteredClipping(f=f, tau=tau, iterations=iterations), **keywords)


def norm_bounding(f: int, bound: float | None = None, **keywords: Any) -> PipelineStrategy:
    """Norm bounding (Sun et al. 2019, §4); n > 2f."""
    return _robust(NormBounding(f=f, bound=bound), **keywords)


def fltrust(f: int, root: Callable[[Job], Update], **keywords: Any) -> PipelineStrategy:
    """FLTrust (Cao et al. 2021, Algorithm 2). `root` trains the server's own update for a job, on data of its own."""
    return _robust(FLTrust(f=f), root=root, **keywords)


def secure(
    max_weight: int | None = 1000,
    *,
    malicious: bool = False,
    population: int | None = None,
    **keywords: Any,
) -> PipelineStrategy:
    """Secure aggregation, the server sees the sum only (Bell et al. 2020; Bonawitz et al. 2017).

    No protection from clients that lie: nobody sees what one of them sends.

    Args:
        max_weight: the largest number of examples that counts; None weights all clients alike.
        malicious: for clients whose policy pins a roster.
        population: number of all clients, in the malicious mode those of the roster; None where each round asks all.
        keywords: `PipelineStrategy`'s; `fraction`.
    """
    weighting: Literal["examples", "uniform"] = "uniform" if max_weight is None else "examples"
    return _strategy(
        SGD(),
        collector=Masked(max_weight=max_weight, malicious=malicious, population=population),
        combiner=Mean(weighting=weighting),
        population=population,
        **{**_SUMS, **keywords},
    )


def secure_grouped(
    groups: int, f: int, rule: Robust | None = None, **keywords: Any
) -> PipelineStrategy:
    """Secure aggregation within random groups, a robust rule over the groups' means: the median by default.

    A client that lies spoils its group, so f bounds the liars. The server sees each group's sum, and across rounds, in
    which groups are drawn anew, their differences tell more than one sum of all would.
    """
    return _strategy(
        SGD(),
        collector=Masked(groups=groups),
        combiner=rule or Median(f=f),
        **{**_SUMS, **keywords},
    )


def ckks_mean(collector: Ckks | None = None, **keywords: Any) -> PipelineStrategy:
    """FedAvg under CKKS with one key for all clients: the server adds what it can't read (docs/ckks.md).

    Whoever has the key opens every upload: no client may collude with the server.
    """
    collector = collector or Ckks(max_weight=1000)
    weighting: Literal["examples", "uniform"] = (
        "uniform" if collector.max_weight is None else "examples"
    )
    return _strategy(
        SGD(),
        collector=collector,
        combiner=Mean(weighting=weighting),
        **{**_SUMS, **keywords},
    )


def dp(
    privacy: Central,
    *,
    norm: float = 1.0,
    fraction: float = 0.5,
    optimizer: ServerOptimizer | None = None,
    **keywords: Any,
) -> PipelineStrategy:
    """DP-FedAvg, privacy of clients under a trusted server (McMahan et al. 2018, Algorithm 1; docs/privacy.md).

    Args:
        privacy: the promise: budget or noise, all clients (`population`), the planned rounds, and the ledger's file.
        norm: the bound C of a client's update, the same as in the clients' `Clip`.
        fraction: the probability that a client is asked in a round.
        optimizer: the server's; SGD by default.
        keywords: `PipelineStrategy`'s.
    """
    sampler = Poisson(fraction=fraction, population=privacy.population or 0)
    return _private(privacy, sampler, norm, optimizer, **keywords)


def dp_ftrl(
    privacy: Ftrl,
    *,
    participations: int,
    separation: int,
    norm: float = 1.0,
    fraction: float = 0.1,
    optimizer: ServerOptimizer | None = None,
    **keywords: Any,
) -> PipelineStrategy:
    """DP-FTRL, where nothing is claimed of sampling (Kairouz et al. 2021; docs/dp_ftrl.md).

    Args:
        privacy: the promise, as in `dp`.
        participations: rounds in which a client is asked at most.
        separation: rounds from one of these to the next, at least.
        norm: the bound C of a client's update.
        fraction: of the clients, in a round.
        optimizer: the server's; SGD by default.
        keywords: `PipelineStrategy`'s.
    """
    sampler = Spaced(
        participations=participations,
        separation=separation,
        fraction=fraction,
        population=privacy.population or 0,
    )
    return _private(privacy, sampler, norm, optimizer, **keywords)


def _private(
    privacy: Central,
    sampler: Poisson | Spaced,
    norm: float,
    optimizer: ServerOptimizer | None,
    **keywords: Any,
) -> PipelineStrategy:
    pipeline = Pipeline(
        collector=Plain(metrics=False),
        stages=[Clip(norm=norm)],
        sampler=sampler,
        combiner=Mean(weighting="uniform", denominator="cohort"),
        privacy=privacy,
        optimizer=optimizer or SGD(),
    )
    return PipelineStrategy(pipeline, **{**_SUMS, "population": privacy.population, **keywords})
