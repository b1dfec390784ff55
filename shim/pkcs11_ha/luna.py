"""Luna's client configuration (Chrystoki.conf, crystoki.ini) read, and said in the words of ours.  Pure."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pkcs11_ha.uri import TokenSelector

Place = tuple[str | int, ...]
"""Where a value stands in our configuration: ("member", 0, "module")."""

HA_SECTIONS = ("VirtualToken", "HASynchronize", "HAConfiguration", "HARecovery")
"""What Luna's own library needs no more, once the groups are ours."""

LOG_FILE = "haErrorLog.txt"
SERIAL_SIZE = 16  # of CK_TOKEN_INFO.serialNumber


_NOT_TEXT = "not UTF-8: iconv -f ISO-8859-1 -t UTF-8 makes it so"
_UTF_16 = "UTF-16: iconv -f UTF-16 -t UTF-8 makes it UTF-8"
_MARKS_16 = "\udcff\udcfe", "\udcfe\udcff"  # the byte order marks, as bytes that are not UTF-8 come


def _is_text(text: str) -> bool:
    """Whether it was UTF-8: bytes that were not come as lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


class LunaError(Exception):
    """The file is not understood, or says what cannot be: on this line, of this key (if it is one)."""

    def __init__(self, line: int, key: str, problem: str) -> None:
        if not _is_text(key + problem):
            key, problem = "", _NOT_TEXT
        super().__init__(f"{line}: {key}: {problem}")
        self.line, self.key, self.problem = line, key, problem


# ---- The file


@dataclass(frozen=True)
class Entry:
    """`key = value` of a section, and the line (from 1) on which it stands."""

    section: str
    key: str
    value: str
    line: int

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    def error(self, problem: str) -> LunaError:
        return LunaError(self.line, self.name, problem)


_MARK = "\ufeff"  # some editors begin a file with it
_BLANK = re.compile(r"(?:\s|#[^\n]*(?:\n|$))+")
_HEAD = re.compile(r"([^={};\n]+?)\s*=\s*\{")
_PAIR = re.compile(r"([^={};\n]+?)[^\S\n]*=[^\S\n]*([^;{}\n]*?)[^\S\n]*;")


def parse(text: str) -> tuple[Entry, ...]:
    """The entries of the file in its order, in Unix or Windows syntax, whichever it is; raises LunaError."""
    if text.startswith(_MARKS_16) or "\0" in text:
        raise LunaError(1, "", _UTF_16)
    entries = _parse_ini(text) if _is_ini(text) else _parse_unix(text)[0]
    for entry in entries:
        if not _is_text(entry.name + entry.value):
            raise entry.error(_NOT_TEXT)
    return entries


def _is_ini(text: str) -> bool:
    first = next((line.strip() for line in text.removeprefix(_MARK).splitlines() if _means(line)), "")
    return first.startswith("[")


def _means(line: str) -> bool:
    return line.strip() != "" and line.strip()[0] not in "#;"


def _parse_unix(text: str) -> tuple[tuple[Entry, ...], tuple[tuple[str, int, int], ...]]:
    """`Section = { Key = value; }`, however it is broken into lines; and where each section begins and ends."""
    entries: list[Entry] = []
    spans: list[tuple[str, int, int]] = []
    section, opened, began, at = "", 0, 0, int(text.startswith(_MARK))
    while at < len(text):
        if blank := _BLANK.match(text, at):
            at = blank.end()
            continue
        line = 1 + text.count("\n", 0, at)
        if opened and text[at] == "}":
            opened, at = 0, at + 1
            spans.append((section, began, at))
        elif opened and (pair := _PAIR.match(text, at)):
            entries.append(Entry(section, pair[1], _bare(pair[2]), line))
            at = pair.end()
        elif not opened and (head := _HEAD.match(text, at)):
            section, opened, began, at = head[1], line, at, head.end()
        elif opened and (head := _HEAD.match(text, at)):
            raise LunaError(opened, section, f"is not closed by `}}` before {head[1]} on line {line}")
        else:
            wanted = "`Key = value;` or `}`" if opened else "`Section = {`"
            raise LunaError(line, "", _problem(wanted, text[at:].split("\n", 1)[0].strip()))
    if opened:
        raise LunaError(opened, section, "is not closed by `}`")
    return tuple(entries), tuple(spans)


def _problem(wanted: str, words: str) -> str:
    """What is wrong with a line.  Its value is not shown: it may be a secret."""
    key, equals, value = words.partition("=")
    if not equals:
        return f"expected {wanted}, not `{words.split()[0][:40]} …`"
    if "}" in wanted and key.strip() and not value.rstrip().endswith((";", "{")):
        return f"{key.strip()}: its value must end with `;`"
    return f"expected {wanted}, not `{key.strip()} = …`"


def _parse_ini(text: str) -> tuple[Entry, ...]:
    """`[Section]` and `Key=value`, one a line."""
    entries: list[Entry] = []
    section = ""
    for number, line in enumerate(text.removeprefix(_MARK).splitlines(), 1):
        words = line.strip()
        if not _means(line):
            continue
        if words.startswith("[") and words.endswith("]") and words[1:-1].strip():
            section = words[1:-1].strip()
            continue
        key, equals, value = words.partition("=")
        if not equals or not key.strip() or not section:
            raise LunaError(number, "", _problem("`[Section]` or `Key=value`", words))
        entries.append(Entry(section, key.strip(), _bare(value.strip()), number))
    return tuple(entries)


def _bare(value: str) -> str:
    """Some tools write values in quotes."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


