"""Templates: what a copy of an object is made with, so that it is what the application asked for."""

from __future__ import annotations

from collections.abc import Mapping

from pkcs11_ha import ck
from pkcs11_ha.core import public_key
from pkcs11_ha.core.identity import Name

Nested = tuple[tuple[int, bytes], ...]
Template = Mapping[int, "bytes | Nested"]
"""CKA number -> value as it stands in memory; of a CKF_ARRAY_ATTRIBUTE the attributes inside."""

TRUE, FALSE = b"\1", b"\0"

RESERVED = b"pkcs11-ha "
"""How the CKA_ID, CKA_LABEL or CKA_APPLICATION of what the group keeps for itself begins: applications neither see
nor make such objects."""

USAGE = (
    *(ck.CKA_ENCRYPT, ck.CKA_DECRYPT, ck.CKA_SIGN, ck.CKA_SIGN_RECOVER, ck.CKA_VERIFY, ck.CKA_VERIFY_RECOVER),
    *(ck.CKA_WRAP, ck.CKA_UNWRAP, ck.CKA_DERIVE),
)
"""What a key may be used for."""
_STORAGE = (ck.CKA_PRIVATE, ck.CKA_MODIFIABLE, ck.CKA_COPYABLE, ck.CKA_DESTROYABLE, ck.CKA_LABEL)
_KEY = (
    ck.CKA_KEY_TYPE,
    ck.CKA_ID,
    ck.CKA_START_DATE,
    ck.CKA_END_DATE,
    ck.CKA_DERIVE,
    ck.CKA_ALLOWED_MECHANISMS,
)
_SECRET = (ck.CKA_SENSITIVE, ck.CKA_EXTRACTABLE, ck.CKA_WRAP_WITH_TRUSTED)

# What the creator of an object of a class may say (PKCS#11 3.2, section 4), but for what makes up a key.
_OF_CLASS: Mapping[int, tuple[int, ...]] = {
    ck.CKO_SECRET_KEY: (
        *_KEY,
        *_SECRET,
        *(ck.CKA_ENCRYPT, ck.CKA_DECRYPT, ck.CKA_SIGN, ck.CKA_VERIFY, ck.CKA_WRAP, ck.CKA_UNWRAP),
        *(ck.CKA_WRAP_TEMPLATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE),
    ),
    ck.CKO_PRIVATE_KEY: (
        *_KEY,
        *_SECRET,
        *(
            ck.CKA_SUBJECT,
            ck.CKA_DECRYPT,
            ck.CKA_SIGN,
            ck.CKA_SIGN_RECOVER,
            ck.CKA_UNWRAP,
            ck.CKA_DECAPSULATE,
        ),
        *(ck.CKA_ALWAYS_AUTHENTICATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE),
    ),
    ck.CKO_PUBLIC_KEY: (
        *_KEY,
        *(
            ck.CKA_SUBJECT,
            ck.CKA_ENCRYPT,
            ck.CKA_VERIFY,
            ck.CKA_VERIFY_RECOVER,
            ck.CKA_WRAP,
            ck.CKA_ENCAPSULATE,
        ),
        ck.CKA_WRAP_TEMPLATE,
    ),
    ck.CKO_CERTIFICATE: (
        *(ck.CKA_CERTIFICATE_TYPE, ck.CKA_CERTIFICATE_CATEGORY, ck.CKA_ID, ck.CKA_SUBJECT, ck.CKA_ISSUER),
        *(ck.CKA_SERIAL_NUMBER, ck.CKA_VALUE, ck.CKA_URL, ck.CKA_START_DATE, ck.CKA_END_DATE, ck.CKA_OWNER),
        *(ck.CKA_AC_ISSUER, ck.CKA_ATTR_TYPES, ck.CKA_HASH_OF_SUBJECT_PUBLIC_KEY),
        *(ck.CKA_HASH_OF_ISSUER_PUBLIC_KEY, ck.CKA_NAME_HASH_ALGORITHM, ck.CKA_JAVA_MIDP_SECURITY_DOMAIN),
    ),
    ck.CKO_DATA: (ck.CKA_APPLICATION, ck.CKA_OBJECT_ID, ck.CKA_VALUE),
    ck.CKO_DOMAIN_PARAMETERS: (ck.CKA_KEY_TYPE,),
}

