"""What the group keeps for itself on its members is neither seen nor named, found nor touched by applications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from demo.members import SoftToken
from tests import p11
from tests.ha.app import bare, code
from tests.replication import contents
from tests.replication.conftest import StartFactory
from tests.replication.contents import DOMAIN_KEY, RESERVED
from tests.replication.domain import PIN, Domain
from tests.replication.kinds import BLOCK, KINDS, Template

YES, NO = True, False
NOTE: Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: YES, p11.CKA_LABEL: "note", p11.CKA_VALUE: b"v"}
SECRET: Template = {
    p11.CKA_CLASS: p11.CKO_SECRET_KEY,
    p11.CKA_KEY_TYPE: p11.CKK_AES,
    p11.CKA_VALUE: bytes(range(16)),
    p11.CKA_LABEL: "secret",
}


def fill(session: p11.Session) -> set[str]:
    """One object of some kinds; the labels of all that applications may find."""
    KINDS["p256"].generate(session, "pair")
    KINDS["aes-256"].generate(session, "aes")
    session.create(NOTE)
    session.create(NOTE | {p11.CKA_LABEL: "private note", p11.CKA_PRIVATE: YES})
    session.create(SECRET | {p11.CKA_TOKEN: NO, p11.CKA_LABEL: "session key"})
    return {"pair", "aes", "note", "private note", "session key"}


SEARCHES: dict[str, Template] = {
    "everything": {},
    "token": {p11.CKA_TOKEN: YES},
    "session": {p11.CKA_TOKEN: NO},
    "private": {p11.CKA_PRIVATE: YES},
    "not private": {p11.CKA_PRIVATE: NO},
    "data": {p11.CKA_CLASS: p11.CKO_DATA},
    "private data": {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_PRIVATE: YES},
    "secret keys": {p11.CKA_CLASS: p11.CKO_SECRET_KEY},
    "aes": {p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_KEY_TYPE: p11.CKK_AES},
    "for wrapping": {p11.CKA_WRAP: YES, p11.CKA_UNWRAP: YES},
    "not local": {p11.CKA_LOCAL: NO},
    "of no label": {p11.CKA_LABEL: b""},
    "modifiable": {p11.CKA_MODIFIABLE: YES},
}
OURS: dict[str, Template] = {
    "domain key": {p11.CKA_ID: DOMAIN_KEY},
    **{
        stage: {p11.CKA_LABEL: RESERVED + stage.encode()}
        for stage in ("kept", "placed", "announced", "lease")
    },
    "roster": {p11.CKA_LABEL: RESERVED + b"roster"},
}


def labels(session: p11.Session, template: Template) -> list[str]:
    return sorted(session.get(handle, p11.CKA_LABEL)[0].decode() for handle in session.find(template))


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("search", SEARCHES | OURS)
def test_search_finds_what_is_the_applications_alone(app: Domain, search: str, anew: bool) -> None:
    """As well in a process that has not made the objects itself."""
    session = app.login(PIN)
    known = fill(session)
    if anew:
        app.module.finalize()
        app.module.initialize()
        session = app.login(PIN)
        known.discard("session key")
    found = labels(session, (SEARCHES | OURS)[search])
    assert set(found) <= known
    if search in OURS:
        assert found == []
    if search == "everything":
        assert found == sorted([*known, "pair"])


def test_long_ledger_is_not_seen(app: Domain) -> None:
    """So many entries that they are looked up together."""
    session = app.login(PIN)
    for number in range(40):
        session.create(NOTE | {p11.CKA_LABEL: f"note {number}"})
    app.module.finalize()
    app.module.initialize()
    session = app.login(PIN)
    assert len(session.find({})) == len(session.find({p11.CKA_CLASS: p11.CKO_DATA})) == 40
    assert len(session.find({p11.CKA_PRIVATE: YES})) == 40
    for handle in session.find({}):
        session.destroy(handle)
    assert session.find({}) == []


def test_search_in_steps_counts_the_applications_objects_alone(app: Domain) -> None:
    """Each C_FindObjects gives as many as it is asked for while there are some."""
    from ctypes import byref, c_ulong

    session = app.login(PIN)
    known = {session.create(NOTE | {p11.CKA_LABEL: f"note {number}"}) for number in range(5)}
    session.call("C_FindObjectsInit", None, 0)
    found: list[int] = []
    counts: list[int] = []
    handle, count = (c_ulong * 2)(), c_ulong()
    while not counts or counts[-1]:
        session.call("C_FindObjects", handle, 2, byref(count))
        counts.append(count.value)
        found += handle[: count.value]
    session.call("C_FindObjectsFinal")
    assert (set(found), len(found), counts) == (known, 5, [2, 2, 1, 0])


def test_handles_that_nobody_was_given_name_nothing(app: Domain) -> None:
    """Handles of a member's own objects, the group's among them, are none of the group's."""
    session = app.login(PIN)
    known = {session.create(NOTE), KINDS["aes-256"].generate(session, "aes").private}
    guesses = set(range(200)) | {each + step for each in known for step in range(-3, 4)} - known
    for guess in guesses - known:
        for call in (
            lambda: session.get(guess, p11.CKA_LABEL),  # noqa: B023
            lambda: session.set(guess, {p11.CKA_LABEL: "x"}),  # noqa: B023
            lambda: session.destroy(guess),  # noqa: B023
            lambda: session.copy(guess, {}),  # noqa: B023
        ):
            assert code(call) == "CKR_OBJECT_HANDLE_INVALID"


