"""Session keys are where they are needed when their member is lost, as far as the group can make them again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests import p11
from tests.ha import keys as software
from tests.ha.app import code
from tests.replication import contents
from tests.replication.conftest import StartFactory
from tests.replication.domain import PIN, Domain
from tests.replication.kinds import BLOCK, KINDS, Template, ecdh, peer

YES, NO = True, False
BOTH = pytest.mark.parametrize("session_keys", ["pin", "replicate"])
KEY: Template = {
    p11.CKA_CLASS: p11.CKO_SECRET_KEY,
    p11.CKA_KEY_TYPE: p11.CKK_AES,
    p11.CKA_TOKEN: NO,
    p11.CKA_SENSITIVE: YES,
    p11.CKA_ENCRYPT: YES,
    p11.CKA_DECRYPT: YES,
    p11.CKA_LABEL: "session",
}
BASE: Template = software.ec_private(ec.derive_private_key(0x1234567890ABCDEF, ec.SECP256R1()), "base")
KEK: Template = software.secret(
    *(p11.CKK_AES, bytes(range(32)), "kek", b"\1", p11.CKA_WRAP, p11.CKA_UNWRAP, p11.CKA_ENCRYPT)
)

Make = Callable[[p11.Session], int]


def created(session: p11.Session) -> int:
    return session.create(KEY | {p11.CKA_VALUE: bytes(range(32))})


def unwrapped(session: p11.Session) -> int:
    kek = session.find_one({p11.CKA_LABEL: "kek"})
    inner = session.create(KEY | {p11.CKA_VALUE: bytes(range(7, 39)), p11.CKA_EXTRACTABLE: YES})
    blob = session.wrap(p11.CKM_AES_KEY_WRAP_PAD, kek, inner)
    session.destroy(inner)
    return session.unwrap(p11.CKM_AES_KEY_WRAP_PAD, kek, blob, KEY)


def derived(session: p11.Session) -> int:
    base = session.find_one({p11.CKA_LABEL: "base"})
    return session.derive(ecdh(peer()), base, KEY | {p11.CKA_VALUE_LEN: 32})


def copied(session: p11.Session) -> int:
    """Of a key that is gone, by way of another one that is gone."""
    key = session.create(KEY | {p11.CKA_VALUE: bytes(range(32)), p11.CKA_LABEL: "first"})
    for label in ("second", "session"):
        copy = session.copy(key, {p11.CKA_LABEL: label})
        session.destroy(key)
        key = copy
    return key


def copied_from_the_token(session: p11.Session) -> int:
    base = session.find_one({p11.CKA_LABEL: "kek"})
    return session.copy(base, {p11.CKA_TOKEN: NO, p11.CKA_LABEL: "session"})


def changed(session: p11.Session) -> int:
    key = session.create(KEY | {p11.CKA_VALUE: bytes(range(32)), p11.CKA_LABEL: "first"})
    for label in ("second", "session"):
        session.set(key, {p11.CKA_LABEL: label})
    return key


TOLD: dict[str, Make] = {
    make.__name__: make for make in (created, unwrapped, derived, copied, copied_from_the_token, changed)
}


def started(start: StartFactory, session_keys: str = "pin") -> tuple[Domain, p11.Session]:
    """A group with the keys that others come of."""
    app = start(session_keys=session_keys)
    session = app.login(PIN)
    session.create(BASE)
    session.create(KEK)
    return app, session


def text(session: p11.Session, key: int) -> bytes:
    return session.encrypt(p11.CKM_AES_ECB, key, BLOCK)


@BOTH
@pytest.mark.parametrize("how", TOLD)
def test_session_key_follows_its_session(start: StartFactory, how: str, session_keys: str) -> None:
    """Use, loss, use on the other, and the same once more the other way round."""
    app, session = started(start, session_keys)
    key = TOLD[how](session)
    right = text(session, key)
    for _ in range(2):
        lost = app.served(session)
        with app.without(lost):
            assert text(session, key) == right
            assert app.served(session) != lost
            assert session.find({p11.CKA_LABEL: "session"}) == [key]
        assert {text(session, key) for _ in range(4)} == {right}
    assert session.find({p11.CKA_LABEL: "session"}) == [key]
    session.destroy(key)
    assert code(lambda: text(session, key)) == "CKR_KEY_HANDLE_INVALID"


@pytest.mark.parametrize("how", TOLD)
def test_session_key_that_was_never_used_follows_its_session(start: StartFactory, how: str) -> None:
    app, session = started(start)
    key, twin = TOLD[how](session), TOLD[how](session)
    right = text(session, twin)
    with app.without("east"):
        first = text(session, key)
    with app.without("west"):
        assert text(session, key) == first
    if how != "generated":
        assert first == right


@pytest.mark.parametrize("how", TOLD)
def test_session_key_dies_with_its_session(start: StartFactory, how: str) -> None:
    app, session = started(start)
    mine = app.open()
    key = TOLD[how](mine)
    text(mine, key)
    with app.without(app.served(mine)):
        text(mine, key)
    mine.close()
    assert code(lambda: text(session, key)) == "CKR_KEY_HANDLE_INVALID"
    assert session.find({p11.CKA_LABEL: "session"}) == []


@pytest.mark.parametrize("how", ["unwrapped", "derived"])
def test_key_whose_base_was_destroyed_fails_cleanly(start: StartFactory, how: str) -> None:
    """It serves as long as its member does, is refused then, and the session goes on."""
    app, session = started(start)
    key = TOLD[how](session)
    right = text(session, key)
    for label in ("base", "kek"):
        session.destroy(session.find_one({p11.CKA_LABEL: label}))
    assert {text(session, key) for _ in range(4)} == {right}
    with app.without(app.served(session)):
        assert code(lambda: text(session, key)) in ("CKR_KEY_HANDLE_INVALID", "CKR_DEVICE_ERROR")
        other = created(session)
        assert code(lambda: text(session, other)) == "CKR_OK"
    assert app.away() == set()
    assert code(lambda: session.random(8)) == "CKR_OK"


@pytest.mark.parametrize("name", ["aes-256", "generic"])
def test_generated_key_changes_members_where_that_is_wanted(start: StartFactory, name: str) -> None:
    kind = KINDS[name]
    app, session = started(start, "replicate")
    keys = kind.generate(session, "session", private={p11.CKA_TOKEN: NO})
    proof = kind.prove(session, keys)
    for _ in range(2):
        lost = app.served(session)
        with app.without(lost):
            kind.check(session, keys, proof)
            assert app.served(session) != lost
        kind.check(session, keys, proof)


def test_generated_key_is_pinned_where_nothing_else_is_wanted(start: StartFactory) -> None:
    app, session = started(start, "pin")
    key = KINDS["aes-256"].generate(session, "session", private={p11.CKA_TOKEN: NO}).private
    right = text(session, key)
    home = app.served(session)
    for _ in range(4):
        assert (text(session, key), app.served(session)) == (right, home)
    with app.without({"east": "west", "west": "east"}[home]):
        assert text(session, key) == right
    with app.without(home):
        assert code(lambda: text(session, key)) in ("CKR_KEY_HANDLE_INVALID", "CKR_DEVICE_ERROR")
        assert session.find({p11.CKA_LABEL: "session"}) == []


def test_session_key_that_died_with_its_member_is_destroyed_once(start: StartFactory) -> None:
    """It is gone, as is wanted; its handle is nobody's, once that was said or its session is closed."""
    app, session = started(start, "pin")
    mine = app.open()
    keys = [KINDS["aes-256"].generate(mine, "session", private={p11.CKA_TOKEN: NO}).private for _ in range(2)]
    text(mine, keys[0])
    with app.without(app.served(mine)):
        text(session, created(session))  # it is found out
        assert code(lambda: mine.destroy(keys[0])) == "CKR_OK"
        assert code(lambda: mine.destroy(keys[0])) == "CKR_OBJECT_HANDLE_INVALID"
        mine.close()
        assert code(lambda: session.destroy(keys[1])) == "CKR_OBJECT_HANDLE_INVALID"