# Absent and empty is the same for these; some tokens refuse to be told that they are empty.
_OPTIONAL = frozenset(
    {
        *(
            ck.CKA_START_DATE,
            ck.CKA_END_DATE,
            ck.CKA_SUBJECT,
            ck.CKA_ALLOWED_MECHANISMS,
            ck.CKA_ID,
            ck.CKA_LABEL,
        ),
        *(ck.CKA_WRAP_TEMPLATE, ck.CKA_UNWRAP_TEMPLATE, ck.CKA_DERIVE_TEMPLATE, ck.CKA_URL, ck.CKA_ISSUER),
        *(ck.CKA_SERIAL_NUMBER, ck.CKA_OBJECT_ID, ck.CKA_APPLICATION, ck.CKA_OWNER, ck.CKA_AC_ISSUER),
        *(ck.CKA_ATTR_TYPES, ck.CKA_HASH_OF_SUBJECT_PUBLIC_KEY, ck.CKA_HASH_OF_ISSUER_PUBLIC_KEY),
    }
)
# What a token does unless it is told otherwise: saying so is refused by tokens that do not know the attribute.
_DEFAULTS: Template = {
    ck.CKA_MODIFIABLE: TRUE,
    ck.CKA_COPYABLE: TRUE,
    ck.CKA_DESTROYABLE: TRUE,
    ck.CKA_ALWAYS_AUTHENTICATE: FALSE,
    ck.CKA_WRAP_WITH_TRUSTED: FALSE,
    ck.CKA_ENCAPSULATE: FALSE,
    ck.CKA_DECAPSULATE: FALSE,
    ck.CKA_JAVA_MIDP_SECURITY_DOMAIN: bytes(8),
    ck.CKA_CERTIFICATE_CATEGORY: bytes(8),
    ck.CKA_NAME_HASH_ALGORITHM: ck.CKM_SHA_1.to_bytes(8, "little"),
}

# These keys sign with what they have not signed with before: two copies would do it twice (NIST SP 800-208).
_STATEFUL_TYPES = frozenset({ck.CKK_HSS, ck.CKK_XMSS, ck.CKK_XMSSMT})
_STATEFUL_MECHANISMS = frozenset(
    {ck.CKM_HSS_KEY_PAIR_GEN, ck.CKM_XMSS_KEY_PAIR_GEN, ck.CKM_XMSSMT_KEY_PAIR_GEN}
)


def ulong(value: int) -> bytes:
    """A CK_ULONG as it stands in memory."""
    return value.to_bytes(8, "little")


def is_reserved(template: Template) -> bool:
    """Whether it names an object of the group's own."""
    named = (template.get(number) for number in (ck.CKA_ID, ck.CKA_LABEL, ck.CKA_APPLICATION))
    return any(isinstance(value, bytes) and value.startswith(RESERVED) for value in named)


def is_stateful(mechanism: int | None, template: Template) -> bool:
    """Whether what is made would be a stateful signature key, which must never be copied."""
    key_type = template.get(ck.CKA_KEY_TYPE, b"")
    types = {int.from_bytes(key_type, "little")} if isinstance(key_type, bytes) else set()
    return mechanism in _STATEFUL_MECHANISMS or bool(types & _STATEFUL_TYPES)


NEW_ID = RESERVED + b"new"
"""CKA_ID of an object until the ledger says that it is there."""


def has_id(object_class: int | None) -> bool:
    """Whether objects of a class have a CKA_ID."""
    return object_class in (ck.CKO_PRIVATE_KEY, ck.CKO_PUBLIC_KEY, ck.CKO_SECRET_KEY, ck.CKO_CERTIFICATE)


