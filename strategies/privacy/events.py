"""What one release costs, as data. A mechanism says which release it will make; accountants say what many come to.

Events hold numbers and no opinion, and go to plain data and back: a noise multiplier is noise over sensitivity, whoever
made the noise, and a claim of amplification is made by naming how the units were sampled. What an accountant does not
know it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from strategies.ranges import Ranged

Relation = Literal["add_or_remove_one", "replace_one"]
"""Which two inputs are neighbours: one has a unit more than the other, or has another in the place of one."""

Sampling = Literal["none", "poisson", "fixed"]
"""How units come into a release, as far as chance is claimed: not at all, each by its own coin, or so many of all."""


@dataclass(frozen=True)
class GaussianRelease(Ranged):
    """A vector released with Gaussian noise.

    Attributes:
        noise_multiplier: the noise's standard deviation over the L2 change that one unit makes, under `relation`.
        rate: probability that a unit is in (`poisson`), or the share of all units that are (`fixed`); 1 for `none`.
        sampling: what of it may be claimed.
        relation: the neighbouring relation.
    """

    noise_multiplier: Annotated[float, Gt(0)]
    rate: Annotated[float, Ge(0), Le(1)] = 1.0
    sampling: Sampling = "none"
    relation: Relation = "add_or_remove_one"


@dataclass(frozen=True)
class LatticeRelease(Ranged):
    """A sum of integer vectors, released with the sum of integer noise that its members added.

    Attributes:
        noise: the law of each member's share, an element each: the discrete Gaussian with variance parameter σ², or a
            Skellam variable with variance σ² (the difference of two Poisson ones with mean σ²/2).
        variance: σ² of one share, in squared steps of the lattice.
        shares: how many honest shares the sum holds at least.
        l2: L2 change of the integer sum that one unit makes, after rounding, in steps.
        l1: L1 change, likewise.
        dimension: elements of the vector.
        rate: probability that a unit is in; 1 for `none`.
        sampling: what of it may be claimed.
        relation: the neighbouring relation.
    """

    noise: Literal["discrete_gaussian", "skellam"]
    variance: Annotated[float, Gt(0)]
    shares: Annotated[int, Ge(1)]
    l2: Annotated[float, Gt(0)]
    l1: Annotated[float, Gt(0)]
    dimension: Annotated[int, Ge(1)]
    rate: Annotated[float, Ge(0), Le(1)] = 1.0
    sampling: Sampling = "none"
    relation: Relation = "add_or_remove_one"


Release = GaussianRelease | LatticeRelease
"""One release."""

_KINDS: Mapping[str, type[GaussianRelease] | type[LatticeRelease]] = {
    "gaussian": GaussianRelease,
    "lattice": LatticeRelease,
}


def release_to_data(release: Release) -> dict[str, Any]:
    """A release as numbers and strings: its kind, and its fields."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(release, cls))
    return {"kind": kind, **asdict(release)}


def release_from_data(data: Mapping[str, Any]) -> Release:
    """The release of `release_to_data`.

    Raises:
        ValueError: the kind is not known, a field is missing, unknown or of a wrong kind, or out of its range.
    """
    cls = _KINDS.get(str(data.get("kind")))
    if cls is None:
        raise ValueError(f"a release of unknown kind: {dict(data)}")
    values = {key: value for key, value in data.items() if key != "kind"}
    expected = {field.name: field.type for field in fields(cls)}
    if values.keys() != expected.keys():
        raise ValueError(f"a {data['kind']} release has {sorted(expected)}, not {sorted(values)}")
    for key, value in values.items():
        kinds = (
            int
            if "int" in str(expected[key])
            else int | float
            if "float" in str(expected[key])
            else str
        )
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"a {data['kind']} release's {key} can't be {value!r}")
    return cls(**values)
