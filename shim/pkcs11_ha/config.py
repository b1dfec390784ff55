"""The configuration: every option in one table, read from TOML, and refused with file, line and key."""

import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from pkcs11_ha.log import FORMATS, parse_target
from pkcs11_ha.uri import TokenSelector, parse_pin_source, parse_token_uri

if TYPE_CHECKING:
    from pkcs11_ha.luna import Translation

SYSTEM_PATH = "/etc/pkcs11-ha/pkcs11-ha.toml"
SYSTEM_STATE = "/run/pkcs11-ha"
PROFILES = ("auto", "softhsm", "p11-kit", "generic")
MEMBERS_MAX = 32
REPLAY_LIMIT = 1 << 20

LUNA_PATH = "ChrystokiConfigurationPath"
ENVIRONMENT = ("PKCS11_HA_CONF", "PKCS11_HA_STATE", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", LUNA_PATH)
"""The variables that say where things are."""

WORKER_ENVIRONMENT = (
    *("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL"),
    *("LC_COLLATE", "LC_CTYPE", "LC_MESSAGES", "LC_MONETARY", "LC_NUMERIC", "LC_TIME"),
)
"""The variables of the application that its workers have too."""

Mode = Literal["call", "background"]
Instance = Literal["shared", "own"]
HOSTS = ("process", "worker")
Balance = Literal["least-busy", "round-robin", "primary-first"]
Replication = Literal["none", "domain"]
Escrow = Literal["token", "none"]
SessionKeys = Literal["pin", "replicate"]
Outlier = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class HaOptions:
    """`[ha]`: how the library as a whole shows itself."""

    only: bool
    log: str
    log_format: str
    log_max_bytes: int
    manufacturer: str


@dataclass(frozen=True)
class RecoveryOptions:
    """`[recovery]`: when lost members are tried again."""

    interval_s: float
    attempts: int
    mode: Mode
    connect_timeout_s: float


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a member's calls may take, by class (`spec.functions.Deadline`); 0: without a limit."""

    information: float = 5
    cryptography: float = 20
    generation: float = 300  # also of logging in: somebody may have to do so at the device


NO_TIMEOUTS = Timeouts(0, 0, 0)
_GENERATION_FACTOR = 15  # times what cryptography may take


@dataclass(frozen=True)
class MemberConfig:
    """`[[member]]`: one token of one vendor library; `env` and `limits` are (name, value), `pin_source` a path."""

    name: str
    module: str
    token: TokenSelector
    env: tuple[tuple[str, str], ...]
    init_args: str | None
    pin_source: str | None
    instance: Instance
    host: str
    profile: str
    call_timeout_s: Timeouts | None
    user: str | None
    limits: tuple[tuple[str, int], ...]

    @property
    def timeouts(self) -> Timeouts:
        """What holds where nothing is said: without a worker a limit has its price, and is to be wanted."""
        if self.call_timeout_s is None:
            return NO_TIMEOUTS if self.host == "process" else Timeouts()
        return self.call_timeout_s


@dataclass(frozen=True)
class GroupConfig:
    """`[[group]]`: one virtual slot with its token; `members` and `standby` are names of members."""

    label: str
    serial: str | None
    manufacturer: str
    model: str
    members: tuple[str, ...]
    standby: tuple[str, ...]
    balance: Balance
    replication: Replication
    min_copies: int
    escrow: Escrow
    session_keys: SessionKeys
    replay_limit_bytes: int
    outlier: Outlier
    outlier_interval_s: float
    outlier_min_calls: int
    outlier_latency_factor: float
    outlier_ratio: float
    eject_base_s: float
    eject_max_s: float
    slow_start_s: float


@dataclass(frozen=True)
class Config:
    """What a configuration file says; members and groups in the file's order."""

    path: str
    ha: HaOptions
    recovery: RecoveryOptions
    members: tuple[MemberConfig, ...]
    groups: tuple[GroupConfig, ...]


class ConfigError(Exception):
    """The configuration cannot be used; `str` is one line: `/path/x.toml:12: member.env: expected …`.

    `line` is None where no line can be named, `key` empty where no key can.
    """

    def __init__(self, path: str, line: int | None, key: str, problem: str) -> None:
        self.path, self.line, self.key, self.problem = path, line, key, problem
        where = path if line is None else f"{path}:{line}"
        super().__init__(": ".join(_printable(part) for part in (where, key, problem) if part))


def _printable(text: str) -> str:
    """The text on one line, whatever a key or a path contains."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# ---- What values look like


@dataclass(frozen=True)
class Form:
    """What a value must look like: in words, and as the function that makes our value of TOML's.

    `read` raises ValueError: with a message of its own, or without one where the words say it all.
    """

    words: str
    read: Callable[[Any], Any]


def _form(words: str, holds: Callable[[Any], bool], value: Callable[[Any], Any] | None = None) -> Form:
    """A form of which `holds` says whether it is met; `value` makes our value, which may raise ValueError."""

    def read(given: Any) -> Any:
        if not holds(given):
            raise ValueError
        return given if value is None else value(given)

    return Form(words, read)


def _is_text(given: Any) -> bool:
    return isinstance(given, str) and "\0" not in given


def _is_number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def _is_list_of_text(given: Any) -> bool:
    return isinstance(given, list) and all(_is_text(element) for element in given)


def _is_environment(given: Any) -> bool:
    return isinstance(given, dict) and all(
        name and "=" not in name and _is_text(name) and _is_text(value) for name, value in given.items()
    )


def _padded(least: int, most: int) -> Form:
    """A field that PKCS#11 pads with blanks: blanks at its end could not be told from padding."""
    return _form(
        f"{least} to {most} bytes of printable UTF-8 without a blank at either end",
        lambda given: (
            _is_text(given)
            and least <= len(given.encode()) <= most
            and given.isprintable()
            and given == given.strip()
        ),
    )


def _choice(names: Sequence[str], later: Sequence[str] = ()) -> Form:
    """One of `names`; those in `later` are known but refused."""

    def read(given: Any) -> Any:
        if given in later:
            raise ValueError(f'"{given}" is not available in this version')
        if given not in names:
            raise ValueError
        return given

    return Form(" or ".join(f'"{name}"' for name in names), read)


def _is_seconds(given: Any) -> bool:
    # A whole nanosecond at least, and a number of them that fits 64 bits; the bounds also refuse inf and nan.
    return _is_number(given) and 1e-9 <= given <= 1e9


def _timeouts(given: Any) -> Timeouts:
    """A number is that of cryptography, from which the others follow."""
    if given == "none":
        return NO_TIMEOUTS
    if _is_seconds(given):
        return Timeouts(min(Timeouts.information, given), given, _GENERATION_FACTOR * given)
    names = [field.name for field in fields(Timeouts)]
    if not isinstance(given, dict) or not all(map(_is_seconds, given.values())):
        raise ValueError
    for name in given:
        if name not in names:
            raise ValueError(f"unknown class {name!r}; there are {', '.join(names)}")
    return Timeouts(**given)


LIMITS = ("memory_bytes", "open_files", "cpu_s", "core")
"""What a worker may use: RLIMIT_AS, RLIMIT_NOFILE, RLIMIT_CPU, RLIMIT_CORE."""


def _limits(given: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(given, dict):
        raise ValueError
    for name, value in given.items():
        if name not in LIMITS:
            raise ValueError(f"unknown limit {name!r}; there are {', '.join(LIMITS)}")
        least = 0 if name == "core" else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise ValueError
    return tuple(given.items())


def _log_spec(given: str) -> str:
    parse_target(given)
    return given


_BOOLEAN = _form("true or false", lambda given: isinstance(given, bool))
_TEXT = _form("a string", _is_text)
_SECONDS = _form("a number of seconds from 1e-9 to 1e9", _is_seconds)
_TIMEOUTS = Form(
    'a number of seconds from 1e-9 to 1e9, a table of such by class, or "none"',
    _timeouts,
)
_ATTEMPTS = _form(
    "a whole number from -1 to 2147483647",
    lambda given: _is_number(given) and isinstance(given, int) and -1 <= given < 2**31,
)
_COPIES = _form(
    "a whole number from 1 to 32",
    lambda given: _is_number(given) and isinstance(given, int) and 1 <= given <= 32,
)
_BYTES = _form(
    "a whole number of bytes, 0 or more, 1 GiB at most",
    lambda given: _is_number(given) and isinstance(given, int) and 0 <= given <= 1 << 30,
)
# Less than the longest line would be a file for each.
_LOG_BYTES = _form(
    "a whole number of bytes: 0, or from 4096 to 1 TiB",
    lambda given: _is_number(given) and isinstance(given, int) and (given == 0 or 4096 <= given <= 1 << 40),
)
_CALLS = _form(
    "a whole number from 1 to 1000000",
    lambda given: _is_number(given) and isinstance(given, int) and 1 <= given <= 1_000_000,
)
_FACTOR = _form("a number from 1.5 to 1000", lambda given: _is_number(given) and 1.5 <= given <= 1000)
_SHARE = _form("a number above 0, 1 at most", lambda given: _is_number(given) and 0 < given <= 1)
# A name becomes part of paths, where "." and ".." are something else.
_NAME = _form(
    "a name of letters, digits and . _ -",
    lambda given: _is_text(given) and bool(re.fullmatch(r"(?!\.\.?$)[A-Za-z0-9._-]+", given)),
)
_NAMES = _form("a list of member names", _is_list_of_text, tuple)
_SOME_NAMES = _form(
    "a list of at least one member name", lambda given: _is_list_of_text(given) and given != [], tuple
)
_PATH = _form("an absolute path", lambda given: _is_text(given) and given.startswith("/"))
_ENVIRONMENT = _form("a table of strings", _is_environment, lambda given: tuple(given.items()))
_SERIAL = _form(
    "1 to 16 printable ASCII characters without a blank at either end",
    lambda given: _is_text(given) and bool(re.fullmatch(r"(?! )[ -~]{1,16}(?<! )", given)),
)
_LOG = _form('"file:/path", "syslog", "stderr" or "off"', _is_text, _log_spec)
_TOKEN = _form("a PKCS#11 URI (RFC 7512)", _is_text, parse_token_uri)
_HOST = _form(
    '"process", "worker" or "unix:/path"',
    lambda given: given in HOSTS or (_is_text(given) and given.startswith("unix:/")),
)
_LIMITS = Form("a table of whole numbers above 0 (core may be 0)", _limits)
_USER = _form("the name of a user", lambda given: _is_text(given) and given != "")
_PIN_SOURCE = _form('"file:/path"', _is_text, parse_pin_source)

_REQUIRED = object()


@dataclass(frozen=True)
class Option:
    """A row of the table of options."""

    section: str
    name: str
    form: Form
    default: Any
    doc: str

    @property
    def required(self) -> bool:
        """Whether the file must say it; if not, `default` holds, where None is nothing."""
        return self.default is _REQUIRED


OPTIONS = (
    Option("ha", "only", _BOOLEAN, True, "Show the groups alone; false: the members' own slots come first."),
    Option("ha", "log", _LOG, "syslog", "Where the HA log goes."),
    Option("ha", "log_format", _choice(FORMATS), "text", "How its lines are written; json: an object each."),
    Option(
        "ha",
        "log_max_bytes",
        _LOG_BYTES,
        0,
        "A log file that has grown to so much gets a name with the time in it, and a new one is begun; 0: it grows."
        " Not together with logrotate.",
    ),
    Option("ha", "manufacturer", _padded(0, 32), "pkcs11-ha", "The manufacturer that C_GetInfo names."),
    #
    Option("recovery", "interval_s", _SECONDS, 60, "Seconds to pass between attempts for a member (X)."),
    Option("recovery", "attempts", _ATTEMPTS, -1, "Attempts for a member (N): -1 without limit, 0 none."),
    Option("recovery", "mode", _choice(get_args(Mode)), "call", "Recover within calls, or in a thread too."),
    Option(
        "recovery",
        "connect_timeout_s",
        _SECONDS,
        5,
        "Seconds that connecting one member may take, at C_Initialize and in each attempt, and that leaving it may. In"
        ' `mode = "call"` the call that makes an attempt waits so long for a member that hangs, beside its own time.',
    ),
    #
    Option("member", "name", _NAME, _REQUIRED, "What groups, log and tools call the member."),
    Option("member", "module", _PATH, _REQUIRED, "The vendor's PKCS#11 library."),
    Option("member", "token", _TOKEN, _REQUIRED, "Which of the library's tokens it is."),
    Option(
        "member",
        "env",
        _ENVIRONMENT,
        (),
        "Environment while the library is loaded and initialised. A worker has no other, but for the application's"
        f" {', '.join(WORKER_ENVIRONMENT[:-1])} and {WORKER_ENVIRONMENT[-1]}.",
    ),
    Option("member", "init_args", _TEXT, None, "The string C_Initialize gets in pReserved (NSS)."),
    Option("member", "pin_source", _PIN_SOURCE, None, "File with the PIN, where the member has its own."),
    Option(
        "member",
        "instance",
        _choice(get_args(Instance)),
        "shared",
        "A copy of the library, or shared. A token that the application has logged in to by itself, through a library"
        " that it shares, looks at no PIN: if no other member does, the group's C_Login answers"
        " CKR_USER_ALREADY_LOGGED_IN and its sessions stay public.",
    ),
    Option(
        "member",
        "host",
        _HOST,
        "process",
        "Where the library runs: in the application, in a worker process that is started for it, or in the"
        " `pkcs11-ha-worker` that listens at a socket (with an environment and a library of its own).",
    ),
    Option("member", "profile", _TEXT, "auto", "Name of the profile with the library's peculiarities."),
    Option(
        "member",
        "call_timeout_s",
        _TIMEOUTS,
        None,
        "Seconds that a call may take: then its worker is killed. By class of [function](functions.md); what is not"
        f" said is `{{ information = {Timeouts.information}, cryptography = {Timeouts.cryptography}, generation ="
        f" {Timeouts.generation} }}`. A number N is that of cryptography: information has N or"
        f' {Timeouts.information}, whichever is less, generation {_GENERATION_FACTOR} N. With `host = "process"`'
        " none if none is said; with one, threads of this library make the calls, a late one stays behind in the"
        " vendor's, its member is lost (CKR_DEVICE_REMOVED), and what a worker refuses is refused.",
    ),
    Option(
        "member",
        "user",
        _USER,
        None,
        'Who runs the library, with that user\'s groups and HOME: only with `host = "worker"` in an application that'
        " runs as root.",
    ),
    Option(
        "member",
        "limits",
        _LIMITS,
        (),
        f"What the worker may use ({', '.join(LIMITS)}; see `getrlimit`), over its whole life: then the system refuses"
        ' it, or ends it. Only with `host = "worker"`.',
    ),
    #
    Option("group", "label", _padded(1, 32), _REQUIRED, "Label of the virtual token."),
    Option("group", "serial", _SERIAL, None, 'Its serial; else "1" and the serial of the first member.'),
    Option("group", "manufacturer", _padded(0, 32), "pkcs11-ha", "Its manufacturer."),
    Option("group", "model", _padded(0, 16), "HA group", "Its model."),
    Option("group", "members", _SOME_NAMES, _REQUIRED, "The active members; the first is the primary."),
    Option("group", "standby", _NAMES, (), "Members that serve only when no active member is left."),
    Option("group", "balance", _choice(get_args(Balance)), "least-busy", "How operations choose a member."),
    Option(
        "group",
        "replication",
        _choice(get_args(Replication), ("backend",)),
        "none",
        "How keys come to be on every member.",
    ),
    Option("group", "min_copies", _COPIES, 1, "Members that must have taken an object for it to be made."),
    Option("group", "escrow", _choice(get_args(Escrow)), "token", "Wrapped keys kept on the tokens, or not."),
    Option(
        "group", "session_keys", _choice(get_args(SessionKeys)), "pin", "Whether they can change members."
    ),
    Option(
        "group",
        "replay_limit_bytes",
        _BYTES,
        REPLAY_LIMIT,
        "Input of one operation that is kept, in locked memory, so that it can go on on another member.",
    ),
    Option(
        "group",
        "outlier",
        _choice(get_args(Outlier)),
        "auto",
        "Whether members much slower or more faulty than their peers are ejected for a while ([circuit-breaking.md]"
        '(circuit-breaking.md)); "auto": with three active members or more.',
    ),
    Option(
        "group",
        "outlier_interval_s",
        _SECONDS,
        10,
        "Seconds between two comparisons of the members (Envoy's `interval`).",
    ),
    Option(
        "group",
        "outlier_min_calls",
        _CALLS,
        20,
        "Calls that a member must have had to be judged (Hystrix's `requestVolumeThreshold`).",
    ),
    Option(
        "group",
        "outlier_latency_factor",
        _FACTOR,
        5,
        "A call is slow that takes so many times as long as the median of the peers' for the same work.",
    ),
    Option(
        "group",
        "outlier_ratio",
        _SHARE,
        0.2,
        "A member is ejected for so much larger a share of slow, or of failing, calls than its peers have"
        " (Resilience4j's `slowCallRateThreshold`, `failureRateThreshold`).",
    ),
    Option(
        "group",
        "eject_base_s",
        _SECONDS,
        30,
        "Seconds of an ejection, times their number in a row (Envoy's `base_ejection_time`).",
    ),
    Option(
        "group",
        "eject_max_s",
        _SECONDS,
        300,
        "Seconds of an ejection at most (Envoy's `max_ejection_time`).",
    ),
    Option(
        "group",
        "slow_start_s",
        _SECONDS,
        30,
        "Seconds in which the share of an admitted member grows to the whole (HAProxy's `slowstart`, Envoy's"
        " `slow_start_window`).",
    ),
)
"""Every option there is: what is not here is an unknown key."""

SECTIONS = tuple(dict.fromkeys(option.section for option in OPTIONS))


# ---- Where the configuration is


def is_secure(uid: int, euid: int, gid: int, egid: int) -> bool:
    """Whether the process runs with rights its caller has not, so that the environment must not guide it."""
    return uid != euid or gid != egid


def _trusted(environ: Mapping[str, str], secure: bool | None) -> Mapping[str, str]:
    if secure is None:
        secure = is_secure(os.getuid(), os.geteuid(), os.getgid(), os.getegid())
    return {} if secure else environ


def find_path(environ: Mapping[str, str], secure: bool | None = None) -> str:
    """The path of the configuration file, which need not exist.

    $PKCS11_HA_CONF, else the file below $XDG_CONFIG_HOME if there is one, else the system's; if that is not there
    either, Luna's, where $ChrystokiConfigurationPath says. The environment has no say in a `secure` process;
    None finds out whether this is one.
    """
    environ = _trusted(environ, secure)
    if environ.get("PKCS11_HA_CONF"):
        return environ["PKCS11_HA_CONF"]
    home = environ.get("XDG_CONFIG_HOME", "")
    path = f"{home}/pkcs11-ha/pkcs11-ha.toml"
    # the XDG Base Directory Specification has relative paths ignored
    if home.startswith("/") and os.access(path, os.F_OK):
        return path
    luna = environ.get(LUNA_PATH, "")
    return luna_file(luna) if luna and not os.access(SYSTEM_PATH, os.F_OK) else SYSTEM_PATH


def is_luna(path: str) -> bool:
    """Whether the file is in Luna's syntax and not in TOML: its name says so."""
    return path.lower().endswith((".conf", ".ini"))


def luna_file(path: str) -> str:
    """Luna's file, of which `path` names the directory, or itself."""
    if is_luna(path):
        return path
    files = [f"{path.rstrip('/')}/{name}" for name in ("Chrystoki.conf", "crystoki.ini")]
    return next((file for file in files if os.access(file, os.F_OK)), files[0])


def state_dir(environ: Mapping[str, str], secure: bool | None = None) -> str:
    """The directory of status segments and recover requests, which need not exist; `secure` as above."""
    environ = _trusted(environ, secure)
    if environ.get("PKCS11_HA_STATE"):
        return environ["PKCS11_HA_STATE"]
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/pkcs11-ha" if runtime.startswith("/") else SYSTEM_STATE


# ---- Lines: tomllib tells what a value is, not where it stands

Place = tuple[str | int, ...]
"""Where a value stands: ("member", 1, "env", "HOME"); numbers count the elements of arrays."""


@dataclass(frozen=True)
class _Source:
    path: str
    text: str

    def error(self, place: Place, problem: str) -> ConfigError:
        """The error for what stands, or is missing, at `place`, with the line of the nearest thing known."""
        luna = _luna(self.text, self.path) if is_luna(self.path) else None
        lines = locate(self.text) if luna is None else luna.lines()
        nearest = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in lines), ())
        key = ".".join(part for part in place if isinstance(part, str))
        key = key if luna is None else luna.names().get(nearest, key)
        return ConfigError(self.path, lines.get(nearest, 1), key, problem)


