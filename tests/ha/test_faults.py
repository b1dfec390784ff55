"""What a member's return value leads to, class by class: scripted on a fake token, seen by what reached which."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_ulong, create_string_buffer
from dataclasses import dataclass

import pytest

from demo.members import SoftToken, Toml
from tests import fake as fakes
from tests import p11
from tests.fake import PIN, FakeToken
from tests.ha.app import SOON, Application, code, environment, until
from tests.ha.conftest import FakeFactory, StartFactory
from tests.ha.keys import DATA, DIGEST, shared
from tests.ha.operations import gcm

SUSPECT = "CKR_DEVICE_ERROR CKR_GENERAL_ERROR CKR_FUNCTION_FAILED 0x80001234".split()
DEAD = "CKR_DEVICE_REMOVED CKR_TOKEN_NOT_PRESENT CKR_TOKEN_NOT_RECOGNIZED CKR_SLOT_ID_INVALID".split()
BUSY = "CKR_DEVICE_MEMORY CKR_HOST_MEMORY CKR_SESSION_COUNT CKR_TOKEN_RESOURCE_EXCEEDED".split()
CAPABILITY = (
    "CKR_MECHANISM_INVALID CKR_FUNCTION_NOT_SUPPORTED CKR_KEY_SIZE_RANGE CKR_CURVE_NOT_SUPPORTED".split()
)
APPLICATION = (
    "CKR_DATA_INVALID CKR_DATA_LEN_RANGE CKR_KEY_FUNCTION_NOT_PERMITTED CKR_KEY_TYPE_INCONSISTENT "
    "CKR_FUNCTION_CANCELED CKR_FUNCTION_REJECTED CKR_ARGUMENTS_BAD CKR_MECHANISM_PARAM_INVALID "
    "CKR_PIN_EXPIRED CKR_KEY_EXHAUSTED CKR_SIGNATURE_INVALID"
).split()
HANDLE = "CKR_KEY_HANDLE_INVALID CKR_OBJECT_HANDLE_INVALID".split()
SESSION = "CKR_SESSION_HANDLE_INVALID CKR_SESSION_CLOSED".split()


def rv_of(name: str) -> int:
    return int(name, 16) if name.startswith("0x") else int(getattr(p11, name))


@dataclass
class Two:
    """East is asked first, west when east is of no use."""

    app: Application
    east: FakeToken
    west: FakeToken
    session: p11.Session
    key: int

    def sign(self) -> bytes:
        return self.session.sign(p11.CKM_RSA_PKCS, self.key, DIGEST)

    def calls(self, function: str) -> tuple[int, int]:
        return self.east.calls(function), self.west.calls(function)


class TwoFactory:
    def __init__(self, fake: FakeFactory, start: StartFactory) -> None:
        self.fake, self.start = fake, start

    def __call__(self, *objects: p11.Template, **options: Toml) -> Two:
        held = (fakes.signing_key(), *objects)
        east, west = self.fake("east", *held), self.fake("west", *held)
        options.setdefault("balance", "primary-first")
        app = self.start(east.member(), west.member(), recovery=None, ha=None, **options)
        session = app.login(PIN)
        key = session.find_one({p11.CKA_LABEL: "signing"})
        two = Two(app, east, west, session, key)
        two.sign()
        return two


@pytest.fixture
def make_two(fake: FakeFactory, start: StartFactory) -> TwoFactory:
    return TwoFactory(fake, start)


@pytest.fixture
def two(make_two: TwoFactory) -> Two:
    return make_two()


# ---- suspect: another member says who is right

at_init_or_operation = pytest.mark.parametrize("function", ["C_SignInit", "C_Sign"])


@at_init_or_operation
@pytest.mark.parametrize("name", SUSPECT)
def test_suspect_is_lost_when_another_member_can(two: Two, name: str, function: str) -> None:
    right = two.sign()
    two.east[function].answers(rv_of(name))
    assert two.sign() == right
    assert two.app.away() == {"east"}
    (lost,) = two.app.events("member.lost")
    assert f"code={name}" in lost or name.startswith("0x")
    assert f"call={function}" in lost
    assert two.app.served(two.session) == "west"


@at_init_or_operation
@pytest.mark.parametrize("name", SUSPECT)
def test_suspicion_that_all_members_share_is_the_application_s_answer(
    two: Two, name: str, function: str
) -> None:
    for token in (two.east, two.west):
        token[function].answers(rv_of(name))
    assert code(two.sign) == name
    assert two.app.away() == set()
    for token in (two.east, two.west):
        token[function].works()
    two.sign()
    assert two.app.events("member.lost") == []


def test_suspect_is_not_lost_for_what_another_member_refuses(two: Two) -> None:
    """A forged signature must not cost a member that is clumsy about saying so: who sends it could take it out."""
    tag = two.sign()
    forged = bytes([tag[0] ^ 1]) + tag[1:]
    two.east["C_Verify"].answers(p11.CKR_GENERAL_ERROR)

    def verify() -> None:
        two.session.verify(p11.CKM_RSA_PKCS, two.key, DIGEST, forged)

    for _ in range(3):
        assert code(verify) == "CKR_SIGNATURE_INVALID"
    assert two.app.away() == set()


def test_suspect_that_cannot_be_reached_is_lost_also_when_the_other_s_answer_is_no_success(two: Two) -> None:
    """A dead member would else be asked first for ever by an application that is sent forgeries only."""
    two.east.dies()

    def verify() -> None:
        two.session.verify(p11.CKM_RSA_PKCS, two.key, DIGEST, bytes(32))

    assert code(verify) == "CKR_SIGNATURE_INVALID"
    assert two.app.away() == {"east"}


def test_all_members_dead_are_all_lost(two: Two) -> None:
    two.east.dies()
    two.west.dies()
    assert code(two.sign) == "CKR_DEVICE_ERROR"
    assert two.app.away() == {"east", "west"}


def test_one_call_reaches_each_suspect_once(two: Two) -> None:
    for token in (two.east, two.west):
        token["C_Sign"].answers(p11.CKR_GENERAL_ERROR)
    before = two.calls("C_Sign")
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    output, size = create_string_buffer(64), c_ulong(64)
    assert (
        two.app.module.rv("C_Sign", two.session.handle, DIGEST, 32, output, byref(size))
        == p11.CKR_GENERAL_ERROR
    )
    assert two.calls("C_Sign") == (before[0] + 1, before[1] + 1)


# ---- dead: lost on its own word


@at_init_or_operation
@pytest.mark.parametrize("name", DEAD)
def test_member_that_says_it_is_gone_is_lost(two: Two, name: str, function: str) -> None:
    right = two.sign()
    two.east[function].answers(rv_of(name))
    assert two.sign() == right
    assert two.app.away() == {"east"}


def test_token_pulled_out_of_its_slot_is_lost_and_comes_back(fake: FakeFactory, start: StartFactory) -> None:
    east, west = (fake(name, fakes.signing_key()) for name in ("east", "west"))
    app = start(east.member(), west.member(), balance="primary-first", recovery=SOON)
    session = app.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "signing"})
    right = session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    east.shared.absent = 1
    assert session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right
    assert app.away() == {"east"}
    east.shared.absent = 0
    until(lambda: session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right and not app.away(), "it is back")
    assert session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right
    assert app.served(session) == "east"


# ---- busy and incapable: another member, nobody at fault


@at_init_or_operation
@pytest.mark.parametrize("name", BUSY + CAPABILITY)
def test_busy_or_incapable_member_is_passed_over_and_stays(two: Two, name: str, function: str) -> None:
    right = two.sign()
    two.east[function].answers(rv_of(name))
    assert two.sign() == right
    assert two.app.served(two.session) == "west"
    two.east[function].works()
    assert two.sign() == right
    assert two.app.served(two.session) == "east"
    assert two.app.events("member.lost") == []


@pytest.mark.parametrize("name", BUSY + CAPABILITY)
def test_group_that_is_busy_or_incapable_as_a_whole_says_so(two: Two, name: str) -> None:
    for token in (two.east, two.west):
        token["C_SignInit"].answers(rv_of(name))
    assert code(two.sign) == name
    assert two.app.away() == set()


def test_suspect_is_lost_for_its_own_answer(fake: FakeFactory, start: StartFactory) -> None:
    """Not for that of a member which cannot, and was asked before."""
    east, west, north = (fake(name, fakes.signing_key()) for name in ("east", "west", "north"))
    app = start(east.member(), west.member(), north.member(), balance="primary-first")
    session = app.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "signing"})
    session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    east["C_SignInit"].answers(p11.CKR_MECHANISM_INVALID)
    west["C_SignInit"].answers(p11.CKR_GENERAL_ERROR)
    session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    (lost,) = app.events("member.lost")
    assert "member=west" in lost
    assert "code=CKR_GENERAL_ERROR" in lost


def test_member_without_a_free_session_is_passed_over(two: Two) -> None:
    two.east.shared.most_sessions = two.east.shared.sessions
    session = two.app.open()
    assert session.sign(p11.CKM_RSA_PKCS, two.key, DIGEST) == two.sign()
    assert two.app.away() == set()


def test_function_that_no_member_has_is_not_supported(two: Two) -> None:
    """The fake has no C_GetObjectSize at all: its list holds NULL."""
    size = c_ulong()
    assert code(lambda: two.session.call("C_GetObjectSize", two.key, byref(size))) == (
        "CKR_FUNCTION_NOT_SUPPORTED"
    )
    assert two.app.away() == set()


# ---- session, login, handle, operation, library: repaired, and the application does not notice


@at_init_or_operation
@pytest.mark.parametrize("name", SESSION)
def test_session_that_a_member_lost_is_replaced(two: Two, name: str, function: str) -> None:
    right = two.sign()
    two.east[function].answers(rv_of(name), times=1)
    opened = two.east.calls("C_OpenSession")
    assert two.sign() == right
    assert two.app.served(two.session) == "east"
    assert two.east.calls("C_OpenSession") == opened + 1
    assert two.app.events("member.lost") == []


def test_member_that_forgot_all_sessions_and_the_login_is_repaired(two: Two) -> None:
    right = two.sign()
    others = [two.app.open(rw=bool(n % 2)) for n in range(4)]
    for session in others:
        assert session.sign(p11.CKM_RSA_PKCS, two.key, DIGEST) == right
    for session in [two.app.open(rw=rw) for rw in (True, False) for _ in range(3)]:
        session.sign(p11.CKM_RSA_PKCS, two.key, DIGEST)
        session.close()  # so that there are idle ones of it, which are gone as well
    two.east.shared.forget_sessions += 1
    for session in (two.session, *others):
        assert session.sign(p11.CKM_RSA_PKCS, two.key, DIGEST) == right
        assert two.app.served(session) == "east"
    assert two.app.events("member.lost") == []
    assert two.east.shared.pin_failures == 0


def test_members_that_all_forgot_their_sessions_are_all_repaired(make_two: TwoFactory) -> None:
    """At once, as when the network between has closed what was idle: what cures one says nothing about the other."""
    two = make_two(balance="round-robin")
    right = two.sign()
    for member in (two.east, two.west):
        member.shared.forget_sessions += 1
    assert [two.sign() for _ in range(4)] == [right] * 4
    assert two.app.events("member.lost") == []


def test_member_that_knows_no_session_any_more_is_lost(two: Two) -> None:
    right = two.sign()
    two.east["C_SignInit"].answers(p11.CKR_SESSION_HANDLE_INVALID)
    assert two.sign() == right
    assert two.app.away() == {"east"}


@at_init_or_operation
def test_login_that_a_member_lost_is_made_again_once(two: Two, function: str) -> None:
    right = two.sign()
    tries = two.east.shared.pin_tries
    two.east.shared.forget_login += 1
    two.east[function].answers(p11.CKR_USER_NOT_LOGGED_IN, times=1)
    assert two.sign() == right
    assert two.app.served(two.session) == "east"
    assert two.east.shared.pin_tries == tries + 1
    assert two.app.away() == set()


def test_member_whose_pin_was_changed_meanwhile_is_left_out_after_one_try(two: Two) -> None:
    right = two.sign()
    two.east.shared.pin = b"another"
    two.east.shared.forget_login += 1
    two.east["C_SignInit"].answers(p11.CKR_USER_NOT_LOGGED_IN)
    for _ in range(3):
        assert two.sign() == right
    assert two.east.shared.pin_failures == 1
    assert two.app.away() == {"east"}


def test_member_that_wants_a_login_although_it_has_one_gets_no_second_pin(two: Two) -> None:
    """Such as a key that wants the PIN for each use: the answer is the application's."""
    tries = two.east.shared.pin_tries
    two.east["C_Sign"].answers(p11.CKR_USER_NOT_LOGGED_IN)
    two.west["C_Sign"].answers(p11.CKR_USER_NOT_LOGGED_IN)
    assert code(two.sign) == "CKR_USER_NOT_LOGGED_IN"
    assert two.east.shared.pin_tries <= tries + 1
    assert two.app.away() == set()


