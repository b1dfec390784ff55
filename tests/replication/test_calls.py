"""Each call that makes, changes or destroys objects leaves on every member what the bare module leaves on its token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa

from demo.members import SoftToken
from tests import p11
from tests.der import tlv
from tests.ha import keys as software
from tests.ha.app import bare, code
from tests.ha.keys import DATA
from tests.replication import contents
from tests.replication.compare import SUBJECT, Do, Step
from tests.replication.conftest import StartFactory
from tests.replication.domain import PIN, Domain
from tests.replication.kinds import KINDS, MODP_2048, P256, X25519, Template, ecdh, inside, mechanisms

YES, NO = True, False
ON_TOKEN: Template = {p11.CKA_TOKEN: YES}
EC_KEY = ec.derive_private_key(0x1234567890ABCDEF, ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=1024)
DSA_KEY = dsa.generate_private_key(1024)
AES_VALUE = bytes(range(32))
CERTIFICATE = tlv(0x30, tlv(0x30, b"to be signed") + tlv(0x30, b"") + tlv(0x03, b"\0signature"))


def number(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def dsa_key(*, private: bool) -> Template:
    numbers = DSA_KEY.private_numbers()
    group = numbers.public_numbers.parameter_numbers
    return {
        p11.CKA_CLASS: p11.CKO_PRIVATE_KEY if private else p11.CKO_PUBLIC_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_DSA,
        p11.CKA_TOKEN: YES,
        p11.CKA_PRIME: number(group.p),
        p11.CKA_SUBPRIME: number(group.q),
        p11.CKA_BASE: number(group.g),
        p11.CKA_VALUE: number(numbers.x if private else numbers.public_numbers.y),
    }


def secret(size: int, kind: int, **said: p11.Value) -> Template:
    more = {getattr(p11, f"CKA_{name.upper()}"): value for name, value in said.items()}
    return {
        p11.CKA_CLASS: p11.CKO_SECRET_KEY,
        p11.CKA_KEY_TYPE: kind,
        p11.CKA_TOKEN: YES,
        p11.CKA_VALUE: bytes(range(size)),
        **more,
    }


def note(**said: p11.Value) -> Template:
    more = {getattr(p11, f"CKA_{name.upper()}"): value for name, value in said.items()}
    return {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: YES, p11.CKA_VALUE: b"what it says", **more}


def certificate(**said: p11.Value) -> Template:
    more = {getattr(p11, f"CKA_{name.upper()}"): value for name, value in said.items()}
    return {
        p11.CKA_CLASS: p11.CKO_CERTIFICATE,
        p11.CKA_CERTIFICATE_TYPE: p11.CKC_X_509,
        p11.CKA_TOKEN: YES,
        p11.CKA_SUBJECT: SUBJECT,
        p11.CKA_VALUE: CERTIFICATE,
        **more,
    }


CREATED: dict[str, Template] = {
    "aes": secret(32, p11.CKK_AES),
    "aes, open": secret(16, p11.CKK_AES, sensitive=NO, extractable=YES),
    "aes, sensitive": secret(32, p11.CKK_AES, sensitive=YES, extractable=NO, encrypt=YES),
    "aes, not modifiable": secret(32, p11.CKK_AES, modifiable=NO),
    "aes, not copyable": secret(32, p11.CKK_AES, copyable=NO),
    "aes, not destroyable": secret(32, p11.CKK_AES, destroyable=NO),
    "aes, for the trusted": secret(32, p11.CKK_AES, wrap_with_trusted=YES),
    "aes, of dates": secret(32, p11.CKK_AES, start_date=b"20300101", end_date=b"20310101"),
    "aes, not private": secret(32, p11.CKK_AES, private=NO, sensitive=NO),
    "aes, for mechanisms": secret(32, p11.CKK_AES, allowed_mechanisms=mechanisms(p11.CKM_AES_ECB)),
    "aes, for templates": secret(32, p11.CKK_AES, unwrap_template=inside({p11.CKA_SIGN: YES})),
    "generic of 37": secret(37, p11.CKK_GENERIC_SECRET),
    "generic of 1": secret(1, p11.CKK_GENERIC_SECRET, sign=YES, sensitive=NO),
    "des3": secret(24, p11.CKK_DES3),
    "des": secret(8, p11.CKK_DES),
    "hmac": secret(37, p11.CKK_SHA256_HMAC),
    "ec private": software.ec_private(EC_KEY),
    "ec private, open": software.ec_private(EC_KEY) | {p11.CKA_SENSITIVE: NO, p11.CKA_EXTRACTABLE: YES},
    "ec private, of a subject": software.ec_private(EC_KEY) | {p11.CKA_SUBJECT: SUBJECT},
    "ec public": software.ec_public(EC_KEY.public_key()),
    "ec public, private": software.ec_public(EC_KEY.public_key()) | {p11.CKA_PRIVATE: YES},
    "rsa private": software.rsa_private(RSA_KEY),
    "rsa public": software.rsa_public(RSA_KEY.public_key()),
    "dsa private": dsa_key(private=True),
    "dsa public": dsa_key(private=False),
    "dh private": {
        p11.CKA_CLASS: p11.CKO_PRIVATE_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_DH,
        p11.CKA_TOKEN: YES,
        p11.CKA_PRIME: MODP_2048,
        p11.CKA_BASE: b"\2",
        p11.CKA_VALUE: bytes(range(1, 33)),
    },
    "x25519 private": {
        p11.CKA_CLASS: p11.CKO_PRIVATE_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_EC_EDWARDS,
        p11.CKA_TOKEN: YES,
        p11.CKA_EC_PARAMS: X25519,
        p11.CKA_VALUE: bytes(range(32)),
    },
    "dh parameters": {
        p11.CKA_CLASS: p11.CKO_DOMAIN_PARAMETERS,
        p11.CKA_KEY_TYPE: p11.CKK_DH,
        p11.CKA_TOKEN: YES,
        p11.CKA_PRIME: MODP_2048,
        p11.CKA_BASE: b"\2",
    },
    "dsa parameters": {
        p11.CKA_CLASS: p11.CKO_DOMAIN_PARAMETERS,
        p11.CKA_KEY_TYPE: p11.CKK_DSA,
        p11.CKA_TOKEN: YES,
        **{
            n: v
            for n, v in dsa_key(private=True).items()
            if n in (p11.CKA_PRIME, p11.CKA_SUBPRIME, p11.CKA_BASE)
        },
    },
    "certificate": certificate(),
    "certificate, private": certificate(private=YES),
    "certificate of names": certificate(id=b"\1", issuer=SUBJECT, serial_number=b"\2\1\1"),
    "certificate, not modifiable": certificate(modifiable=NO),
    "certificate of dates": certificate(start_date=b"20300101", end_date=b"20310101"),
    "certificate of a category": certificate(certificate_category=2),
    "certificate of a url": certificate(
        url=b"http://localhost/", hash_of_subject_public_key=bytes(20), hash_of_issuer_public_key=bytes(20)
    ),
    "note": note(),
    "note, private": note(private=YES),
    "note, not private": note(private=NO),
    "note, not modifiable": note(modifiable=NO),
    "note, not destroyable": note(destroyable=NO),
    "note of an application": note(application="tests", object_id=bytes.fromhex("06032a0304")),
    "note of nothing": note(value=b""),
    "note of much": note(value=bytes(200_000)),
    # what the module refuses
    "key of no type": {p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_TOKEN: YES, p11.CKA_VALUE: AES_VALUE},
    "key of no value": {p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_TOKEN: YES, p11.CKA_KEY_TYPE: p11.CKK_AES},
    "aes of 17 bytes": secret(17, p11.CKK_AES),
    "object of no class": {p11.CKA_TOKEN: YES, p11.CKA_VALUE: b"?"},
    "object of a wrong class": {p11.CKA_CLASS: 0x77, p11.CKA_TOKEN: YES},
    "private key of half": {
        n: v for n, v in software.rsa_private(RSA_KEY).items() if n != p11.CKA_PRIVATE_EXPONENT
    },
    "note of a wrong flag": note(private=b"\0\0\0"),
    "note with the bits of a key": note(modulus_bits=1024),
    "key said to be local": secret(32, p11.CKK_AES, local=YES),
    "trusted certificate": certificate(trusted=YES),
    "certificate of no subject": certificate(subject=b""),
}
HARD = ("aes, of dates",)


def creating(templates: Mapping[str, Template]) -> dict[str, Step]:
    def step(name: str, said: Template) -> Step:
        return lambda session: session.create(said | {p11.CKA_LABEL: name})

    return {name: step(name, said) for name, said in templates.items()}


def test_created_objects_are_the_same_on_every_member(do: Do) -> None:
    made = do(creating({name: said for name, said in CREATED.items() if name not in HARD}))
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}


@pytest.mark.parametrize("name", HARD)
def test_created_object_of_a_hard_template_is_the_same_on_every_member(do: Do, name: str) -> None:
    made = do(creating({name: CREATED[name]}))
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}


UNWRAPPED: dict[str, Template] = {
    "as it comes": {},
    "not token": {p11.CKA_TOKEN: NO},
    "open": {p11.CKA_SENSITIVE: NO, p11.CKA_EXTRACTABLE: YES},
    "sensitive": {p11.CKA_SENSITIVE: YES, p11.CKA_EXTRACTABLE: NO},
    "not modifiable": {p11.CKA_MODIFIABLE: NO},
    "not copyable": {p11.CKA_COPYABLE: NO},
    "for the trusted": {p11.CKA_WRAP_WITH_TRUSTED: YES},
    "for signing": {p11.CKA_SIGN: YES, p11.CKA_ENCRYPT: NO},
    "of an id": {p11.CKA_ID: b"\7"},
    "of a value": {p11.CKA_VALUE: AES_VALUE},
    "of a length": {p11.CKA_VALUE_LEN: 32},
}


def test_unwrapped_keys_are_the_same_on_every_member(do: Do) -> None:
    """Of the application's own wrapping key."""

    def kek(session: p11.Session) -> int:
        return session.create(
            secret(32, p11.CKK_AES, wrap=YES, unwrap=YES, sensitive=NO, extractable=YES)
            | {p11.CKA_LABEL: "kek"}
        )

    def step(name: str, said: Template, key: Callable[[p11.Session], int]) -> Step:
        def unwrap(session: p11.Session) -> int:
            wrapping = session.find_one({p11.CKA_LABEL: "kek"})
            inner = key(session)
            blob = session.wrap(p11.CKM_AES_KEY_WRAP_PAD, wrapping, inner)
            (kind,) = session.get(inner, p11.CKA_KEY_TYPE)
            (object_class,) = session.get(inner, p11.CKA_CLASS)
            session.destroy(inner)
            said_all = ON_TOKEN | {p11.CKA_CLASS: object_class, p11.CKA_KEY_TYPE: kind, p11.CKA_LABEL: name}
            return session.unwrap(p11.CKM_AES_KEY_WRAP_PAD, wrapping, blob, said_all | said)

        return unwrap

    open_: Template = {p11.CKA_TOKEN: NO, p11.CKA_SENSITIVE: NO, p11.CKA_EXTRACTABLE: YES}
    steps: dict[str, Step] = {"kek": kek}
    for name, said in UNWRAPPED.items():
        steps[name] = step(name, said, lambda s: s.create(secret(32, p11.CKK_AES) | open_))
    steps["private"] = step("private", {}, lambda s: s.create(software.ec_private(EC_KEY) | open_))
    made = do(steps)
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}


