"""Products of thin matrices, as low-rank adapters are: their sums, their distances, their best shorter ones."""

from strategies.lora.decomposition import (
    Decomposition,
    Method,
    balanced,
    decomposed,
    effective_rank,
    truncated,
)
from strategies.lora.factors import Factors, cross_term, distance, frobenius, stacked
from strategies.lora.layers import Layer, is_factor, is_residual, layers_of, own_factors

__all__ = [
    "Decomposition",
    "Factors",
    "Layer",
    "Method",
    "balanced",
    "cross_term",
    "decomposed",
    "distance",
    "effective_rank",
    "frobenius",
    "is_factor",
    "is_residual",
    "layers_of",
    "own_factors",
    "stacked",
    "truncated",
]
