"""Objects that the application makes, changes and destroys, seen through it and in the members' own stores."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_ulong
from functools import partial

import pytest

from demo.members import SoftToken
from tests import fake as fakes
from tests import p11
from tests.fake import PIN, FakeToken
from tests.ha.app import SOON, Application, bare, code, until
from tests.ha.conftest import FakeFactory, Pair, StartFactory
from tests.ha.keys import DATA, DIGEST, private, secret, shared

NOTE: dict[int, p11.Value] = {
    p11.CKA_CLASS: p11.CKO_DATA,
    p11.CKA_TOKEN: True,
    p11.CKA_PRIVATE: False,
    p11.CKA_LABEL: "note",
    p11.CKA_VALUE: b"what it says",
}
BLOCK = DATA[:16]


@pytest.fixture
def app(tokens: tuple[SoftToken, SoftToken], start: StartFactory) -> Application:
    return start(*(token.member() for token in tokens), balance="round-robin")


def stored(tokens: tuple[SoftToken, SoftToken], label: str) -> list[int]:
    """How many objects of that label each token has, by its own module."""
    counts = []
    for token in tokens:
        with bare(token) as session:
            counts.append(len(session.find({p11.CKA_LABEL: label})))
    return counts


# ---- every member gets it


def test_created_object_is_on_every_member(app: Application, tokens: tuple[SoftToken, SoftToken]) -> None:
    session = app.login("123456")
    note = session.create(NOTE)
    assert session.find({p11.CKA_LABEL: "note"}) == [note]
    assert stored(tokens, "note") == [1, 1]
    assert app.events("object.pinned") == []


def test_created_key_works_on_every_member(app: Application) -> None:
    session = app.login("123456")
    key = session.create(secret(p11.CKK_AES, b"n" * 32, "new", b"\x21", p11.CKA_ENCRYPT))
    served, outputs = set(), set()
    for _ in range(4):
        outputs.add(session.encrypt(p11.CKM_AES_ECB, key, BLOCK))
        served.add(app.served(session))
    assert (served, len(outputs)) == ({"east", "west"}, 1)


def test_copied_changed_and_destroyed_objects_are_so_on_every_member(
    app: Application, tokens: tuple[SoftToken, SoftToken]
) -> None:
    session = app.login("123456")
    note = session.create(NOTE)
    copy = session.copy(note, {p11.CKA_LABEL: "copy"})
    assert stored(tokens, "copy") == [1, 1]
    session.set(copy, {p11.CKA_LABEL: "renamed"})
    assert (stored(tokens, "copy"), stored(tokens, "renamed")) == ([0, 0], [1, 1])
    assert session.find({p11.CKA_LABEL: "renamed"}) == [copy]
    session.destroy(copy)
    assert (stored(tokens, "renamed"), stored(tokens, "note")) == ([0, 0], [1, 1])
    assert session.find({p11.CKA_LABEL: "renamed"}) == []
    assert code(lambda: session.get(copy, p11.CKA_LABEL)) == "CKR_OBJECT_HANDLE_INVALID"


def test_object_that_is_found_is_changed_on_every_member(
    app: Application, tokens: tuple[SoftToken, SoftToken]
) -> None:
    """Nobody has used it before, so where it is must be found out."""
    session = app.login("123456")
    session.set(session.find_one(shared("aes")), {p11.CKA_LABEL: "renamed"})
    assert stored(tokens, "renamed") == [1, 1]
    session.destroy(session.find_one(shared("hmac")))
    assert stored(tokens, "hmac") == [0, 0]


def test_generated_token_key_is_on_one_member_and_said_to_be(
    app: Application, tokens: tuple[SoftToken, SoftToken]
) -> None:
    """Until there is replication."""
    session = app.login("123456")
    template: p11.Template = {
        p11.CKA_TOKEN: True,
        p11.CKA_LABEL: "generated",
        p11.CKA_VALUE_LEN: 32,
        p11.CKA_ENCRYPT: True,
    }
    key = session.generate_key(p11.CKM_AES_KEY_GEN, template)
    assert sorted(stored(tokens, "generated")) == [0, 1]
    assert len(app.events("object.pinned")) == 1
    assert len({session.encrypt(p11.CKM_AES_ECB, key, BLOCK) for _ in range(4)}) == 1


def test_member_that_refuses_an_object_has_it_not_and_it_is_said(
    fake: FakeFactory, start: StartFactory
) -> None:
    east, west = fake("east"), fake("west")
    app = start(east.member(), west.member(), balance="primary-first")
    session = app.open()
    west["C_CreateObject"].answers(p11.CKR_TEMPLATE_INCONSISTENT)
    note = session.create(NOTE)
    assert (east.labels(), west.labels()) == (["note"], [])
    assert len(app.events("write.partial", "west")) == 1
    for _ in range(4):
        assert session.get(note, p11.CKA_VALUE) == (b"what it says",)
    assert app.away() == set()


def test_object_that_nobody_can_make_is_made_by_nobody(fake: FakeFactory, start: StartFactory) -> None:
    east, west = fake("east"), fake("west")
    app = start(east.member(), west.member(), balance="primary-first")
    session = app.open()
    east["C_CreateObject"].answers(p11.CKR_TEMPLATE_INCONSISTENT)
    assert code(lambda: session.create(NOTE)) == "CKR_TEMPLATE_INCONSISTENT"
    assert (east.labels(), west.labels()) == ([], [])


# ---- a member is away meanwhile


@pytest.fixture
def two(fake: FakeFactory) -> tuple[FakeToken, FakeToken]:
    return fake("east", fakes.signing_key()), fake("west", fakes.signing_key())


def lose(app: Application, session: p11.Session, token: FakeToken) -> None:
    token.shared.absent = 1
    until(lambda: session.random(8) and app.away(), "the loss is noticed")


def regain(app: Application, session: p11.Session, token: FakeToken) -> None:
    token.shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "the member is back")


@pytest.mark.parametrize("what", ["data", "key that shows itself", "key that does not", "key used before"])
def test_object_destroyed_while_a_member_was_away_does_not_come_back(
    fake: FakeFactory, start: StartFactory, what: str
) -> None:
    template = {
        "data": NOTE,
        "key that shows itself": fakes.signing_key("note"),
        "key that does not": fakes.secret_key("note"),
        "key used before": fakes.secret_key("note"),
    }[what]
    east, west = fake("east", template), fake("west", template)
    app = start(east.member(), west.member(), recovery=SOON)
    session = app.login(PIN)
    note = session.find_one({p11.CKA_LABEL: "note"})
    if what == "key used before":
        session.sign(p11.CKM_SHA256_HMAC, note, DIGEST)
    lose(app, session, west)
    session.destroy(note)
    assert (east.labels(), west.labels()) == ([], ["note"])
    regain(app, session, west)
    assert session.find({p11.CKA_LABEL: "note"}) == []
    assert west.labels() == []


def test_namesake_of_what_was_destroyed_is_not_destroyed_with_it(
    fake: FakeFactory, start: StartFactory
) -> None:
    east = fake("east", fakes.secret_key("note", b"1" * 32))
    west = fake("west", fakes.secret_key("note", b"2" * 32))
    app = start(east.member(), west.member(), recovery=SOON, balance="round-robin")
    session = app.login(PIN)
    right = {}
    for handle in session.find({p11.CKA_LABEL: "note"}):
        session.sign(p11.CKM_SHA256_HMAC, handle, DIGEST)
        right[app.served(session)] = handle
    lose(app, session, west)
    session.destroy(right["east"])
    regain(app, session, west)
    assert (east.labels(), west.labels()) == ([], ["note"])
    assert len(session.find({p11.CKA_LABEL: "note"})) == 1


def test_destroyed_object_stays_destroyed_when_its_member_is_lost_meanwhile(
    fake: FakeFactory, start: StartFactory
) -> None:
    """It dies in the very call."""
    east, west = fake("east", NOTE), fake("west", NOTE)
    app = start(east.member(), west.member(), recovery=SOON)
    session = app.open()
    note = session.find_one({p11.CKA_LABEL: "note"})
    session.get(note, p11.CKA_LABEL)
    west.dies()
    session.destroy(note)
    assert (east.labels(), west.labels()) == ([], ["note"])
    west.is_well_again()
    until(lambda: session.random(8) and not app.away(), "the member is back")
    assert session.find({p11.CKA_LABEL: "note"}) == []
    assert west.labels() == []


def test_object_made_while_a_member_was_away_serves_from_the_others(
    two: tuple[FakeToken, FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in two), recovery=SOON, balance="round-robin")
    session = app.login(PIN)
    lose(app, session, two[1])
    key = session.create(fakes.secret_key("new") | {p11.CKA_TOKEN: True})
    right = session.sign(p11.CKM_SHA256_HMAC, key, DIGEST)
    regain(app, session, two[1])
    assert {session.sign(p11.CKM_SHA256_HMAC, key, DIGEST) for _ in range(6)} == {right}
    assert session.find({p11.CKA_LABEL: "new"}) == [key]


def test_object_made_by_another_program_is_found(
    two: tuple[FakeToken, FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in two), balance="round-robin")
    session = app.login(PIN)
    assert session.find({p11.CKA_LABEL: "later"}) == []
    for token in two:
        token.add(fakes.secret_key("later"))
    key = session.find_one({p11.CKA_LABEL: "later"})
    assert len({session.sign(p11.CKM_SHA256_HMAC, key, DIGEST) for _ in range(4)}) == 1


def test_object_destroyed_by_another_program_is_gone(
    two: tuple[FakeToken, FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in two), balance="round-robin")
    session = app.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "signing"})
    session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    for token in two:
        for place in token.shared.object:
            place.used = 0
    assert session.find({}) == []
    assert code(lambda: session.sign(p11.CKM_RSA_PKCS, key, DIGEST)) == "CKR_KEY_HANDLE_INVALID"
    assert app.away() == set()


# ---- sessions, logins and handles


def test_private_objects_are_invisible_after_logout(app: Application) -> None:
    session = app.login("123456")
    ec, aes = session.find_one(private("ec")), session.find_one(shared("aes"))
    session.sign(p11.CKM_ECDSA, ec, DIGEST)
    session.logout()
    assert session.find(private("ec")) == []
    assert code(lambda: session.sign(p11.CKM_ECDSA, ec, DIGEST)) == "CKR_KEY_HANDLE_INVALID"
    assert code(lambda: session.get(aes, p11.CKA_LABEL)) == "CKR_OBJECT_HANDLE_INVALID"
    assert len(session.find({p11.CKA_CLASS: p11.CKO_PUBLIC_KEY})) == 2
    session.login("123456")
    again = session.find_one(private("ec"))
    session.sign(p11.CKM_ECDSA, again, DIGEST)


def test_session_objects_die_with_their_session_and_no_other(app: Application) -> None:
    first, second = app.login("123456"), app.open()
    make: Callable[[p11.Session, str], int] = lambda session, label: session.create(  # noqa: E731
        secret(p11.CKK_AES, b"s" * 32, label, b"", p11.CKA_ENCRYPT, token=False)
    )
    mine, its = make(first, "mine"), make(second, "its")
    for session in (first, second):  # all sessions of an application see them
        assert sorted(session.find(shared("mine")) + session.find(shared("its"))) == sorted([mine, its])
        session.encrypt(p11.CKM_AES_ECB, mine, BLOCK)
        session.encrypt(p11.CKM_AES_ECB, its, BLOCK)
    first.close()
    assert code(lambda: second.get(mine, p11.CKA_LABEL)) == "CKR_OBJECT_HANDLE_INVALID"
    assert second.find(shared("mine")) == []
    assert second.find(shared("its")) == [its]
    for _ in range(3):
        second.encrypt(p11.CKM_AES_ECB, its, BLOCK)


def test_keys_that_a_session_makes_can_be_used_together(app: Application) -> None:
    """They are made on one member, however the turns go: no other could do what needs two of them."""
    session = app.login("123456")
    template: dict[int, p11.Value] = {
        p11.CKA_TOKEN: False,
        p11.CKA_VALUE_LEN: 32,
        p11.CKA_WRAP: True,
        p11.CKA_ENCRYPT: True,
        p11.CKA_EXTRACTABLE: True,
    }
    keys = []
    for _ in range(4):
        keys.append(session.generate_key(p11.CKM_AES_KEY_GEN, template))
        session.digest(p11.CKM_SHA256, DATA)  # takes a turn
    for one in keys:
        for other in keys:
            assert len(session.wrap(p11.CKM_AES_KEY_WRAP, one, other)) == 40


def test_session_key_is_destroyed_by_nothing_but_that(fake: FakeFactory, start: StartFactory) -> None:
    """Whoever is to destroy it need not be able to use it, and nothing of it is asked for before."""
    tokens = fake("east"), fake("west")
    session = start(*(token.member() for token in tokens)).login(PIN)
    key = session.create(dict(fakes.secret_key()) | {p11.CKA_TOKEN: False})
    for token in tokens:
        for name in ("C_GetAttributeValue", "C_SignInit", "C_Sign"):
            token[name].answers(p11.CKR_DEVICE_MEMORY)
    session.destroy(key)
    assert code(lambda: session.destroy(key)) == "CKR_OBJECT_HANDLE_INVALID"


def test_session_object_is_in_no_store(app: Application, tokens: tuple[SoftToken, SoftToken]) -> None:
    session = app.login("123456")
    session.create(NOTE | {p11.CKA_TOKEN: False})
    assert len(session.find({p11.CKA_LABEL: "note"})) == 1
    assert stored(tokens, "note") == [0, 0]
    app.module.finalize()
    app.module.initialize()
    assert app.open().find({p11.CKA_LABEL: "note"}) == []


def test_session_object_of_a_closed_session_is_left_on_no_member(
    two: tuple[FakeToken, FakeToken], start: StartFactory
) -> None:
    app = start(*(token.member() for token in two))
    keeper, session = app.open(), app.open()
    session.create(NOTE | {p11.CKA_TOKEN: False})
    session.close()
    left = [sum(bool(place.used and place.session) for place in token.shared.object) for token in two]
    assert left == [0, 0]
    assert keeper.find({p11.CKA_LABEL: "note"}) == []


def test_handles_are_never_given_out_twice(app: Application) -> None:
    session = app.login("123456")
    seen: set[int] = set()
    for _ in range(20):
        note = session.create(NOTE | {p11.CKA_TOKEN: False})
        assert note not in seen
        seen.add(note)
        session.destroy(note)
        assert code(partial(session.get, note, p11.CKA_LABEL)) == "CKR_OBJECT_HANDLE_INVALID"
    assert 0 not in seen
    handles: set[int] = set()
    for _ in range(20):
        another = app.open()
        assert another.handle not in handles | {0}
        handles.add(another.handle)
        another.close()
        assert code(another.info) == "CKR_SESSION_HANDLE_INVALID"


def test_destroyed_object_is_not_given_out_by_a_search_under_way(app: Application) -> None:
    session = app.login("123456")
    note = session.create(NOTE | {p11.CKA_TOKEN: False})
    other = app.open()
    other.call("C_FindObjectsInit", None, 0)
    session.destroy(note)
    handles, count = (c_ulong * 64)(), c_ulong()
    other.call("C_FindObjects", handles, 64, byref(count))
    other.call("C_FindObjectsFinal")
    assert note not in handles[: count.value]


def test_keys_found_in_one_session_serve_in_another(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members())
    session = app.login(pair.pin)
    key = session.find_one(private("ec"))
    session.close()
    session = app.login(pair.pin)
    # The last session's end was a logout: a private key's handle ended with it.
    assert code(lambda: session.sign(p11.CKM_ECDSA, key, DIGEST)) == "CKR_KEY_HANDLE_INVALID"
    key = session.find_one(private("ec"))
    other = app.open(rw=False)
    pair.keys.check_ec(other.sign(p11.CKM_ECDSA, key, DIGEST))


def test_search_beside_an_operation_finds_all_or_says_that_it_cannot(
    tokens: tuple[SoftToken, SoftToken], app: Application
) -> None:
    """SoftHSM allows none. What the other member finds is not all there is."""
    with bare(tokens[1]) as session:
        session.create(NOTE)
    served = set()
    for _ in range(2):
        session = app.open()
        session.init("C_DigestInit", p11.CKM_SHA256)
        served.add(app.served(session))
        assert code(partial(session.find, {p11.CKA_LABEL: "note"})) == "CKR_OPERATION_ACTIVE"
        session.output("C_Digest", DATA, len(DATA))
        assert len(session.find({p11.CKA_LABEL: "note"})) == 1
    assert served == {"east", "west"}
