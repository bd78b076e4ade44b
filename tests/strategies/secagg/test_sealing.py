"""What was sealed opens with its key and context only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.secagg.sealing import OVERHEAD, seal, unseal

KEY = bytes(range(32))


@given(st.binary(max_size=300), st.binary(max_size=30))
def test_a_sealed_message_opens_and_is_sixteen_bytes_longer(plaintext, associated):
    sealed = seal(KEY, plaintext, associated)
    assert len(sealed) == len(plaintext) + OVERHEAD
    assert unseal(KEY, sealed, associated) == plaintext


@given(st.binary(max_size=40), st.data())
def test_a_message_with_any_bit_changed_does_not_open(plaintext, data):
    sealed = bytearray(seal(KEY, plaintext, b"who"))
    place = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[place // 8] ^= 1 << place % 8
    with pytest.raises(ValueError, match="does not open"):
        unseal(KEY, bytes(sealed), b"who")


@pytest.mark.parametrize(
    ("key", "cut", "associated"),
    [(bytes(reversed(KEY)), 0, b"who"), (KEY, 0, b"whom"), (KEY, 1, b"who"), (KEY, 20, b"who")],
)
def test_another_key_context_or_length_does_not_open(key, cut, associated):
    sealed = seal(KEY, b"some", b"who")
    with pytest.raises(ValueError, match="does not open"):
        unseal(key, sealed[cut:], associated)


def test_a_key_of_another_length_is_refused():
    for call in (seal, unseal):
        with pytest.raises(ValueError, match="32 bytes"):
            call(bytes(16), bytes(40), b"")


def test_the_construction_is_that_of_rfc_8439():
    """Appendix A.1: with the zero key the keystream from counter 1 is known, and sealing zeros shows it."""
    sealed = seal(bytes(32), bytes(32), b"")
    assert sealed[:32].hex() == "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