def test_derived_keys_are_the_same_on_every_member(do: Do) -> None:
    point = software.ec_point(ec.generate_private_key(ec.SECP256R1()).public_key())

    def base(session: p11.Session) -> int:
        return session.create(software.ec_private(EC_KEY, "base"))

    def step(name: str, said: Template, mechanism: Callable[[], p11.Mechanism] = lambda: ecdh(point)) -> Step:
        def derive(session: p11.Session) -> int:
            wanted: Template = {
                p11.CKA_CLASS: p11.CKO_SECRET_KEY,
                p11.CKA_KEY_TYPE: p11.CKK_AES,
                p11.CKA_TOKEN: YES,
                p11.CKA_LABEL: name,
                p11.CKA_VALUE_LEN: 32,
            }
            return session.derive(mechanism(), session.find_one({p11.CKA_LABEL: "base"}), wanted | said)

        return derive

    steps: dict[str, Step] = {"base": base}
    for name in ("as it comes", "open", "sensitive", "not token", "for signing", "of an id", "of a value"):
        steps[name] = step(name, UNWRAPPED[name])
    steps["generic"] = step("generic", {p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET})
    steps["des3"] = step("des3", {p11.CKA_KEY_TYPE: p11.CKK_DES3, p11.CKA_VALUE_LEN: 24})
    steps["too long"] = step("too long", {p11.CKA_VALUE_LEN: 3200})
    steps["off the curve"] = step("off the curve", {}, lambda: ecdh(b"\4" + bytes(64)))
    made = do(steps)
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}