def test_application_that_is_not_logged_in_is_told_so(fake: FakeFactory, start: StartFactory) -> None:
    east, west = fake("east"), fake("west")
    app = start(east.member(), west.member(), balance="primary-first")
    session = app.open()
    east["C_SignInit"].answers(p11.CKR_USER_NOT_LOGGED_IN)
    data = session.create({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: False, p11.CKA_PRIVATE: False})
    assert code(lambda: session.sign(p11.CKM_RSA_PKCS, data, DIGEST)) == "CKR_USER_NOT_LOGGED_IN"
    assert (east.calls("C_Login"), west.calls("C_Login")) == (0, 0)


@pytest.mark.parametrize("name", HANDLE)
def test_key_handle_that_a_member_lost_is_found_again(two: Two, name: str) -> None:
    right = two.sign()
    two.east["C_SignInit"].answers(rv_of(name), times=1)
    searches = two.east.calls("C_FindObjectsInit")
    assert two.sign() == right
    assert two.app.served(two.session) == "east"
    assert two.east.calls("C_FindObjectsInit") > searches
    assert two.app.away() == set()


@pytest.mark.parametrize("name", HANDLE)
def test_key_that_a_member_does_not_know_is_used_on_another(two: Two, name: str) -> None:
    right = two.sign()
    two.east["C_SignInit"].answers(rv_of(name))
    for _ in range(3):
        assert two.sign() == right
        assert two.app.served(two.session) == "west"
    assert two.app.away() == set()


