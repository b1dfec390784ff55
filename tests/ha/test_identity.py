"""One virtual object is one object on each member, and never another one that only bears its name."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

from demo.members import SoftToken
from tests import fake as fakes
from tests import p11
from tests.conftest import ServerFactory, SoftTokenFactory
from tests.fake import PIN
from tests.ha.app import SOON, Application, bare, code, until, working_until
from tests.ha.conftest import FakeFactory, Pair, StartFactory
from tests.ha.keys import (
    DATA,
    DIGEST,
    P256,
    Keys,
    ec_point,
    ec_private,
    ec_public,
    private,
    public,
    secret,
    shared,
    verify_ec,
)

BLOCK = DATA[:16]


def signers(signatures: Iterable[bytes], *keys: ec.EllipticCurvePrivateKey) -> set[int]:
    """Which of the keys made these signatures; raises if one was made by none."""
    found = set()
    for signature in signatures:
        mine = [number for number, key in enumerate(keys) if _is_by(key, signature)]
        assert len(mine) == 1
        found.add(mine[0])
    return found


def _is_by(key: ec.EllipticCurvePrivateKey, signature: bytes) -> bool:
    try:
        verify_ec(key.public_key(), signature)
    except InvalidSignature:
        return False
    return True


class Namesakes:
    """Two tokens that each hold an EC key of the same label and id, but not the same key."""

    def __init__(self, east: SoftToken, west: SoftToken, *, with_public: bool) -> None:
        self.keys = tuple(ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.tokens = east, west
        for token, key in zip(self.tokens, self.keys, strict=True):
            with bare(token) as session:
                session.create(ec_private(key))
                if with_public:
                    session.create(ec_public(key.public_key()))


@pytest.fixture(params=[True, False], ids=["with public keys", "without public keys"])
def namesakes(request: pytest.FixtureRequest, soft_token: SoftTokenFactory) -> Namesakes:
    return Namesakes(soft_token("east"), soft_token("west"), with_public=request.param)


@pytest.mark.parametrize("balance", ["primary-first", "round-robin", "least-busy"])
def test_different_keys_of_one_name_are_two_keys(
    namesakes: Namesakes, start: StartFactory, balance: str
) -> None:
    app = start(*(token.member() for token in namesakes.tokens), balance=balance)
    session = app.login("123456")
    handles = session.find(private("ec"))
    assert len(handles) == len(set(handles)) == 2
    made = [
        signers((session.sign(p11.CKM_ECDSA, handle, DIGEST) for _ in range(6)), *namesakes.keys)
        for handle in handles
    ]
    assert sorted(map(len, made)) == [1, 1]  # each handle is one key,
    assert set.union(*made) == {0, 1}  # and not the same
    assert sorted(session.find(private("ec"))) == sorted(handles)


def test_key_is_never_stood_in_for_by_its_namesake_on_a_living_member(
    namesakes: Namesakes, server: ServerFactory, start: StartFactory
) -> None:
    servers = [server(token) for token in namesakes.tokens]
    app = start(*(each.member() for each in servers), recovery=SOON, balance="round-robin")
    session = app.login("123456")
    east, west = _by_key(session, namesakes)
    servers[0].kill()
    assert code(lambda: session.sign(p11.CKM_ECDSA, east, DIGEST)) == "CKR_DEVICE_ERROR"
    for _ in range(4):
        assert signers([session.sign(p11.CKM_ECDSA, west, DIGEST)], *namesakes.keys) == {1}
    assert code(lambda: session.sign(p11.CKM_ECDSA, east, DIGEST)) == "CKR_DEVICE_ERROR"
    servers[0].start()
    until(lambda: code(lambda: session.sign(p11.CKM_ECDSA, east, DIGEST)) == "CKR_OK", "its key is back")
    for _ in range(4):
        assert signers([session.sign(p11.CKM_ECDSA, east, DIGEST)], *namesakes.keys) == {0}
        assert signers([session.sign(p11.CKM_ECDSA, west, DIGEST)], *namesakes.keys) == {1}


@pytest.mark.parametrize("answer", [p11.CKR_BUFFER_TOO_SMALL, p11.CKR_FUNCTION_FAILED])
def test_proof_that_did_not_end_is_in_the_way_of_none(
    fake: FakeFactory, start: StartFactory, answer: int
) -> None:
    """What it leaves under way in a session of the core's own is never an application's matter."""
    tokens = fake("east", fakes.secret_key()), fake("west", fakes.secret_key())
    app = start(*(token.member() for token in tokens), balance="round-robin")
    app.login(PIN)
    tokens[1]["C_Sign"].answers(answer, times=1)
    key = app.open().find_one({p11.CKA_LABEL: "secret"})
    assert tokens[1]["C_Sign"].is_over()
    served = set()
    for _ in range(4):
        session = app.open()
        assert session.find({p11.CKA_LABEL: "secret"}) == [key]
        session.sign(p11.CKM_SHA256_HMAC, key, DATA)
        served.add(app.served(session))
    assert served == {"east", "west"}
    assert app.events("object.pinned") == []


def _by_key(session: p11.Session, namesakes: Namesakes) -> list[int]:
    """The handles of the first and the second key."""
    handles: dict[int, int] = {}
    for handle in session.find(private("ec")):
        (signer,) = signers([session.sign(p11.CKM_ECDSA, handle, DIGEST)], *namesakes.keys)
        handles[signer] = handle
    return [handles[0], handles[1]]


@pytest.mark.parametrize("away", [0, 1])
def test_namesake_met_after_a_loss_is_not_taken_for_the_key(
    namesakes: Namesakes, server: ServerFactory, start: StartFactory, away: int
) -> None:
    """One member is away when the application finds and uses its key; then the other goes and this one comes."""
    servers = [server(token) for token in namesakes.tokens]
    servers[away].kill()
    app = start(*(each.member() for each in servers), recovery=SOON)
    session = app.login("123456")
    handle = session.find_one(private("ec"))
    here = 1 - away
    assert signers([session.sign(p11.CKM_ECDSA, handle, DIGEST)], *namesakes.keys) == {here}
    servers[away].start()
    until(lambda: session.random(8) and not app.away(), "the other has come")
    for _ in range(4):
        assert signers([session.sign(p11.CKM_ECDSA, handle, DIGEST)], *namesakes.keys) == {here}
    servers[here].kill()
    for _ in range(3):
        assert code(lambda: session.sign(p11.CKM_ECDSA, handle, DIGEST)) == "CKR_DEVICE_ERROR"
    (other,) = [found for found in session.find(private("ec")) if found != handle]
    assert signers([session.sign(p11.CKM_ECDSA, other, DIGEST)], *namesakes.keys) == {away}


def test_key_used_on_one_member_is_not_its_namesake_that_comes_when_it_is_gone(
    namesakes: Namesakes, server: ServerFactory, start: StartFactory
) -> None:
    """The two members are never there together, so nothing can be compared but what the key has shown."""
    servers = [server(token) for token in namesakes.tokens]
    servers[1].kill()
    app = start(*(each.member() for each in servers), recovery=SOON)
    session = app.login("123456")
    handle = session.find_one(private("ec"))
    assert signers([session.sign(p11.CKM_ECDSA, handle, DIGEST)], *namesakes.keys) == {0}
    servers[0].kill()
    assert code(lambda: session.sign(p11.CKM_ECDSA, handle, DIGEST)) == "CKR_DEVICE_ERROR"
    servers[1].start()
    until(lambda: code(lambda: session.random(8)) == "CKR_OK", "west is there")
    for _ in range(3):
        assert code(lambda: session.sign(p11.CKM_ECDSA, handle, DIGEST)) == "CKR_DEVICE_ERROR"


def test_public_keys_of_one_name_are_told_apart_by_what_they_show(
    soft_token: SoftTokenFactory, start: StartFactory
) -> None:
    namesakes = Namesakes(soft_token("east"), soft_token("west"), with_public=True)
    app = start(*(token.member() for token in namesakes.tokens), balance="round-robin")
    session = app.login("123456")
    points = set()
    for handle in session.find(public("ec")):
        shown = {session.get(handle, p11.CKA_EC_POINT)[0][2:] for _ in range(4)}
        assert len(shown) == 1
        points |= shown
    assert points == {ec_point(key.public_key()) for key in namesakes.keys}


def test_same_keys_are_found_once_and_used_on_both(
    tokens: tuple[SoftToken, SoftToken], start: StartFactory, keys: Keys
) -> None:
    app = start(*(token.member() for token in tokens), balance="round-robin")
    session = app.login("123456")
    assert len(session.find({})) == 6
    for template, mechanism in (
        (private("ec"), p11.CKM_ECDSA),
        (private("rsa"), p11.CKM_RSA_PKCS),
        (shared("hmac"), p11.CKM_SHA256_HMAC),
    ):
        handle = session.find_one(template)
        served = set()
        for _ in range(4):
            session.sign(mechanism, handle, DIGEST)
            served.add(app.served(session))
        assert served == {"east", "west"}
    aes = session.find_one(shared("aes"))
    assert {session.encrypt(p11.CKM_AES_ECB, aes, BLOCK) for _ in range(4)} == {keys.aes_ecb(BLOCK)}
    assert app.events("object.pinned") == []


def test_same_private_key_without_its_public_key_is_recognised_by_what_it_signs(
    soft_token: SoftTokenFactory, start: StartFactory
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    both = soft_token("east"), soft_token("west")
    for token in both:
        with bare(token) as session:
            session.create(ec_private(key))
    app = start(*(token.member() for token in both), balance="round-robin")
    session = app.login("123456")
    handle = session.find_one(private("ec"))
    served = set()
    for _ in range(4):
        verify_ec(key.public_key(), session.sign(p11.CKM_ECDSA, handle, DIGEST))
        served.add(app.served(session))
    assert served == {"east", "west"}


@pytest.mark.parametrize(
    ("kind", "usage"), [(p11.CKK_AES, p11.CKA_ENCRYPT), (p11.CKK_GENERIC_SECRET, p11.CKA_SIGN)]
)
def test_different_secret_keys_of_one_name_are_two_keys(
    soft_token: SoftTokenFactory, start: StartFactory, kind: int, usage: int
) -> None:
    both = soft_token("east"), soft_token("west")
    for token, value in zip(both, (b"e" * 32, b"w" * 32), strict=True):
        with bare(token) as session:
            session.create(secret(kind, value, "secret", b"\x01", usage))
    app = start(*(token.member() for token in both), balance="round-robin")
    session = app.login("123456")
    handles = session.find(shared("secret"))
    assert len(handles) == 2
    shown = []
    for handle in handles:
        outputs = {_use(session, handle, kind) for _ in range(4)}
        assert len(outputs) == 1
        shown.append(outputs.pop())
    assert shown[0] != shown[1]


def _use(session: p11.Session, handle: int, kind: int) -> bytes:
    if kind == p11.CKK_AES:
        return session.encrypt(p11.CKM_AES_ECB, handle, BLOCK)
    return session.sign(p11.CKM_SHA256_HMAC, handle, DATA)


def test_several_keys_of_one_name_on_each_member_are_never_mixed_up(
    soft_token: SoftTokenFactory, start: StartFactory
) -> None:
    both = soft_token("east"), soft_token("west")
    values = (b"1" * 32, b"2" * 32)
    for token, order in zip(both, (values, values[::-1]), strict=True):
        with bare(token) as session:
            for value in order:
                session.create(secret(p11.CKK_AES, value, "twin", b"\x01", p11.CKA_ENCRYPT))
    app = start(*(token.member() for token in both), balance="round-robin")
    session = app.login("123456")
    handles = session.find(shared("twin"))
    outputs = [{session.encrypt(p11.CKM_AES_ECB, handle, BLOCK) for _ in range(6)} for handle in handles]
    assert [len(each) for each in outputs] == [1, 1]
    assert outputs[0] != outputs[1]


def test_claim_whose_witness_dies_meanwhile_is_believed_before_its_first_use(
    fake: FakeFactory, start: StartFactory
) -> None:
    """As a search proves only some of what it finds at once; who asks then is not told of a member that died."""
    objects = [fakes.secret_key(f"secret {n}", bytes([n + 1]) * 32) for n in range(36)]
    east = fake("east", *objects)
    west = fake("west", *({**each, p11.CKA_LOCAL: True} for each in objects))  # which is asked first
    app = start(east.member(), west.member(), balance="primary-first")
    session = app.login(PIN)
    handles = session.find({p11.CKA_CLASS: p11.CKO_SECRET_KEY})
    assert len(handles) == 36
    east.dies()
    assert session.get(handles[-1], p11.CKA_LABEL) == (b"secret 35",)
    assert app.away() == {"east"}


# ---- numbers that come again


def test_numbers_of_a_returned_member_mean_something_else_and_are_not_believed(
    fake: FakeFactory, start: StartFactory
) -> None:
    """The fake gives each object the number that another one had before its restart."""
    objects = [fakes.signing_key(f"key {n}", bytes([0xC1 + n]) * 128) for n in range(8)]
    east, west = fake("east", *objects), fake("west", *objects)
    app = start(east.member(), west.member(), recovery=SOON, balance="round-robin")
    session = app.login(PIN)
    handles = [session.find_one({p11.CKA_LABEL: f"key {n}"}) for n in range(8)]
    right = [session.sign(p11.CKM_RSA_PKCS, handle, DIGEST) for handle in handles]
    assert len(set(right)) == 8
    for _ in range(3):
        east.dies()
        until(lambda: session.sign(p11.CKM_RSA_PKCS, handles[0], DIGEST) and app.away(), "it is lost")
        east.is_well_again()
        until(lambda: session.sign(p11.CKM_RSA_PKCS, handles[0], DIGEST) and not app.away(), "it is back")
        for _ in range(2):
            assert [session.sign(p11.CKM_RSA_PKCS, handle, DIGEST) for handle in handles] == right
    assert east.shared.starts == 4


def test_search_after_a_return_gives_the_handles_as_before(fake: FakeFactory, start: StartFactory) -> None:
    objects = [fakes.secret_key(f"secret {n}", bytes([n + 1]) * 32) for n in range(4)]
    east, west = fake("east", *objects), fake("west", *objects)
    app = start(east.member(), west.member(), recovery=SOON, balance="round-robin")
    session = app.login(PIN)
    handles = sorted(session.find({}))
    assert len(handles) == 4
    east.shared.absent = 1
    until(lambda: session.random(8) and app.away(), "it is lost")
    assert sorted(session.find({})) == handles
    east.shared.absent = 0
    until(lambda: session.random(8) and not app.away(), "it is back")
    assert sorted(session.find({})) == handles


# ---- keys on one member only


@pytest.fixture
def lone(pair: Pair, start: StartFactory) -> tuple[Application, p11.Session, dict[str, int]]:
    """Keys that east alone has."""
    with bare(pair.east.token) as session:
        session.create(ec_private(pair.keys.ec, "lone", b"\x11"))
        session.create(secret(p11.CKK_AES, b"l" * 32, "lone", b"\x12", p11.CKA_ENCRYPT))
    pair.east.kill()  # its library has read the store before
    pair.east.start()
    app = start(*pair.members(), recovery=SOON, balance="round-robin")
    session = app.login(pair.pin)
    found = {"ec": session.find_one(private("lone")), "aes": session.find_one(shared("lone"))}
    return app, session, found


def test_key_on_one_member_is_used_there(
    lone: tuple[Application, p11.Session, dict[str, int]], pair: Pair
) -> None:
    app, session, found = lone
    for _ in range(4):
        pair.keys.check_ec(session.sign(p11.CKM_ECDSA, found["ec"], DIGEST))
        assert app.served(session) == "east"


@pytest.mark.parametrize("used_before", [True, False])
def test_key_on_one_member_comes_and_goes_with_it(
    lone: tuple[Application, p11.Session, dict[str, int]], pair: Pair, used_before: bool
) -> None:
    """It has nobody to be compared with: it is recognised by what it showed, or was never used."""
    app, session, found = lone

    def use() -> None:
        pair.keys.check_ec(session.sign(p11.CKM_ECDSA, found["ec"], DIGEST))
        assert len(session.encrypt(p11.CKM_AES_ECB, found["aes"], BLOCK)) == 16

    if used_before:
        use()
    pair.east.kill()
    until(lambda: session.random(8) and app.away(), "the loss is noticed")
    assert code(use) == "CKR_DEVICE_ERROR"
    assert code(use) == "CKR_DEVICE_ERROR"
    session.sign(p11.CKM_ECDSA, session.find_one(private("ec")), DIGEST)
    pair.east.start()
    until(lambda: session.random(8) and not app.away(), "the member is back")
    use()
    use()


@pytest.mark.parametrize("used_before", [True, False])
def test_key_that_was_made_on_one_member_comes_back_with_it(
    pair: Pair, start: StartFactory, used_before: bool
) -> None:
    app = start(*pair.members(), recovery=SOON)
    session = app.login(pair.pin)
    common: dict[int, p11.Value] = {p11.CKA_TOKEN: True, p11.CKA_LABEL: "made", p11.CKA_ID: b"\x31"}
    point, key = session.generate_key_pair(
        p11.CKM_EC_KEY_PAIR_GEN,
        common | {p11.CKA_EC_PARAMS: P256, p11.CKA_VERIFY: True},
        common | {p11.CKA_SIGN: True, p11.CKA_PRIVATE: True},
    )
    if used_before:
        session.verify(p11.CKM_ECDSA, point, DIGEST, session.sign(p11.CKM_ECDSA, key, DIGEST))
    maker = pair.east if app.events("object.pinned", "east") else pair.west
    maker.kill()
    working_until(lambda: session.random(8), app.away, "the loss is noticed")
    assert code(lambda: session.sign(p11.CKM_ECDSA, key, DIGEST)) == "CKR_DEVICE_ERROR"
    maker.start()
    working_until(lambda: session.random(8), lambda: not app.away(), "the member is back")
    session.verify(p11.CKM_ECDSA, point, DIGEST, session.sign(p11.CKM_ECDSA, key, DIGEST))


def test_key_that_can_show_nothing_comes_back_with_its_only_member(pair: Pair, start: StartFactory) -> None:
    """It neither signs nor encrypts; that it is the only one of its name where it was must do."""
    with bare(pair.east.token) as session:
        uses = (p11.CKA_ENCRYPT, p11.CKA_DECRYPT, p11.CKA_SIGN, p11.CKA_VERIFY)
        session.create(secret(p11.CKK_AES, b"w" * 32, "wrapped", b"\x41") | dict.fromkeys(uses, False))
    pair.east.kill()
    pair.east.start()
    app = start(*pair.members(), recovery=SOON)
    session = app.login(pair.pin)
    key = session.find_one(shared("wrapped"))
    rsa = session.find_one(public("rsa"))
    right = pair.keys.rsa.decrypt(session.wrap(p11.CKM_RSA_PKCS, rsa, key), PKCS1v15())
    pair.east.kill()
    working_until(lambda: session.random(8), app.away, "the loss is noticed")
    assert code(lambda: session.wrap(p11.CKM_RSA_PKCS, rsa, key)) == "CKR_DEVICE_ERROR"
    pair.east.start()
    working_until(lambda: session.random(8), lambda: not app.away(), "the member is back")
    assert pair.keys.rsa.decrypt(session.wrap(p11.CKM_RSA_PKCS, rsa, key), PKCS1v15()) == right == b"w" * 32


def test_call_that_needs_two_keys_from_two_members_is_refused(pair: Pair, start: StartFactory) -> None:
    for server, label in ((pair.east, "of east"), (pair.west, "of west")):
        with bare(server.token) as session:
            session.create(secret(p11.CKK_AES, b"o" * 32, label, label.encode(), p11.CKA_ENCRYPT))
        server.kill()
        server.start()
    app = start(*pair.members())
    session = app.login(pair.pin)
    rsa = session.find_one(public("rsa"))
    east, west = session.find_one(shared("of east")), session.find_one(shared("of west"))
    for key in (east, west):
        assert session.wrap(p11.CKM_RSA_PKCS, rsa, key)  # each goes with what both have
    answer = code(lambda: session.wrap(p11.CKM_AES_KEY_WRAP, east, west))
    assert answer in ("CKR_KEY_HANDLE_INVALID", "CKR_WRAPPING_KEY_HANDLE_INVALID", "CKR_MECHANISM_INVALID")
    assert app.away() == set()
