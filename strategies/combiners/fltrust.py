"""FLTrust (Cao et al. 2021, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", Algorithm 2).

The server trains an update of its own on a small clean root data set. A client's trust is the cosine of its update to
the server's, 0 where that is negative; the aggregate is the mean, by trust, of the updates scaled to the server's norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from strategies.combiners.distances import Matrix, products_with
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.contract import Claim, ContractError, name_of
from strategies.update import MODEL_SECTIONS, Vector

_LEAST_LENGTH = 1e-20
"""Of the server's own update's length: clients whose updates are shorter are not trusted."""


def trust_weights(products: Matrix, norms: Matrix, root_norm: float) -> Matrix:
    """The weight of each update in the aggregate, (n,) float64: TSᵢ·‖g₀‖ / ‖gᵢ‖ / Σ TS (eqs. 2 to 4).

    All are 0 where nobody is trusted, or where the server's own update is none: the model stays as it is.

    Args:
        products: ⟨gᵢ, g₀⟩, (n,).
        norms: ‖gᵢ‖, (n,).
        root_norm: ‖g₀‖.
    """
    # Of an update so much shorter than the server's float32 knows no direction that is worth its scaling up.
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > _LEAST_LENGTH * root_norm)
    trust = np.clip(products * inverse / root_norm, 0, 1) if root_norm else np.zeros_like(norms)
    total = trust.sum()
    return trust * inverse * (root_norm / total) if total > 0 else np.zeros_like(norms)


@dataclass
class FLTrust(Robust):
    """The mean by trust in the server's own update. Bears any number of liars but all, as far as a cosine can tell."""

    label: ClassVar[str] = "FLTrust"
    wants_root: ClassVar[bool] = True

    def least(self, f: int) -> int:
        """One more than f: somebody must be honest."""
        return f + 1

    def needs(self, claim: Claim, part: object) -> None:
        """An update of the server's own, of the model's own sections: the server has no control variate."""
        claim.need_root(part)
        beyond = sorted(claim.sections - MODEL_SECTIONS)
        if beyond:
            raise ContractError(
                claim.source("sections"),
                name_of(part),
                f"the server's own update has no section {', '.join(beyond)} to hold the clients' against",
                "use client=sgd or client=proximal, or another combiner",
            )
        super().needs(claim, part)

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`.

        Raises:
            ValueError: the server has no update of its own.
        """
        if side.root is None:
            raise ValueError("FLTrust needs the server's own update (root=)")
        root = np.concatenate(side.root)
        products, norms = products_with(rows, root)
        return rows.combined(
            trust_weights(products, norms, float(np.linalg.norm(root.astype(np.float64))))
        )