COPIED: dict[str, Template] = {
    "as it is": {},
    "of an id": {p11.CKA_ID: b"\7"},
    "private": {p11.CKA_PRIVATE: YES},
    "not private": {p11.CKA_PRIVATE: NO},
    "sensitive": {p11.CKA_SENSITIVE: YES},
    "not sensitive": {p11.CKA_SENSITIVE: NO},
    "not extractable": {p11.CKA_EXTRACTABLE: NO},
    "extractable": {p11.CKA_EXTRACTABLE: YES},
    "not modifiable": {p11.CKA_MODIFIABLE: NO},
    "of a value": {p11.CKA_VALUE: b"another"},
    "in the session": {p11.CKA_TOKEN: NO},
    "of an unknown attribute": {0x80000123: b"vendor's"},
}


def copying(source: str, only: Sequence[str] = tuple(COPIED)) -> dict[str, Step]:
    def step(name: str) -> Step:
        def copy(session: p11.Session) -> int:
            found = session.find_one({p11.CKA_LABEL: source})
            return session.copy(found, {p11.CKA_LABEL: f"{source}, {name}"} | COPIED[name])

        return copy

    return {f"copy of {source}, {name}": step(name) for name in only}


@pytest.mark.parametrize(
    "source",
    ["aes, open", "aes, sensitive", "ec private", "ec public", "note", "note, private", "certificate"],
)
def test_copied_objects_are_the_same_on_every_member(do: Do, source: str) -> None:
    made = do(creating({source: CREATED[source]}) | copying(source))
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}


