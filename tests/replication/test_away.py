"""What is made, changed or destroyed while a member is away is so on it when it returns, and nothing comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from demo.members import SoftToken
from pkcs11_ha.cli.segments import read_all
from tests import p11
from tests.ha import keys as software
from tests.ha.app import bare, code, working_until
from tests.ha.conftest import clone
from tests.replication import contents, domain
from tests.replication.compare import ON_COPIES
from tests.replication.conftest import StartFactory
from tests.replication.contents import Contents, Held
from tests.replication.domain import PIN, Domain, missing
from tests.replication.kinds import BLOCK, KINDS, Template

YES, NO = True, False
NOTE: Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: YES, p11.CKA_VALUE: b"what it says"}
CERTIFICATE: Template = {
    p11.CKA_CLASS: p11.CKO_CERTIFICATE,
    p11.CKA_CERTIFICATE_TYPE: p11.CKC_X_509,
    p11.CKA_TOKEN: YES,
    p11.CKA_SUBJECT: b"\x30\x00",
    p11.CKA_VALUE: b"\x30\x03\x02\x01\x05",
}

Make = Callable[[p11.Session, str], list[int]]


def pair(name: str) -> Make:
    def make(session: p11.Session, label: str) -> list[int]:
        keys = KINDS[name].generate(session, label)
        return [keys.public, keys.private]

    return make


def secret(name: str, **said: p11.Value) -> Make:
    more: Template = {getattr(p11, f"CKA_{each.upper()}"): value for each, value in said.items()}
    return lambda session, label: [KINDS[name].generate(session, label, private=more).private]


def created(template: Template) -> Make:
    return lambda session, label: [session.create(template | {p11.CKA_LABEL: label})]


MAKES: dict[str, Make] = {
    "ec": pair("p256"),
    "rsa": pair("rsa"),
    "aes": secret("aes-256"),
    "aes, sensitive": secret("aes-128", sensitive=YES),
    "aes, open": secret("aes-128", sensitive=NO, extractable=YES),
    "aes of no id": secret("aes-256", id=b""),
    "aes, created": created(
        {
            p11.CKA_CLASS: p11.CKO_SECRET_KEY,
            p11.CKA_KEY_TYPE: p11.CKK_AES,
            p11.CKA_TOKEN: YES,
            p11.CKA_ENCRYPT: YES,
            p11.CKA_VALUE: bytes(range(16)),
        }
    ),
    "hmac": secret("generic", value_len=32),
    "des3": secret("des3"),
    "certificate": created(CERTIFICATE),
    "note": created(NOTE),
    "private note": created(NOTE | {p11.CKA_PRIVATE: YES}),
    "note of an application": created(
        NOTE | {p11.CKA_APPLICATION: "tests", p11.CKA_OBJECT_ID: b"\6\3\x2a\3\4"}
    ),
}


def state(held: Held) -> str:
    """What one object is, less what a copy may have otherwise."""
    return repr(sorted((n, v) for n, v in held.shown.items() if n not in ON_COPIES))


def equal(one: Contents, other: Contents) -> None:
    assert sorted(map(state, one.seen)) == sorted(map(state, other.seen))


def settled(app: Domain, *, kept: int | None = None) -> list[Contents]:
    """Ends the application; what its members hold: the same, and nothing half done."""
    app.module.finalize()
    held = [contents.of(token) for token in app.tokens]
    for each in held[1:]:
        equal(held[0], each)
    for each in held:
        assert each.others == []
        assert each.ledger == ["kept"] * (len(each.ledger) if kept is None else kept)
    return held


@pytest.mark.parametrize("away", domain.NAMES)
@pytest.mark.parametrize("name", MAKES)
def test_object_made_meanwhile_is_made(app: Domain, name: str, away: str) -> None:
    session = app.login(PIN)
    with app.without(away):
        made = MAKES[name](session, "object")
    assert sorted(session.find({p11.CKA_LABEL: "object"})) == sorted(made)
    held = settled(app, kept=len(made))
    assert len(held[0].seen) == len(made)


@pytest.mark.parametrize("name", MAKES)
def test_object_made_meanwhile_is_made_for_the_next_process(
    app: Domain, tokens: Sequence[SoftToken], name: str
) -> None:
    app.module.finalize()
    with missing(tokens[0]):
        app.module.initialize()
        made = MAKES[name](app.login(PIN), "object")
        app.module.finalize()
    app.module.initialize()
    session = app.login(PIN)
    assert len(session.find({p11.CKA_LABEL: "object"})) == len(made)
    assert app.away() == set()
    settled(app, kept=len(made))


RENAMES: list[Template] = [
    {p11.CKA_LABEL: "first"},
    {p11.CKA_LABEL: "second"},
    {p11.CKA_LABEL: "third"},
]


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("name", MAKES)
def test_object_renamed_twice_meanwhile_is_renamed(
    app: Domain, tokens: Sequence[SoftToken], name: str, anew: bool
) -> None:
    """For the process that did it, or for one that comes later."""
    session = app.login(PIN)
    made = MAKES[name](session, "object")

    def rename(handles: Sequence[int]) -> None:
        for template in RENAMES:
            for handle in handles:
                session.set(handle, template)

    if anew:
        app.module.finalize()
        with missing(tokens[1]):
            app.module.initialize()
            session = app.login(PIN)
            rename(session.find({p11.CKA_LABEL: "object"}))
            app.module.finalize()
        app.module.initialize()
        session = app.login(PIN)
    else:
        with app.without("west"):
            rename(made)
    assert len(session.find({p11.CKA_LABEL: "third"})) == len(made)
    held = settled(app, kept=len(made))
    assert {each.label for each in held[0].seen} == {b"third"}


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", ["ec", "aes", "aes of no id", "certificate", "note"])
def test_object_renamed_and_back_is_as_it_was(app: Domain, name: str, back: bool) -> None:
    """Also when the member returns between."""
    session = app.login(PIN)
    made = MAKES[name](session, "object")
    with app.without("west"):
        for handle in made:
            session.set(handle, {p11.CKA_LABEL: "other"})
        if not back:
            for handle in made:
                session.set(handle, {p11.CKA_LABEL: "object"})
    if back:
        with app.without("east"):
            for handle in made:
                session.set(handle, {p11.CKA_LABEL: "object"})
    held = settled(app, kept=len(made))
    assert {each.label for each in held[0].seen} == {b"object"}


CHANGES: dict[str, Template] = {
    "ec": {p11.CKA_ID: b"another", p11.CKA_DERIVE: NO},
    "aes": {p11.CKA_ID: b"another", p11.CKA_WRAP: YES},
    "aes, open": {p11.CKA_ID: b"another", p11.CKA_SENSITIVE: YES, p11.CKA_EXTRACTABLE: NO},
    "aes of no id": {p11.CKA_ID: b"now it has one"},
    "certificate": {p11.CKA_ID: b"another"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_object_changed_meanwhile_is_changed(app: Domain, name: str) -> None:
    session = app.login(PIN)
    made = MAKES[name](session, "object")
    with app.without("west"):
        for handle in made:
            session.set(handle, CHANGES[name])
            session.set(handle, {p11.CKA_LABEL: "named"})
    held = settled(app, kept=len(made))
    assert {each.shown["CKA_ID"] for each in held[0].seen} == {CHANGES[name][p11.CKA_ID]}


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("escrow", ["token", "none"])
@pytest.mark.parametrize("name", MAKES)
def test_object_destroyed_meanwhile_is_destroyed(
    start: StartFactory, tokens: Sequence[SoftToken], name: str, escrow: str, anew: bool
) -> None:
    app = start(escrow=escrow)
    session = app.login(PIN)
    made = MAKES[name](session, "object")
    if anew:
        app.module.finalize()
        with missing(tokens[1]):
            app.module.initialize()
            session = app.login(PIN)
            for handle in session.find({p11.CKA_LABEL: "object"}):
                session.destroy(handle)
            app.module.finalize()
        app.module.initialize()
        session = app.login(PIN)
    else:
        with app.without("west"):
            for handle in made:
                session.destroy(handle)
    assert session.find({p11.CKA_LABEL: "object"}) == []
    assert app.away() == set()
    assert settled(app, kept=0)[0].seen == []


@pytest.mark.parametrize("escrow", ["token", "none"])
@pytest.mark.parametrize("name", MAKES)
def test_ledger_holds_one_entry_of_each_object_or_none(start: StartFactory, name: str, escrow: str) -> None:
    """Made, and changed, while a member is away; and with all there."""
    app = start(escrow=escrow)
    session = app.login(PIN)
    before = MAKES[name](session, "before")
    with app.without("west"):
        made = MAKES[name](session, "made")
        for handle in (*made, *before):
            session.set(handle, {p11.CKA_LABEL: "changed"})
    for handle in made:
        session.set(handle, {p11.CKA_LABEL: "again"})
    settled(app, kept=2 * len(made) if escrow == "token" else 0)


@pytest.mark.parametrize("name", ["aes", "ec", "note", "certificate"])
def test_object_that_its_member_has_lost_is_made_again(app: Domain, name: str) -> None:
    """An entry says that it was there; where it is no more, a change is not done by saying so."""
    session = app.login(PIN)
    made = MAKES[name](session, "object")
    with bare(app.token("west")) as other:
        for handle in other.find({p11.CKA_LABEL: "object"}):
            other.destroy(handle)
    with app.without("west"):
        for handle in made:
            session.set(handle, {p11.CKA_LABEL: "changed"})
    held = settled(app, kept=len(made))
    assert len(held[0].seen) == len(held[1].seen) == len(made)


@pytest.mark.parametrize("name", ["aes", "aes of no id", "hmac", "des3", "ec", "note", "certificate"])
def test_object_replaced_under_its_name_is_the_new_one(app: Domain, name: str) -> None:
    session = app.login(PIN)
    old = MAKES[name](session, "object")
    with app.without("west"):
        for handle in old:
            session.destroy(handle)
        new = MAKES[name](session, "object")
    assert sorted(session.find({p11.CKA_LABEL: "object"})) == sorted(new)
    proofs = _proofs(session, name, new)
    held = settled(app, kept=len(new))
    assert len(held[0].seen) == len(new)
    for token in app.tokens:
        with contents.opened(token, "object") as (bare_session, handles):
            assert _proofs(bare_session, name, handles) == proofs


def _proofs(session: p11.Session, name: str, handles: Sequence[int]) -> list[bytes]:
    """What tells one key, or content, from another of its name."""
    proofs = []
    for handle in handles:
        match name:
            case "aes" | "aes of no id":
                proofs.append(session.encrypt(p11.CKM_AES_ECB, handle, BLOCK))
            case "des3":
                proofs.append(session.encrypt(p11.CKM_DES3_ECB, handle, BLOCK))
            case "hmac":
                proofs.append(session.sign(p11.CKM_SHA256_HMAC, handle, BLOCK))
            case "ec":
                (kind,) = session.get(handle, p11.CKA_CLASS)
                if kind == p11.value_bytes(p11.CKO_PUBLIC_KEY):
                    proofs += session.get(handle, p11.CKA_EC_POINT)
            case _:
                proofs += session.get(handle, p11.CKA_VALUE)
    return sorted(proofs)


@pytest.mark.parametrize("act", ["none", "destroy one", "rename one"])
@pytest.mark.parametrize("when", ["before", "meanwhile", "one each"])
@pytest.mark.parametrize("name", ["aes", "aes of no id", "hmac", "des3"])
def test_two_keys_of_one_name_are_two(app: Domain, name: str, when: str, act: str) -> None:
    session = app.login(PIN)
    keys = [
        MAKES[name](session, "twin")[0] for _ in range({"before": 2, "meanwhile": 0, "one each": 1}[when])
    ]
    with app.without("west"):
        while len(keys) < 2:
            keys += MAKES[name](session, "twin")
        (gone,), stays = _proofs(session, name, keys[:1]), _proofs(session, name, keys[1:])
        if act == "destroy one":
            session.destroy(keys[0])
        if act == "rename one":
            session.set(keys[0], {p11.CKA_LABEL: "renamed"})
    twins = {"none": [gone, *stays], "destroy one": stays, "rename one": stays}[act]
    assert _proofs(session, name, session.find({p11.CKA_LABEL: "twin"})) == sorted(twins)
    settled(app, kept=1 if act == "destroy one" else 2)
    for token in app.tokens:
        for label, right in (("twin", sorted(twins)), ("renamed", [gone] if act == "rename one" else [])):
            with contents.opened(token, label) as (bare_session, handles):
                assert _proofs(bare_session, name, handles) == right


@pytest.mark.parametrize("act", ["none", "destroy one", "rename one", "destroy both"])
@pytest.mark.parametrize("when", ["before", "meanwhile", "one each"])
@pytest.mark.parametrize("name", ["note", "certificate"])
def test_two_identical_objects_are_two(app: Domain, name: str, when: str, act: str) -> None:
    session = app.login(PIN)
    made = [
        MAKES[name](session, "twin")[0] for _ in range({"before": 2, "meanwhile": 0, "one each": 1}[when])
    ]
    with app.without("west"):
        while len(made) < 2:
            made += MAKES[name](session, "twin")
        if act == "destroy one":
            session.destroy(made[0])
        if act == "rename one":
            session.set(made[0], {p11.CKA_LABEL: "renamed"})
        if act == "destroy both":
            for handle in made:
                session.destroy(handle)
    left = {
        "none": ["twin", "twin"],
        "destroy one": ["twin"],
        "rename one": ["renamed", "twin"],
        "destroy both": [],
    }
    found = [session.get(handle, p11.CKA_LABEL)[0].decode() for handle in session.find({})]
    assert sorted(found) == left[act]
    held = settled(app, kept=len(left[act]))
    assert sorted(each.label.decode() for each in held[0].seen) == left[act]


# ---- provisioned outside

FOREIGN: dict[str, list[Template]] = {
    "note": [NOTE],
    "certificate": [CERTIFICATE],
    "ec": [],
    "aes": [software.secret(p11.CKK_AES, bytes(range(32)), "", b"\xae", p11.CKA_ENCRYPT, p11.CKA_DECRYPT)],
    "two aes": [
        software.secret(
            p11.CKK_AES, bytes(range(start, start + 32)), "", b"", p11.CKA_ENCRYPT, p11.CKA_DECRYPT
        )
        for start in (0, 1)
    ],
    "two notes": [NOTE, NOTE],
    "aes that can do nothing": [software.secret(p11.CKK_AES, bytes(range(32)), "", b"\xae")],
}


@pytest.fixture(scope="module")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def provision(tokens: Sequence[SoftToken], name: str, key: ec.EllipticCurvePrivateKey) -> int:
    templates = FOREIGN[name] or [software.ec_private(key), software.ec_public(key.public_key())]
    for token in tokens:
        with bare(token) as session:
            for template in templates:
                session.create(template | {p11.CKA_LABEL: "foreign"})
    return len(templates)


@pytest.mark.parametrize("act", ["destroy", "rename", "rename twice", "rename and destroy"])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_object_is_changed_and_destroyed_on_the_returned_member(
    app: Domain, ec_key: ec.EllipticCurvePrivateKey, name: str, act: str
) -> None:
    app.module.finalize()
    count = provision(app.tokens, name, ec_key)
    app.module.initialize()
    session = app.login(PIN)
    found = session.find({p11.CKA_LABEL: "foreign"})
    assert len(found) == count
    with app.without("west"):
        for handle in found:
            if "rename" in act:
                session.set(handle, {p11.CKA_LABEL: "renamed"})
            if "twice" in act:
                session.set(handle, {p11.CKA_LABEL: "renamed again"})
            if "destroy" in act:
                session.destroy(handle)
    left = 0 if "destroy" in act else count
    assert len(session.find({})) == left
    held = settled(app, kept=0)
    assert len(held[0].seen) == left


@pytest.mark.parametrize("act", ["destroy one", "rename one"])
@pytest.mark.parametrize("name", ["two aes", "two notes"])
def test_one_of_two_foreign_objects_is_changed_or_destroyed(
    app: Domain, ec_key: ec.EllipticCurvePrivateKey, name: str, act: str
) -> None:
    app.module.finalize()
    provision(app.tokens, name, ec_key)
    app.module.initialize()
    session = app.login(PIN)
    found = session.find({p11.CKA_LABEL: "foreign"})
    kind = name.split()[1].removesuffix("s") if "notes" in name else "aes"
    stays = _proofs(session, kind, found[1:])
    with app.without("west"):
        if act == "destroy one":
            session.destroy(found[0])
        else:
            session.set(found[0], {p11.CKA_LABEL: "renamed"})
    assert _proofs(session, kind, session.find({p11.CKA_LABEL: "foreign"})) == stays
    settled(app, kept=0)
    for token in app.tokens:
        with contents.opened(token, "foreign") as (bare_session, handles):
            assert _proofs(bare_session, kind, handles) == stays


def test_foreign_object_of_one_member_alone_is_none_of_the_others(app: Domain) -> None:
    """What was provisioned on one member was meant so: it is not copied, and can be changed and destroyed."""
    app.module.finalize()
    with bare(app.token("east")) as bare_session:
        for label in ("stays", "is renamed", "is destroyed"):
            bare_session.create(NOTE | {p11.CKA_LABEL: label})
    app.module.initialize()
    session = app.login(PIN)
    with app.without("west"):
        session.set(session.find_one({p11.CKA_LABEL: "is renamed"}), {p11.CKA_LABEL: "renamed"})
        session.destroy(session.find_one({p11.CKA_LABEL: "is destroyed"}))
    app.module.finalize()
    east, west = map(contents.of, app.tokens)
    assert sorted(held.label for held in east.seen) == [b"renamed", b"stays"]
    assert (west.seen, east.ledger, west.ledger) == ([], [], [])


# ---- refusals


def test_object_of_too_few_copies_is_not_made(start: StartFactory) -> None:
    app = start(min_copies=2)
    session = app.login(PIN)
    before = session.create(NOTE | {p11.CKA_LABEL: "before"})
    with app.without("west"):
        for name, make in MAKES.items():
            assert code(lambda: make(session, "object")) == "CKR_DEVICE_ERROR", name  # noqa: B023
        assert code(lambda: session.copy(before, {p11.CKA_LABEL: "object"})) == "CKR_DEVICE_ERROR"
        assert [session.get(handle, p11.CKA_LABEL) for handle in session.find({})] == [(b"before",)]
    assert app.events("replication.refused") != []
    held = settled(app, kept=1)
    assert len(held[0].seen) == 1


@pytest.mark.parametrize("act", ["rename", "destroy"])
def test_object_is_not_changed_with_too_few_members(start: StartFactory, act: str) -> None:
    app = start(min_copies=2)
    session = app.login(PIN)
    note = session.create(NOTE | {p11.CKA_LABEL: "note"})
    with app.without("west"):
        acts = {
            "rename": lambda: session.set(note, {p11.CKA_LABEL: "renamed"}),
            "destroy": lambda: session.destroy(note),
        }
        assert code(acts[act]) == "CKR_DEVICE_ERROR"
    assert session.find({p11.CKA_LABEL: "note"}) == [note]
    assert len(settled(app, kept=1)[0].seen) == 1


@pytest.mark.parametrize("at_return", [False, True])
def test_member_without_the_domain_key_is_left_out(app: Domain, at_return: bool) -> None:
    if not at_return:
        app.module.finalize()
    else:
        app.login(PIN)
        app.lose("west")
    with bare(app.token("west")) as session:
        session.destroy(session.find_one({p11.CKA_ID: contents.DOMAIN_KEY}))
    if not at_return:
        app.module.initialize()
        app.login(PIN)
    _is_refused(app, "west", "it has no domain key: p11ha domain admit west", at_return=at_return)


@pytest.mark.parametrize("at_return", [False, True])
def test_member_with_another_domain_key_is_left_out(
    app: Domain, at_return: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both check values are named, so that people can compare."""
    east = app.token("east")
    other = clone(east, east.directory.with_name("other-east"))
    strange = clone(app.token("west"), east.directory.with_name("other-west"))
    app.module.finalize()
    right = _check_value(east)
    for token in other, strange:
        with bare(token) as session:
            for handle in session.find({p11.CKA_TOKEN: YES}):
                if session.get(handle, p11.CKA_LABEL)[0].startswith(contents.RESERVED):
                    session.destroy(handle)
    domain.initialise(tmp_path_factory.mktemp("init"), [other.member(), strange.member()])
    wrong = _check_value(strange)
    assert right != wrong
    west = app.token("west")

    def replace() -> None:
        west.directory.rename(west.directory.with_suffix(".old"))
        strange.directory.rename(west.directory)
        (west.directory / "softhsm2.conf").write_text(
            (west.directory / "softhsm2.conf").read_text().replace("other-west", "west")
        )

    if at_return:
        app.module.initialize()
        app.login(PIN)
        replace()
        app.lose("west")
    else:
        replace()
        app.module.initialize()
        app.login(PIN)
    line = (
        f"it has another domain key: its check value is {wrong} (generation 1), the group's is "
        f"{right} (generation 1): p11ha domain admit west"
    )
    _is_refused(app, "west", line, at_return=at_return)


