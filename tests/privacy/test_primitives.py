"""The library calls are put together rightly."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from hanse.core.errors import PrivacyError
from hanse.privacy.primitives import add_mask, agreed, combined, opened, private_key, public_key, sealed, split


def test_two_owners_of_keys_agree_and_every_use_has_a_key_of_its_own() -> None:
    one, two = private_key(b"one".ljust(16)), private_key(b"two".ljust(16))
    assert agreed(one, public_key(two), b"a use") == agreed(two, public_key(one), b"a use")
    assert agreed(one, public_key(two), b"a use") != agreed(one, public_key(two), b"another")
    with pytest.raises(PrivacyError, match="a public key is not one"):
        agreed(one, bytes(32), b"a use")


def test_what_is_sealed_is_opened_in_its_context_alone() -> None:
    key, nonce = bytes(range(32)), bytes(12)
    data = sealed(key, b"text", b"1 to 2", nonce)
    assert opened(key, data, b"1 to 2") == b"text" and b"text" not in data
    for other in ((bytes(32), data, b"1 to 2"), (key, data, b"2 to 1"), (key, data[:-1] + b"x", b"1 to 2")):
        with pytest.raises(PrivacyError, match="changed on its way"):
            opened(*other)


def test_any_shares_that_are_enough_give_the_secret() -> None:
    secret = bytes(range(16))
    shares = dict(enumerate(split(secret, 3, 5)))
    for places in ((0, 1, 2), (4, 2, 0), (1, 3, 4)):
        assert combined({place: shares[place] for place in places}) == secret
    assert combined({place: shares[place] for place in (0, 1)}) != secret


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_a_long_mask_is_one_stream(dtype: str) -> None:
    """It is made in pieces of a megabyte; none repeats another. 2.4 MB and a bit."""
    total, key = np.ones(2_400_008 // int(dtype[2]), dtype), bytes(range(32))
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(total.nbytes))
    add_mask(total, key, 1)
    assert np.array_equal(total, np.frombuffer(stream, dtype) + np.ones(1, dtype))
    add_mask(total, key, -1)
    assert bool((total == 1).all())