@pytest.mark.parametrize("name", ["p256", "rsa", "aes-256"])
def test_copies_of_generated_keys_are_the_same_on_every_member(do: Do, name: str) -> None:
    kind = KINDS[name]

    def step(said: Template, label: str) -> Step:
        return lambda session: session.copy(kind.found(session, "key").private, said | {p11.CKA_LABEL: label})

    steps: dict[str, Step] = {"key": lambda session: kind.generate(session, "key")}
    made = do(steps | {label: step(said, label) for label, said in COPIED.items()})
    assert made.refusals() == {}
    assert made.differences() == {}


def test_session_object_is_copied_to_the_tokens(do: Do) -> None:
    def copy(session: p11.Session) -> int:
        source = session.create(note() | {p11.CKA_TOKEN: NO, p11.CKA_LABEL: "session"})
        return session.copy(source, ON_TOKEN | {p11.CKA_LABEL: "token"})

    made = do({"copy": copy})
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}


@pytest.mark.parametrize("name", ["p256", "aes-256"])
def test_generated_session_key_is_copied_to_the_tokens(do: Do, name: str) -> None:
    """PKCS#11 gives no other way to keep a key that was tried first."""
    kind = KINDS[name]

    def copy(session: p11.Session) -> int:
        extractable: Template = {p11.CKA_TOKEN: NO, p11.CKA_EXTRACTABLE: YES}
        keys = kind.generate(session, "session", {p11.CKA_TOKEN: NO}, extractable)
        return session.copy(keys.private, ON_TOKEN | {p11.CKA_LABEL: "token"})

    made = do({"copy": copy})
    assert made.refusals() == {}
    assert made.differences() == {}


