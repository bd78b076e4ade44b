"""Two agree on a key that depends on its purpose; signatures hold; private parts stay out of sight."""

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from hypothesis import given
from hypothesis import strategies as st

from strategies.secagg.keys import Identity, KeyPair, agree, context, derive, verify

names = st.text("abcdefghij_", min_size=1, max_size=3)
values = st.one_of(st.binary(max_size=4), st.integers(), st.text(max_size=4))
contexts = st.tuples(st.text(max_size=3), st.dictionaries(names, values, max_size=3))


@given(contexts, contexts)
def test_different_contexts_have_different_encodings(one, other):
    same = one == other and all(type(one[1][k]) is type(other[1][k]) for k in one[1])
    assert (context(one[0], **one[1]) == context(other[0], **other[1])) == same


def test_contexts_that_a_careless_encoding_would_confuse():
    alike = [
        context("mask", a=b"xy", b=b"z"), context("mask", a=b"x", b=b"yz"), context("maska", b=b"xy"),
        context("mask", a=b"xyz"), context("mask", a="xyz"), context("mask", purpose=b"xyz"),
        context("mask", a=1), context("mask", a=-1), context("mask", a="1"), context("mask", a=b"1"),
        context("mask"), context("mask", a=b""), context("mask", a=""),
    ]  # fmt: skip
    assert len(set(alike)) == len(alike)
    assert context("mask", a=1, b=2) == context("mask", b=2, a=1)
    with pytest.raises(TypeError, match="field a is a float"):
        context("mask", a=1.0)


def test_two_owners_agree_and_each_purpose_has_a_key_of_its_own():
    mine, theirs, other = KeyPair.generate(), KeyPair.generate(), KeyPair.generate()
    key = agree(mine.private, theirs.public, context("mask", round=1))
    assert len(key) == 32
    assert key == agree(theirs.private, mine.public, context("mask", round=1))
    assert key != agree(mine.private, theirs.public, context("mask", round=2))
    assert key != agree(other.private, theirs.public, context("mask", round=1))
    assert KeyPair.from_private(mine.private) == mine
    assert mine.agree(theirs.public, context("mask", round=1)) == key
    assert derive(key, b"a") != derive(key, b"b")


def test_agreement_is_that_of_rfc_7748_and_derivation_that_of_rfc_5869():
    alice = KeyPair.from_private(
        bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agree(alice.private, bob, b"info") == derive(bytes.fromhex(secret), b"info")
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert alice.public.hex() == public
    derived = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"  # test case 3
    assert derive(b"\x0b" * 22, b"").hex() == derived


@pytest.mark.parametrize(
    "public",
    [
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
    ],
)
def test_public_keys_of_low_order_are_refused(public):
    with pytest.raises(ValueError, match=f"{public} is of low order"):
        agree(KeyPair.generate().private, bytes.fromhex(public), b"")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_keys_of_another_length_are_refused(length):
    pair = KeyPair.generate()
    with pytest.raises(ValueError, match="32 bytes"):
        KeyPair.from_private(bytes(length))
    with pytest.raises(ValueError, match="32 bytes"):
        agree(bytes(length), pair.public, b"")
    with pytest.raises(ValueError, match="32 bytes"):
        agree(pair.private, bytes(length), b"")


def test_a_signature_holds_for_its_message_and_its_signer_only():
    identity, other = Identity.generate(), Identity.generate()
    signature = identity.sign(b"message")
    assert verify(identity.public, signature, b"message")
    assert not verify(identity.public, signature, b"another")
    assert not verify(other.public, signature, b"message")
    assert not verify(identity.public, signature[:-1], b"message")
    assert not verify(identity.public, bytes(64), b"message")
    assert not verify(b"short", signature, b"message")


def test_an_identity_comes_back_from_its_file():
    identity = Identity.generate()
    assert Identity.from_pem(identity.to_pem()) == identity
    assert identity.to_pem().startswith(b"-----BEGIN PRIVATE KEY-----")
    curve = generate_private_key(SECP256R1())
    with pytest.raises(ValueError, match="must be Ed25519"):
        Identity.from_pem(pem(curve, serialization.NoEncryption()))
    with pytest.raises(ValueError, match="without a password"):
        Identity.from_pem(pem(curve, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(ValueError, match="PEM"):
        Identity.from_pem(b"no key")


def pem(key, encryption):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


@pytest.mark.parametrize("kind", [KeyPair, Identity])
def test_no_repr_shows_a_private_part(kind):
    pair = kind.generate()
    for shown in (repr(pair), str(pair), f"{pair}"):
        assert repr(pair.private)[2:-1] not in shown
        assert pair.private.hex() not in shown
        assert "rivate" not in shown
