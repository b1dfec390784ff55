"""The members that other tests stand on are real, and die, hang and come back as they say."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from demo.members import MemberError, Server, SoftToken, Table, p11_kit_client, softhsm, write_config
from tests import p11
from tests.conftest import P11_KIT_DOES_NOT_END, GroupFactory, ServerFactory, SoftTokenFactory

KEY: p11.Template = {p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "signing"}
DIGEST = bytes(range(32))


def import_new_key(token: SoftToken) -> ec.EllipticCurvePublicKey:
    key = ec.generate_private_key(ec.SECP256R1())
    token.import_key(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), label="signing", id_hex="a1"
    )
    return key.public_key()


def verify(public: ec.EllipticCurvePublicKey, signature: bytes) -> None:
    r, s = (int.from_bytes(half) for half in (signature[:32], signature[32:]))
    public.verify(encode_dss_signature(r, s), DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


def logged_in(module: p11.Module, token: SoftToken) -> p11.Session:
    session = module.open(module.slot(token.label))
    session.login(token.pin)
    return session


@pytest.fixture
def token(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


def test_imported_key_signs_on_the_bare_token(token: SoftToken, monkeypatch: pytest.MonkeyPatch) -> None:
    public = import_new_key(token)
    monkeypatch.setenv("SOFTHSM2_CONF", str(token.conf))
    with p11.Module(softhsm()) as module:
        assert module.token(module.slot("east")).serial == token.serial
        session = logged_in(module, token)
        signature = session.sign(p11.CKM_ECDSA, session.find_one(KEY), DIGEST)
        verify(public, signature)
        session.verify(
            p11.CKM_ECDSA, session.find_one({p11.CKA_CLASS: p11.CKO_PUBLIC_KEY}), DIGEST, signature
        )


def test_killed_server_is_dead_for_a_client_that_was_connected_and_back_after_a_restart(
    token: SoftToken, server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = import_new_key(token)
    east = server(token)
    for name, value in east.env.items():
        monkeypatch.setenv(name, value)
    module = p11.Module(p11_kit_client())
    with module:
        session = logged_in(module, token)
        key = session.find_one(KEY)
        verify(public, session.sign(p11.CKM_ECDSA, key, DIGEST))

        east.kill()
        assert not east.answers()
        with pytest.raises(p11.CkError) as caught:
            session.sign(p11.CKM_ECDSA, key, DIGEST)
        assert (caught.value.call, caught.value.name) == ("C_SignInit", "CKR_DEVICE_ERROR")

        east.start()
        assert module.rv("C_GetTokenInfo", 0x11, None) != p11.CKR_OK  # it does not connect again by itself

    with module:
        session = logged_in(module, token)
        verify(public, session.sign(p11.CKM_ECDSA, session.find_one(KEY), DIGEST))


def test_stopped_server_holds_a_call_until_it_continues(
    token: SoftToken, server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    east = server(token)
    for name, value in east.env.items():
        monkeypatch.setenv(name, value)
    with p11.Module(p11_kit_client()) as module:
        session = module.open(module.slot("east"))
        random: list[bytes] = []
        call = threading.Thread(target=lambda: random.append(session.random(8)))
        east.stop()
        call.start()
        call.join(timeout=0.3)
        assert call.is_alive()
        assert random == []
        east.cont()
        call.join(timeout=10)
        assert len(random) == 1


def test_stopped_server_can_be_killed(token: SoftToken, server: ServerFactory) -> None:
    east = server(token)
    east.stop()
    east.kill()
    assert not east.answers()


@pytest.mark.not_sanitized(P11_KIT_DOES_NOT_END)
def test_server_that_cannot_start_says_why(token: SoftToken, directory: Path) -> None:
    with pytest.raises(MemberError, match=r"east ended: .*no-such"):
        Server(token, directory / "no-such" / "p11.sock").start()


def test_socket_path_must_fit(token: SoftToken, directory: Path) -> None:
    with pytest.raises(MemberError, match="too long for a socket"):
        Server(token, directory / ("x" * 108))


def test_member_error_names_the_tool_and_its_words(token: SoftToken) -> None:
    with pytest.raises(MemberError, match="--import"):
        token.import_key(b"no key", "signing", "a1")


def test_written_configuration_reads_back(directory: Path) -> None:
    member: Table = {"name": 'odd "name"', "env": {"A": "unix:path=/x"}, "call_timeout_s": 0.5}
    group: Table = {"label": "prod", "members": ["a", "b"], "standby": [], "balance": "round-robin"}
    path = write_config(
        directory / "c.toml", [member, {"name": "b"}], [group], {"attempts": -1}, {"only": True}
    )
    assert tomllib.loads(path.read_text()) == {
        "ha": {"only": True},
        "recovery": {"attempts": -1},
        "member": [member, {"name": "b"}],
        "group": [group],
    }


def test_group_is_configured_for_children(
    token: SoftToken, soft_token: SoftTokenFactory, group: GroupFactory
) -> None:
    made = group(token.member(), soft_token("west").member(), standby=["west"], recovery={"interval_s": 2})
    read = tomllib.loads(made.conf.read_text())
    assert read["member"][0]["env"] == token.env
    assert (read["group"][0]["members"], read["group"][0]["standby"]) == (["east"], ["west"])
    assert read["recovery"] == {"interval_s": 2}
    assert made.env["PKCS11_HA_CONF"] == str(made.conf)
