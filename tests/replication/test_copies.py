"""Copies are what the application asked for: every attribute of each is compared with the bare module's own object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from demo.members import SoftToken
from tests import p11
from tests.ha.app import bare, code
from tests.replication import contents
from tests.replication.compare import ON_COPIES, ON_THE_ORIGIN, SUBJECT, UNCOPIED, Do, Made, Step, otherwise
from tests.replication.conftest import StartFactory
from tests.replication.domain import PIN, Domain
from tests.replication.kinds import KINDS, PINNED, WRAPPABLE, Kind, Template, inside, mechanisms

YES, NO = True, False

COMMON: dict[str, Template] = {
    "as it comes": {},
    "private": {p11.CKA_PRIVATE: YES},
    "not private": {p11.CKA_PRIVATE: NO},
    "of an id": {p11.CKA_ID: b"\0an id\xff"},
    "of no id": {p11.CKA_ID: b""},
    "of dates": {p11.CKA_START_DATE: b"20300101", p11.CKA_END_DATE: b"20401231"},
    "not modifiable": {p11.CKA_MODIFIABLE: NO},
    "not copyable": {p11.CKA_COPYABLE: NO},
    "not destroyable": {p11.CKA_DESTROYABLE: NO},
    "may derive": {p11.CKA_DERIVE: YES},
    "may not derive": {p11.CKA_DERIVE: NO},
}
GUARDED: dict[str, Template] = COMMON | {
    "sensitive": {p11.CKA_SENSITIVE: YES},
    "not sensitive": {p11.CKA_SENSITIVE: NO},
    "extractable": {p11.CKA_EXTRACTABLE: YES},
    "not extractable": {p11.CKA_EXTRACTABLE: NO},
    "sensitive and extractable": {p11.CKA_SENSITIVE: YES, p11.CKA_EXTRACTABLE: YES},
    "open": {p11.CKA_SENSITIVE: NO, p11.CKA_EXTRACTABLE: YES},
    "open and not private": {p11.CKA_SENSITIVE: NO, p11.CKA_EXTRACTABLE: YES, p11.CKA_PRIVATE: NO},
    "for the trusted": {p11.CKA_WRAP_WITH_TRUSTED: YES},
    "for the trusted and extractable": {p11.CKA_WRAP_WITH_TRUSTED: YES, p11.CKA_EXTRACTABLE: YES},
    "for mechanisms": {
        p11.CKA_ALLOWED_MECHANISMS: mechanisms(p11.CKM_ECDSA, p11.CKM_SHA256_RSA_PKCS, p11.CKM_AES_CBC)
    },
    "for templates": {p11.CKA_UNWRAP_TEMPLATE: inside({p11.CKA_SIGN: YES, p11.CKA_LABEL: "unwrapped"})},
    "of an unknown attribute": {0x80000123: b"vendor's"},
    "of a wrong date": {p11.CKA_START_DATE: b"2030"},
    "of a wrong flag": {p11.CKA_EXTRACTABLE: b"\0\0"},
    "said to be local": {p11.CKA_LOCAL: YES},
    "said to be of a mechanism": {p11.CKA_KEY_GEN_MECHANISM: 1},
    "said to have been sensitive": {p11.CKA_ALWAYS_SENSITIVE: YES},
}


def uses(*numbers: int) -> dict[str, Template]:
    names = {number: name.removeprefix("CKA_").lower() for number, name in contents.names().items()}
    return {f"for {names[each]}": {n: n == each for n in numbers} for each in numbers}


PRIVATE: dict[str, Template] = (
    GUARDED
    | uses(p11.CKA_SIGN, p11.CKA_SIGN_RECOVER, p11.CKA_DECRYPT, p11.CKA_UNWRAP)
    | {"of a subject": {p11.CKA_SUBJECT: SUBJECT}, "always authenticated": {p11.CKA_ALWAYS_AUTHENTICATE: YES}}
)
SECRET_KEY: dict[str, Template] = (
    GUARDED
    | uses(p11.CKA_SIGN, p11.CKA_VERIFY, p11.CKA_ENCRYPT, p11.CKA_DECRYPT, p11.CKA_WRAP, p11.CKA_UNWRAP)
    | {
        "for two templates": {
            p11.CKA_WRAP_TEMPLATE: inside({p11.CKA_EXTRACTABLE: YES}),
            p11.CKA_UNWRAP_TEMPLATE: inside({p11.CKA_ID: b"", p11.CKA_SENSITIVE: YES}),
        },
        "of a wrong check value": {p11.CKA_CHECK_VALUE: b"123"},
        "of a subject": {p11.CKA_SUBJECT: SUBJECT},
    }
)
PUBLIC: dict[str, Template] = (
    COMMON
    | uses(p11.CKA_VERIFY, p11.CKA_VERIFY_RECOVER, p11.CKA_ENCRYPT, p11.CKA_WRAP)
    | {
        "of a subject": {p11.CKA_SUBJECT: SUBJECT},
        "wrapping by a template": {p11.CKA_WRAP_TEMPLATE: inside({p11.CKA_EXTRACTABLE: YES})},
        "trusted": {p11.CKA_TRUSTED: YES},
        "said to be sensitive": {p11.CKA_SENSITIVE: YES},
    }
)
FEW = ("as it comes", "open", "sensitive and extractable", "not destroyable", "of no id")
HARD = ("of dates", "not modifiable")
"""Have tests of their own: SoftHSM shows no date of a private object, and makes no object that is not modifiable
of a template that says so before it says what else the object is."""


def generating(kind: Kind, ways: Mapping[str, Template], *, public: bool = False) -> dict[str, Step]:
    def step(name: str, said: Template) -> Step:
        if public:
            return lambda session: kind.generate(session, name, public=said)
        return lambda session: kind.generate(session, name, private=said)

    return {name: step(name, said) for name, said in ways.items()}


def without(ways: Mapping[str, Template], *names: str) -> dict[str, Template]:
    return {name: said for name, said in ways.items() if name not in names}


@pytest.mark.parametrize("name", WRAPPABLE)
def test_generated_keys_are_the_same_on_every_member(do: Do, name: str) -> None:
    kind = KINDS[name]
    ways = PRIVATE if kind.is_pair else SECRET_KEY
    some = without(ways, *HARD) if name in ("p256", "aes-256") else {each: ways[each] for each in FEW}
    made = do(generating(kind, some))
    assert made.refusals() == {}
    assert made.differences() == {}


@pytest.mark.parametrize("name", ["p256", "rsa", "aes-256", "generic"])
@pytest.mark.parametrize("way", HARD)
def test_generated_keys_of_hard_templates_are_the_same_on_every_member(do: Do, name: str, way: str) -> None:
    made = do(generating(KINDS[name], {way: GUARDED[way]}))
    assert made.refusals() == {}
    assert made.differences() == {}


def test_generated_public_keys_are_the_same_on_every_member(do: Do) -> None:
    made = do(generating(KINDS["p256"], without(PUBLIC, *UNCOPIED, "not modifiable"), public=True))
    assert made.refusals() == {}
    assert made.differences() == {}


def test_each_allowed_difference_is_one(do: Do) -> None:
    """The list of what may be otherwise is no longer than it must be."""
    way = {"sensitive": GUARDED["sensitive"]}
    on_origin: set[str] = set()
    on_copy: set[str] = set()
    for name in ("dh", "aes-256"):
        made = do(generating(KINDS[name], way))
        for held, origin, copy in made.matched({}):
            on_origin |= otherwise(held, origin, generated=True)
            on_copy |= otherwise(held, copy, generated=True)
    assert (sorted(on_origin), sorted(on_copy)) == (sorted(ON_THE_ORIGIN), sorted(ON_COPIES))


@pytest.mark.parametrize("name", WRAPPABLE)
def test_copied_key_is_the_generated_key(app: Domain, tokens: Sequence[SoftToken], name: str) -> None:
    """Here and there what the one does the other understands."""
    kind = KINDS[name]
    kind.generate(app.login(PIN), "key")
    app.module.finalize()
    proofs = []
    for token in tokens:
        with bare(token) as session:
            proofs.append(kind.prove(session, kind.found(session, "key")))
    for token, proof in zip(reversed(tokens), proofs, strict=True):
        with bare(token) as session:
            kind.check(session, kind.found(session, "key"), proof)


@pytest.mark.parametrize("name", WRAPPABLE)
def test_generated_key_serves_when_its_origin_is_lost(app: Domain, name: str) -> None:
    kind = KINDS[name]
    session = app.login(PIN)
    keys = kind.generate(session, "key")
    proof = kind.prove(session, keys)
    origin = app.served(session)
    with app.without(origin):
        kind.check(session, keys, proof)
        assert app.served(session) != origin
        kind.check(session, kind.found(session, "key"), kind.prove(session, keys))
    assert app.away() == set()


@pytest.mark.parametrize("name", PINNED)
def test_key_that_cannot_be_wrapped_stays_with_its_member_and_works(
    app: Domain, tokens: Sequence[SoftToken], name: str
) -> None:
    kind = KINDS[name]
    session = app.login(PIN)
    keys = kind.generate(session, "key")
    halves = 2 if kind.is_pair else 1
    assert len(app.events("object.pinned")) == halves
    for _ in range(4):
        kind.check(session, keys, kind.prove(session, keys))
    assert kind.found(session, "key") == keys
    app.module.finalize()
    held = [contents.of(token) for token in tokens]
    assert sorted(len(each.seen) for each in held) == [0, halves]
    assert [(each.ledger, each.others) for each in held] == [([], [])] * 2


@pytest.mark.parametrize("name", PINNED)
def test_key_that_cannot_be_wrapped_is_as_the_bare_one(
    start: StartFactory, plain: SoftToken, tokens: Sequence[SoftToken], name: str
) -> None:
    kind = KINDS[name]
    ways = {each: PRIVATE[each] for each in FEW}
    with bare(plain) as session:
        for label, said in ways.items():
            kind.generate(session, label, private=said)
    app = start(balance="primary-first")
    session = app.login(PIN)
    for label, said in ways.items():
        kind.generate(session, label, private=said)
    app.module.finalize()
    origin = contents.of(tokens[0])
    assert Made(contents.of(plain), origin, origin, {}).differences() == {}


def test_key_that_cannot_be_wrapped_is_not_made_where_copies_are_demanded(
    start: StartFactory, tokens: Sequence[SoftToken]
) -> None:
    app = start(min_copies=2)
    session = app.login(PIN)
    for name in PINNED:
        assert code(lambda: KINDS[name].generate(session, "key")) == "CKR_KEY_NOT_WRAPPABLE"  # noqa: B023
    app.module.finalize()
    assert [contents.of(token).seen for token in tokens] == [[], []]


@pytest.mark.parametrize("origin", ["east", "west"])
@pytest.mark.parametrize("name", WRAPPABLE)
def test_key_is_found_once_by_who_comes_later(app: Domain, name: str, origin: str) -> None:
    """Whichever member it was generated on."""
    kind = KINDS[name]
    session = app.login(PIN)
    with app.without({"east": "west", "west": "east"}[origin]):
        keys = kind.generate(session, "key")
        proof = kind.prove(session, keys)
    app.module.finalize()
    app.module.initialize()
    session = app.login(PIN)
    keys = kind.found(session, "key")
    kind.check(session, keys, proof)
    assert app.events("object.pinned") == []