def test_key_that_is_gone_from_a_member_is_used_on_another(make_two: TwoFactory) -> None:
    two = make_two(fakes.secret_key())
    right = two.sign()
    two.east.shared.object[0].used = 0
    for _ in range(3):
        assert two.sign() == right
        assert two.app.served(two.session) == "west"
    assert two.app.away() == set()


def test_key_that_is_gone_from_every_member_is_no_key(make_two: TwoFactory) -> None:
    two = make_two(fakes.secret_key())
    for token in (two.east, two.west):
        token.shared.object[0].used = 0
    assert code(two.sign) == "CKR_KEY_HANDLE_INVALID"
    assert two.app.away() == set()


@pytest.mark.parametrize("name", ["CKR_MECHANISM_INVALID", "CKR_GENERAL_ERROR", "CKR_DEVICE_REMOVED"])
def test_key_that_a_member_had_not_for_a_while_is_found_there_when_nobody_else_can(
    make_two: TwoFactory, name: str
) -> None:
    two = make_two(fakes.secret_key())
    right = two.sign()
    two.east.shared.object[0].used = 0
    assert two.sign() == right
    two.east.shared.object[0].used = 1
    two.west["C_SignInit"].answers(rv_of(name))
    for _ in range(2):
        assert two.sign() == right
        assert two.app.served(two.session) == "east"