def test_session_key_that_must_not_leave_its_member_is_copied_there(app: Domain) -> None:
    session = app.login(PIN)
    kind = KINDS["aes-256"]
    keys = kind.generate(session, "session", {p11.CKA_TOKEN: NO}, {p11.CKA_TOKEN: NO})
    copy = session.copy(keys.private, ON_TOKEN | {p11.CKA_LABEL: "token"})
    assert len(app.events("object.pinned")) == 1
    assert session.find({p11.CKA_LABEL: "token"}) == [copy]


CHANGES: dict[str, Template] = {
    "renamed": {p11.CKA_LABEL: "renamed"},
    "of another id": {p11.CKA_ID: b"another"},
    "of no id": {p11.CKA_ID: b""},
    "of both": {p11.CKA_LABEL: "both", p11.CKA_ID: b"both"},
    "for another use": {p11.CKA_SIGN: NO, p11.CKA_ENCRYPT: YES},
    "sensitive": {p11.CKA_SENSITIVE: YES},
    "not sensitive": {p11.CKA_SENSITIVE: NO},
    "not extractable": {p11.CKA_EXTRACTABLE: NO},
    "extractable": {p11.CKA_EXTRACTABLE: YES},
    "of dates": {p11.CKA_START_DATE: b"20300101"},
    "of a wrong date": {p11.CKA_START_DATE: b"2030"},
    "of a subject": {p11.CKA_SUBJECT: SUBJECT},
    "of another class": {p11.CKA_CLASS: p11.CKO_DATA},
    "of a value": {p11.CKA_VALUE: b"another value"},
    "not token": {p11.CKA_TOKEN: NO},
    "not modifiable": {p11.CKA_MODIFIABLE: NO},
    "of an unknown attribute": {0x80000123: b"vendor's"},
    "half wrong": {p11.CKA_LABEL: "half", p11.CKA_CLASS: p11.CKO_DATA},
    "of nothing": {},
}


@pytest.mark.parametrize("kind", ["aes, open", "ec private, open", "ec public", "certificate", "note"])
def test_changed_objects_are_the_same_on_every_member(do: Do, kind: str) -> None:
    """Each change is one of an object of its own; a second one, of the name alone, follows it."""
    template = CREATED[kind]

    def step(name: str, said: Template) -> Step:
        def change(session: p11.Session) -> None:
            made = session.create(template | {p11.CKA_LABEL: f"object {name}"})
            session.set(made, said)

        return change

    def again(name: str, said: Template) -> Step:
        def change(session: p11.Session) -> None:
            label = said.get(p11.CKA_LABEL, f"object {name}")
            found = session.find({p11.CKA_LABEL: label}) or session.find({p11.CKA_LABEL: f"object {name}"})
            session.set(found[0], {p11.CKA_LABEL: f"{name}, again"})

        return change

    steps: dict[str, Step] = {}
    for name, said in CHANGES.items():
        steps[name] = step(name, said)
        steps[f"{name}, again"] = again(name, said)
    made = do(steps)
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}


