"""The domain key on a member: finding it, proving it, wrapping and unwrapping with it, and bringing it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.core import wrapping
from pkcs11_ha.core.domain import KEY_ID, Generation, label, parse_label
from pkcs11_ha.core.template import FALSE, TRUE, ulong
from pkcs11_ha.runtime import attributes, native
from pkcs11_ha.runtime.attributes import Filled
from pkcs11_ha.runtime.member import Member
from pkcs11_ha.runtime.service import Refused, create, destroy, do, mechanism, on, unwrap, wrap

_IMPORT_BITS = 3072
_HASHES = {
    "sha256": (ck.CKM_SHA256, ck.CKG_MGF1_SHA256),
    "sha1": (ck.CKM_SHA_1, ck.CKG_MGF1_SHA1),
}  # of OAEP; the better first


@dataclass(frozen=True)
class DomainKey:
    """A domain key as a member has it, proven: `spellings` are the mechanisms that gave its check values."""

    handle: int
    generation: Generation
    spellings: Mapping[str, int]  # form -> mechanism


# ---- finding and proving ----


def keys_of(member: Member) -> dict[int, DomainKey]:
    """The domain keys that a member holds and proves: generation -> key.  Raises MemberFault, CkError.

    What only says that it is a domain key, without yielding its check value, is none.
    """
    with on(member):
        wanted = {ck.CKA_CLASS: ulong(ck.CKO_SECRET_KEY), ck.CKA_TOKEN: TRUE, ck.CKA_ID: KEY_ID}
        keys, member.witnesses = {}, {}
        for handle in attributes.find(member, wanted):
            shown = attributes.read(member, member.session, handle, (ck.CKA_LABEL,))
            generation = parse_label(shown.get(ck.CKA_LABEL, b""))
            if generation is None:
                continue
            spellings = _prove(member, handle, generation)
            if spellings:
                keys[generation.number] = DomainKey(handle, generation, spellings)
                member.witnesses[handle] = shown[ck.CKA_LABEL]
        return keys


def _prove(member: Member, handle: int, generation: Generation) -> dict[str, int]:
    """form -> mechanism, of those with which the key yields the check value that is written on it."""
    spellings: dict[str, int] = {}
    known = create(
        member,
        {
            ck.CKA_CLASS: ulong(ck.CKO_SECRET_KEY),
            ck.CKA_KEY_TYPE: ulong(ck.CKK_AES),
            ck.CKA_TOKEN: FALSE,
            ck.CKA_EXTRACTABLE: TRUE,
            ck.CKA_SENSITIVE: FALSE,
            ck.CKA_VALUE: wrapping.CHECK_KEY,
        },
    )
    try:
        for form in wrapping.FORMS:
            for number in wrapping.CANDIDATES[form]:
                if number not in member.mechanisms or form in spellings:
                    continue
                try:
                    blob = wrap(member, mechanism(number), handle, known)
                except Refused:
                    continue
                if sha256(blob).hexdigest()[:8] == generation.checks[form]:
                    spellings[form] = number
    finally:
        member.call("C_DestroyObject", member.session, known)
    return spellings


def keeps_lengths(member: Member, key: DomainKey) -> bool:
    """Whether a secret key of 17 bytes comes out of its blob with 17 bytes; raises MemberFault.

    SoftHSM 2.6 leaves the zeros of RFC 5649 in it: then it is another key.
    """
    value = bytes(range(1, 18))
    if wrapping.KWP not in key.spellings:
        return False
    template = {
        ck.CKA_CLASS: ulong(ck.CKO_SECRET_KEY),
        ck.CKA_KEY_TYPE: ulong(ck.CKK_GENERIC_SECRET),
        ck.CKA_TOKEN: FALSE,
        ck.CKA_EXTRACTABLE: TRUE,
        ck.CKA_SENSITIVE: FALSE,
    }
    spelling = mechanism(key.spellings[wrapping.KWP])
    made: list[int] = []
    with suppress(Refused), on(member):
        try:
            made.append(create(member, {**template, ck.CKA_VALUE: value}))
            made.append(
                unwrap(member, spelling, key.handle, wrap(member, spelling, key.handle, made[0]), template)
            )
            return (
                attributes.read(member, member.session, made[1], (ck.CKA_VALUE,)).get(ck.CKA_VALUE) == value
            )
        finally:
            for handle in made:
                member.call("C_DestroyObject", member.session, handle)
    return False


# ---- bringing it in ----


@dataclass(frozen=True)
class Entrance:
    """An RSA key pair of a member, alive as long as its service session, under which the domain key comes in."""

    public: int
    private: int
    modulus: int
    exponent: int
    hash: str  # of OAEP that the member takes


def open_entrance(member: Member) -> Entrance:
    """Raises Refused where the member cannot unwrap under RSA-OAEP."""
    with on(member):
        if not any(number in member.mechanisms for form in wrapping.CANDIDATES.values() for number in form):
            raise Refused(member, ck.CKR_MECHANISM_INVALID, "C_WrapKey with AES key wrap of any form")
        if ck.CKM_RSA_PKCS_OAEP not in member.mechanisms:
            raise Refused(member, ck.CKR_MECHANISM_INVALID, "C_UnwrapKey with CKM_RSA_PKCS_OAEP")
        public = Filled(
            {
                ck.CKA_TOKEN: FALSE,
                ck.CKA_MODULUS_BITS: ulong(_IMPORT_BITS),
                ck.CKA_PUBLIC_EXPONENT: b"\1\0\1",
                ck.CKA_WRAP: TRUE,
            }
        )
        private = Filled(
            {
                ck.CKA_TOKEN: FALSE,
                ck.CKA_PRIVATE: TRUE,
                ck.CKA_SENSITIVE: TRUE,
                ck.CKA_EXTRACTABLE: FALSE,
                ck.CKA_UNWRAP: TRUE,
            }
        )
        made = native.ffi.new("CK_OBJECT_HANDLE[2]")
        generate = mechanism(ck.CKM_RSA_PKCS_KEY_PAIR_GEN)
        templates = (public.array, public.count, private.array, private.count)
        do(member, "C_GenerateKeyPair", member.session, generate, *templates, made, made + 1)
        shown = attributes.read(member, member.session, made[0], (ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT))
        numbers = (int.from_bytes(shown[n], "big") for n in (ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT))
        modulus, exponent = numbers
        return Entrance(int(made[0]), int(made[1]), modulus, exponent, _oaep_hash(member, made[0], made[1]))


def _oaep_hash(member: Member, public: int, private: int) -> str:
    """Which OAEP the member does, by a key that is thrown away."""
    filled = Filled({ck.CKA_TOKEN: FALSE, ck.CKA_EXTRACTABLE: TRUE, ck.CKA_VALUE_LEN: ulong(32)})
    made = native.ffi.new("CK_OBJECT_HANDLE *")
    do(
        member,
        "C_GenerateKey",
        member.session,
        mechanism(ck.CKM_AES_KEY_GEN),
        filled.array,
        filled.count,
        made,
    )
    try:
        for name in _HASHES:
            oaep, _parameter = _oaep(name)
            try:
                blob = wrap(member, oaep, public, int(made[0]))
                destroy(member, unwrap(member, oaep, private, blob, _domain_template(None, token=False)))
            except Refused:
                continue
            return name
    finally:
        member.call("C_DestroyObject", member.session, made[0])
    raise Refused(member, ck.CKR_MECHANISM_PARAM_INVALID, "C_UnwrapKey with CKM_RSA_PKCS_OAEP")


def _oaep(name: str) -> tuple[Any, Any]:
    """CKM_RSA_PKCS_OAEP with that hash, and its parameter, which must live as long."""
    parameter = native.ffi.new("CK_RSA_PKCS_OAEP_PARAMS *")
    parameter.hashAlg, parameter.mgf = _HASHES[name]
    parameter.source = ck.CKZ_DATA_SPECIFIED
    size = native.ffi.sizeof("CK_RSA_PKCS_OAEP_PARAMS")
    return mechanism(ck.CKM_RSA_PKCS_OAEP, parameter, size), parameter


def _domain_template(generation: Generation | None, *, token: bool) -> dict[int, bytes]:
    """Wraps and unwraps, and nothing else."""
    template = {
        ck.CKA_CLASS: ulong(ck.CKO_SECRET_KEY),
        ck.CKA_KEY_TYPE: ulong(ck.CKK_AES),
        ck.CKA_TOKEN: TRUE if token else FALSE,
        ck.CKA_PRIVATE: TRUE,
        ck.CKA_SENSITIVE: TRUE,
        ck.CKA_EXTRACTABLE: FALSE,
        ck.CKA_WRAP: TRUE,
        ck.CKA_UNWRAP: TRUE,
        ck.CKA_ENCRYPT: FALSE,
        ck.CKA_DECRYPT: FALSE,
        ck.CKA_SIGN: FALSE,
        ck.CKA_VERIFY: FALSE,
        ck.CKA_DERIVE: FALSE,
    }
    if generation is not None:
        template |= {ck.CKA_ID: KEY_ID, ck.CKA_LABEL: label(generation)}
    return template


def bring_in(member: Member, entrance: Entrance, ciphertext: bytes, generation: Generation) -> DomainKey:
    """Unwraps the domain key under the entrance's private key; raises MemberFault, Refused, CkError."""
    with on(member):
        oaep, _parameter = _oaep(entrance.hash)
        made = unwrap(member, oaep, entrance.private, ciphertext, _domain_template(generation, token=True))
        return _accepted(member, made, generation)