@BOTH
@pytest.mark.parametrize("name", ["p256", "rsa"])
def test_generated_pair_of_a_session_works_while_its_member_does(
    start: StartFactory, name: str, session_keys: str
) -> None:
    kind = KINDS[name]
    app, session = started(start, session_keys)
    keys = kind.generate(session, "session", {p11.CKA_TOKEN: NO}, {p11.CKA_TOKEN: NO})
    for _ in range(4):
        kind.check(session, keys, kind.prove(session, keys))
    with app.without(app.served(session)):
        assert code(lambda: kind.prove(session, keys)) in ("CKR_KEY_HANDLE_INVALID", "CKR_DEVICE_ERROR")


ASKED: dict[str, Template] = {
    "as it comes": {},
    "extractable": {p11.CKA_EXTRACTABLE: YES},
    "not extractable": {p11.CKA_EXTRACTABLE: NO},
    "not sensitive": {p11.CKA_SENSITIVE: NO},
    "not modifiable": {p11.CKA_MODIFIABLE: NO},
    "for the trusted": {p11.CKA_WRAP_WITH_TRUSTED: YES},
    "not copyable": {p11.CKA_COPYABLE: NO},
}
GUARDS = (
    *(p11.CKA_SENSITIVE, p11.CKA_EXTRACTABLE, p11.CKA_MODIFIABLE, p11.CKA_COPYABLE),
    *(p11.CKA_WRAP_WITH_TRUSTED, p11.CKA_PRIVATE, p11.CKA_TOKEN, p11.CKA_LABEL, p11.CKA_ENCRYPT),
)


