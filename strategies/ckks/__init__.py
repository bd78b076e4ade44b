"""Encrypted sums by CKKS: clients share a key that the server lacks, it adds ciphertexts, clients decrypt sums."""

from strategies.ckks.key import KeyFileError, SharedKey
from strategies.ckks.parameters import CkksParameters
from strategies.ckks.streams import CiphertextError
from strategies.ckks.tags import Member, Tagger, add_tags
from strategies.ckks.vectors import Cipher, Encrypted, SecretKeyError, Sum, public_only

__all__ = [
    "Cipher",
    "CiphertextError",
    "CkksParameters",
    "Encrypted",
    "KeyFileError",
    "Member",
    "SecretKeyError",
    "SharedKey",
    "Sum",
    "Tagger",
    "add_tags",
    "public_only",
]