def locate(text: str) -> dict[Place, int]:
    """The line (from 1) on which each table, key and array element of a valid TOML document begins."""
    walk = _Walk(text)
    # a line that is not found costs a message its precision, no more
    with suppress(ValueError, RecursionError):
        walk.document()
    return walk.lines


class _Lost(ValueError):
    """The walk met what it does not know: the text is not valid TOML."""


_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY = re.compile(r"""[ \t]*([A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')[ \t]*""")
# Strings first, triple quotes before single ones; up to two quotes may stand right before the last three.
_SCALAR = re.compile(
    r'''"""(?:\\.|(?!""")[^\\])*"{3,5}'''
    r"""|'{3}(?:(?!'{3}).)*'{3,5}"""
    r"""|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[^][{},#"'\s][^][{},#"'\r\n]*""",
    re.DOTALL,
)


class _Walk:
    """One pass over a TOML document (v1.0.0) that notes where things begin."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Place, int] = {}
        self._text = text
        self._at = 0
        self._tables: dict[Place, int] = {}  # arrays of tables, and how many tables each has so far

    def document(self) -> None:
        table: Place = ()
        while self._next() != "":
            if self._skip("[["):
                table = self._header(array=True)
            elif self._skip("["):
                table = self._header(array=False)
            else:
                self._pair(table)

    def _next(self) -> str:
        """The next character that is neither blank nor comment; "" at the end."""
        self._take(_BLANK)
        return self._text[self._at : self._at + 1]

    def _skip(self, mark: str) -> bool:
        found = self._text.startswith(mark, self._at)
        if found:
            self._at += len(mark)
        return found

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise _Lost
        self._at = match.end()
        return match

    def _note(self, place: Place) -> None:
        self.lines.setdefault(place, 1 + self._text.count("\n", 0, self._at))

    def _keys(self) -> list[str]:
        """A key with its dots, as its parts."""
        keys: list[str] = []
        while not keys or self._skip("."):
            word = self._take(_KEY)[1]
            keys.append(tomllib.loads(f"key = {word}")["key"] if word[0] in "\"'" else word)
        return keys

    def _header(self, array: bool) -> Place:
        """`[a.b]` or `[[a.b]]` behind its bracket: below an array of tables it means the last of them."""
        place: Place = ()
        keys = self._keys()
        for position, key in enumerate(keys, 1):
            place = (*place, key)
            self._note(place)
            if array and position == len(keys):
                self._tables[place] = self._tables.get(place, 0) + 1
            if place in self._tables:
                place = (*place, self._tables[place] - 1)
                self._note(place)
        self._skip("]]" if array else "]")
        return place

    def _pair(self, place: Place) -> None:
        for key in self._keys():
            place = (*place, key)
            self._note(place)
        if not self._skip("="):
            raise _Lost
        self._value(place)

    def _value(self, place: Place) -> None:
        self._next()
        if self._skip("["):
            self._elements(place)
        elif self._skip("{"):
            while self._next() != "}":
                if not self._skip(","):
                    self._pair(place)
            self._skip("}")
        else:
            self._take(_SCALAR)

    def _elements(self, place: Place) -> None:
        number = 0
        while self._next() != "]":
            if not self._skip(","):
                self._note((*place, number))
                self._value((*place, number))
                number += 1
        self._skip("]")


# ---- Reading it


def load(path: str, profiles: Sequence[str] = PROFILES) -> Config:
    """Read the file and see that the files it names can be read; raises ConfigError.

    `profiles` are the names that `profile` may have.
    """
    text = read(path)
    config = parse(text, path, profiles)
    for error in unusable(config, text):
        raise error
    return config


def unusable(config: Config, text: str) -> Iterator[ConfigError]:
    """What the configuration names and this process cannot use: files, users.  `text` is what it was parsed from."""
    source = _Source(config.path, text)
    for number, member in enumerate(config.members):
        module = None if member.host.startswith("unix:") else member.module  # that is the worker's to read
        for key, file in (("module", module), ("pin_source", member.pin_source)):
            problem = file and problem_with(file)
            if problem:
                yield source.error(("member", number, key), f"{file}: {problem}")
        if member.user is not None and (problem := _problem_with_user(member.user)):
            yield source.error(("member", number, "user"), problem)


def log_of(path: str) -> tuple[str, str, int]:
    """Where and how a configuration that cannot be used wants its log (`log`, `log_format`, `log_max_bytes`), as far
    as that can be told; else the defaults."""
    options = {o.name: o for o in OPTIONS if o.section == "ha" and o.name.startswith("log")}
    found = {name: option.default for name, option in options.items()}
    with suppress(ConfigError, ValueError, AttributeError):
        wanted = tables(read(path), path).get("ha", {}).items()
        for name, value in wanted:
            if name in options:
                with suppress(ValueError):
                    found[name] = options[name].form.read(value)
    return found["log"], found["log_format"], found["log_max_bytes"]


_BEGIN = "p11ha member add begins one, PKCS11_HA_CONF or --config names another"


def read(path: str, *, luna: bool | None = None) -> str:
    """The text of a configuration file; raises ConfigError.

    Of Luna's (by its name, or as `luna` says) bytes that are not UTF-8 come as lone surrogates: comments may have them.
    """
    errors = "surrogateescape" if luna or (luna is None and is_luna(path)) else "strict"
    try:
        # A FIFO that nobody writes to must not hold up C_Initialize.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(path, None, "", "not a regular file")
            data = file.read()
    except FileNotFoundError as error:
        begin = "" if luna or is_luna(path) else f": {_BEGIN}"
        raise ConfigError(path, None, "", f"{_reason(error)}{begin}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(path, None, "", _reason(error)) from None
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ConfigError(path, 1 + data.count(b"\n", 0, error.start), "", "not UTF-8") from None


def problem_with(path: str) -> str | None:
    """Why the file cannot be read, if so. It is not opened: that could wait (a FIFO) or use it up."""
    try:
        descriptor = os.open(path, os.O_PATH)
    except (OSError, ValueError) as error:
        return _reason(error)
    try:
        directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
    if directory:
        return "is a directory"
    return None if os.access(path, os.R_OK, effective_ids=True) else "permission denied"


def _problem_with_user(name: str) -> str | None:
    """Why no worker can be run as that user, if so."""
    if os.geteuid() != 0:
        return "only an application that runs as root can do that"
    try:
        pwd.getpwnam(name)
    except KeyError:
        return f"there is no user {name!r}"
    return None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def parse(text: str, path: str, profiles: Sequence[str] = PROFILES, complete: bool = True) -> Config:
    """Understand the text of a configuration file; `path` is for messages only. Raises ConfigError.

    One that is not `complete` is being written, and may yet have no group.
    """
    said = tables(text, path)
    source = _Source(path, text)
    for section in said:
        if section not in SECTIONS:
            raise source.error((section,), f"unknown section; there are {', '.join(SECTIONS)}")
    config = Config(
        path=path,
        ha=HaOptions(**_values("ha", said.get("ha", {}), ("ha",), source)),
        recovery=RecoveryOptions(**_values("recovery", said.get("recovery", {}), ("recovery",), source)),
        members=tuple(MemberConfig(**values) for values in _values_of_each("member", said, source)),
        groups=tuple(GroupConfig(**values) for values in _values_of_each("group", said, source)),
    )
    _check_names(config, profiles, source)
    _check_hosts(config, source)
    _check_membership(config, source)
    if complete and not config.groups:
        raise source.error(("group",), "expected at least one [[group]]")
    return config


def _luna(text: str, path: str) -> "Translation":
    from pkcs11_ha.luna import LunaError, translate  # few applications have such a file

    try:
        return translate(text, knows=knows)
    except LunaError as error:
        raise ConfigError(path, error.line, error.key, error.problem) from None


def knows(section: str, name: str) -> bool:
    """Whether there is such an option."""
    return any((option.section, option.name) == (section, name) for option in OPTIONS)


def tables(text: str, path: str) -> dict[str, Any]:
    """The tables of the file, which may be Luna's; raises ConfigError."""
    if is_luna(path):
        return _luna(text, path).tables()
    if text.startswith("\ufeff"):
        raise ConfigError(
            path, 1, "", "begins with a byte order mark, which TOML has not: save it as UTF-8 without one"
        )
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(path, None, "", "not valid TOML: nested too deeply") from None
    except ValueError as error:
        message, _, position = str(error).partition(" (at ")
        found = re.match(r"line ([0-9]+)", position)
        line = int(found[1]) if found else 1 + text.rstrip().count("\n")
        raise ConfigError(path, line, "", f"not valid TOML: {message}") from None