def test_key_that_only_an_incapable_member_has_is_looked_for_once_a_call(make_two: TwoFactory) -> None:
    two = make_two(fakes.secret_key())
    two.east.shared.object[0].used = 0
    two.sign()
    two.west["C_SignInit"].answers(p11.CKR_MECHANISM_INVALID)
    searches = two.east.calls("C_FindObjectsInit")
    assert code(two.sign) == "CKR_MECHANISM_INVALID"
    assert two.east.calls("C_FindObjectsInit") == searches + 2  # for the key, and for anything at all
    assert two.app.away() == set()


def test_member_that_shows_none_of_its_objects_is_taken_in_anew(
    fake: FakeFactory, start: StartFactory
) -> None:
    """A token whose store is away finds nothing, with CKR_OK, and may do so after that is back (SoftHSM)."""
    east, west = (fake(name, fakes.signing_key(), fakes.secret_key()) for name in ("east", "west"))
    app = start(east.member(), west.member(), balance="primary-first", recovery=SOON)
    session = app.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "signing"})
    right = session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    starts = east.shared.starts
    east["C_Initialize"].answers(p11.CKR_GENERAL_ERROR)
    for place in east.shared.object[:2]:
        place.used = 0
    assert session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right
    assert app.away() == {"east"}
    (lost,) = app.events("member.lost")
    assert "code=CKR_TOKEN_NOT_RECOGNIZED" in lost
    for place in east.shared.object[:2]:
        place.used = 1
    east["C_Initialize"].works()
    until(lambda: session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right and not app.away(), "it is back")
    assert session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right
    assert app.served(session) == "east"
    assert east.shared.starts == starts + 1


def test_member_that_has_no_object_any_more_is_taken_in_anew_once(two: Two) -> None:
    right = two.sign()
    starts = two.east.shared.starts
    two.east.shared.object[0].used = 0
    for _ in range(3):
        assert two.sign() == right
        assert two.app.served(two.session) == "west"
    assert two.app.away() == set()
    assert two.east.shared.starts == starts + 1


def test_left_over_operation_in_a_member_s_session_is_got_rid_of(two: Two) -> None:
    right = two.sign()
    two.east["C_SignInit"].answers(p11.CKR_OPERATION_ACTIVE, times=1)
    assert two.sign() == right
    assert two.app.served(two.session) == "east"
    assert two.app.away() == set()


def test_operation_that_a_member_forgot_is_begun_again(two: Two) -> None:
    right = two.sign()
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    two.east["C_Sign"].answers(p11.CKR_OPERATION_NOT_INITIALIZED, times=1)
    begun = sum(two.calls("C_SignInit"))
    assert two.session.output("C_Sign", DIGEST, 32) == right
    assert sum(two.calls("C_SignInit")) == begun + 1
    assert two.app.away() == set()


