"""One of two members dies, and the application sees no error: whatever it does, whichever it is, whenever."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_ulong, create_string_buffer
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import p11
from tests.conftest import GroupFactory
from tests.ha import operations
from tests.ha.app import FAR, code
from tests.ha.conftest import Pair, StartFactory
from tests.ha.keys import DATA, DIGEST, private, public, secret, shared
from tests.ha.operations import PSS, PssParams, Use
from tests.ha.program import Program

either = pytest.mark.parametrize("dead", ["east", "west"])


@either
@pytest.mark.parametrize("name", operations.EVERY)
def test_operation_survives_the_death_of_a_member(
    pair: Pair, start: StartFactory, name: str, dead: str
) -> None:
    use = Use.begin(start(*pair.members(), balance="round-robin"), pair.keys, pair.pin)
    operation = operations.EVERY[name]
    operation(use)
    pair.named(dead).kill()
    for _ in range(3):  # so that the dead one's turn comes
        operation(use)
    operations.sign_ecdsa(use)
    operations.sign_ecdsa(use)
    assert use.app.away() == {dead}
    assert len(use.app.events("member.lost")) == 1


@either
@pytest.mark.parametrize("name", ["sign_ecdsa", "sign_rsa", "sign_hmac", "encrypt_aes", "attributes"])
def test_key_found_before_a_loss_is_first_used_after_it(
    pair: Pair, start: StartFactory, name: str, dead: str
) -> None:
    """Which of two keys of one name it was cannot be proven any more, but nobody has used either yet."""
    use = Use.begin(start(*pair.members(), balance="round-robin"), pair.keys, pair.pin)
    pair.named(dead).kill()
    for _ in range(3):
        operations.EVERY[name](use)


@either
def test_login_survives_the_death_of_a_member(pair: Pair, start: StartFactory, dead: str) -> None:
    app = start(*pair.members(), balance="round-robin")
    session = app.open()
    assert session.info().state == p11.CKS_RW_PUBLIC_SESSION
    pair.named(dead).kill()
    session.login(pair.pin)
    for _ in range(3):
        pair.keys.check_ec(session.sign(p11.CKM_ECDSA, session.find_one(private("ec")), DIGEST))
    assert app.away() == {dead}


@either
def test_first_call_of_all_survives_the_death_of_a_member(pair: Pair, start: StartFactory, dead: str) -> None:
    app = start(*pair.members())
    pair.named(dead).kill()
    assert app.is_present()
    assert app.module.token(app.slot).label == "prod"
    session = app.login(pair.pin)
    pair.keys.check_ec(session.sign(p11.CKM_ECDSA, session.find_one(private("ec")), DIGEST))


@either
def test_search_goes_on_after_the_death_of_a_member(pair: Pair, start: StartFactory, dead: str) -> None:
    """Between C_FindObjectsInit and C_FindObjects."""
    app = start(*pair.members())
    session = app.login(pair.pin)
    expected = sorted(session.find({}))
    session.call("C_FindObjectsInit", None, 0)
    pair.named(dead).kill()
    handles, count = (c_ulong * 16)(), c_ulong()
    session.call("C_FindObjects", handles, 16, byref(count))
    assert sorted(handles[: count.value]) == expected
    session.call("C_FindObjectsFinal")


@dataclass(frozen=True)
class SinglePart:
    """An operation of an Init and one more call; `begin` names the key, `end` gives and checks."""

    init: str
    mechanism: Callable[[], p11.Mechanism]
    key: Callable[[Use], tuple[int, ...]]
    end: Callable[[Use], None]


def _same(output: bytes, right: bytes) -> None:
    assert output == right


SINGLE_PART = {
    "sign": SinglePart(
        "C_SignInit",
        lambda: p11.CKM_ECDSA,
        lambda use: (use.ec,),
        lambda use: use.keys.check_ec(use.session.output("C_Sign", DIGEST, len(DIGEST))),
    ),
    "sign with a parameter": SinglePart(
        "C_SignInit",
        lambda: PSS,
        lambda use: (use.rsa,),
        lambda use: use.keys.check_pss(use.session.output("C_Sign", DIGEST, len(DIGEST))),
    ),
    "verify": SinglePart(
        "C_VerifyInit",
        lambda: p11.CKM_ECDSA,
        lambda use: (use.ec_public,),
        lambda use: use.session.call("C_Verify", DIGEST, len(DIGEST), use.keys.sign_ec(), 64),
    ),
    "encrypt": SinglePart(
        "C_EncryptInit",
        lambda: p11.CKM_AES_ECB,
        lambda use: (use.aes,),
        lambda use: _same(
            use.session.output("C_Encrypt", DATA[:32], 32),
            use.keys.aes_ecb(DATA[:32]),
        ),
    ),
    "decrypt": SinglePart(
        "C_DecryptInit",
        lambda: p11.CKM_AES_ECB,
        lambda use: (use.aes,),
        lambda use: _same(
            use.session.output("C_Decrypt", use.keys.aes_ecb(DATA[:32]), 32),
            DATA[:32],
        ),
    ),
    "digest": SinglePart(
        "C_DigestInit",
        lambda: p11.CKM_SHA256,
        lambda _: (),
        lambda use: _same(use.session.output("C_Digest", DATA, len(DATA)), DIGEST),
    ),
}


@pytest.mark.parametrize("name", SINGLE_PART)
def test_operation_begun_on_a_member_that_dies_ends_on_the_other(
    pair: Pair, start: StartFactory, name: str
) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    operation = SINGLE_PART[name]
    use.session.init(operation.init, operation.mechanism(), *operation.key(use))
    serving = use.app.served(use.session)
    pair.named(serving).kill()
    operation.end(use)
    assert use.app.away() == {serving}
    assert use.app.served(use.session) != serving
    use.session.init(operation.init, operation.mechanism(), *operation.key(use))
    operation.end(use)


@pytest.mark.parametrize("query", ["C_Sign", "C_Encrypt", "C_Digest"])
def test_member_dies_between_the_question_for_the_size_and_the_call(
    pair: Pair, start: StartFactory, query: str
) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    init, mechanism, key, data = {
        "C_Sign": ("C_SignInit", p11.CKM_SHA256_HMAC, (use.hmac,), DATA),
        "C_Encrypt": ("C_EncryptInit", p11.CKM_AES_ECB, (use.aes,), DATA[:32]),
        "C_Digest": ("C_DigestInit", p11.CKM_SHA256, (), DATA),
    }[query]
    use.session.init(init, mechanism, *key)
    size = c_ulong()
    use.session.call(query, data, len(data), None, byref(size))
    pair.named(use.app.served(use.session)).kill()
    output = create_string_buffer(size.value)
    use.session.call(query, data, len(data), output, byref(size))
    match query:
        case "C_Sign":
            use.keys.check_hmac(output.raw)
        case "C_Encrypt":
            assert output.raw == use.keys.aes_ecb(DATA[:32])
        case _:
            assert output.raw == DIGEST


def test_operation_is_repeated_with_the_parameter_as_it_was(pair: Pair, start: StartFactory) -> None:
    """The application may reuse its memory as soon as the Init has returned."""
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    parameter = PssParams(p11.CKM_SHA256, p11.CKG_MGF1_SHA256, 32)
    use.session.init("C_SignInit", (p11.CKM_RSA_PKCS_PSS, parameter), use.rsa)
    parameter.salt = parameter.hash = 0
    pair.named(use.app.served(use.session)).kill()
    use.keys.check_pss(use.session.output("C_Sign", DIGEST, len(DIGEST)))


def test_interrupted_operation_of_several_parts_goes_on(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, use.hmac)
    use.session.feed("C_SignUpdate", DATA[:10])
    serving = use.app.served(use.session)
    pair.named(serving).kill()
    use.session.feed("C_SignUpdate", DATA[10:])
    use.keys.check_hmac(use.session.output("C_SignFinal"))
    operations.sign_hmac(use)  # the session is usable at once
    operations.encrypt_aes(use)


@pytest.mark.parametrize("final", ["C_SignFinal", "C_DigestFinal", "C_EncryptFinal"])
def test_interrupted_final_never_gives_out_half_a_result(pair: Pair, start: StartFactory, final: str) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    match final:
        case "C_SignFinal":
            use.session.init("C_SignInit", p11.CKM_SHA256_HMAC, use.hmac)
            use.session.feed("C_SignUpdate", DATA)
        case "C_DigestFinal":
            use.session.init("C_DigestInit", p11.CKM_SHA256)
            use.session.feed("C_DigestUpdate", DATA)
        case _:
            use.session.init("C_EncryptInit", p11.CKM_AES_ECB, use.aes)
            size = c_ulong(64)
            output = create_string_buffer(64)
            use.session.call("C_EncryptUpdate", DATA[:32], 32, output, byref(size))
    pair.named(use.app.served(use.session)).kill()
    given = c_ulong(64)  # not what a query says: p11-kit's client takes room for nothing as too little
    room = create_string_buffer(64)
    use.session.call(final, room, byref(given))
    result = room.raw[: given.value]
    match final:
        case "C_SignFinal":
            use.keys.check_hmac(result)
        case "C_DigestFinal":
            assert result == DIGEST
        case _:
            assert output.raw[: size.value] + result == use.keys.aes_ecb(DATA[:32])
    operations.sign_ecdsa(use)
    operations.digest(use)


@either
def test_other_sessions_of_the_application_go_on(pair: Pair, start: StartFactory, dead: str) -> None:
    use = Use.begin(start(*pair.members(), balance="round-robin"), pair.keys, pair.pin)
    others = [use.app.open(rw=bool(n % 2)) for n in range(8)]
    for session in others:
        use.keys.check_ec(session.sign(p11.CKM_ECDSA, use.ec, DIGEST))
    pair.named(dead).kill()
    for session in others:
        use.keys.check_ec(session.sign(p11.CKM_ECDSA, use.ec, DIGEST))
        session.close()
    assert use.app.away() == {dead}


@either
def test_session_object_that_was_given_as_a_template_outlives_a_member(
    pair: Pair, start: StartFactory, dead: str
) -> None:
    use = Use.begin(start(*pair.members(), balance="round-robin"), pair.keys, pair.pin)
    key = use.session.create(secret(p11.CKK_AES, b"v" * 16, "tmp", b"", p11.CKA_ENCRYPT, token=False))
    sealed = use.session.encrypt(p11.CKM_AES_ECB, key, DATA[:16])
    pair.named(dead).kill()
    for _ in range(3):
        assert use.session.encrypt(p11.CKM_AES_ECB, key, DATA[:16]) == sealed


def test_session_key_that_died_with_its_member_is_said_to_be_gone(pair: Pair, start: StartFactory) -> None:
    """A key that was on that member alone cannot be brought back, and no other may stand in for it."""
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    template: p11.Template = {
        p11.CKA_TOKEN: False,
        p11.CKA_LABEL: "aes",
        p11.CKA_ID: b"\xae",
        p11.CKA_VALUE_LEN: 32,
        p11.CKA_ENCRYPT: True,
    }
    key = use.session.generate_key(p11.CKM_AES_KEY_GEN, template)
    use.session.encrypt(p11.CKM_AES_ECB, key, DATA[:16])
    pair.named(use.app.served(use.session)).kill()
    operations.sign_ecdsa(use)
    operations.sign_ecdsa(use)
    assert code(lambda: use.session.encrypt(p11.CKM_AES_ECB, key, DATA[:16])) == "CKR_KEY_HANDLE_INVALID"
    assert use.session.find(shared("aes")) == [use.aes]
    operations.encrypt_aes(use)


def test_dead_member_is_not_asked_again_before_its_time(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members(), balance="round-robin"), pair.keys, pair.pin)
    pair.east.kill()
    for _ in range(20):
        operations.sign_ecdsa(use)
    assert len(use.app.events("member.lost", "east")) == 1
    assert len(use.app.events("call.failed_over")) == 1
    assert use.app.events("recovery.failed") == []


def test_public_key_reads_the_same_on_either_member(pair: Pair, start: StartFactory) -> None:
    use = Use.begin(start(*pair.members()), pair.keys, pair.pin)
    before = use.session.get(use.ec_public, p11.CKA_EC_POINT, p11.CKA_ID, p11.CKA_LABEL)
    pair.east.kill()
    assert use.session.get(use.ec_public, p11.CKA_EC_POINT, p11.CKA_ID, p11.CKA_LABEL) == before
    assert use.session.find_one(public("ec")) == use.ec_public


def test_idle_application_outlives_the_broken_pipe(pair: Pair, group: GroupFactory, module: Path) -> None:
    """Its next call writes into a socket whose server is gone; SIGPIPE would end a program that knows of none."""
    group(*pair.members(), recovery=FAR)
    program = Program(
        module,
        """
        import signal
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in any program but a Python one
        session = module.open(0)
        session.login("123456")
        key = session.find({p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "ec"})[0]
        sign = lambda: len(session.sign(p11.CKM_ECDSA, key, bytes(32)))
        answers["before"] = [sign() for _ in range(4)]
        print("ready", flush=True)
        sys.stdin.readline()
        answers["after"] = [sign() for _ in range(4)]
        answers["disposition"] = signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
        answers["blocked"] = signal.SIGPIPE in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        """,
    )
    program.wait_for("ready")
    pair.east.kill()
    program.go_on()
    _, answers = program.end()
    assert answers["after"] == answers["before"] == [64] * 4
    assert (answers["disposition"], answers["blocked"]) == (True, False)


@either
def test_program_that_starts_while_a_member_is_dead_works(
    pair: Pair, group: GroupFactory, module: Path, dead: str
) -> None:
    group(*pair.members(), recovery=FAR)
    pair.named(dead).kill()
    program = Program(
        module,
        """
        timed("slot", lambda: module.slot("prod"))
        timed("serial", lambda: module.token(answers["slot"]).serial)
        session = module.open(answers["slot"])
        timed("login", lambda: session.login("123456"))
        key = session.find({p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "ec"})[0]
        timed("sign", lambda: len(session.sign(p11.CKM_ECDSA, key, bytes(32))))
        """,
    )
    _, answers = program.end()
    expected = {"C_Initialize": None, "slot": 0, "serial": "1599447001", "login": None, "sign": 64}
    assert answers == expected | {"C_Finalize": None}