# ---- What becomes of it


@dataclass(frozen=True)
class Setting:
    """A value of our configuration, and the entry that it comes from."""

    value: Any
    entry: Entry


@dataclass(frozen=True)
class Remark:
    """What an operator is to know of a line of the file; `line` is None for what is not in it."""

    line: int | None
    text: str

    def __str__(self) -> str:
        return self.text if self.line is None else f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Group:
    """A group as the file has it, for those who want to see it as Luna shows it."""

    label: str
    serial: str
    members: tuple[str, ...]
    standby: tuple[str, ...]
    synchronised: bool


@dataclass(frozen=True)
class Translation:
    """The file in our words."""

    settings: Mapping[Place, Setting]
    groups: tuple[Group, ...]
    remarks: tuple[Remark, ...]

    def tables(self) -> dict[str, Any]:
        """As tomllib gives them."""
        tables: dict[str, Any] = {}
        for place, setting in self.settings.items():
            if len(place) == 2:
                tables.setdefault(str(place[0]), {})[place[1]] = setting.value
                continue
            section, number, key = place
            elements = tables.setdefault(str(section), [])
            if number == len(elements):
                elements.append({})
            elements[number][key] = setting.value
        return tables

    def lines(self) -> dict[Place, int]:
        """The line of each value, and of what stands around it, as `config.locate` has them."""
        lines: dict[Place, int] = {}
        for place, setting in self.settings.items():
            for size in range(1, len(place) + 1):
                lines.setdefault(place[:size], setting.entry.line)
        return lines

    def names(self) -> dict[Place, str]:
        """What the file calls each value."""
        return {place: setting.entry.name for place, setting in self.settings.items()}


@dataclass
class _Numbered:
    """The entries of one VirtualTokenNN."""

    label: Entry | None = None
    serial: Entry | None = None
    members: Entry | None = None


@dataclass
class _Draft:
    """What was read so far."""

    knows: Callable[[str, str], bool]
    settings: dict[Place, Setting] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    libraries: dict[str, Entry] = field(default_factory=dict)
    numbered: dict[int, _Numbered] = field(default_factory=dict)
    synchronise: dict[str, Entry] = field(default_factory=dict)
    standby: dict[tuple[str, str], Entry] = field(default_factory=dict)
    log: dict[str, Entry] = field(default_factory=dict)
    probe: Entry | None = None
    has_own_file: bool = False  # Luna's library is to have one without groups

    def set(self, section: str, key: str, value: Any, entry: Entry) -> None:
        self.settings[section, key] = Setting(value, entry)

    def say(self, entry: Entry, text: str) -> None:
        self.remarks.append(Remark(entry.line, f"{entry.name}: {text}"))


def _flag(entry: Entry) -> bool:
    if entry.value not in ("0", "1"):
        raise entry.error("expected 1 or 0")
    return entry.value == "1"


def _whole(entry: Entry) -> int:
    if not re.fullmatch(r"-?[0-9]{1,12}", entry.value):
        raise entry.error("expected a whole number")
    return int(entry.value)


def _above_zero(entry: Entry) -> int:
    number = _whole(entry)
    if number <= 0:
        raise entry.error("expected a whole number above 0")
    return number


def _enabled(entry: Entry) -> bool:
    if entry.value.lower() not in ("enabled", "disabled"):
        raise entry.error("expected enabled or disabled")
    return entry.value.lower() == "enabled"