def _values_of_each(section: str, said: dict[str, Any], source: _Source) -> list[dict[str, Any]]:
    elements = said.get(section, [])
    if not isinstance(elements, list):
        raise source.error((section,), f"expected [[{section}]]")
    return [_values(section, table, (section, number), source) for number, table in enumerate(elements)]


def _values(section: str, table: Any, place: Place, source: _Source) -> dict[str, Any]:
    """The value of every option of the section: from the table, else its default."""
    if not isinstance(table, dict):
        raise source.error(place, "expected a table")
    options = {option.name: option for option in OPTIONS if option.section == section}
    for key in table:
        if key not in options:
            raise source.error((*place, key), f"unknown key; there are {', '.join(options)}")
    values = {}
    for name, option in options.items():
        if name not in table and option.required:
            raise source.error((*place, name), "required, but not given")
        try:
            values[name] = option.form.read(table[name]) if name in table else option.default
        except ValueError as error:
            raise source.error((*place, name), str(error) or f"expected {option.form.words}") from None
    return values


def _check_names(config: Config, profiles: Sequence[str], source: _Source) -> None:
    """Names, labels and serials are given once; profiles exist."""
    columns: dict[tuple[str, str], list[str | None]] = {
        ("member", "name"): [member.name for member in config.members],
        ("group", "label"): [group.label for group in config.groups],
        ("group", "serial"): [group.serial for group in config.groups],
    }
    for (section, key), names in columns.items():
        for number, name in enumerate(names):
            if name is not None and name in names[:number]:
                raise source.error((section, number, key), f"{name!r} is taken")
    for number, member in enumerate(config.members):
        if member.profile not in profiles:
            names_known = " or ".join(f'"{name}"' for name in profiles)
            raise source.error(("member", number, "profile"), f"expected {names_known}")