def _check_value(token: SoftToken) -> str:
    """Of the domain key, as its label says."""
    with bare(token) as session:
        key = session.find_one({p11.CKA_ID: contents.DOMAIN_KEY})
        return session.get(key, p11.CKA_LABEL)[0].decode().split()[4]


def test_member_that_was_never_admitted_is_left_out(
    start: StartFactory, app: Domain, tokens: Sequence[SoftToken]
) -> None:
    """It has the key, by a copy of another member's store, but what it holds may be long destroyed."""
    app.login(PIN).create(NOTE | {p11.CKA_LABEL: "note"})
    app.module.finalize()
    west = tokens[1]
    north = clone(west, west.directory.with_name("north"))
    member = dict(north.member()) | {"name": "north"}
    with missing(west):
        app = start(tokens[0].member(), member)
        app.login(PIN)
        line = "it was never admitted to the group: p11ha domain admit north"
        _is_refused(app, "north", line, at_return=False)


def _is_refused(app: Domain, name: str, why: str, *, at_return: bool) -> None:
    """It does not serve, and the log says why; the others do."""
    session = app.open()
    event = "recovery.failed" if at_return else "domain.refused"
    working_until(lambda: session.random(8), lambda: app.events(event, name), f"{event} is logged")
    events = app.events(event, name)
    assert events
    assert why in events[0]
    assert app.away() == {name}
    session.destroy(session.create(NOTE | {p11.CKA_LABEL: "goes on"}))
    assert app.away() == {name}


@pytest.mark.parametrize("away", domain.NAMES)
def test_what_a_member_is_owed_is_shown(app: Domain, away: str) -> None:
    session = app.login(PIN)

    def owed() -> dict[str, int | None]:
        (process,) = read_all(str(app.group.state)).processes
        assert process.text
        return {member.name: member.owed for member in process.text.groups[0].members}

    assert owed() == dict.fromkeys(domain.NAMES, 0)
    with app.without(away):
        (first,) = created(NOTE)(session, "first")
        created(NOTE)(session, "second")
        assert owed() == dict.fromkeys(domain.NAMES, 0) | {away: 2}
        session.destroy(first)
        assert owed() == dict.fromkeys(domain.NAMES, 0) | {away: 2}  # it may have come to have it
    session.find({})
    assert owed() == dict.fromkeys(domain.NAMES, 0)
