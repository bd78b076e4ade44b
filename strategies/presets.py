"""Named strategies: each a few lines over `PipelineStrategy`, for any Flower app.

    from strategies import fedadam
    strategy = fedadam(lr=0.03)
    result = strategy.start(grid, initial_arrays, num_rounds=20)

All work with vanilla clients, which return weights (set `vanilla=False` where the ClientApp carries
`strategies.pipeline_mod`); SCAFFOLD needs its client half. Further keywords are `PipelineStrategy`'s.
"""

from __future__ import annotations

from typing import Any

from strategies.collectors import Plain
from strategies.combiners import Mean
from strategies.pipeline import Pipeline
from strategies.protocols import ConfigValue
from strategies.samplers import Uniform
from strategies.server_models import SGD, Adagrad, Adam, Scaffold, ServerOptimizer, Yogi
from strategies.strategy import PipelineStrategy
from strategies.update import CONTROL, DELTA

PROXIMAL_MU = "proximal-mu"
"""The setting by which FedProx tells clients μ; Flower's own FedProx uses the same name."""


def _strategy(
    optimizer: ServerOptimizer,
    *,
    fraction: float = 1.0,
    vanilla: bool = True,
    train_config: dict[str, ConfigValue] | None = None,
    **keywords: Any,
) -> PipelineStrategy:
    pipeline = Pipeline(
        collector=Plain(vanilla=vanilla),
        sampler=Uniform(fraction=fraction),
        optimizer=optimizer,
        train_config=train_config or {},
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
