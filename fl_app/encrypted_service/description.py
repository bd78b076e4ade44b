"""What a service says of its model: all that a client needs to encrypt for it, and none of its weights.

Both sides are strangers to each other: a client checks every number before it makes a key of them or allocates for
them, and takes no ring that is not 128-bit secure. Nothing here knows HTTP or a key.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from annotated_types import Ge, Gt, Le, MaxLen
from pydantic import BaseModel, ConfigDict

from clients.encrypted.inference_plan import Terms
from clients.encrypted.model_file import FeatureTerms, TrainedModel
from clients.encrypted.ring import Ring
from fl_app.encrypted_service.messages import Sizes
from strategies.ckks.parameters import SEED_BYTES

_LARGEST: Final = 1 << 30
"""Bytes of a message that anybody makes or reads."""


class Description(BaseModel):
    """The answer to GET /v1/model.

    Attributes:
        format: of the protocol.
        model: digest of model, features and parameters; each request names it.
        features: that the owner computes in the clear, and encrypts.
        bound: the largest magnitude of a feature.
        classes: K.
        degree: N.
        bits: lengths of the primes, as SEAL picks them; ciphertexts have all but the last.
        input_bits: features are encrypted at scale 2^input_bits.
        logit_bits: logits come at scale 2^logit_bits.
        components: polynomials of an encrypted logit.
        samples: the most of one request.
        request_bytes: of a request's body, without its head.
        answer_bytes: of an answer's.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["trellis-encrypted-inference-1"] = "trellis-encrypted-inference-1"
    model: Annotated[str, MaxLen(64)]
    features: FeatureTerms
    bound: Annotated[float, Gt(0)]
    classes: Annotated[int, Ge(1), Le(1 << 14)]
    degree: int
    bits: Annotated[tuple[int, ...], MaxLen(16)]
    input_bits: int
    logit_bits: int
    components: int
    samples: int
    request_bytes: int
    answer_bytes: int

    @classmethod
    def of(cls, model: TrainedModel) -> Description:
        """What is to be said of a model."""
        terms = model.plan.terms
        sizes = _sizes(model.digest, model.features.size, model.network.sizes[-1], terms)
        return cls(
            model=model.digest,
            features=model.features,
            bound=terms.bound,
            classes=sizes.classes,
            degree=terms.ring.degree,
            bits=terms.ring.bits,
            input_bits=terms.input_bits,
            logit_bits=terms.logit_bits,
            components=terms.components,
            samples=terms.samples,
            request_bytes=sizes.request_bytes,
            answer_bytes=sizes.answer_bytes,
        )

    def terms(self) -> Terms:
        """Ring and scales.

        Raises:
            ValueError: they are insecure, or none that can be.
        """
        ring = Ring(self.degree, self.bits)
        return Terms(ring, self.input_bits, self.logit_bits, self.components, self.bound)

    def sizes(self) -> Sizes:
        """Of the messages.

        Raises:
            ValueError: as `terms`, or they are too long.
        """
        return _sizes(self.model, self.features.size, self.classes, self.terms())


def _sizes(model: str, features: int, classes: int, terms: Terms) -> Sizes:
    ring = terms.ring
    found = Sizes(
        model=model,
        features=features,
        primes=ring.primes[: ring.levels],
        degree=ring.degree,
        samples=terms.samples,
        classes=classes,
        components=terms.components,
        seed_bytes=SEED_BYTES,
    )
    largest = max(found.request_bytes, found.answer_bytes)
    if largest > _LARGEST:
        raise ValueError(f"messages of {largest} bytes: {_LARGEST} are the most")
    return found