def test_application_s_own_second_operation_reaches_no_member(two: Two) -> None:
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    before = two.calls("C_SignInit")
    again = lambda: two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)  # noqa: E731
    assert code(again) == "CKR_OPERATION_ACTIVE"
    assert two.calls("C_SignInit") == before
    two.session.output("C_Sign", DIGEST, 32)
    assert code(lambda: two.session.output("C_Sign", DIGEST, 32)) == "CKR_OPERATION_NOT_INITIALIZED"


def test_library_that_somebody_finalised_is_initialised_again(two: Two) -> None:
    right = two.sign()
    starts = two.east.shared.starts
    two.east.shared.forget_library += 1
    assert two.sign() == right
    assert two.east.shared.starts == starts + 1
    assert two.app.away() == set()
    assert two.sign() == right
    assert two.app.served(two.session) == "east"


def test_library_that_cannot_be_initialised_again_costs_its_member(two: Two) -> None:
    right = two.sign()
    two.east.shared.forget_library += 1
    two.east["C_Initialize"].answers(p11.CKR_GENERAL_ERROR)
    assert two.sign() == right
    assert two.app.away() == {"east"}


# ---- the application's own affair


@at_init_or_operation
@pytest.mark.parametrize("name", APPLICATION)
def test_answer_to_the_application_passes_and_nobody_else_is_asked(
    two: Two, name: str, function: str
) -> None:
    two.east[function].answers(rv_of(name))
    before = two.west.calls(function)
    assert code(two.sign) == name
    assert two.west.calls(function) == before
    two.east[function].works()
    two.sign()
    assert two.app.served(two.session) == "east"
    assert two.app.events("member.lost") == []


def test_wrong_signature_is_one_answer_of_one_member(two: Two) -> None:
    tag = two.sign()
    before = sum(two.calls("C_Verify"))
    forged = bytes([tag[0] ^ 1]) + tag[1:]
    assert (
        code(lambda: two.session.verify(p11.CKM_RSA_PKCS, two.key, DIGEST, forged)) == "CKR_SIGNATURE_INVALID"
    )
    assert sum(two.calls("C_Verify")) == before + 1
    assert two.app.away() == set()


def test_buffer_too_small_keeps_the_operation(two: Two) -> None:
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    output, size = create_string_buffer(8), c_ulong(8)
    assert two.app.module.rv("C_Sign", two.session.handle, DIGEST, 32, output, byref(size)) == (
        p11.CKR_BUFFER_TOO_SMALL
    )
    assert size.value == 32
    assert two.session.output("C_Sign", DIGEST, 32) == two.sign()


def test_forged_gcm_tag_costs_no_real_member(
    tokens: tuple[SoftToken, SoftToken], start: StartFactory
) -> None:
    """SoftHSM answers it with CKR_GENERAL_ERROR."""
    east, west = tokens
    app = start(east.member(), west.member())
    session = app.login(east.pin)
    key = session.find_one(shared("aes"))
    iv = b"i" * 12
    sealed = session.encrypt(gcm(iv), key, DATA)
    forged = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for _ in range(6):
        assert code(lambda: session.decrypt(gcm(iv), key, forged)) in (
            "CKR_GENERAL_ERROR",
            "CKR_ENCRYPTED_DATA_INVALID",
        )
    assert session.decrypt(gcm(iv), key, sealed) == DATA
    assert app.away() == set()
    assert app.events("member.lost") == []


# ---- what may have been done is not done again

TOKEN_DATA: p11.Template = {
    p11.CKA_CLASS: p11.CKO_DATA,
    p11.CKA_TOKEN: True,
    p11.CKA_PRIVATE: False,
    p11.CKA_LABEL: "note",
    p11.CKA_VALUE: b"text",
}


def test_token_object_that_may_have_been_made_is_not_made_there_again(
    fake: FakeFactory, start: StartFactory
) -> None:
    """It is made on the other member, as it was to be, and recognised on the first one when that is back."""
    east, west = fake("east"), fake("west")
    app = start(east.member(), west.member(), balance="primary-first", recovery=SOON)
    session = app.open()
    east["C_CreateObject"].answers(p11.CKR_DEVICE_ERROR, times=1, late=True)
    note = session.create(TOKEN_DATA)
    assert (east.calls("C_CreateObject"), west.calls("C_CreateObject")) == (1, 1)
    until(lambda: session.find({}) and not app.away(), "east is back")
    assert session.find({p11.CKA_LABEL: "note"}) == [note]
    assert (east.labels(), west.labels()) == (["note"], ["note"])


def test_session_object_is_made_elsewhere(two: Two) -> None:
    template = dict(TOKEN_DATA) | {p11.CKA_TOKEN: False}
    two.east["C_CreateObject"].answers(p11.CKR_DEVICE_ERROR)
    note = two.session.create(template)
    assert two.session.get(note, p11.CKA_VALUE) == (b"text",)
    assert two.app.away() == {"east"}