def bring_in_plain(member: Member, value: Any, size: int, generation: Generation) -> DomainKey:
    """C_CreateObject from bytes in the clear (`value` points to them), for members without RSA unwrap."""
    with on(member):
        template = _domain_template(generation, token=True)
        filled = Filled({**template, ck.CKA_VALUE: b""})
        filled.array[filled.count - 1].pValue = value
        filled.array[filled.count - 1].ulValueLen = size
        made = native.ffi.new("CK_OBJECT_HANDLE *")
        do(member, "C_CreateObject", member.session, filled.array, filled.count, made)
        return _accepted(member, int(made[0]), generation)


def _accepted(member: Member, handle: int, generation: Generation) -> DomainKey:
    """The key proves its check value and shows that it stays where it is, or it goes again."""
    shown = attributes.read(member, member.session, handle, (ck.CKA_SENSITIVE, ck.CKA_EXTRACTABLE))
    guarded = shown.get(ck.CKA_SENSITIVE) == TRUE and shown.get(ck.CKA_EXTRACTABLE) == FALSE
    spellings = _prove(member, handle, generation) if guarded else {}
    if not spellings:
        destroy(member, handle)
        why = "proving the domain key" if guarded else "keeping the domain key sensitive and not extractable"
        raise Refused(member, ck.CKR_FUNCTION_FAILED, why)
    return DomainKey(handle, generation, spellings)


def close_entrance(member: Member, entrance: Entrance) -> None:
    """Destroys the key pair."""
    for handle in (entrance.public, entrance.private):
        member.call("C_DestroyObject", member.session, handle)


def drop_all_but(member: Member, keep: Sequence[Generation]) -> None:
    """Destroys domain keys of other generations; raises MemberFault, Refused, CkError."""
    with on(member):
        wanted = {ck.CKA_CLASS: ulong(ck.CKO_SECRET_KEY), ck.CKA_TOKEN: TRUE, ck.CKA_ID: KEY_ID}
        for handle in attributes.find(member, wanted):
            shown = attributes.read(member, member.session, handle, (ck.CKA_LABEL,))
            if parse_label(shown.get(ck.CKA_LABEL, b"")) not in keep:
                destroy(member, handle)
