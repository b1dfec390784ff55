"""A member: one token of a vendor library, from loading to loss and back."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pkcs11_ha import ck
from pkcs11_ha.config import MemberConfig
from pkcs11_ha.core import codes
from pkcs11_ha.core.recovery import Outage
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.library import Instance, Libraries, LibraryError
from pkcs11_ha.spec.functions import INDEX

_QUIET_STEP_S = 0.002
# Slots may appear between the two calls of C_GetSlotList, as those of SoftHSM do while its files are written.
_MORE_SLOTS = 4
_LIST_PAUSES_S = (0, 0.01, 0.04)

T = TypeVar("T")


class MemberState(enum.Enum):
    """AWAY and UP; `Outage` says more about a member that is away."""

    AWAY = "away"
    UP = "up"


class ConnectError(Exception):
    """A member cannot be reached; `rv` is the code to show for it, `str` one line."""

    def __init__(self, rv: int, why: str) -> None:
        super().__init__(why)
        self.rv = rv


class PinRefused(ConnectError):
    """A member refused its PIN: no further attempt may be made with it."""


@dataclass(frozen=True)
class TokenFacts:
    """What a member's token says of itself, kept for when it is slow or away."""

    label: str
    manufacturer: str
    model: str
    serial: str
    flags: int
    numbers: tuple[int, ...]  # the ulong fields of CK_TOKEN_INFO, in its order
    hardware: tuple[int, int]
    firmware: tuple[int, int]


_OF_SESSION = (codes.Code.SESSION, codes.Code.OPERATION)


class _Lives(threading.local):
    """In which epochs a thread's calls may reach members, by name."""

    def __init__(self) -> None:
        self.known: Mapping[str, int] = {}  # those of which it knows something (`keep_to`)
        self.held: dict[str, int] = {}  # those in which it is at work (`Member.one_life`)


_lives = _Lives()


def keep_to(epochs: Mapping[str, int] | None) -> None:
    """From here on, this thread's calls reach members in the epochs that are named (by member) and in no later one.

    What it knows of them, handles above all, would mean something else there.  None: whichever is the present one.
    """
    _lives.known = {} if epochs is None else epochs


Lose = Callable[["Member", int, str, int], None]  # for this answer of this function in this epoch


