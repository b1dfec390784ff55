"""What `p11ha doctor` looks at, gathered from this host and its members: nothing is judged, and no PIN is tried."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pkcs11_ha import __version__, ck, config
from pkcs11_ha.cli import module
from pkcs11_ha.cli.module import Library, ModuleError
from pkcs11_ha.cli.segments import Found, read_all
from pkcs11_ha.config import Config, ConfigError
from pkcs11_ha.log import parse_target
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.member import Member, MemberState

MODULE = "libpkcs11-ha.so"
WORKER = "pkcs11-ha-worker"
_ELSEWHERE = ("/usr/lib/*/pkcs11", "/usr/lib/pkcs11", "/usr/lib64/pkcs11", "/usr/local/lib/pkcs11")
_PRELOAD = Path("/etc/ld.so.preload")
# What build.py writes into the library.
_STAMP = re.compile(rb"\0([0-9][0-9.a-z]*\+[0-9a-f]{12})\0")
_LIBPYTHON = re.compile(rb"libpython([0-9]+\.[0-9]+)\.so")
_STDLIB = re.compile(rb"(/[^\0]+)/encodings/__init__\.py\0")
_WORKER = re.compile(rb"\0(/[^\0]*/pkcs11-ha-worker)\0")


@dataclass(frozen=True)
class File:
    """What is at a path: owner, group, st_mode."""

    uid: int
    gid: int
    mode: int


@dataclass(frozen=True)
class Place:
    """A path without links, and what is there, if anything."""

    path: str
    file: File | None


@dataclass(frozen=True)
class User:
    """Somebody who runs applications."""

    name: str
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True)
class Build:
    """A libpkcs11-ha.so: what it was built from, and for. `problem`: why it cannot be loaded."""

    path: str
    stamp: str
    python: str
    stdlib: str
    worker: str
    built_s: float
    problem: str = ""


@dataclass(frozen=True)
class MemberFacts:
    """A member as C_Initialize found it; `why` it is away; `clock` is the token's utcTime, if it has a clock."""

    name: str
    group: str
    why: str = ""
    label: str = ""
    serial: str = ""
    flags: int = 0
    clock: str = ""
    mechanisms: frozenset[int] = frozenset()
    drained: bool = False


@dataclass(frozen=True)
class WorkerProcess:
    """A worker and the application that started it."""

    pid: int
    parent: int
    parent_lives: bool


@dataclass(frozen=True)
class LogFacts:
    """The log file's path, its size, and what is free where it lies (None: not known)."""

    path: str
    size: int
    free_bytes: int | None
    free_files: int | None


@dataclass(frozen=True)
class Facts:
    """All of it. `places` has, for each path that matters, where it leads and every directory above that."""

    version: str
    stamp: str
    python: str
    uid: int
    user: User
    build: Build | None
    others: tuple[Build, ...]
    preloaded: tuple[str, ...]
    settings: Config | None
    problem: str  # with the configuration
    state_dir: str
    found: Found  # in the state directory
    log: LogFacts | None
    members: tuple[MemberFacts, ...]
    unread: str  # why members could not be looked at
    workers: tuple[WorkerProcess, ...]
    now_s: float
    synchronised: bool | None
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)


def user_of(name: str) -> User:
    """The user of that name, or who runs this; raises KeyError."""
    entry = pwd.getpwnam(name) if name else pwd.getpwuid(os.geteuid())
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return User(entry.pw_name, entry.pw_uid, frozenset(groups))


def gather(user: User) -> Facts:
    """Looks everywhere; members are connected as an application's C_Initialize does it."""
    path = config.find_path(os.environ)
    settings, problem = _settings(path)
    state_dir = config.state_dir(os.environ)
    build = _build_in_use()
    log = _log(settings)
    wanted = [path, state_dir]
    if log:
        wanted.append(log.path)
    if build:
        wanted += [build.path, build.stdlib, build.worker]
    for member in settings.members if settings else ():
        wanted += [each for each in (member.module, member.pin_source) if each]
    # C_Initialize makes files and processes, and takes away what others left behind: it comes last.
    places, found, workers = _places(wanted), read_all(state_dir, remove=False), tuple(_workers())
    members, unread = _members(settings, build)
    return Facts(
        version=__version__,
        stamp=ck.STAMP,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        uid=os.geteuid(),
        user=user,
        build=build,
        others=tuple(_others(build)),
        preloaded=tuple(_preloaded()),
        settings=settings,
        problem=problem,
        state_dir=state_dir,
        found=found,
        log=log,
        members=members,
        unread=unread,
        workers=workers,
        now_s=time.time(),
        synchronised=_synchronised(),
        places=places,
    )


def _settings(path: str) -> tuple[Config | None, str]:
    try:
        return config.load(path), ""
    except ConfigError as error:
        return None, str(error)