def test_token_key_that_may_have_been_generated_is_not_generated_again(two: Two) -> None:
    template: p11.Template = {
        p11.CKA_CLASS: p11.CKO_SECRET_KEY,
        p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET,
        p11.CKA_TOKEN: True,
        p11.CKA_LABEL: "new",
        p11.CKA_VALUE_LEN: 32,
    }
    two.east["C_GenerateKey"].answers(p11.CKR_DEVICE_ERROR, late=True)
    generate: Callable[[], object] = lambda: two.session.generate_key(  # noqa: E731
        p11.CKM_GENERIC_SECRET_KEY_GEN, template
    )
    assert code(generate) == "CKR_DEVICE_ERROR"
    assert two.calls("C_GenerateKey") == (1, 0)


@pytest.mark.parametrize(
    ("function", "write"),
    [
        ("C_SetAttributeValue", lambda two, note: two.session.set(note, {p11.CKA_LABEL: "renamed"})),
        ("C_DestroyObject", lambda two, note: two.session.destroy(note)),
    ],
)
def test_write_that_may_have_been_done_is_not_done_again(
    two: Two, function: str, write: Callable[[Two, int], None]
) -> None:
    note = two.session.create(TOKEN_DATA)
    two.east[function].answers(p11.CKR_DEVICE_ERROR, late=True)
    assert code(lambda: write(two, note)) == "CKR_DEVICE_ERROR"
    assert two.east.calls(function) == 1
    assert two.app.away() == set()


def test_pin_change_that_may_have_been_done_is_not_done_again(two: Two) -> None:
    two.east["C_SetPIN"].answers(p11.CKR_DEVICE_ERROR, times=1, late=True)
    change: Callable[[], object] = lambda: two.session.call(  # noqa: E731
        "C_SetPIN", PIN.encode(), 4, b"5678", 4
    )
    assert code(change) == "CKR_DEVICE_ERROR"
    assert two.calls("C_SetPIN") == (1, 0)


def test_write_on_a_member_that_died_reaches_the_other(two: Two) -> None:
    note = two.session.create(TOKEN_DATA)
    two.east.dies()
    two.session.set(note, {p11.CKA_LABEL: "renamed"})
    assert "renamed" in two.west.labels()
    assert two.app.away() == {"east"}


# ---- operations of several parts


PART = [*SUSPECT[:3], *SESSION, "CKR_CRYPTOKI_NOT_INITIALIZED", "CKR_DEVICE_REMOVED"]


@pytest.mark.parametrize("function", ["C_SignUpdate", "C_SignFinal"])
@pytest.mark.parametrize("name", PART)
def test_operation_that_is_broken_between_its_parts_goes_on_elsewhere(
    two: Two, name: str, function: str
) -> None:
    """With what it took before, and each part once: never CKR_OK for half the input, or for some of it twice."""
    right = two.session.sign(p11.CKM_RSA_PKCS, two.key, DIGEST)
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    two.session.feed("C_SignUpdate", DIGEST[:16])
    two.east[function].answers(rv_of(name))
    two.session.feed("C_SignUpdate", DIGEST[16:])
    assert two.session.output("C_SignFinal") == right
    two.east[function].works()
    assert two.sign() == two.sign()


@pytest.mark.parametrize("late", SUSPECT[:2])
def test_part_that_a_member_took_and_then_complained_about_counts_once(two: Two, late: str) -> None:
    right = two.session.sign(p11.CKM_RSA_PKCS, two.key, DIGEST)
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    two.session.feed("C_SignUpdate", DIGEST[:16])
    two.east["C_SignUpdate"].answers(rv_of(late), late=True)
    two.session.feed("C_SignUpdate", DIGEST[16:])
    two.east["C_SignUpdate"].works()
    assert two.session.output("C_SignFinal") == right


def test_part_that_is_given_to_the_same_member_again_counts_once_beside_a_key_of_the_session(
    two: Two,
) -> None:
    """It took the part, and then said that it knew of no login: its session is not closed for that, for the key."""
    secret = two.session.generate_key(
        p11.CKM_GENERIC_SECRET_KEY_GEN,
        {p11.CKA_TOKEN: False, p11.CKA_SIGN: True, p11.CKA_VALUE_LEN: 32, p11.CKA_LABEL: "of the session"},
    )
    right = two.session.sign(p11.CKM_SHA256_HMAC, secret, DIGEST)
    token = two.east if two.app.served(two.session) == "east" else two.west
    two.session.init("C_SignInit", p11.CKM_SHA256_HMAC, secret)
    token["C_SignUpdate"].answers(p11.CKR_USER_NOT_LOGGED_IN, times=1, late=True)
    two.session.feed("C_SignUpdate", DIGEST)
    assert two.session.output("C_SignFinal") == right
    assert two.session.sign(p11.CKM_SHA256_HMAC, secret, DIGEST) == right