@pytest.mark.parametrize("name", [RESERVED, DOMAIN_KEY, RESERVED + b"kept", RESERVED + b"anything"])
def test_reserved_name_is_refused_and_leaves_nothing(
    app: Domain, tokens: Sequence[SoftToken], name: bytes
) -> None:
    session = app.login(PIN)
    note, key = session.create(NOTE), KINDS["aes-256"].generate(session, "aes").private
    passing = session.create(SECRET | {p11.CKA_TOKEN: NO})
    tries = {
        "create": lambda: session.create(NOTE | {p11.CKA_LABEL: name}),
        "create of an application": lambda: session.create(NOTE | {p11.CKA_APPLICATION: name}),
        "create key": lambda: session.create(SECRET | {p11.CKA_TOKEN: YES, p11.CKA_ID: name}),
        "create session key": lambda: session.create(SECRET | {p11.CKA_TOKEN: NO, p11.CKA_ID: name}),
        "generate": lambda: KINDS["aes-256"].generate(session, "key", private={p11.CKA_ID: name}),
        "generate pair": lambda: KINDS["p256"].generate(session, "key", private={p11.CKA_LABEL: name}),
        "generate public": lambda: KINDS["p256"].generate(session, "key", public={p11.CKA_ID: name}),
        "generate session key": lambda: KINDS["aes-256"].generate(
            session, "key", private={p11.CKA_ID: name, p11.CKA_TOKEN: NO}
        ),
        "copy": lambda: session.copy(note, {p11.CKA_LABEL: name}),
        "copy key": lambda: session.copy(key, {p11.CKA_ID: name}),
        "copy to the session": lambda: session.copy(key, {p11.CKA_ID: name, p11.CKA_TOKEN: NO}),
        "rename": lambda: session.set(note, {p11.CKA_LABEL: name}),
        "rename of an application": lambda: session.set(note, {p11.CKA_APPLICATION: name}),
        "rename key": lambda: session.set(key, {p11.CKA_ID: name}),
        "rename session key": lambda: session.set(passing, {p11.CKA_LABEL: name}),
        "derive": lambda: session.derive(p11.CKM_AES_ECB_ENCRYPT_DATA, key, {p11.CKA_LABEL: name}),
        "unwrap": lambda: session.unwrap(p11.CKM_AES_KEY_WRAP, key, bytes(24), {p11.CKA_LABEL: name}),
    }
    answers = {what: code(call) for what, call in tries.items()}
    assert answers == dict.fromkeys(tries, "CKR_ATTRIBUTE_VALUE_INVALID")
    app.module.finalize()
    for token in tokens:
        held = contents.of(token)
        assert ([len(held.seen), held.ledger, held.others]) == [2, ["kept", "kept"], []]


def test_name_that_only_looks_reserved_is_the_applications(app: Domain) -> None:
    session = app.login(PIN)
    for name in (b"pkcs11-ha", b"pkcs11-hat ", b" pkcs11-ha ", b"Pkcs11-ha kept"):
        made = session.create(NOTE | {p11.CKA_LABEL: name, p11.CKA_APPLICATION: name})
        assert session.find({p11.CKA_LABEL: name}) == [made]


def plant(tokens: Sequence[SoftToken], *templates: Mapping[int, p11.Value]) -> None:
    """Puts objects on tokens as they lie there in the middle of a write."""
    for token in tokens:
        with bare(token) as session:
            for template in templates:
                session.create(dict(template))


def test_half_made_object_is_not_seen(app: Domain, tokens: Sequence[SoftToken]) -> None:
    """It has its mark yet; nobody says in the ledger that it is there."""
    half = SECRET | {p11.CKA_TOKEN: YES, p11.CKA_ID: RESERVED + b"new", p11.CKA_LABEL: RESERVED + b"0" * 32}
    app.module.finalize()
    plant(tokens[:1], half)
    app.module.initialize()
    session = app.login(PIN)
    by_mark: list[Template] = [{p11.CKA_ID: RESERVED + b"new"}, {p11.CKA_VALUE: SECRET[p11.CKA_VALUE]}]
    for template in (*SEARCHES.values(), *by_mark):
        assert session.find(template) == []


def test_domain_key_does_nothing_for_applications_in_the_members_own_slots(
    start: StartFactory, tokens: Sequence[SoftToken]
) -> None:
    app = start(ha={"only": False})
    first = app.login(PIN)
    fill(first)
    for token in tokens:
        slot = next(s for s in app.module.slots() if app.module.token(s).label == token.label)
        session = app.module.open(slot, rw=True)
        if code(lambda: session.login(PIN)) not in ("CKR_OK", "CKR_USER_ALREADY_LOGGED_IN"):  # noqa: B023
            pytest.fail("the member's own slot takes no login")
        seen = labels(session, {p11.CKA_TOKEN: YES})
        assert seen == ["aes", "note", "pair", "pair", "private note"]
        for search in OURS.values():
            assert session.find(search) == []
        aes = session.find_one({p11.CKA_LABEL: "aes"})
        assert session.decrypt(p11.CKM_AES_ECB, aes, session.encrypt(p11.CKM_AES_ECB, aes, BLOCK)) == BLOCK
        for search in (NOTE | {p11.CKA_LABEL: RESERVED + b"kept"}, SECRET | {p11.CKA_ID: DOMAIN_KEY}):
            assert code(lambda: session.create(search)) == "CKR_ATTRIBUTE_VALUE_INVALID"  # noqa: B023


def test_group_without_replication_hides_what_it_once_kept(start: StartFactory) -> None:
    app = start()
    known = fill(app.login(PIN)) - {"session key"}
    app.module.finalize()
    session = start(replication="none").login(PIN)
    assert set(labels(session, {p11.CKA_TOKEN: YES})) == known
