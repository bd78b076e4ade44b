"""The owner's half of encrypted inference: a key of its own, inputs encrypted, logits decrypted.

A ciphertext a feature, a slot a sample, encrypted under the secret key itself, so that a seed of 64 bytes stands for
half of it (Cheon, Kim, Kim and Song 2017, "Homomorphic Encryption for Arithmetic of Approximate Numbers"). There
is no public key, no relinearisation key and no rotation key: nothing but these ciphertexts ever leaves the owner. The
key lives in this process's memory, and a new one costs milliseconds.

What `decrypt` gives is for the owner alone: an approximate decryption, handed to whoever made the ciphertext, gives the
key away (Li and Micciancio 2021, "On the Security of Homomorphic Encryption on Approximate Numbers"). Nothing here
knows the model, files or HTTP.
"""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.inference_plan import Terms
from clients.encrypted.ring import Desk, in_range
from strategies.ckks.streams import CiphertextError, Residues


class InferenceKey:
    """A new secret key, from the operating system's entropy.

    Args:
        terms: ring, scales and the bound of inputs that the server has room for.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        ring = terms.ring
        seal, context = ring.seal, ring.context
        secret = seal.KeyGenerator(context).secret_key()
        self._encryptor = seal.Encryptor(context, secret)
        self._decryptor = seal.Decryptor(context, secret)
        self._encoder = seal.CKKSEncoder(context)
        self._desk, self._lock = Desk(ring), threading.Lock()

    def has_secret_key(self) -> bool:
        """True: by this name whoever must have no secret key asks of what it is handed."""
        return True

    def encrypt(self, inputs: NDArray[np.floating]) -> tuple[Residues, NDArray[np.uint8]]:
        """Inputs (n, d) as fresh ciphertexts.

        Returns:
            First components (d, primes, N), and the seeds of the second ones (d, bytes).

        Raises:
            ValueError: there are no inputs or more than slots, or one is not finite or beyond the bound.
        """
        values = np.asarray(inputs, np.float64)
        if values.ndim != 2 or not 1 <= len(values) <= self._terms.samples:
            raise ValueError(
                f"inputs of shape {values.shape}: 1 to {self._terms.samples} rows can be encrypted at once"
            )
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self._terms.bound:
            raise ValueError(
                f"an input of magnitude {largest:.4g}: the model has room up to {self._terms.bound:.4g},"
                " and takes finite numbers only"
            )
        level, scale = self._terms.ring.levels, math.ldexp(1, self._terms.input_bits)
        plaintext = self._terms.ring.seal.Plaintext()
        firsts, seeds = [], []
        with self._lock:
            for column in np.ascontiguousarray(values.T):
                self._encoder.encode(column.tolist(), scale, plaintext)
                first, seed = self._desk.fresh(self._encryptor.encrypt_symmetric(plaintext), level)
                firsts.append(first)
                seeds.append(np.frombuffer(seed, np.uint8))
        return np.concatenate(firsts), np.stack(seeds)

    def decrypt(self, residues: Residues, samples: int) -> NDArray[np.float64]:
        """Logits (samples, classes) of encrypted ones (classes, components, primes, N): never to be sent to the server.

        Raises:
            CiphertextError: they are no encrypted logits of these terms.
        """
        ring = self._terms.ring
        if residues.shape[1:] != (self._terms.components, ring.levels, ring.degree):
            raise CiphertextError(f"residues of shape {residues.shape} are no encrypted logits")
        in_range(residues, ring, "encrypted logits")
        scale = math.ldexp(1, self._terms.logit_bits)
        plaintext = ring.seal.Plaintext()
        logits = np.empty((samples, len(residues)))
        with self._lock:
            for index, one in enumerate(residues):
                self._decryptor.decrypt(self._desk.ciphertext(one, scale), plaintext)
                logits[:, index] = self._encoder.decode_double(plaintext)[:samples]
        return logits

    def __repr__(self) -> str:
        return f"InferenceKey(ring={self._terms.ring})"

    def __reduce__(self) -> str:
        raise TypeError("a key stays in the process that made it")