def test_input_that_the_failed_member_wrote_over_is_given_to_the_next_as_it_was(two: Two) -> None:
    """Applications sign and encrypt in place."""
    right = two.sign()
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    two.east["C_Sign"].answers(p11.CKR_DEVICE_ERROR, late=True)
    buffer, size = create_string_buffer(DIGEST, 256), c_ulong(256)
    two.session.call("C_Sign", buffer, len(DIGEST), buffer, byref(size))
    assert buffer.raw[: size.value] == right
    assert two.app.away() == {"east"}


def test_key_of_the_session_survives_an_operation_that_its_member_refuses(two: Two) -> None:
    """No other member has it, so the answer is the application's: its session there must not be closed for it."""
    secret = two.session.generate_key(
        p11.CKM_GENERIC_SECRET_KEY_GEN,
        {p11.CKA_TOKEN: False, p11.CKA_SIGN: True, p11.CKA_VALUE_LEN: 32, p11.CKA_LABEL: "of the session"},
    )
    right = two.session.sign(p11.CKM_SHA256_HMAC, secret, DIGEST)
    member = two.app.served(two.session)
    two.session.init("C_SignInit", p11.CKM_SHA256_HMAC, secret)
    token = two.east if member == "east" else two.west
    two.session.feed("C_SignUpdate", DIGEST)
    token["C_SignFinal"].answers(
        p11.CKR_FUNCTION_FAILED, times=1, late=True
    )  # and the operation has ended there
    assert code(lambda: two.session.call("C_SignFinal", create_string_buffer(64), byref(c_ulong(64)))) == (
        "CKR_FUNCTION_FAILED"
    )
    assert two.session.sign(p11.CKM_SHA256_HMAC, secret, DIGEST) == right
    assert two.app.away() == set()


def test_two_operations_of_one_session_both_move(make_two: TwoFactory) -> None:
    two = make_two()
    right, digest = two.sign(), two.session.digest(p11.CKM_SHA256, DIGEST)
    two.session.init("C_DigestInit", p11.CKM_SHA256)
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    assert two.app.served(two.session) == "east"
    two.east.dies()
    assert two.session.output("C_Sign", DIGEST, 32) == right
    assert two.session.output("C_Digest", DIGEST, 32) == digest
    assert two.app.away() == {"east"}


def test_operation_whose_input_is_not_known_keeps_a_second_one_from_moving(make_two: TwoFactory) -> None:
    two = make_two(replay_limit_bytes=3)
    two.session.init("C_DigestInit", p11.CKM_SHA256)
    two.session.feed("C_DigestUpdate", b"some")
    two.session.init("C_SignInit", p11.CKM_RSA_PKCS, two.key)
    two.east.dies()
    assert code(lambda: two.session.output("C_Sign", DIGEST, 32)) == "CKR_DEVICE_ERROR"
    assert code(lambda: two.session.output("C_DigestFinal")) == "CKR_OPERATION_NOT_INITIALIZED"
    two.sign()


# ---- searches and attribute reads


@pytest.mark.parametrize("function", ["C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal"])
@pytest.mark.parametrize("name", SUSPECT[:2])
def test_search_that_fails_on_one_member_is_answered_by_the_other(two: Two, name: str, function: str) -> None:
    two.east[function].answers(rv_of(name))
    assert two.session.find({p11.CKA_LABEL: "signing"}) == [two.key]
    assert two.app.away() == {"east"}


def test_search_after_all_members_forgot_the_login_still_shows_what_is_private(two: Two) -> None:
    """Tokens find the public objects alone then, with CKR_OK."""
    for token in (two.east, two.west):
        token.shared.forget_login += 1
    assert two.session.find({p11.CKA_LABEL: "signing"}) == [two.key]
    assert two.session.find({}) == [two.key]
    assert two.calls("C_Login") == (2, 2)


def test_search_that_fails_alike_everywhere_is_the_application_s_answer(two: Two) -> None:
    for token in (two.east, two.west):
        token["C_FindObjectsInit"].answers(p11.CKR_GENERAL_ERROR)
    assert code(lambda: two.session.find({})) == "CKR_GENERAL_ERROR"
    assert two.app.away() == set()


@pytest.mark.parametrize("name", SUSPECT[:2])
def test_attribute_read_that_fails_on_one_member_is_answered_by_the_other(two: Two, name: str) -> None:
    two.east["C_GetAttributeValue"].answers(rv_of(name))
    assert two.session.get(two.key, p11.CKA_LABEL) == (b"signing",)
    assert two.app.away() == {"east"}


