"""How keys travel between members: the forms of AES key wrap, and how members spell them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pkcs11_ha import ck

KWP, KW = "kwp", "kw"
FORMS = (KWP, KW)
"""RFC 5649 takes keys of any length, RFC 3394 those of whole 8 bytes; the better first."""

CANDIDATES: Mapping[str, tuple[int, ...]] = {
    # CKM_AES_KEY_WRAP_PAD means RFC 5649 to some (SoftHSM) and something else to others (NSS): which, the check
    # value of the domain key shows.
    KWP: (ck.CKM_AES_KEY_WRAP_KWP, ck.CKM_AES_KEY_WRAP_PAD),
    KW: (ck.CKM_AES_KEY_WRAP,),
}
"""Mechanisms that may be spellings of a form; the one that yields the domain key's check value is."""

CHECK_KEY = bytes(16)
"""What the domain key wraps to show its check value."""

NOT_WRAPPABLE = frozenset(
    {
        *(
            ck.CKR_KEY_NOT_WRAPPABLE,
            ck.CKR_KEY_UNEXTRACTABLE,
            ck.CKR_KEY_SIZE_RANGE,
            ck.CKR_MECHANISM_INVALID,
        ),
        *(ck.CKR_FUNCTION_NOT_SUPPORTED, ck.CKR_KEY_TYPE_INCONSISTENT, ck.CKR_KEY_FUNCTION_NOT_PERMITTED),
        *(ck.CKR_KEY_HANDLE_INVALID, ck.CKR_WRAPPING_KEY_TYPE_INCONSISTENT, ck.CKR_WRAPPING_KEY_SIZE_RANGE),
    }
)
"""Answers to C_WrapKey that say: not this key."""

# NSS softokn finds a private EC key by its public point and wants to be told (CKA_NSS_DB).
_NSS_DB = 0xD5A0DB00


def form_for(spellings: Iterable[Mapping[str, int]]) -> str | None:
    """The best form that all these members have."""
    known = list(spellings)
    return next((form for form in FORMS if all(form in spelling for spelling in known)), None)


def extras(profile: str, key_type: int | None, point: bytes | None) -> dict[int, bytes]:
    """What a member of this profile wants besides, to unwrap a private key of this type.

    `point` is the CKA_EC_POINT of its public key, if that is known.
    """
    return {_NSS_DB: point} if profile == "nss" and key_type == ck.CKK_EC and point else {}