_SOCKET_PATH_MAX = 107  # unix(7)


def _check_hosts(config: Config, source: _Source) -> None:
    """What one host can do and another cannot."""
    for number, member in enumerate(config.members):
        for key, value in (("user", member.user), ("limits", member.limits)):
            if value and member.host != "worker":
                raise source.error(("member", number, key), 'only with host = "worker"')
        if len(os.fsencode(member.host.removeprefix("unix:"))) > _SOCKET_PATH_MAX:
            why = f"a socket's path has {_SOCKET_PATH_MAX} bytes at most"
            raise source.error(("member", number, "host"), why)
        if member.host.startswith("unix:") and member.env:
            raise source.error(
                ("member", number, "env"), "the worker at a socket has an environment of its own"
            )


def _check_membership(config: Config, source: _Source) -> None:
    """Groups are made of members that exist, each in one place."""
    known = {member.name for member in config.members}
    group_of: dict[str, str] = {}
    for number, group in enumerate(config.groups):
        if len(group.members) + len(group.standby) > MEMBERS_MAX:
            raise source.error(("group", number, "members"), f"more than {MEMBERS_MAX} with the standbys")
        for key, names in (("members", group.members), ("standby", group.standby)):
            for position, name in enumerate(names):
                place = ("group", number, key, position)
                if name not in known:
                    raise source.error(place, f"no [[member]] has the name {name!r}")
                if name in group_of:
                    raise source.error(place, f"{name!r} is already in group {group_of[name]!r}")
                group_of[name] = group.label