def test_attribute_that_is_not_shown_is_asked_of_one_member(two: Two) -> None:
    before = two.west.calls("C_GetAttributeValue")
    assert code(lambda: two.session.get(two.key, p11.CKA_LABEL, p11.CKA_START_DATE)) == (
        "CKR_ATTRIBUTE_TYPE_INVALID"
    )
    assert two.west.calls("C_GetAttributeValue") == before
    assert two.app.away() == set()


# ---- tokens and slots


@pytest.mark.parametrize("name", DEAD[:2] + SUSPECT[:2])
def test_token_query_passes_over_a_member_that_fails(two: Two, name: str) -> None:
    two.east["C_GetTokenInfo"].answers(rv_of(name))
    assert two.app.module.token(two.app.slot).label == "prod"
    assert two.app.away() == {"east"}


def test_token_query_does_not_wait_for_a_slow_member(two: Two) -> None:
    with two.east["C_GetTokenInfo"].holding():
        assert two.app.module.token(two.app.slot).serial == "1599447001"
        two.east["C_GetTokenInfo"].wait_held()
        for _ in range(3):
            assert two.app.module.token(two.app.slot).serial == "1599447001"
        assert two.east["C_GetTokenInfo"].held == 1  # who is waited for already is not asked again
    assert two.app.away() == set()


# ---- one library, several members


@dataclass
class House:
    """Two tokens in the slots of one library, as with most vendors."""

    app: Application
    east: FakeToken
    west: FakeToken
    session: p11.Session
    key: int


@pytest.fixture
def house(fake: FakeFactory, start: StartFactory) -> House:
    east, west = (fake(name, fakes.signing_key()) for name in ("east", "west"))
    env = {"FAKE_TOKENS": f"{east.file}:{west.file}"}
    members = [token.member(env=env, instance="shared") for token in (east, west)]
    app = start(*members, balance="primary-first", recovery=SOON)
    session = app.login(PIN)
    return House(app, east, west, session, session.find_one({p11.CKA_LABEL: "signing"}))


def test_member_returns_without_a_restart_under_its_sibling(house: House) -> None:
    right = house.session.sign(p11.CKM_RSA_PKCS, house.key, DIGEST)
    house.east.shared.absent = 1
    assert house.session.sign(p11.CKM_RSA_PKCS, house.key, DIGEST) == right
    assert house.app.away() == {"east"}
    house.east.shared.absent = 0

    def back() -> bool:
        return house.session.sign(p11.CKM_RSA_PKCS, house.key, DIGEST) == right and not house.app.away()

    until(back, "it is back")
    assert (house.east.calls("C_Initialize"), house.west.calls("C_Initialize")) == (1, 1)
    assert house.west.calls("C_Finalize") == 0
    assert house.session.sign(p11.CKM_RSA_PKCS, house.key, DIGEST) == right


def test_library_of_two_members_that_somebody_finalised_is_initialised_again(house: House) -> None:
    right = house.session.sign(p11.CKM_RSA_PKCS, house.key, DIGEST)
    house.east.shared.forget_library += 1

    def back() -> bool:
        return code(lambda: house.session.sign(p11.CKM_RSA_PKCS, house.key, DIGEST)) == "CKR_OK" and (
            not house.app.away()
        )

    until(back, "both are back")
    for _ in range(4):
        assert house.session.sign(p11.CKM_RSA_PKCS, house.key, DIGEST) == right
    assert house.east.shared.pin_failures == house.west.shared.pin_failures == 0


def test_library_that_the_host_initialised_and_finalises_is_initialised_by_us(
    fake: FakeFactory, start: StartFactory
) -> None:
    east, west = (fake(name, fakes.signing_key()) for name in ("east", "west"))
    with environment(east.env):
        host = p11.Module(east.library)
        host.initialize()
    app = start(east.member(instance="shared"), west.member(), balance="primary-first", recovery=SOON)
    assert east.shared.starts == 1  # CKR_CRYPTOKI_ALREADY_INITIALIZED is as good
    session = app.login(PIN)
    key = session.find_one({p11.CKA_LABEL: "signing"})
    right = session.sign(p11.CKM_RSA_PKCS, key, DIGEST)
    host.finalize()

    def back() -> bool:
        return session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right and not app.away()

    until(back, "our own C_Initialize has brought it back")
    assert session.sign(p11.CKM_RSA_PKCS, key, DIGEST) == right
    assert app.served(session) == "east"


def test_library_that_the_host_uses_is_never_finalised(fake: FakeFactory, start: StartFactory) -> None:
    east, west = (fake(name, fakes.signing_key()) for name in ("east", "west"))
    with environment(east.env):
        host = p11.Module(east.library)
        host.initialize()
    app = start(east.member(instance="shared"), west.member())
    app.login(PIN)
    app.module.finalize()
    assert east.calls("C_Finalize") == 0
    assert west.calls("C_Finalize") == 1
    host.finalize()
