"""Aggregation strategies for Flower: named ones, and the parts that they are made of.

    from strategies import fedadam
    result = fedadam(lr=0.03).start(grid, initial_arrays, num_rounds=20)

This package imports neither the clients nor the application: any Flower app can use it.
"""

from strategies.admission import Admission
from strategies.contract import Claim, ContractError, Visibility
from strategies.mod import pipeline_mod
from strategies.pipeline import Pipeline
from strategies.presets import (
    bulyan,
    centered_clipping,
    ckks_mean,
    dp,
    dp_ftrl,
    fedadagrad,
    fedadam,
    fedasync,
    fedavg,
    fedavgm,
    fedbuff,
    fedprox,
    fedyogi,
    fltrust,
    geometric_median,
    krum,
    median,
    multi_krum,
    norm_bounding,
    robust,
    scaffold,
    secure,
    secure_grouped,
    trimmed_mean,
)
from strategies.strategy import PipelineStrategy
from strategies.update import Layout, Section, Update

__all__ = [
    "Admission",
    "Claim",
    "ContractError",
    "Layout",
    "Pipeline",
    "PipelineStrategy",
    "Section",
    "Update",
    "Visibility",
    "bulyan",
    "centered_clipping",
    "ckks_mean",
    "dp",
    "dp_ftrl",
    "fedadagrad",
    "fedadam",
    "fedasync",
    "fedavg",
    "fedavgm",
    "fedbuff",
    "fedprox",
    "fedyogi",
    "fltrust",
    "geometric_median",
    "krum",
    "median",
    "multi_krum",
    "norm_bounding",
    "pipeline_mod",
    "robust",
    "scaffold",
    "secure",
    "secure_grouped",
    "trimmed_mean",
]
