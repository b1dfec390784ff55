"""Vendor libraries: one instance per state, in this process and shared where it must be, or in a worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pkcs11_ha import ck
from pkcs11_ha.config import NO_TIMEOUTS, MemberConfig
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.worker import Hands, Worker, WorkerError
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX

# Libraries whose function list is bound to the environment of the moment it was asked for: the variables need
# not stand while it is initialised, which may take long (the server is asked).
_ENV_AT_LIST = ("p11-kit-client",)
_STILL_INSIDE = "a call that was late is still inside it"
_MOST_LEFT_BEHIND = 8  # calls inside a library that nobody waits for: then it is called no more


class LibraryError(Exception):
    """A library cannot be used; `str` is one line."""


class Instance:
    """One initialised state of a library: a function list, and the members that live in it."""

    remote = False  # whether it is in a process of its own
    has_threads = False  # whether calls are made by others than their callers
    is_empty = True  # whether nobody was left behind in it who would be there when it is finalised

    def __init__(self, library: Any, path: str, config: MemberConfig, idle: list[Instance] | None) -> None:
        self.library = library
        self.path = path
        self.idle = idle  # where it waits for the next run, if it is memory for ever
        self.config = config
        self.members: set[str] = set()
        self.list: Any = None
        self.count = 0
        self.version = (0, 0)
        self.initialised = False
        self.foreign = False  # the host initialised it: it is not ours to finalise
        self.one_call_at_a_time = False
        self.lock = (
            threading.RLock()
        )  # over its C_Initialize and C_Finalize: members in it start side by side

    def take_list(self) -> None:
        """Asks for the function list; some libraries answer with a new one each time."""
        count, major, minor = (native.ffi.new("unsigned *") for _ in range(3))
        error = native.ffi.new("char[512]")
        found = native.lib.ha_library_list(self.library, count, major, minor, error, 512)
        if not found:
            raise LibraryError(f"{self.path}: {native.ffi.string(error).decode()}")
        self.list, self.count, self.version = found, count[0], (major[0], minor[0])

    def pointer(self, row: int) -> Any:
        """The library's own function of a row, NULL if it has none."""
        if row >= self.count:
            return native.ffi.NULL
        return native.lib.ha_library_function(self.library, self.list, row)

    def publish(self, member: Any) -> None:
        """Puts the functions into a member's table."""
        for row in range(len(FUNCTIONS)):
            native.lib.ha_member_function(member, row, self.pointer(row))

    def initialise(self, can_create_threads: bool) -> None:
        """C_Initialize; 0x191 means that the host uses this library too."""
        with self.lock:
            if not self.initialised:
                self._initialise(can_create_threads)

    def _initialise(self, can_create_threads: bool) -> None:
        flags = ck.CKF_OS_LOCKING_OK | (0 if can_create_threads else ck.CKF_LIBRARY_CANT_CREATE_OS_THREADS)
        reserved = native.ffi.NULL if self.config.init_args is None else native.text(self.config.init_args)
        function = self.pointer(INDEX["C_Initialize"])
        rv = native.lib.ha_library_initialize(function, flags, reserved)
        if rv == ck.CKR_CANT_LOCK:
            rv = native.lib.ha_library_initialize(function, 0, reserved)
            self.one_call_at_a_time = True
        if rv not in (ck.CKR_OK, ck.CKR_CRYPTOKI_ALREADY_INITIALIZED):
            raise LibraryError(f"{self.path}: C_Initialize answers {ck.rv_name(rv)}")
        self.foreign = rv == ck.CKR_CRYPTOKI_ALREADY_INITIALIZED
        self.initialised = True

    def finalise(self) -> None:
        """C_Finalize, if it is ours to call; its answer changes nothing."""
        if self.initialised and not self.foreign:
            native.lib.ha_library_finalize(self.pointer(INDEX["C_Finalize"]))
        self.initialised = False

    def resume(self) -> None:
        """Before it is called again without having been restarted.  Raises LibraryError."""

    def abandon(self) -> None:
        """Makes calls that are stuck in it come back, where that can be done."""

    def take_turns(self) -> None:
        """Where others make the calls, they make one at a time from now on."""

    def leave(self) -> None:
        """The end of the run."""
        self.finalise()
        self.members.clear()
        if self.idle is not None:
            self.idle.append(self)