class Member:
    """One token.  `state` and `outage` are written by `Core` alone, under its lock."""

    def __init__(self, config: MemberConfig, now_ns: int, gone: Lose, seen: str = "") -> None:
        """`gone` is told of a call of the core's own that found the token gone, or did not come back in its time,
        whoever would make something of its answer.  `seen` is the serial number that its token had when it was last
        there."""
        self.name = config.name
        self.gone = gone
        self.native = native.lib.ha_member_new()
        self.state = MemberState.AWAY
        self.drained = False  # by an operator: it takes no new work, and is not tried again
        self.loss_was_read = False  # the first status after a loss says CKR_DEVICE_ERROR
        self.why = ""  # it is away, in one line
        self.fault = (
            "",
            "",
        )  # the last code for which it was lost or not recovered, and the call that gave it
        self.instance: Instance | None = None
        self._cleans: list[
            Any
        ] = []  # tables of the data plane; a call that is late may still read the one before
        self._configure(config, now_ns, seen)
        self.facts: TokenFacts | None = None
        self.slot_flags: int | None = None  # of the slot that the token was seen in
        self.mechanisms: dict[
            int, tuple[int, int, int] | None
        ] = {}  # type -> (min, max, flags), None: not asked
        self.service = threading.RLock()  # of the service session: held over its calls
        self.session: int = 0  # kept open so that the login and the handles outlive other sessions
        self.witnesses: dict[
            int, bytes
        ] = {}  # domain keys it has shown in its present life: handle -> CKA_LABEL
        self.logins: set[int] = set()  # virtual slots that are logged in on this member
        self.replacer: int | None = None  # the thread that is restarting the library: no other may call it
        self.connecting = False  # an attempt is under way, perhaps beyond its time
        self.learning = False  # somebody is asking it for its token information
        self._name()

    def _configure(self, config: MemberConfig, now_ns: int, seen: str) -> None:
        self.config, self.seen = config, seen
        self.outage = Outage(now_ns)
        self.profile = profile_of(config)
        self._cleans.append(native.ffi.new("unsigned char[]", codes.clean_table(self.profile)))
        native.lib.ha_member_clean(self.native, self._cleans[-1])

    def renew(self, config: MemberConfig, now_ns: int, seen: str) -> None:
        """It was left, and is to come again: perhaps another token, in another library.  Handles of its lives before
        mean nothing, as always."""
        self._configure(config, now_ns, seen)
        self.why, self.loss_was_read = "", False
        self.facts, self.slot_flags, self.mechanisms = None, None, {}

    # ---- calls ----

    @property
    def epoch(self) -> int:
        """Changes at every loss and every return; handles are of one epoch."""
        return int(native.lib.ha_member_epoch(self.native))

    def call(self, name: str, *arguments: Any) -> int:
        """Calls one function of the library; CKR_DEVICE_REMOVED if the member is being replaced, or its life is not
        that which this thread keeps to."""
        known = _lives.known.get(self.name, self.epoch) if _lives.known else self.epoch
        return self.call_in(_lives.held.get(self.name, known), name, *arguments)

    def call_in(self, epoch: int, name: str, *arguments: Any) -> int:
        """As `call`, for handles of that epoch: in another they would mean something else."""
        function = native.lib.ha_member_pointer(self.native, INDEX[name])
        if not function:
            return ck.CKR_FUNCTION_NOT_SUPPORTED
        guard = native.ffi.new("ha_call *")
        if not native.lib.ha_member_enter(self.native, epoch, guard):
            return ck.CKR_DEVICE_REMOVED
        if self.replacer not in (None, threading.get_ident()):
            native.lib.ha_member_leave(self.native, guard)
            return ck.CKR_DEVICE_REMOVED
        try:
            rv = int(native.ffi.cast(f"CK_{name}", function)(*arguments))
        finally:
            native.lib.ha_member_leave(self.native, guard)
        if rv == ck.CKR_DEVICE_REMOVED:
            self.gone(self, rv, name, epoch)
        return rv

    @contextmanager
    def one_life(self) -> Iterator[None]:
        """What this thread does there now, it does in one epoch."""
        if self.name in _lives.held:
            yield
            return
        _lives.held[self.name] = _lives.known.get(self.name, self.epoch)
        try:
            yield
        finally:
            del _lives.held[self.name]

    def code(self, rv: int) -> codes.Code:
        """The class of one of its answers."""
        return codes.classify(rv, self.profile)

    # ---- connection ----

    def connect(self, libraries: Libraries, connect_timeout_s: float, alone: bool) -> None:
        """Loads the library, or restarts it if this member is alone in it, finds the token, opens the service session.

        Raises ConnectError.  The member serves nobody yet: logging in and matching objects come next.
        """
        self.replacer = threading.get_ident()
        try:
            self._connect(libraries, connect_timeout_s, alone)
        finally:
            self.replacer = None

    def _connect(self, libraries: Libraries, connect_timeout_s: float, alone: bool) -> None:
        native.lib.ha_member_new_epoch(self.native)  # from here on, handles of before are turned away
        fresh = True
        try:
            if self.instance is None:
                self.instance = libraries.instance_for(self.config)
                libraries.initialise(self.instance, self.config)
            elif alone and self._may_restart(connect_timeout_s):
                libraries.restart(self.instance, self.config)
            else:
                self.instance.resume()
                if not self.instance.initialised or self._is_finalised():
                    libraries.revive(self.instance, self.config)
                else:
                    fresh = self.instance.foreign
        except LibraryError as error:
            raise ConnectError(ck.CKR_TOKEN_NOT_PRESENT, str(error)) from None
        instance = self.instance
        instance.publish(self.native)
        # SoftHSM writes to no socket, and stubs do without the signal: SIGPIPE cannot come from them.
        guard = self.profile != "softhsm" and not instance.has_threads
        # p11-kit-client can lose a wake-up when its server dies under several threads, and leave one waiting for ever.
        one_by_one = instance.one_call_at_a_time or self.profile == "p11-kit"
        if one_by_one and instance.has_threads:
            instance.take_turns()  # there: the limit of a call counts while it waits for its turn
        native.lib.ha_member_traits(self.native, guard, one_by_one and not instance.has_threads)
        native.lib.ha_member_new_epoch(self.native)
        self.session = 0
        self.witnesses = {}
        self.logins.clear()
        slot = self._find_slot()
        native.lib.ha_member_slot(self.native, slot)
        if not fresh:
            self.call("C_CloseAllSessions", slot)  # those of its life before, and the login with them
        self.learn()
        self.mechanisms = dict.fromkeys(self.mechanism_types(slot))
        self._open_service_session()
        self._name()

    def _may_restart(self, connect_timeout_s: float) -> bool:
        """Whether the library may be finalised: it is ours, and no call is inside it any more."""
        assert self.instance
        if self.instance.foreign or not self.instance.is_empty:
            return False
        if self.instance.remote:
            self.instance.abandon()
        if not self.is_quiet(connect_timeout_s):
            raise ConnectError(ck.CKR_DEVICE_ERROR, "calls are stuck inside its library")
        return self.instance.is_empty

    def _is_finalised(self) -> bool:
        """Whether somebody else, the host perhaps, has finalised the library."""
        return self.call("C_GetInfo", native.ffi.new("CK_INFO *")) == ck.CKR_CRYPTOKI_NOT_INITIALIZED

    def _find_slot(self) -> int:
        """The slot whose token the configuration selects; slot ids move, so it is looked for each time."""
        matches = []
        for slot, slot_info, token_info, library in self.tokens():
            if self.config.token.matches(slot, slot_info, token_info, library):
                matches.append((slot, int(slot_info["flags"])))
        if not matches:
            raise ConnectError(ck.CKR_TOKEN_NOT_PRESENT, f"no token matches {self.config.token}")
        if len(matches) > 1:
            raise ConnectError(
                ck.CKR_TOKEN_NOT_RECOGNIZED,
                f"{len(matches)} tokens match {self.config.token}: be more precise",
            )
        slot, self.slot_flags = matches[0]
        return slot

    def tokens(self) -> Iterator[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """Every token of its library: slot, CK_SLOT_INFO, CK_TOKEN_INFO, CK_INFO.  Raises ConnectError."""
        for slot in self._slots():
            slot_info, token_info = native.ffi.new("CK_SLOT_INFO *"), native.ffi.new("CK_TOKEN_INFO *")
            if self.call("C_GetSlotInfo", slot, slot_info) or self.call("C_GetTokenInfo", slot, token_info):
                continue
            library = native.ffi.new("CK_INFO *")
            self.call("C_GetInfo", library)
            yield slot, _fields(slot_info), _fields(token_info), _fields(library)

    def _slots(self) -> Sequence[int]:
        count = native.ffi.new("CK_ULONG *")
        for pause_s in _LIST_PAUSES_S:
            time.sleep(pause_s)
            self._must("C_GetSlotList", ck.CK_TRUE, native.ffi.NULL, count)
            count[0] += _MORE_SLOTS
            slots = native.ffi.new("CK_SLOT_ID[]", count[0])
            rv = self.call("C_GetSlotList", ck.CK_TRUE, slots, count)
            if rv == ck.CKR_OK:
                return [int(slots[i]) for i in range(count[0])]
            if rv != ck.CKR_BUFFER_TOO_SMALL:
                raise ConnectError(rv, f"C_GetSlotList answers {ck.rv_name(rv)}")
        raise ConnectError(ck.CKR_DEVICE_ERROR, "its slot list does not stand still")

    def _must(self, name: str, *arguments: Any) -> None:
        rv = self.call(name, *arguments)
        if rv != ck.CKR_OK:
            raise ConnectError(rv, f"{name} answers {ck.rv_name(rv)}")

    def learn(self) -> None:
        """Reads the token's information anew; raises ConnectError."""
        info = native.ffi.new("CK_TOKEN_INFO *")
        self._must("C_GetTokenInfo", native.lib.ha_member_slot_id(self.native), info)
        self.facts = TokenFacts(
            native.padded(info.label),
            native.padded(info.manufacturerID),
            native.padded(info.model),
            native.padded(info.serialNumber),
            int(info.flags),
            tuple(int(getattr(info, field)) for field in TOKEN_NUMBERS),
            (info.hardwareVersion.major, info.hardwareVersion.minor),
            (info.firmwareVersion.major, info.firmwareVersion.minor),
        )

    def mechanism_types(self, slot: int) -> Sequence[int]:
        """Those of the token in a slot of its library; raises ConnectError."""
        count = native.ffi.new("CK_ULONG *")
        self._must("C_GetMechanismList", slot, native.ffi.NULL, count)
        # One more than it says: p11-kit-client 0.24 reads a place too far when it takes one off its list.
        types = native.ffi.new("CK_MECHANISM_TYPE[]", count[0] + 1)
        self._must("C_GetMechanismList", slot, types, count)
        return [int(types[i]) for i in range(count[0])]

    def mechanism_info(self, mechanism: int) -> tuple[int, int, int]:
        """(ulMinKeySize, ulMaxKeySize, flags), asked once; raises CkError."""
        known = self.mechanisms.get(mechanism)
        if known is None:
            info = native.ffi.new("CK_MECHANISM_INFO *")
            rv = self.call("C_GetMechanismInfo", native.lib.ha_member_slot_id(self.native), mechanism, info)
            native.check(rv)
            known = (int(info.ulMinKeySize), int(info.ulMaxKeySize), int(info.flags))
            self.mechanisms[mechanism] = known
        return known

    @property
    def write_protected(self) -> bool:
        return bool(self.facts and self.facts.flags & ck.CKF_WRITE_PROTECTED)

    def _open_service_session(self) -> None:
        """Read-write where the token allows it: a read-only session stands in the way of the SO."""
        flags = ck.CKF_SERIAL_SESSION | (0 if self.write_protected else ck.CKF_RW_SESSION)
        session = native.ffi.new("CK_SESSION_HANDLE *")
        slot = native.lib.ha_member_slot_id(self.native)
        self._must("C_OpenSession", slot, flags, native.ffi.NULL, native.ffi.NULL, session)
        self.session = int(session[0])

    def on_service_session(self, work: Callable[[], T]) -> T:
        """`work()`, which raises CkError where a call of it fails; done again, once, on another service session if it
        was this one that was at fault: gone, or with something under way that an earlier failure has left there.

        Nobody who asks for something else is told of that.
        """
        with self.service, self.one_life():
            try:
                return work()
            except native.CkError as error:
                if not self._is_of_session(error.rv):
                    raise
                if not self._renew_service_session():
                    raise self._without_session(error) from None
            try:
                return work()
            except native.CkError as error:
                raise self._without_session(error) from None

    def _is_of_session(self, rv: int) -> bool:
        """Whether an answer is about the session; after CKR_BUFFER_TOO_SMALL, too, its operation goes on."""
        return self.code(rv) in _OF_SESSION or rv == ck.CKR_BUFFER_TOO_SMALL

    def _without_session(self, error: native.CkError) -> native.CkError:
        """What it means that there is something under way in a session of ours is that the member is not well."""
        if self.code(error.rv) is not codes.Code.OPERATION:
            return error
        return native.CkError(ck.CKR_DEVICE_ERROR, str(error), self)

    def _renew_service_session(self) -> bool:
        """Another one, before the one there was is closed: with its last session a token forgets its login.  False:
        there is none, or the login was forgotten."""
        before = self.session
        try:
            self._open_service_session()
        except ConnectError:
            return False
        self.call("C_CloseSession", before)
        return self.keeps_login()

    def probe(self) -> bool:
        """Whether it answers at all: its token is there and it opens a session."""
        info = native.ffi.new("CK_TOKEN_INFO *")
        slot = native.lib.ha_member_slot_id(self.native)
        if self.call("C_GetTokenInfo", slot, info) != ck.CKR_OK:
            return False
        session = native.ffi.new("CK_SESSION_HANDLE *")
        rv = self.call(
            "C_OpenSession", slot, ck.CKF_SERIAL_SESSION, native.ffi.NULL, native.ffi.NULL, session
        )
        if rv == ck.CKR_SESSION_READ_WRITE_SO_EXISTS:
            return True
        if rv == ck.CKR_OK:
            rv = self.call("C_CloseSession", session[0])
        return rv == ck.CKR_OK

    def token_flags(self) -> int | None:
        """The flags of CK_TOKEN_INFO as they are now; None if it does not say."""
        info = native.ffi.new("CK_TOKEN_INFO *")
        rv = self.call("C_GetTokenInfo", native.lib.ha_member_slot_id(self.native), info)
        return int(info.flags) if rv == ck.CKR_OK else None

    def _name(self) -> None:
        native.lib.ha_member_names(self.native, native.text(self.name), native.text(self.serial))

    @property
    def serial(self) -> str:
        """The token's serial number; before it was seen, what the configuration says, or it last was, or its name."""
        if self.facts:
            return self.facts.serial
        return self.config.token.serial or self.seen or self.name[:16]

    # ---- login ----

    def login(self, user: int, pin: Any, size: int) -> int:
        """One C_Login on the service session, renewed if the member has forgotten it; what the member says.

        Raises ConnectError.
        """
        with self.service:
            rv = self.call("C_Login", self.session, user, pin, size)
            if self.code(rv) is codes.Code.SESSION:  # the PIN was not looked at
                self._open_service_session()
                rv = self.call("C_Login", self.session, user, pin, size)
            return rv

    def is_logged_in(self) -> bool:
        """Whether the token still knows of a login; opens the service session anew if it forgot that.

        Raises ConnectError.
        """
        info = native.ffi.new("CK_SESSION_INFO *")
        with self.service:
            rv = self.call("C_GetSessionInfo", self.session, info)
            if self.code(rv) is codes.Code.SESSION:
                self._open_service_session()
                rv = self.call("C_GetSessionInfo", self.session, info)
        return rv != ck.CKR_OK or info.state not in (ck.CKS_RO_PUBLIC_SESSION, ck.CKS_RW_PUBLIC_SESSION)

    def keeps_login(self) -> bool:
        """Whether it is logged in if it is said to be: with the login it forgets its handles of what is private."""
        try:
            return not self.logins or self.is_logged_in()
        except ConnectError:
            return False

    def depart(self) -> None:
        """Closes what the core has opened in a library that is not ours to finalise."""
        self.call("C_CloseSession", self.session)

    def is_quiet(self, patience_s: float) -> bool:
        """Whether no call is inside its library any more, or will be in a moment."""
        deadline = time.monotonic() + patience_s
        while native.lib.ha_member_in_flight(self.native):
            if time.monotonic() > deadline:
                return False
            time.sleep(_QUIET_STEP_S)
        return True

    def leave(self) -> None:
        """Logs out and closes whatever this process has open on it, which in a library of the host's is ours alone."""
        assert self.instance
        if self.logins:
            self.logout()
            self.logins.clear()
        if self.instance.foreign:
            self.depart()
        else:
            self.call("C_CloseAllSessions", native.lib.ha_member_slot_id(self.native))

    def logout(self) -> int:
        with self.service:
            return self.call("C_Logout", self.session)


def _fields(structure: Any) -> dict[str, Any]:
    """CK_SLOT_INFO, CK_TOKEN_INFO or CK_INFO as the plain values that a selector compares."""
    return {name: _plain(getattr(structure, name)) for name, _ in native.ffi.typeof(structure[0]).fields}


def _plain(value: Any) -> object:
    if isinstance(value, int):
        return value
    if native.ffi.typeof(value) is native.ffi.typeof("CK_VERSION"):
        return (value.major, value.minor)
    return native.padded(value)


TOKEN_NUMBERS = (
    "ulMaxSessionCount",
    "ulSessionCount",
    "ulMaxRwSessionCount",
    "ulRwSessionCount",
    "ulMaxPinLen",
    "ulMinPinLen",
    "ulTotalPublicMemory",
    "ulFreePublicMemory",
    "ulTotalPrivateMemory",
    "ulFreePrivateMemory",
)


def profile_of(config: MemberConfig) -> str:
    """The profile that `auto` stands for, by the name of the library's file."""
    if config.profile != "auto":
        return config.profile
    name = config.module.rsplit("/", 1)[-1]
    if name.startswith("libsofthsm2"):
        return "softhsm"
    if name.startswith("libsoftokn3"):
        return "nss"
    return "p11-kit" if name.startswith("p11-kit-client") else "generic"