@pytest.mark.parametrize(
    "kind", ["aes", "ec private", "ec public", "certificate", "note", "note, not destroyable"]
)
def test_destroyed_objects_are_on_no_member(do: Do, kind: str) -> None:
    def destroy(session: p11.Session) -> None:
        (found,) = session.find({p11.CKA_LABEL: kind})
        session.destroy(found)

    made = do(creating({kind: CREATED[kind]}) | {"destroy": destroy})
    assert made.refusals() == {}
    assert made.differences(generated=False) == {}
    left = 1 if "not destroyable" in kind else 0
    assert [len(held.seen) for held in (made.origin, made.copy)] == [left, left]
    assert [len(held.ledger) for held in (made.origin, made.copy)] == [left, left]


# ---- what is refused


def refused(session: p11.Session) -> dict[str, Step]:
    """Calls on token objects, each by itself; the object is that of the label."""
    there = session.find({p11.CKA_LABEL: "there"})
    return {
        "create": lambda s: s.create(note()),
        "create private": lambda s: s.create(note(private=YES)),
        "create key": lambda s: s.create(secret(32, p11.CKK_AES)),
        "generate": lambda s: KINDS["aes-256"].generate(s, "key"),
        "generate pair": lambda s: KINDS["p256"].generate(s, "key"),
        "copy": lambda s: s.copy(there[0], {p11.CKA_LABEL: "copy"}),
        "set": lambda s: s.set(there[0], {p11.CKA_LABEL: "renamed"}),
        "destroy": lambda s: s.destroy(there[0]),
    }


def answers(session: p11.Session) -> dict[str, str]:
    return {name: code(lambda: step(session)) for name, step in refused(session).items()}  # noqa: B023


@pytest.mark.parametrize("private", [False, True])
def test_session_that_cannot_write_is_refused_as_by_the_module(
    start: StartFactory, tokens: Sequence[SoftToken], plain: SoftToken, private: bool
) -> None:
    for token in (*tokens, plain):
        with bare(token) as session:
            session.create(note(private=private, label="there"))
    with bare(plain, login=False) as first:
        session = first.module.open(first.info().slot)
        first.close()
        session.login(PIN)
        right = answers(session)
    app = start()
    session = app.login(PIN, rw=False)
    assert answers(session) == right
    app.module.finalize()
    assert [(len(held.seen), held.ledger) for held in map(contents.of, tokens)] == [(1, [])] * 2


def test_application_that_is_not_logged_in_is_refused(
    start: StartFactory, tokens: Sequence[SoftToken]
) -> None:
    """Also where the module would take a public object: the ledger is private."""
    for token in tokens:
        with bare(token) as session:
            session.create(note(private=NO, label="there"))
    app = start()
    given = answers(app.open())
    assert set(given.values()) == {"CKR_USER_NOT_LOGGED_IN"}
    app.module.finalize()
    assert [(len(held.seen), held.ledger) for held in map(contents.of, tokens)] == [(1, [])] * 2


PAIRS: dict[str, tuple[Template, Template]] = {
    "of no curve": ({p11.CKA_EC_PARAMS: b""}, {}),
    "of an unknown curve": ({p11.CKA_EC_PARAMS: bytes.fromhex("06032a0304")}, {}),
    "of a wrong class": ({p11.CKA_CLASS: p11.CKO_DATA}, {}),
    "of a wrong type": ({}, {p11.CKA_KEY_TYPE: p11.CKK_RSA}),
    "of a value": ({}, {p11.CKA_VALUE: AES_VALUE}),
    "of a point": ({p11.CKA_EC_POINT: b"\4"}, {}),
    "of a wrong flag": ({}, {p11.CKA_SIGN: b""}),
    "half on the token": ({p11.CKA_TOKEN: NO}, {}),
    "the other half": ({}, {p11.CKA_TOKEN: NO}),
}


