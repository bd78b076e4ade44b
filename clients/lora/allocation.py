"""Ranks under a budget of memory: the next step of rank goes where it is worth the most for each byte.

What rank r of layer l is worth is I_l·log(1 + r), with I_l the layer's importance. The best approximation of rank r of
a change holds Σ_{i≤r} σᵢ² of it (Eckart and Young 1936, "The approximation of one matrix by another of lower rank"). If
squared singular values fall as 1/i, which is taken for granted here, that is the harmonic number of r, which grows as
log(1 + r): each doubling of a rank is worth the same. Memory is a function of all ranks at once, since layers share
what they save for the backward pass.

The greedy order of steps does not hang on the budget: a budget is the place where it ends, at the first step that does
not fit. So no layer loses rank when a budget grows, which filling up with whatever still fits would not give; the price
is that up to one step's bytes are left over. This file knows neither models nor how memory is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isfinite, log1p

Ranks = Mapping[str, int]
Memory = Callable[[Ranks], int]
"""Bytes of a client whose layers have these ranks; never less for more."""

CHOICES = (0, 4, 8, 16, 32, 64)
"""Ranks that a layer may have."""


class BudgetError(ValueError):
    """A budget that the frozen model alone is over."""


def allocate(
    importance: Mapping[str, float],
    memory: Memory,
    budget: int,
    choices: Sequence[int] = CHOICES,
) -> dict[str, int]:
    """The rank of each layer, by layer.

    Ties go to the layer whose name comes first.

    Args:
        importance: of each layer, not negative.
        memory: bytes at given ranks, of all these layers.
        budget: bytes that must not be exceeded.
        choices: ranks that a layer may have; 0 is always one.

    Raises:
        BudgetError: the budget does not hold the model without adapters.
        ValueError: an importance that is no number, or negative.
    """
    wrong = {n: value for n, value in importance.items() if not (isfinite(value) and value >= 0)}
    if wrong:
        raise ValueError(f"importance must be a number of at least 0, not {wrong}")
    ladder = _ladder(choices)
    ranks = dict.fromkeys(sorted(importance), 0)
    check_budget(memory, ranks, budget)
    spent = memory(ranks)
    while steps := list(_steps(ranks, ladder, importance, memory, spent)):
        # The first of the best; names are in order.
        _, name, rank, needed = max(steps, key=lambda step: step[0])
        if needed > budget:
            break
        ranks[name], spent = rank, needed
    return {name: ranks[name] for name in importance}


def uniform(
    layers: Iterable[str], memory: Memory, budget: int, choices: Sequence[int] = CHOICES
) -> dict[str, int]:
    """The largest rank that fits in all layers; where none does but 0, what layers of equal importance get.

    Raises:
        BudgetError: the budget does not hold the model without adapters.
    """
    names = list(layers)
    for rank in reversed(_ladder(choices)[1:]):
        ranks = dict.fromkeys(names, rank)
        if memory(ranks) <= budget:
            return ranks
    return allocate(dict.fromkeys(names, 1.0), memory, budget, choices)


def check_budget(memory: Memory, layers: Iterable[str], budget: int) -> None:
    """Refuses a budget that does not hold the model without adapters.

    Raises:
        BudgetError: with what is needed and what there is.
    """
    need = memory(dict.fromkeys(layers, 0))
    if need > budget:
        raise BudgetError(
            f"training takes {need / 1e6:.1f} MB without a single adapter, and the budget is {budget / 1e6:.1f} MB:"
            f" raise it, lower the batch size, or load the base in bfloat16"
        )


def _ladder(choices: Sequence[int]) -> list[int]:
    if any(rank < 0 for rank in choices):
        raise ValueError(f"ranks to choose from must be at least 0, not {list(choices)}")
    return sorted({0, *choices})


def _steps(
    ranks: Ranks,
    ladder: Sequence[int],
    importance: Mapping[str, float],
    memory: Memory,
    spent: int,
) -> Iterable[tuple[float, str, int, int]]:
    """What each layer's next step is worth for a byte, the layer, the rank, and bytes in all after it."""
    for name, rank in ranks.items():
        place = ladder.index(rank) + 1
        if place < len(ladder):
            more = ladder[place]
            needed = memory({**ranks, name: more})
            worth = importance[name] * (log1p(more) - log1p(rank))
            yield worth / (needed - spent) if needed > spent else inf, name, more, needed