@pytest.mark.parametrize("way", ASKED)
def test_generated_session_key_is_guarded_as_wished_wherever_it_is(start: StartFactory, way: str) -> None:
    """That it can change members must not be what weakens it."""
    app, session = started(start, "pin")
    private = {p11.CKA_TOKEN: NO} | ASKED[way]
    right = session.get(KINDS["aes-256"].generate(session, "session", private=private).private, *GUARDS)
    app.module.finalize()
    app = start(session_keys="replicate")
    session = app.login(PIN)
    keys = KINDS["aes-256"].generate(session, "session", private=private)
    assert session.get(keys.private, *GUARDS) == right
    text(session, keys.private)
    with app.without(app.served(session)):
        text(session, keys.private)
        assert session.get(keys.private, *GUARDS) == right


@pytest.mark.parametrize("way", ASKED)
def test_generated_session_key_is_there_once_or_not_at_all(start: StartFactory, way: str) -> None:
    """Where it is refused, what it was made with first does not stay."""
    _, session = started(start, "replicate")
    private = {p11.CKA_TOKEN: NO} | ASKED[way]
    refused = code(lambda: KINDS["aes-256"].generate(session, "session", private=private)) != "CKR_OK"
    assert len(session.find({p11.CKA_LABEL: "session"})) == (0 if refused else 1)


def test_nothing_of_a_session_stays_on_the_tokens(start: StartFactory) -> None:
    app, session = started(start, "replicate")
    made = [make(session) for make in TOLD.values()]
    made.append(KINDS["aes-256"].generate(session, "session", private={p11.CKA_TOKEN: NO}).private)
    with app.without("east"):
        for key in made:
            text(session, key)
    session.close()
    app.module.finalize()
    for token in app.tokens:
        held = contents.of(token)
        assert (sorted(each.label for each in held.seen), held.ledger) == ([b"base", b"kek"], ["kept"] * 2)