@pytest.mark.parametrize("way", PAIRS)
def test_bad_template_of_a_pair_is_refused_and_leaves_nothing(do: Do, way: str) -> None:
    public, private = PAIRS[way]
    made = do({way: lambda session: KINDS["p256"].generate(session, "key", public, private)})
    if "half" in way:  # which no member could do with another: the group refuses it
        assert made.answers[way][1] in (made.answers[way][0], "CKR_TEMPLATE_INCONSISTENT")
    else:
        assert made.refusals() == {}
    if made.answers[way][1] != "CKR_OK":
        assert [(held.seen, held.ledger) for held in (made.origin, made.copy)] == [([], [])] * 2


BAD_MECHANISMS: dict[str, Step] = {
    "unknown": lambda s: s.generate_key(0x80001234, ON_TOKEN),
    "of a pair": lambda s: s.generate_key(p11.CKM_EC_KEY_PAIR_GEN, ON_TOKEN | {p11.CKA_EC_PARAMS: P256}),
    "of no length": lambda s: s.generate_key(p11.CKM_AES_KEY_GEN, ON_TOKEN),
    "of a wrong length": lambda s: s.generate_key(p11.CKM_AES_KEY_GEN, ON_TOKEN | {p11.CKA_VALUE_LEN: 7}),
    "of no bits": lambda s: s.generate_key_pair(p11.CKM_RSA_PKCS_KEY_PAIR_GEN, ON_TOKEN, ON_TOKEN),
    "of few bits": lambda s: s.generate_key_pair(
        p11.CKM_RSA_PKCS_KEY_PAIR_GEN, ON_TOKEN | {p11.CKA_MODULUS_BITS: 64}, ON_TOKEN
    ),
    "of another key": lambda s: s.unwrap(
        p11.CKM_AES_KEY_WRAP_PAD, s.create(note()), DATA, ON_TOKEN | {p11.CKA_CLASS: p11.CKO_SECRET_KEY}
    ),
    "copy of nothing": lambda s: s.copy(0xFFFF_FFFF, ON_TOKEN),
    "change of nothing": lambda s: s.set(0xFFFF_FFFF, {p11.CKA_LABEL: "x"}),
    "end of nothing": lambda s: s.destroy(0xFFFF_FFFF),
}


@pytest.mark.parametrize("way", BAD_MECHANISMS)
def test_bad_call_is_refused_and_leaves_nothing(do: Do, way: str) -> None:
    made = do({way: BAD_MECHANISMS[way]})
    assert made.refusals() == {}
    assert [made.answers[way][0] for _ in made.answers] != ["CKR_OK"]
    assert made.differences(generated=False) == {}


# ---- what the group shows of its copies


@pytest.mark.parametrize("name", ["p256", "rsa", "aes-256", "generic"])
def test_group_shows_what_the_origin_knows(app: Domain, name: str) -> None:
    """CKA_LOCAL and its kin, of a key found anew as well, whichever member serves."""
    kind = KINDS[name]
    session = app.login(PIN)
    made = kind.generate(session, "key", private={p11.CKA_SENSITIVE: YES}).private
    wanted: dict[int, p11.Value] = {p11.CKA_LOCAL: YES, p11.CKA_ALWAYS_SENSITIVE: YES}
    if not kind.is_pair:
        wanted[p11.CKA_VALUE_LEN] = 32 if name == "aes-256" else 40
    right = tuple(map(p11.value_bytes, wanted.values()))
    for _ in range(4):
        assert session.get(made, *wanted) == right
    app.module.finalize()
    app.module.initialize()
    session = app.login(PIN)
    found = kind.found(session, "key").private
    for _ in range(4):
        assert session.get(found, *wanted) == right


def test_object_that_cannot_be_destroyed_is_made_once(app: Domain) -> None:
    """What the group tries it with first does not stay."""
    session = app.login(PIN)
    made = session.create(note(destroyable=NO, label="note"))
    assert session.find({p11.CKA_LABEL: "note"}) == [made]
    copy = session.copy(made, {p11.CKA_LABEL: "copy"})
    assert session.find({p11.CKA_LABEL: "copy"}) == [copy]