class HandedInstance(Instance):
    """An instance whose calls have a limit: threads of ours make them, and are left behind in it when they are late.

    With somebody left behind in it a library is neither initialised nor finalised: it would crash.  Where each function
    list is a state of its own, another list is taken.
    """

    has_threads = True

    def __init__(
        self,
        library: Any,
        path: str,
        config: MemberConfig,
        idle: list[Instance] | None,
        connect_timeout_s: float,
    ) -> None:
        super().__init__(library, path, config, idle)
        self.connect_timeout_s = connect_timeout_s
        self.hands: Hands | None = None
        self.late = False  # C_Initialize did not come back in time
        self.outgrown: list[Any] = []  # lists that others have taken the place of

    @property
    def left_behind(self) -> int:
        return self.hands.left_behind if self.hands else 0

    @property
    def is_empty(self) -> bool:  # type: ignore[override]
        return not self.left_behind or _is_bound_by_list(self.config)

    def pointer(self, row: int) -> Any:
        return self.hands.function(row) if self.hands else super().pointer(row)

    def _initialise(self, can_create_threads: bool) -> None:
        if self.left_behind:
            self._renew()
        self._begin()
        try:
            super()._initialise(can_create_threads)
        except LibraryError:
            self.late = self.left_behind > 0
            raise
        if self.late:
            self.foreign = self.late = False  # it was us who initialised it

    def _begin(self) -> None:
        self._must_be_fit()
        try:
            self.hands = self.hands or Hands(self.config, self.connect_timeout_s)
            self.hands.start(self.library, self.list, self.count)
        except WorkerError as error:
            raise LibraryError(str(error)) from None

    def _must_be_fit(self) -> None:
        if self.left_behind >= _MOST_LEFT_BEHIND:
            raise LibraryError(f"{self.path}: {self.left_behind} calls that were late are still inside it")

    def _renew(self) -> None:
        """Leaves its state to those who are inside."""
        self._must_be_fit()
        if not _is_bound_by_list(self.config):
            raise LibraryError(f"{self.path}: {_STILL_INSIDE}")
        self.outgrown.append(self.list)
        with environment(self.config):
            self.take_list()

    def take_turns(self) -> None:
        assert self.hands
        self.hands.take_turns()

    def resume(self) -> None:
        self._must_be_fit()
        if self.hands and not self.hands.is_alive:  # calls take turns, and one was late
            if self.left_behind:
                raise LibraryError(f"{self.path}: {_STILL_INSIDE}")
            self._begin()

    def finalise(self) -> None:
        if not self.left_behind:
            if self.initialised and self.hands and not self.hands.is_alive:
                self._begin()  # the late one has come back
            super().finalise()
        self.initialised = False
        while self.hands and self.outgrown and not self.left_behind:
            self.hands.start(self.library, self.outgrown.pop(), self.count)
            native.lib.ha_library_finalize(self.pointer(INDEX["C_Finalize"]))

    def abandon(self) -> None:
        if self.hands:
            self.hands.kill()

    def leave(self) -> None:
        """With somebody inside it stays as it is, and is not used again."""
        self.finalise()
        if self.left_behind:
            self.idle = None
        super().leave()
        if self.hands:
            self.hands.leave()
            self.hands = None


class RemoteInstance(Instance):
    """An instance in a worker process: killed and started anew, where another is finalised and initialised."""

    remote = has_threads = True

    def __init__(self, config: MemberConfig, connect_timeout_s: float) -> None:
        super().__init__(None, config.module, config, None)
        try:
            self.worker = Worker(config, connect_timeout_s)
        except WorkerError as error:
            raise LibraryError(str(error)) from None
        self.count = len(FUNCTIONS)

    def pointer(self, row: int) -> Any:
        return self.worker.function(row)

    def _initialise(self, can_create_threads: bool) -> None:  # noqa: ARG002 (the worker's threads are its own)
        try:
            self.worker.start()
        except WorkerError as error:
            raise LibraryError(str(error)) from None
        self.version = self.worker.version()
        super()._initialise(can_create_threads=True)

    def abandon(self) -> None:
        self.worker.kill()

    def take_turns(self) -> None:
        self.worker.take_turns()

    def finalise(self) -> None:
        """Whatever it holds ends with it, so that nothing need be asked of a library that may hang."""
        self.worker.kill()
        self.initialised = False

    def leave(self) -> None:
        self.worker.leave()
        self.initialised = False
        self.members.clear()


