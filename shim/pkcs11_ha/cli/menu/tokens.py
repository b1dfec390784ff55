"""Numbers 1 to 15 and 52: slots, tokens, sessions, logins, and the status of an HA group."""

from __future__ import annotations

import time

from pkcs11_ha import ck
from pkcs11_ha.cli.menu import attributes
from pkcs11_ha.cli.menu.attributes import mechanism_name, plain
from pkcs11_ha.cli.menu.client import CallError, Version
from pkcs11_ha.cli.menu.desk import Desk, Session, at_most, choice

_USERS = {"so": ck.CKU_SO, "user": ck.CKU_USER}
_STATES = {
    ck.CKS_RO_PUBLIC_SESSION: "read-only, nobody logged in",
    ck.CKS_RO_USER_FUNCTIONS: "read-only, user logged in",
    ck.CKS_RW_PUBLIC_SESSION: "read-write, nobody logged in",
    ck.CKS_RW_USER_FUNCTIONS: "read-write, user logged in",
    ck.CKS_RW_SO_FUNCTIONS: "read-write, security officer logged in",
}
_SLOT_FLAGS = ("TOKEN_PRESENT", "REMOVABLE_DEVICE", "HW_SLOT")
_TOKEN_FLAGS = (
    *"RNG WRITE_PROTECTED LOGIN_REQUIRED USER_PIN_INITIALIZED RESTORE_KEY_NOT_NEEDED CLOCK_ON_TOKEN".split(),
    *"PROTECTED_AUTHENTICATION_PATH DUAL_CRYPTO_OPERATIONS TOKEN_INITIALIZED USER_PIN_COUNT_LOW".split(),
    *"USER_PIN_FINAL_TRY USER_PIN_LOCKED USER_PIN_TO_BE_CHANGED SO_PIN_COUNT_LOW SO_PIN_FINAL_TRY".split(),
    *"SO_PIN_LOCKED SO_PIN_TO_BE_CHANGED ERROR_STATE SEED_RANDOM_REQUIRED".split(),
)
_MECHANISM_FLAGS = (
    *"HW ENCRYPT DECRYPT DIGEST SIGN SIGN_RECOVER VERIFY VERIFY_RECOVER GENERATE GENERATE_KEY_PAIR WRAP".split(),
    *"UNWRAP DERIVE EC_F_P EC_F_2M EC_ECPARAMETERS EC_NAMEDCURVE EC_UNCOMPRESS EC_COMPRESS".split(),
)
_WAIT_AT_MOST_S = 600
_WAIT_STEP_S = 0.1


def open_session(desk: Desk) -> None:
    """1"""
    slot = desk.slot()
    writes = desk.dialogue.yes("Read-write", default=True)
    handle = desk.client.open(slot, writes=writes)
    last = max((session.number for session in desk.sessions), default=0)
    session = Session(last + 1, handle, slot, writes)
    desk.sessions.append(session)
    desk.say(f"Session {session}; handle {handle}")


def close_session(desk: Desk) -> None:
    """2"""
    session = desk.session()
    desk.client.close(session.handle)
    desk.sessions.remove(session)
    desk.say(f"Session {session.number} is closed")


def log_in(desk: Desk) -> None:
    """3"""
    session = desk.session()
    user = desk.dialogue.ask("As user or so (security officer)", choice(_USERS), "user")
    desk.client.login(session.handle, _USERS[user], _pin(desk, session.slot, f"PIN of the {user}"))


def log_out(desk: Desk) -> None:
    """4"""
    desk.client.logout(desk.session().handle)


def change_pin(desk: Desk) -> None:
    """5"""
    session = desk.session()
    old = _pin(desk, session.slot, "PIN as it is")
    new = None if old is None else desk.dialogue.new_pin("New PIN")
    desk.client.set_pin(session.handle, old, new)


def init_token(desk: Desk) -> None:
    """6"""
    slot = desk.slot()
    label = desk.dialogue.text("New label of the token")
    pin = _pin(desk, slot, "PIN of the so")
    desk.destroys(f"all that is on the token in slot {slot}")
    desk.client.init_token(slot, pin, label)


def init_pin(desk: Desk) -> None:
    """7"""
    session = desk.session()
    protected = _is_protected(desk, session.slot)
    desk.client.init_pin(session.handle, None if protected else desk.dialogue.new_pin("New PIN of the user"))


def _pin(desk: Desk, slot: int, prompt: str) -> bytes | None:
    """A PIN; none for a token that asks for it by itself."""
    if _is_protected(desk, slot):
        desk.say("The token asks for the PIN by itself")
        return None
    return desk.dialogue.pin(prompt)


def _is_protected(desk: Desk, slot: int) -> bool:
    return bool(desk.client.token_info(slot).flags & ck.CKF_PROTECTED_AUTHENTICATION_PATH)


def list_mechanisms(desk: Desk) -> None:
    """8"""
    mechanisms = desk.client.mechanisms(desk.slot())
    names = [mechanism_name(each) for each in mechanisms]
    for left, right in zip(names[::2], [*names[1::2], ""], strict=False):
        desk.say(f"{left:<40}{right}".rstrip())
    desk.say(f"{len(names)} mechanisms")


