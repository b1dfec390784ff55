"""The domain key as shares of words, and back: SLIP-39, one group, no passphrase.

Messages number the shares in the order in which they are given, and name a word by its place, never the word.
"""

from __future__ import annotations

from collections.abc import Sequence

from shamir_mnemonic import MnemonicError, Share, combine_mnemonics, generate_mnemonics
from shamir_mnemonic.wordlist import WORD_INDEX_MAP

from pkcs11_ha.cli.custody import KEY_BYTES, CustodyError, Shares

WORDS = 33  # 7 of header and checksum, 26 of 10 bits for 256
# PBKDF2 with 20000 rounds; a passphrase is what they protect, and there is none.
_ITERATION_EXPONENT = 1


def split(key: bytes, shares: Shares) -> list[str]:
    """The shares of a 32-byte key: 33 lower-case words each, single spaces between."""
    groups = [(shares.threshold, shares.count)]
    (words,) = generate_mnemonics(1, groups, key, iteration_exponent=_ITERATION_EXPONENT)
    return words


def read(line: str, given: Sequence[Share]) -> Share:
    """The share in a line, of the same set as those already given and none of them; raises CustodyError."""
    number = len(given) + 1
    words = line.lower().split()
    for place, word in enumerate(words, 1):
        if word not in WORD_INDEX_MAP:
            raise CustodyError(f"share {number}: word {place} is not in the SLIP-39 word list")
    if len(words) != WORDS:
        raise CustodyError(f"share {number} has {len(words)} words, not {WORDS}")
    try:
        share = Share.from_mnemonic(" ".join(words))
    except MnemonicError:
        raise CustodyError(
            f"share {number}: its checksum is wrong, so a word is wrong or out of its place"
        ) from None
    kind = share.group_index, share.group_threshold, share.group_count, share.iteration_exponent
    if kind != (0, 1, 1, _ITERATION_EXPONENT) or len(share.value) != KEY_BYTES:
        raise CustodyError(f"share {number} is not of a domain key")  # SLIP-39 also serves wallets
    for before, other in enumerate(given, 1):
        if share.group_parameters() != other.group_parameters():
            raise CustodyError(f"share {number} is of another set than share {before}")
        if share == other:
            raise CustodyError(f"share {number} is the same as share {before}")
        if share.index == other.index:
            raise CustodyError(f"share {number} is of another set than share {before}")
    return share


def missing(given: Sequence[Share]) -> int:
    """How many more are needed; the first one tells, before it: 1."""
    return given[0].member_threshold - len(given) if given else 1


def combine(given: Sequence[Share]) -> bytes:
    """The key, 32 bytes, from as many shares as are needed; raises CustodyError."""
    try:
        return combine_mnemonics([share.mnemonic() for share in given])
    except MnemonicError:  # two sets can have the same 15-bit identifier
        raise CustodyError("the shares are of different sets: they do not give a key together") from None