def _places(paths: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    return {path: tuple(Place(each, _file(each)) for each in _lineage(path)) for path in paths}


def _lineage(path: str) -> list[str]:
    """The path, without links, and every directory above it."""
    real = Path(os.path.realpath(path))
    return [str(each) for each in (real, *real.parents)]


def _file(path: str) -> File | None:
    with suppress(OSError, ValueError):
        status = os.stat(path)  # noqa: PTH116 (a path out of a configuration may hold anything)
        return File(status.st_uid, status.st_gid, status.st_mode)
    return None


# ---- the library


def _build_in_use() -> Build | None:
    try:
        path = module.path()
    except ModuleError:
        return None
    return _build(path.resolve(), load=True)


def _build(path: Path, load: bool) -> Build:
    try:
        data, built_s = path.read_bytes(), path.stat().st_mtime
    except OSError as error:
        return Build(str(path), "", "", "", "", 0, error.strerror or str(error))
    problem = ""
    if load:
        try:
            ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            problem = str(error)

    def word(pattern: re.Pattern[bytes]) -> str:
        found = pattern.search(data)
        return os.fsdecode(found[1]) if found else ""

    return Build(str(path), word(_STAMP), word(_LIBPYTHON), word(_STDLIB), word(_WORKER), built_s, problem)


def _others(build: Build | None) -> Iterator[Build]:
    """Libraries of ours elsewhere, where programs look for PKCS#11 modules."""
    places = (place for pattern in _ELSEWHERE for place in Path("/").glob(f"{pattern[1:]}/{MODULE}"))
    for path in sorted({place.resolve() for place in places}):
        if build is None or str(path) != build.path:
            yield _build(path, load=False)


def _preloaded() -> Iterator[str]:
    """What LD_PRELOAD and the system put into every program, as far as it is ours."""
    words = os.environ.get("LD_PRELOAD", "")
    with suppress(OSError):
        words += " " + _PRELOAD.read_text(errors="replace")
    for word in re.split(r"[ :\n]+", words):
        if word.endswith(f"/{MODULE}"):
            yield os.path.realpath(word)


# ---- members


def _members(settings: Config | None, build: Build | None) -> tuple[tuple[MemberFacts, ...], str]:
    if settings is None or build is None or build.problem:
        return (), ""  # said by what is wrong with those
    try:
        with module.initialised() as library:
            return tuple(_each(library)), ""
    except ModuleError as error:
        return (), str(error)


def _each(library: Library) -> Iterator[MemberFacts]:
    for slot in library.core.slots.values():
        if slot.is_group:
            for member in slot.members:
                yield _member(member, slot.face.label)


def _member(member: Member, group: str) -> MemberFacts:
    if member.state is not MemberState.UP or member.facts is None:
        return MemberFacts(member.name, group, member.why or "away")
    facts = member.facts
    return MemberFacts(
        member.name,
        group,
        "",
        facts.label,
        facts.serial,
        facts.flags,
        _clock(member) if facts.flags & ck.CKF_CLOCK_ON_TOKEN else "",
        frozenset(member.mechanisms),
    )


def _clock(member: Member) -> str:
    info = native.ffi.new("CK_TOKEN_INFO *")
    if member.call("C_GetTokenInfo", native.lib.ha_member_slot_id(member.native), info) != ck.CKR_OK:
        return ""
    return native.padded(info.utcTime)


# ---- the host


def _log(settings: Config | None) -> LogFacts | None:
    target = parse_target(settings.ha.log) if settings else ""
    if not target.startswith("/"):
        return None
    path = Path(os.path.realpath(target))
    size = 0
    with suppress(OSError):
        size = path.stat().st_size
    with suppress(OSError):
        room = os.statvfs(path.parent)
        files = room.f_favail if room.f_files else None  # some file systems have no number of them
        return LogFacts(str(path), size, room.f_bavail * room.f_frsize, files)
    return LogFacts(str(path), size, None, None)


def _workers() -> Iterator[WorkerProcess]:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(words[0])).name != WORKER or b"--parent" not in words:
                continue
            ours = Path("/proc/self/ns/pid").readlink()
            if (entry / "ns" / "pid").readlink() != ours:
                continue  # a container's: its numbers mean something else
            parent = int(words[words.index(b"--parent") + 1])
            yield WorkerProcess(int(entry.name), parent, Path(f"/proc/{parent}").exists())


_TIME_ERROR = 5


def _synchronised() -> bool | None:
    """What the kernel knows of the system clock (adjtimex); None if it does not say."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        state = libc.adjtimex(ctypes.create_string_buffer(512))  # modes = 0: nothing is set
        if state >= 0:
            return bool(state != _TIME_ERROR)
        if ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
            return None
    return None
