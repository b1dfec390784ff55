"""What programs do with objects that one member alone has: it must not depend on where their session happens to be."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from demo.members import softhsm
from tests import p11
from tests.clients.conftest import DATA, DIGEST, Keys, KillableFactory, SoftFactory
from tests.clients.programs import Token
from tests.conftest import GroupFactory

VALUE = bytes(range(32))
AES: p11.Template = {p11.CKA_VALUE_LEN: 32, p11.CKA_EXTRACTABLE: True}
P256 = bytes.fromhex("06082a8648ce3d030107")
ROUNDS = 6


@pytest.fixture
def session(soft: SoftFactory, group: GroupFactory, module: Path, directory: Path) -> Iterator[p11.Session]:
    """Of a group that goes round its members; west alone has the AES key `alone`."""
    east, west = soft("east"), soft("west")
    token = Token(softhsm(), west.label, west.pin, directory, west.env)
    token.write("value", VALUE)
    token.run(
        *("pkcs11-tool", "--module", token.module, "--token-label", token.label, "--login"),
        *("--pin", token.pin, "--write-object", "value", "--type", "secrkey", "--key-type", "AES:32"),
        *("--label", "alone", "--extractable"),
    )
    group(east.member(), west.member(), balance="round-robin")
    with p11.Module(module) as loaded:
        opened = loaded.open(loaded.slot("prod"), rw=True)
        opened.login(west.pin)
        yield opened


def alone(session: p11.Session) -> int:
    return session.find_one({p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_LABEL: "alone"})


@pytest.mark.parametrize("owning", [False, True])
def test_a_digest_goes_where_its_key_is(session: p11.Session, owning: bool) -> None:
    """Also if the session it leaves behind has objects, which stay."""
    key = alone(session)
    if owning:
        own = session.create({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_LABEL: "own", p11.CKA_VALUE: VALUE})
    for _ in range(ROUNDS):
        session.init("C_DigestInit", p11.CKM_SHA256)
        session.call("C_DigestKey", key)
        session.feed("C_DigestUpdate", DATA)
        assert session.output("C_DigestFinal") == sha256(VALUE + DATA).digest()
        if owning:
            assert session.get(own, p11.CKA_VALUE) == (VALUE,)


def test_a_digest_that_has_begun_elsewhere_goes_where_the_key_is(session: p11.Session) -> None:
    """With what it has taken."""
    key = alone(session)
    seen = set()
    for extra in range(2 * ROUNDS):
        session.init("C_DigestInit", p11.CKM_SHA256)
        session.feed("C_DigestUpdate", DATA)
        member, _ = session.module.session_member(session)
        seen.add(member)
        session.call("C_DigestKey", key)
        assert session.output("C_DigestFinal") == sha256(DATA + VALUE).digest()
        for _ in range(1 + extra):  # turns, so that the next round begins on another member at times
            assert session.digest(p11.CKM_SHA256, DATA) == DIGEST
    assert seen == {"east", "west"}


def test_an_operation_does_not_hold_calls_on_other_objects(session: p11.Session) -> None:
    key = alone(session)
    for _ in range(ROUNDS):
        session.init("C_DigestInit", p11.CKM_SHA256)
        session.feed("C_DigestUpdate", DATA)
        assert session.get(key, p11.CKA_LABEL) == (b"alone",)
        assert session.output("C_DigestFinal") == DIGEST


def test_keys_of_one_session_wrap_each_other(session: p11.Session) -> None:
    for _ in range(ROUNDS):
        one, two = (session.generate_key(p11.CKM_AES_KEY_GEN, AES) for _ in range(2))
        blob = session.wrap(p11.CKM_AES_KEY_WRAP, one, two)
        kind: p11.Template = {
            p11.CKA_CLASS: p11.CKO_SECRET_KEY,
            p11.CKA_KEY_TYPE: p11.CKK_AES,
            p11.CKA_EXTRACTABLE: True,
            p11.CKA_SENSITIVE: False,
        }
        again = session.unwrap(p11.CKM_AES_KEY_WRAP, one, blob, kind)
        block = bytes(16)
        sealed = [session.encrypt(p11.CKM_AES_ECB, key, block) for key in (two, again)]
        assert sealed[0] == sealed[1]


def test_generated_token_keys_wrap_each_other(session: p11.Session) -> None:
    module, slot = session.module, session.info().slot
    token = {**AES, p11.CKA_TOKEN: True}
    for _ in range(ROUNDS):
        keys = [module.open(slot, rw=True).generate_key(p11.CKM_AES_KEY_GEN, token) for _ in range(2)]
        assert len(session.wrap(p11.CKM_AES_KEY_WRAP, *keys)) == 40


@pytest.mark.parametrize("token", [False, True])
def test_a_public_key_made_for_the_session_outlives_any_member(
    killable: KillableFactory, keys: Keys, module: Path, monkeypatch: pytest.MonkeyPatch, token: bool
) -> None:
    """Java makes one for each certificate that it verifies with, and keeps its handle."""
    made = killable(interval_s=0.2)
    for name, value in made.token.env.items():
        monkeypatch.setenv(name, value)
    numbers = keys.ec.private.public_key().public_numbers()
    assert isinstance(numbers, ec.EllipticCurvePublicNumbers)
    point = b"\x04\x41\x04" + numbers.x.to_bytes(32) + numbers.y.to_bytes(32)
    with p11.Module(module) as loaded:
        session = loaded.open(loaded.slot("prod"), rw=True)
        session.login(made.token.pin)
        private = session.find_one({p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "eckey"})
        public = session.create(
            {
                p11.CKA_CLASS: p11.CKO_PUBLIC_KEY,
                p11.CKA_KEY_TYPE: p11.CKK_EC,
                p11.CKA_TOKEN: token,
                p11.CKA_VERIFY: True,
                p11.CKA_EC_PARAMS: P256,
                p11.CKA_EC_POINT: point,
            }
        )

        def work() -> None:
            for _ in range(ROUNDS):
                signature = session.sign(p11.CKM_ECDSA, private, DIGEST)
                session.verify(p11.CKM_ECDSA, public, DIGEST, signature)

        for name in ("east", "west", "east"):
            times = made.events("member.recovered", name)
            work()
            made[name].kill()
            work()
            made[name].start()
            while made.events("member.recovered", name) == times:
                work()