def may_be_tagged(object_class: int | None, template: Template) -> bool:
    """Whether CKA_ID can say that an object is new: not of one without it, or that must not be modified."""
    return has_id(object_class) and template.get(ck.CKA_MODIFIABLE) != FALSE


def tag(uid: str) -> dict[int, bytes]:
    """What an object is called on a token until the ledger says that it is there: no application sees it so.

    It is for objects that have a CKA_ID and may be modified.
    """
    return {ck.CKA_ID: NEW_ID, ck.CKA_LABEL: RESERVED + uid.encode()}


def named(name: Name) -> dict[int, bytes]:
    """What an object is called, as a template."""
    template = {ck.CKA_LABEL: name.label}
    return {**template, ck.CKA_ID: name.id} if has_id(name.object_class) else template


def renamed(name: Name, said: Mapping[int, bytes]) -> Name:
    """What an object is called after these attributes were set."""
    return name._replace(
        id=said.get(ck.CKA_ID, name.id),
        label=said.get(ck.CKA_LABEL, name.label),
        application=said.get(ck.CKA_APPLICATION, name.application),
        object_id=said.get(ck.CKA_OBJECT_ID, name.object_id),
    )


def attributes_of(object_class: int, key_type: int | None) -> tuple[int, ...]:
    """What to read of an object in order to make a copy of it, never what is secret."""
    own = _OF_CLASS.get(object_class, ())
    if object_class in (ck.CKO_PUBLIC_KEY, ck.CKO_DOMAIN_PARAMETERS):
        family = public_key.family(key_type)
        own += family.parameters + (family.key if object_class == ck.CKO_PUBLIC_KEY else ())
    return (ck.CKA_CLASS, *_STORAGE, *own)


def for_copy(shown: Template) -> dict[int, bytes | Nested]:
    """What a member shows of an object as the template of its copy on a token."""
    said = {
        number: value
        for number, value in shown.items()
        if not (value in (b"", ()) and number in _OPTIONAL) and _DEFAULTS.get(number) != value
    }
    return {**said, ck.CKA_TOKEN: TRUE}


def for_seed(wish: Template, *, is_key: bool) -> dict[int, bytes | None]:
    """What to change in a wish to make a session object that can be wrapped and copied; None: leave it out.

    It lives until the copies are made.  What stands in their way the copies are given themselves.
    """
    changes: dict[int, bytes | None] = {ck.CKA_TOKEN: FALSE}
    for number in (ck.CKA_MODIFIABLE, ck.CKA_COPYABLE, ck.CKA_DESTROYABLE):
        if number in wish:
            changes[number] = None
    if is_key:
        changes[ck.CKA_EXTRACTABLE] = TRUE
        if ck.CKA_WRAP_WITH_TRUSTED in wish:
            changes[ck.CKA_WRAP_WITH_TRUSTED] = None
    return changes


def wished(wish: Template, *, is_key: bool) -> dict[int, bytes]:
    """What the seed had otherwise, as the copies are to have it.

    A key is extractable if the application asked for that and not else: whatever a token's default is, copying a key
    must not be what weakens it.
    """
    numbers = [ck.CKA_MODIFIABLE, ck.CKA_COPYABLE, ck.CKA_DESTROYABLE]
    final: dict[int, bytes] = {}
    if is_key:
        final[ck.CKA_EXTRACTABLE] = FALSE
        numbers += [ck.CKA_EXTRACTABLE, ck.CKA_WRAP_WITH_TRUSTED]
    for number in numbers:
        value = wish.get(number)
        if isinstance(value, bytes):
            final[number] = value
    return final


def contradictions(wanted: Template, made: Template) -> list[int]:
    """Attributes that guard a key and came out otherwise than wanted: the copy must not stay."""
    guards = (*_SECRET, ck.CKA_PRIVATE, ck.CKA_MODIFIABLE, ck.CKA_ALWAYS_AUTHENTICATE)
    return [
        number
        for number in guards
        if number in wanted and number in made and any(wanted[number]) != any(made[number])
    ]