def show_mechanism(desk: Desk) -> None:
    """9"""
    slot = desk.slot()
    mechanism = desk.dialogue.ask("Mechanism (name, or 0xNUMBER)", attributes.mechanism_number)
    info = desk.client.mechanism_info(slot, mechanism)
    desk.say(f"{mechanism_name(mechanism)} (0x{mechanism:X})")
    desk.say(f"  key size  {info.least} to {info.most}")
    _flags(desk, info.flags, _MECHANISM_FLAGS)


def show_info(desk: Desk) -> None:
    """10"""
    info = desk.client.info()
    desk.say(f"  module        {desk.client.path}")
    desk.say(f"  PKCS#11       {_version(info.cryptoki)}")
    desk.say(f"  manufacturer  {_field(info.manufacturer)}")
    desk.say(f"  description   {_field(info.description)}")
    desk.say(f"  version       {_version(info.library)}")


def show_slot(desk: Desk) -> None:
    """11"""
    slot = desk.slot()
    info = desk.client.slot_info(slot)
    desk.say(f"  slot          {slot}")
    desk.say(f"  description   {_field(info.description)}")
    desk.say(f"  manufacturer  {_field(info.manufacturer)}")
    desk.say(f"  hardware      {_version(info.hardware)}")
    desk.say(f"  firmware      {_version(info.firmware)}")
    _flags(desk, info.flags, _SLOT_FLAGS)


def show_token(desk: Desk) -> None:
    """12"""
    info = desk.client.token_info(desk.slot())
    desk.say(f"  label           {_field(info.label)}")
    desk.say(f"  manufacturer    {_field(info.manufacturer)}")
    desk.say(f"  model           {_field(info.model)}")
    desk.say(f"  serial          {_field(info.serial)}")
    desk.say(f"  sessions        {_count(info.sessions)} of {_limit(info.max_sessions)}")
    desk.say(f"  read-write      {_count(info.rw_sessions)} of {_limit(info.max_rw_sessions)}")
    desk.say(f"  PIN             {info.min_pin} to {info.max_pin} characters")
    desk.say(f"  public memory   {_count(info.free_public)} of {_count(info.total_public)} free")
    desk.say(f"  private memory  {_count(info.free_private)} of {_count(info.total_private)} free")
    desk.say(f"  hardware        {_version(info.hardware)}")
    desk.say(f"  firmware        {_version(info.firmware)}")
    _flags(desk, info.flags, _TOKEN_FLAGS)


def show_session(desk: Desk) -> None:
    """13"""
    session = desk.session()
    info = desk.client.session_info(session.handle)
    desk.say(f"  session       {session.number}, handle {session.handle}")
    desk.say(f"  slot          {info.slot}")
    desk.say(f"  state         {_STATES.get(info.state, info.state)}")
    desk.say(f"  device error  0x{info.device_error:X}")


def list_slots(desk: Desk) -> None:
    """14"""
    present = desk.dialogue.yes("Only slots with a token", default=False)
    slots = desk.client.slots(present=present)
    for slot in slots:
        line = f"slot#{slot} - {_field(desk.client.slot_info(slot).description)}"
        try:
            info = desk.client.token_info(slot)
        except CallError as error:
            desk.say(f"{line}\n  {ck.rv_name(error.rv)}")
        else:
            desk.say(f"{line}\n  token {_field(info.label)!r}, serial {_field(info.serial)}")
    desk.say(f"{len(slots)} slots")


def wait_for_event(desk: Desk) -> None:
    """15: looks again and again, so that Ctrl-C is heard."""
    seconds = desk.dialogue.ask("Seconds to wait, 0 to look once", at_most(_WAIT_AT_MOST_S), "0")
    deadline = time.monotonic() + seconds
    while True:
        try:
            slot = desk.client.slot_event()
        except CallError as error:
            if error.rv != ck.CKR_NO_EVENT:
                raise
            if time.monotonic() >= deadline:
                desk.say(f"{error}: nothing has happened")
                return
            time.sleep(_WAIT_STEP_S)
        else:
            desk.say(f"Something has happened in slot {slot}")
            return


def show_ha_status(desk: Desk) -> None:
    """52: the form is the reference page's."""
    status = desk.client.ha_status(desk.slot())
    desk.say(f"HA group {plain(status.group.encode())} status:")
    for serial, rv in status.members:
        desk.say(f"HSM {plain(serial.encode())} - {ck.rv_name(rv)}")


def _flags(desk: Desk, flags: int, names: tuple[str, ...]) -> None:
    known = {getattr(ck, f"CKF_{name}"): f"CKF_{name}" for name in names}
    for flag, name in known.items():
        if flags & flag:
            desk.say(f"  {name}")
    rest = flags & ~sum(known)
    if rest:
        desk.say(f"  0x{rest:X}")


def _field(data: bytes) -> str:
    return plain(data.rstrip(b" "))


def _version(version: Version) -> str:
    return f"{version.major}.{version.minor:02}"


def _count(value: int) -> str:
    return "?" if value == ck.CK_UNAVAILABLE_INFORMATION else str(value)


def _limit(value: int) -> str:
    return "any number" if value == ck.CK_EFFECTIVELY_INFINITE else _count(value)