class Libraries:
    """All instances of one run, from C_Initialize to C_Finalize."""

    def __init__(self, can_create_threads: bool, connect_timeout_s: float) -> None:
        self.can_create_threads = can_create_threads
        self.connect_timeout_s = connect_timeout_s
        self.instances: list[Instance] = []
        self.lock = threading.Lock()  # of `instances`; held while a library is loaded, not while initialised

    def instance_for(self, config: MemberConfig) -> Instance:
        """The instance a member lives in, loaded if need be and not yet initialised."""
        with self.lock:
            if config.host != "process":
                remote = RemoteInstance(config, self.connect_timeout_s)
                remote.members.add(config.name)
                self.instances.append(remote)
                return remote
            if config.timeouts != NO_TIMEOUTS and not self.can_create_threads:
                raise LibraryError(
                    f"{config.module}: call_timeout_s takes threads, and the application forbids them"
                )
            own = config.instance == "own"
            instance = self._load(config, own)
            twin = next((i for i in self.instances if i.list == instance.list), None)
            if twin and _settings(twin.config) != _settings(config):
                instance, twin = self._load(config, True), None  # two settings are two states
            if twin:
                instance = twin
            else:
                self.instances.append(instance)
            instance.members.add(config.name)
            return instance

    def _load(self, config: MemberConfig, own: bool) -> Instance:
        idle = None
        if own or _is_bound_by_list(config):
            key = (_key(config.module), own, config.env, config.timeouts == NO_TIMEOUTS)
            idle = _idle.setdefault(key, [])
            if idle:
                instance = idle.pop()
                instance.config = config
                return instance
        with environment(config):
            library = _open(config.module, own)
            instance = (
                Instance(library, config.module, config, idle)
                if config.timeouts == NO_TIMEOUTS
                else HandedInstance(library, config.module, config, idle, self.connect_timeout_s)
            )
            instance.take_list()
        return instance

    def initialise(self, instance: Instance, config: MemberConfig) -> None:
        """Initialises an instance under its member's `env`."""
        if instance.remote or _is_bound_by_list(config):
            instance.initialise(self.can_create_threads)
        else:
            with environment(config):
                instance.initialise(self.can_create_threads)

    def revive(self, instance: Instance, config: MemberConfig) -> None:
        """Initialises it again after somebody has finalised it, unless a sibling has been quicker."""
        foreign, instance.initialised = instance.foreign, False
        self.initialise(instance, config)
        instance.foreign = instance.foreign and foreign

    def restart(self, instance: Instance, config: MemberConfig) -> None:
        """Finalises and initialises: how a library is made to forget a dead connection."""
        instance.finalise()
        self.initialise(instance, config)

    def release(self, member: str, instance: Instance) -> None:
        """A member leaves its instance; the last one ends it."""
        with self.lock:
            instance.members.discard(member)
            if instance.members or instance not in self.instances:
                return
            self.instances.remove(instance)
        instance.leave()

    def finalise(self, stuck: frozenset[str], in_time: Callable[[Callable[[], None]], bool]) -> None:
        """Finalises every instance in which no call is stuck."""
        for instance in self.instances:
            if not instance.members & stuck:
                in_time(instance.leave)
            else:
                instance.abandon()


# Opened files stay open for the life of the process; a child of a fork must not use the parent's.
_Key = tuple[int, int, int]
_opened: dict[_Key, Any] = {}
# Private copies, and lists that their library never takes back, between two runs.
_idle: dict[tuple[_Key, bool, tuple[tuple[str, str], ...], bool], list[Instance]] = {}


def _settings(config: MemberConfig) -> tuple[object, ...]:
    """What members in one instance have in common."""
    return (config.env, config.init_args, config.timeouts)


def _is_bound_by_list(config: MemberConfig) -> bool:
    return any(name in os.path.basename(config.module) for name in _ENV_AT_LIST)


def _key(path: str) -> _Key:
    try:
        status = os.stat(path)
    except OSError as error:
        raise LibraryError(f"{path}: {error.strerror}") from None
    return (native.lib.ha_fork_generation(), status.st_dev, status.st_ino)


def _open(path: str, own: bool) -> Any:
    key = _key(path)
    if not own and key in _opened:
        return _opened[key]
    why = native.ffi.new("char[512]")
    # In a child the library that the parent loaded has the parent's state, and locks that nobody will release.
    library = native.lib.ha_library_open(native.text(path), own or key[0] > 0, why, 512)
    if not library:
        raise LibraryError(native.ffi.string(why).decode("utf-8", "replace"))
    if not own:
        _opened[key] = library
    return library


_environment_lock = threading.Lock()


def _after_fork() -> None:
    """In a child, whose parent may have been in the middle of it in a thread that the child does not have."""
    global _environment_lock  # noqa: PLW0603 (the old one may be held for ever)
    _environment_lock = threading.Lock()
    if native.lib is not None:
        native.lib.ha_environ_restore()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def environment(config: MemberConfig) -> Iterator[None]:
    """The member's `env` stands in the process's environment; one member at a time."""
    if not config.env:
        yield
        return
    with _environment_lock:
        names = [native.text(name) for name, _ in config.env]
        values = [native.text(value) for _, value in config.env]
        if not native.lib.ha_environ_set(
            native.ffi.new("char *[]", names), native.ffi.new("char *[]", values), len(names)
        ):
            raise LibraryError(f"member {config.name}: its env cannot be set")
        try:
            yield
        finally:
            native.lib.ha_environ_restore()