def _serials(entry: Entry) -> list[str]:
    """A list of serial numbers; each will be a name of ours and part of a URI."""
    serials = [part.strip() for part in entry.value.split(",") if part.strip()]
    if not serials:
        raise entry.error("expected serial numbers with commas between them")
    for serial in serials:
        if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{SERIAL_SIZE}}}", serial) or set(serial) <= {"."}:
            raise entry.error(f"{serial!r} is no serial number")
    return serials


# Each takes an entry into the draft; `part` is what stands in the key for NN or LABEL.
_Take = Callable[[_Draft, Entry, str], None]


def _library(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.libraries[entry.key.lower()] = entry


def _label(draft: _Draft, entry: Entry, part: str) -> None:
    draft.numbered.setdefault(int(part), _Numbered()).label = entry


def _serial(draft: _Draft, entry: Entry, part: str) -> None:
    draft.numbered.setdefault(int(part), _Numbered()).serial = entry


def _members(draft: _Draft, entry: Entry, part: str) -> None:
    draft.numbered.setdefault(int(part), _Numbered()).members = entry


def _active_recovery(draft: _Draft, entry: Entry, _part: str) -> None:
    if entry.value.lower() not in ("activebasic", "activeenhanced"):
        raise entry.error("expected activeBasic or activeEnhanced")
    draft.set("recovery", "mode", "background", entry)
    if entry.value.lower() == "activebasic":
        draft.say(entry, "sessions and login outlive the loss of all members here, as with activeEnhanced")


def _synchronise(draft: _Draft, entry: Entry, part: str) -> None:
    _flag(entry)
    draft.synchronise[part.lower()] = entry


def _standby(draft: _Draft, entry: Entry, part: str) -> None:
    draft.standby[entry.section.lower(), part.lower()] = entry


def _ha_only(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.set("ha", "only", _flag(entry), entry)
    if _flag(entry) and not draft.has_own_file:
        draft.say(
            entry,
            "Luna's own library reads this too, and hides the members from us: "
            "p11ha import-luna --client-config DIR writes it a file without",
        )


def _attempts(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.set("recovery", "attempts", _whole(entry), entry)


def _interval(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.set("recovery", "interval_s", _above_zero(entry), entry)


def _log(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.log[entry.key.lower()] = entry


def _log_length(draft: _Draft, entry: Entry, _part: str) -> None:
    if draft.knows("ha", "log_max_bytes"):
        draft.set("ha", "log_max_bytes", _above_zero(entry), entry)
    else:
        draft.say(entry, "no counterpart in this version: the log is not cut by size")


def _deactivation(draft: _Draft, entry: Entry, _part: str) -> None:
    if not _flag(entry):
        draft.say(entry, "a member that lost its login is always logged in again, else left out")


def _probe(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.probe = entry


def _receive(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.set("recovery", "connect_timeout_s", _seconds(_above_zero(entry)), entry)


def _seconds(milliseconds: int) -> float:
    whole, rest = divmod(milliseconds, 1000)
    return whole if rest == 0 else milliseconds / 1000


def _no_recovery(draft: _Draft, entry: Entry, _part: str) -> None:
    draft.say(entry, "no counterpart: p11ha recover asks running applications to try at once")


@dataclass(frozen=True)
class Key:
    """A row of the table of keys that are understood; NN and LABEL in a name stand for a group's number and label."""

    section: str
    name: str
    ours: str
    meaning: str
    take: _Take

    def part(self, entry: Entry) -> str | None:
        """What stands for NN or LABEL in the entry's key ("" without one); None if the row is not about it."""
        if self.section != "any" and self.section.lower() != entry.section.lower():
            return None
        pattern = self.name.replace("NN", "([0-9]+)").replace("LABEL", "(.+)")
        found = re.fullmatch(pattern, entry.key, re.IGNORECASE)
        return None if found is None else "".join(found.groups())


KEYS = (
    Key("Chrystoki2", "LibUNIX64", "[[member]] module", "The library of every member.", _library),
    Key("Chrystoki2", "LibUNIX", "[[member]] module", "The same, where there is no LibUNIX64.", _library),
    Key("Chrystoki2", "LibNT", "", "A library for Windows: `--module` names one for this system.", _library),
    Key("VirtualToken", "VirtualTokenNNLabel", "[[group]] label", "The group.", _label),
    Key(
        "VirtualToken",
        "VirtualTokenNNSN",
        "[[group]] serial",
        f'Its serial; one longer than {SERIAL_SIZE} characters is left to the default, "1" and the first member\'s.',
        _serial,
    ),
    Key(
        "VirtualToken",
        "VirtualTokenNNMembers",
        "[[member]] token, [[group]] members",
        "Its members by serial number, in this order; the first is the primary.",
        _members,
    ),
    Key(
        "VirtualToken",
        "VirtualTokenActiveRecovery",
        "[recovery] mode",
        'activeBasic and activeEnhanced are "background": a thread recovers members. Sessions and login are always'
        ' kept, as by activeEnhanced. Without it "call", as up to Luna 6.1, and import-luna says so.',
        _active_recovery,
    ),
    Key(
        "HAConfiguration",
        "LABELStandbyMembers",
        "[[group]] standby",
        "Standby members. Luna documents no key for them; this one was seen in use. They may stand among the members"
        " too.",
        _standby,
    ),
    Key(
        "VirtualToken",
        "VirtualTokenNNStandbyMembers",
        "[[group]] standby",
        "The same, should it be spelled so.",
        _standby,
    ),
    Key(
        "HASynchronize",
        "LABEL",
        "[[group]] replication",
        '1 is "domain": writing waits for `p11ha domain init`, once. 0, or a group of one member, is "none".',
        _synchronise,
    ),
    Key(
        "HAConfiguration",
        "HAOnly",
        "[ha] only",
        "1 is true. Without it false, as with Luna: the members' own slots come first.",
        _ha_only,
    ),
    Key(
        "HAConfiguration",
        "reconnAtt",
        "[recovery] attempts",
        "The same numbers: -1 without limit, 0 none. Without it -1.",
        _attempts,
    ),
    Key("HAConfiguration", "AutoReconnectInterval", "[recovery] interval_s", "Seconds.", _interval),
    Key(
        "HAConfiguration",
        "haLogStatus",
        "[ha] log",
        'disabled is "off"; enabled without haLogPath or haLogToStdout is the default, "syslog".',
        _log,
    ),
    Key("HAConfiguration", "haLogPath", "[ha] log", f'"file:PATH/{LOG_FILE}"', _log),
    Key(
        "HAConfiguration",
        "haLogToStdout",
        "[ha] log",
        'enabled is "stderr": standard output is the application\'s.',
        _log,
    ),
    Key("HAConfiguration", "logLen", "[ha] log_max_bytes", "Bytes.", _log_length),
    Key(
        "HAConfiguration",
        "failover_on_deactivation",
        "",
        "Always so: a member that lost its login is logged in again, else left out.",
        _deactivation,
    ),
    Key(
        "any",
        "ProbeTimeout",
        "[[member]] call_timeout_s",
        "How long a call may hang. Its unit is documented nowhere: 1000 and more are taken for milliseconds, less for"
        " seconds.",
        _probe,
    ),
    Key(
        "LunaSA Client",
        "ReceiveTimeout",
        "[recovery] connect_timeout_s",
        "Milliseconds until a member counts as away. Luna's library goes on reading it for its own calls.",
        _receive,
    ),
    Key("HARecovery", "LABEL", "", "No counterpart: `p11ha recover` does it.", _no_recovery),
)
"""Every key that is understood, and what becomes of it."""


_NO_MODE = (
    "VirtualTokenActiveRecovery is not given: members are recovered within calls, as up to Luna 6.1; "
    '[recovery] mode = "background" has a thread do it, as later ones do'
)


def translate(
    text: str,
    module: str | None = None,
    env: Mapping[str, str] | None = None,
    knows: Callable[[str, str], bool] = lambda _section, _key: False,
) -> Translation:
    """The file in our words; raises LunaError.

    `module` is a library instead of the file's, `env` an environment for it; `knows` says whether our
    configuration has an option (section, name).
    """
    draft = _Draft(knows, has_own_file=bool(env))
    _take_all(draft, parse(text))
    if not draft.numbered:
        raise LunaError(1, "VirtualToken", "names no group: VirtualToken00Label, VirtualToken00Members")
    _decide_log(draft)
    if ("ha", "only") not in draft.settings:
        anchor = next(entry for group in draft.numbered.values() for entry in _entries(group))
        draft.set("ha", "only", False, Entry("HAConfiguration", "HAOnly", "not given", anchor.line))
    if ("recovery", "mode") not in draft.settings:
        draft.remarks.append(Remark(None, _NO_MODE))
    groups = [_group(draft, number, draft.numbered[number]) for number in sorted(draft.numbered)]
    _write_members(draft, groups, module, env)
    _write_groups(draft, groups)
    if ("recovery", "attempts") not in draft.settings:
        draft.remarks.append(Remark(None, "reconnAtt is not given: lost members are tried without limit"))
    _say_of_tabs(draft, text)
    draft.remarks.sort(key=lambda remark: (remark.line is None, remark.line or 0))
    return Translation(draft.settings, tuple(group.plain for group in groups), tuple(draft.remarks))


def _take_all(draft: _Draft, entries: Iterable[Entry]) -> None:
    """Every entry by its row of the table; what has none is said, by section where it is not about groups."""
    taken: dict[tuple[str, str], Entry] = {}
    others: dict[str, list[Entry]] = {}
    for entry in entries:
        found = ((key, part) for key in KEYS if (part := key.part(entry)) is not None)
        key, part = next(found, (None, ""))
        if key is not None:
            name = entry.section.lower(), entry.key.lower()
            if name in taken:
                raise entry.error(f"given twice: line {taken[name].line} has it already")
            taken[name] = entry
            key.take(draft, entry, part)
        elif entry.section.lower() in (section.lower() for section in HA_SECTIONS):
            more = ", so it is not known who stands by" if "standby" in entry.key.lower() else ""
            draft.say(entry, f"not known{more}")
        else:
            others.setdefault(entry.section, []).append(entry)
    for section, those in others.items():
        names = ", ".join(entry.key for entry in those[:3]) + (", …" if len(those) > 3 else "")
        draft.remarks.append(
            Remark(those[0].line, f"{section}: {names}: no counterpart; Luna's library goes on reading it")
        )


def _entries(group: _Numbered) -> list[Entry]:
    return [entry for entry in (group.label, group.serial, group.members) if entry is not None]


def _decide_log(draft: _Draft) -> None:
    """Three keys say where the log goes."""
    status, path, stdout = (draft.log.get(key) for key in ("halogstatus", "halogpath", "halogtostdout"))
    if status is not None and not _enabled(status):
        draft.set("ha", "log", "off", status)
    elif stdout is not None and _enabled(stdout):
        draft.set("ha", "log", "stderr", stdout)
        draft.say(stdout, "standard output is the application's: the log goes to standard error")
    elif path is not None and path.value.startswith("/"):
        draft.set("ha", "log", f"file:{_uri_path(path.value.rstrip('/'))}/{LOG_FILE}", path)
    elif path is not None:
        draft.say(path, "no absolute path on this system: the log goes to syslog")
    elif status is not None:
        draft.say(status, "without haLogPath: the log goes to syslog")


def _uri_path(path: str) -> str:
    """Percent-encoded (RFC 3986)."""
    harmless = r"[A-Za-z0-9\-._~:@!$'()*+,;=&/]"
    return "".join(c if re.fullmatch(harmless, c) else "".join(f"%{b:02X}" for b in c.encode()) for c in path)


@dataclass(frozen=True)
class _Whole:
    """A group with the entries that it comes from."""

    plain: Group
    entries: _Numbered
    standby: Entry | None
    synchronise: Entry | None


def _group(draft: _Draft, number: int, entries: _Numbered) -> _Whole:
    if entries.label is None or entries.members is None:
        lacking = "Label" if entries.label is None else "Members"
        raise _entries(entries)[0].error(f"VirtualToken{number:02}{lacking} is lacking")
    label = entries.label.value
    entry = draft.standby.pop(("haconfiguration", label.lower()), None)
    for section, part in tuple(draft.standby):
        if section == "virtualtoken" and int(part) == number:
            entry = draft.standby.pop((section, part))
    standby = _serials(entry) if entry is not None else []
    members = [serial for serial in _serials(entries.members) if serial not in standby]
    if entry is not None and not members:
        raise entry.error("all members stand by: at least one must be active")
    synchronise = draft.synchronise.pop(label.lower(), None)
    synchronised = synchronise is not None and _flag(synchronise)
    serial = "1" + (members + standby)[0] if entries.serial is None else entries.serial.value
    plain = Group(label, serial, tuple(members), tuple(standby), synchronised)
    return _Whole(plain, entries, entry, synchronise)


def _module(draft: _Draft) -> Entry:
    """The library for this system."""
    for name in ("libunix64", "libunix"):
        if name in draft.libraries:
            return draft.libraries[name]
    for entry in draft.libraries.values():
        raise entry.error("is a library for Windows: p11ha import-luna --module names one for this system")
    raise LunaError(1, "Chrystoki2", "names no library: LibUNIX64, or p11ha import-luna --module")


def _write_members(
    draft: _Draft, groups: list[_Whole], module: str | None, env: Mapping[str, str] | None
) -> None:
    """[[member]] for every serial number, in the groups' order.  A token in two groups is refused by the check
    that every configuration passes."""
    library = _module(draft) if module is None else None
    written: set[str] = set()
    for group in groups:
        assert group.entries.members is not None
        for serial in (*group.plain.members, *group.plain.standby):
            if serial in written:
                continue
            entry = group.entries.members if serial in group.plain.members else group.standby
            assert entry is not None
            place = ("member", len(written))
            written.add(serial)
            values: dict[str, tuple[Any, Entry]] = {
                "name": (serial, entry),
                "module": (module, entry) if library is None else (library.value, library),
                "token": (str(TokenSelector((("serial", serial),))), entry),
            }
            if env:
                values["env"] = (dict(env), entry)
            if draft.probe is not None:
                values["call_timeout_s"] = (_probe_seconds(draft.probe), draft.probe)
            draft.settings.update({(*place, key): Setting(*value) for key, value in values.items()})
    if draft.probe is not None:
        draft.say(draft.probe, f"its unit is documented nowhere: taken for {_probe_seconds(draft.probe)} s")


def _probe_seconds(entry: Entry) -> float:
    number = _above_zero(entry)
    return _seconds(number) if number >= 1000 else number


def _write_groups(draft: _Draft, groups: list[_Whole]) -> None:
    for number, group in enumerate(groups):
        plain, entries = group.plain, group.entries
        assert entries.label is not None
        assert entries.members is not None
        values: dict[str, tuple[Any, Entry]] = {"label": (plain.label, entries.label)}
        if entries.serial is not None and len(plain.serial) <= SERIAL_SIZE:
            values["serial"] = (plain.serial, entries.serial)
        elif entries.serial is not None:
            draft.say(
                entries.serial, f"longer than {SERIAL_SIZE} characters: the group has the default serial"
            )
        values["members"] = (list(plain.members), entries.members)
        if group.standby is not None:
            values["standby"] = (list(plain.standby), group.standby)
        if group.synchronise is not None:
            _decide_replication(draft, group, group.synchronise, values)
        draft.settings.update({("group", number, key): Setting(*value) for key, value in values.items()})
    for entry in (*draft.standby.values(), *draft.synchronise.values()):
        draft.say(entry, "there is no such group")
    if not any(group.standby for group in groups) and any(len(g.plain.members) > 1 for g in groups):
        text = "nothing says who stands by (Luna documents no key for it): all members are active"
        draft.remarks.append(Remark(None, text))


def _decide_replication(
    draft: _Draft, group: _Whole, entry: Entry, values: dict[str, tuple[Any, Entry]]
) -> None:
    alone = len(group.plain.members) + len(group.plain.standby) == 1
    values["replication"] = ("domain" if group.plain.synchronised and not alone else "none", entry)
    if group.plain.synchronised and alone:
        draft.say(entry, "one member has nobody to be synchronised with")
    elif group.plain.synchronised:
        draft.say(
            entry, f"keys travel under a key of the group's own: once, p11ha domain init {group.plain.label}"
        )


def _say_of_tabs(draft: _Draft, text: str) -> None:
    line = next((n for n, line in enumerate(text.splitlines(), 1) if "\t" in line), None)
    if line is not None:
        draft.remarks.append(Remark(line, "a tab, which Luna's own library does not read"))


def without_ha(text: str) -> str:
    """The file for Luna's own library: as it is, less what is about groups; raises LunaError."""
    unwanted = {section.lower() for section in HA_SECTIONS}
    if _is_ini(text):
        parse(text)
        kept, keep = [], True
        for line in text.splitlines(keepends=True):
            if line.strip().startswith("["):
                keep = line.strip()[1:-1].strip().lower() not in unwanted
            kept += [line] if keep else []
        return "".join(kept)
    for section, begins, ends in reversed(_parse_unix(text)[1]):
        if section.lower() in unwanted:
            text = text[:begins] + text[ends:].removeprefix("\r").removeprefix("\n")
    return text
