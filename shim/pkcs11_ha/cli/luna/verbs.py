"""What Luna's commands do here: each looks at the configuration or the library, changes the first, and says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from pkcs11_ha import config
from pkcs11_ha.cli import domain, module, objects, operator, status, tokens
from pkcs11_ha.cli.luna import edits, grammar, listing
from pkcs11_ha.cli.luna.edits import Change
from pkcs11_ha.cli.luna.grammar import Command, UsageError
from pkcs11_ha.cli.module import ModuleError
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.cli.options import option as option_of
from pkcs11_ha.cli.progress import progress
from pkcs11_ha.cli.requests import directory
from pkcs11_ha.cli.tokens import ANY
from pkcs11_ha.config import Config, GroupConfig, MemberConfig
from pkcs11_ha.luna import LOG_FILE, SERIAL_SIZE
from pkcs11_ha.runtime import identity_file, requests
from pkcs11_ha.runtime.member import MemberState

NO_ERROR = "Command Result : No Error"
_USUAL_S = (60, 1200)
_PATIENCE_S = 20.0  # for a library, where no configuration says how long
_OF_ONE_MEMBER = ("name", "token", "pin_source")


class _Run:
    """One command: the configuration that it is about, and what it prints."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.path = command.get(grammar.CONFIG) or config.find_path(os.environ)
        os.environ["PKCS11_HA_CONF"] = self.path
        self.lines: list[str] = []
        self.data: object = None

    def settings(self) -> Config:
        """Raises ConfigError."""
        return config.load(self.path)

    def changed(self, change: Change, said: str) -> Config:
        """Makes the change and says it."""
        settings = edits.apply(self.path, change)
        self.lines += ["", said, ""]
        return settings

    def group(self, settings: Config) -> GroupConfig:
        """The group that -group or -label names, by label or number; raises OperatorError, ModuleError."""
        wanted = self.command.get(grammar.GROUP) or self.command.get(grammar.LABEL)
        for group in settings.groups:
            if wanted in (group.label, number_of(settings, group)):
                return group
        if not all(_says_serials(settings, group) for group in settings.groups):
            with module.initialised() as library:
                for slot in library.core.slots.values():
                    if slot.is_group and slot.face.serial == wanted:
                        return next(group for group in settings.groups if group.label == slot.face.label)
        known = ", ".join(group.label for group in settings.groups)
        raise OperatorError(f"no group {wanted!r}: there is {known}")

    def serial(self, settings: Config, member: MemberConfig) -> str:
        """What a change calls a member."""
        return self.command.get(grammar.SERIAL) or serial_of(settings, member.name)

    def member(self, settings: Config) -> MemberConfig:
        """The member that -serialNumber or -slot names; raises OperatorError."""
        wanted = self.command.get(grammar.SERIAL)
        if self.command.has(grammar.SLOT):
            return _member_in_slot(settings, self.command.get(grammar.SLOT))
        found = _member_with(settings, wanted)
        if found is None:
            raise OperatorError(f"no member has the serial number {wanted!r}: p11ha luna hagroup listGroups")
        return found


def run(words: Sequence[str]) -> str:
    """What the command prints; raises UsageError, ConfigError, OperatorError, ModuleError."""
    if words and words[0].lower().lstrip("-") in ("help", "h", "?"):
        return "\n".join(grammar.help_lines())
    command = grammar.read(words)
    this = _Run(command)
    _DOES[command.verb.does](this)
    if command.has(grammar.JSON) and this.data is not None:
        return json.dumps(this.data, indent=2)
    result = ["", NO_ERROR] if command.verb.tool == "hagroup" else []
    return "\n".join([*this.lines, *result])


# ---- what there is


def serial_of(settings: Config, name: str) -> str:
    """A member's serial number as far as the configuration says it, else its name."""
    member = next(member for member in settings.members if member.name == name)
    return member.token.serial or name


def _says_serials(settings: Config, group: GroupConfig) -> bool:
    """Whether the configuration has the serial numbers of all its members."""
    names = (*group.members, *group.standby)
    return all(member.token.serial for member in settings.members if member.name in names)


def number_of(settings: Config, group: GroupConfig) -> str:
    """The group's serial, as far as the configuration says it."""
    return group.serial or f"1{serial_of(settings, group.members[0])}"[:SERIAL_SIZE]


def _globals(settings: Config) -> listing.Settings:
    return listing.Settings(
        settings.recovery.attempts,
        settings.recovery.interval_s,
        settings.recovery.mode,
        settings.ha.log,
        getattr(settings.ha, "log_max_bytes", None),
        settings.ha.only,
    )


def configured(settings: Config, group: GroupConfig) -> listing.Group:
    """A group as the configuration has it."""
    return listing.Group(
        group.label,
        number_of(settings, group),
        "Not Available",
        group.replication != "none",
        tuple(serial_of(settings, name) for name in group.members),
        tuple(serial_of(settings, name) for name in group.standby),
    )


def _live(library: module.Library, password: str) -> list[listing.Group]:
    """All groups as they are now; with a password also whether a member lacks something."""
    groups = []
    settings = library.core.settings
    own = {slot.members[0].name: slot.id for slot in library.core.slots.values() if not slot.is_group}
    for group in status.read(library):
        rows, serials = [], {}
        for member in group.members:
            facts = library.core.members[member.name].facts
            alive = library.core.members[member.name].state is MemberState.UP
            serials[member.name] = member.serial or serial_of(settings, member.name)
            rows.append(
                listing.Row(
                    str(own.get(member.name, listing.UNKNOWN_SLOT)),
                    serials[member.name],
                    facts.label if facts is not None and alive else listing.UNKNOWN_LABEL,
                    "alive" if alive else "down",
                )
            )
        said = next(each for each in settings.groups if each.label == group.label)
        groups.append(
            listing.Group(
                group.label,
                group.serial,
                str(group.slot),
                said.replication != "none",
                tuple(serials[name] for name in said.members),
                tuple(serials[name] for name in said.standby),
                _needs_sync(library, said, password),
                tuple(rows),
            )
        )
    return groups


def _needs_sync(library: module.Library, group: GroupConfig, password: str) -> str:
    if not password or group.replication == "none":
        return "unknown"
    slot = operator.slot_of(library, group.label)
    with _as_file(password) as source, operator.at_work(slot, slot.up(), source) as replication:
        domain.take_part(replication, slot.up())
        return "yes" if any(debt.open or debt.missing for debt in objects.debts(replication)) else "no"


@contextmanager
def _as_file(password: str) -> Iterator[str]:
    """A password of the command line as a --pin-source: in memory, and for nobody else."""
    if not password:
        yield ""  # it will be asked for
        return
    descriptor = os.memfd_create("password", os.MFD_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, password.encode())
        yield f"file:/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _list(this: _Run) -> None:
    settings = this.settings()
    wanted = this.group(settings).label if this.command.has(grammar.GROUP) else None
    with module.initialised() as library:
        groups = _live(library, this.command.get(grammar.PASSWORD))
    groups = [group for group in groups if wanted in (None, group.label)]
    as_vtl = this.command.verb.tool == "haAdmin"
    this.lines += (listing.ha_admin if as_vtl else listing.hagroup)(_globals(settings), groups)
    this.data = {"settings": asdict(_globals(settings)), "groups": [asdict(group) for group in groups]}


def _slots(this: _Run) -> None:
    this.settings()
    found = []
    with module.initialised() as library:
        for slot in library.core.slots.values():
            facts = slot.members[0].facts
            label, serial = (slot.face.label, slot.face.serial) if slot.is_group else ("", "")
            if not slot.is_group and facts is not None:
                label, serial = facts.label, facts.serial
            description = slot.face.description if slot.is_group else "LunaNet Slot"
            found.append(listing.Slot(slot.id, description, label, serial, slot.present))
    this.lines += listing.slots(found)
    this.data = {"slots": [asdict(slot) for slot in found]}


# ---- which token is meant


def _member_with(settings: Config, serial: str) -> MemberConfig | None:
    """As the configuration says, else as the tokens that are there do, or did when they were last seen."""
    for member in settings.members:
        if serial in (member.token.serial, member.name):
            return member
    if all(member.token.serial for member in settings.members) or not settings.groups:
        return None
    with module.initialised() as library:
        for name, live in library.core.members.items():
            if live.serial == serial:
                return next(member for member in settings.members if member.name == name)
    return None


def _whole(text: str, option: grammar.Option) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"-{option.name} {text!r}: type a whole number") from None


def _member_in_slot(settings: Config, text: str) -> MemberConfig:
    number = _whole(text, grammar.SLOT)
    if settings.ha.only:
        raise OperatorError(
            f"-slot {number}: members have no slots while haOnly is enabled: use -serialNumber"
        )
    with module.initialised() as library:
        slot = library.core.slots.get(number)
        if slot is None or slot.is_group:
            raise OperatorError(f"-slot {number}: no member's slot: p11ha luna listSlots")
        return next(member for member in settings.members if member.name == slot.members[0].name)


def _newcomer(this: _Run, settings: Config | None, like: str) -> tuple[str, str, Change]:
    """Name and serial number of the member that is to be in a group, and the change that has it in the file.

    `like` is the member whose library is asked first.  Raises UsageError, ConfigError, OperatorError, ModuleError.
    """
    tables = config.tables(config.read(this.path), this.path).get("member", []) if settings else []
    libraries = _libraries(this, tables, like)
    limit_s = settings.recovery.connect_timeout_s if settings else _PATIENCE_S
    serial = this.command.get(grammar.SERIAL)
    if this.command.has(grammar.SLOT):
        number = _whole(this.command.get(grammar.SLOT), grammar.SLOT)
        if not like and len({library["module"] for library in libraries}) > 1:
            raise OperatorError(f"-module PATH says which library has the token: {_named(libraries, ' or ')}")
        answer = _asked(libraries[0], f"pkcs11:slot-id={number}", limit_s)
        if not answer.tokens:
            raise OperatorError(f"-slot {number}: {answer.problem}")
        serial = answer.tokens[0].serial
    if not 1 <= len(serial) <= SERIAL_SIZE:
        raise UsageError(f"-serialNumber {serial!r}: type 1 to {SERIAL_SIZE} characters")
    if settings is not None and (name := _free_member_with(settings, tables, serial)):
        return name, serial, lambda _document: None
    problems = []
    for library in libraries:
        answer = _asked(library, ANY, limit_s)
        if any(token.serial == serial for token in answer.tokens):
            return serial, serial, edits.new_member(serial, serial, library)
        problems += [answer.problem] if answer.problem else []
    where = "; ".join(dict.fromkeys(problems)) or f"looked for in {_named(libraries, ', ')}"
    raise OperatorError(f"no token has the serial number {serial!r}: {where}")


def _libraries(this: _Run, tables: Sequence[Mapping[str, object]], like: str) -> list[dict[str, object]]:
    """Where a token may be: each library as members load it, or that of -module.  Raises UsageError, OperatorError."""
    module = this.command.get(grammar.MODULE)
    if module and not module.startswith("/"):
        raise UsageError(f"-module {module!r}: type an absolute path")
    found: list[dict[str, object]] = [{"module": module}] if module else []
    for table in sorted(tables, key=lambda table: table["name"] != like):
        library = {key: value for key, value in table.items() if key not in _OF_ONE_MEMBER}
        if module in ("", library["module"]) and library not in found:
            found.append(library)
    if not found:
        raise OperatorError("-module PATH says which library has the token")
    return found


def _named(libraries: Sequence[Mapping[str, object]], parted: str) -> str:
    return parted.join(dict.fromkeys(str(library["module"]) for library in libraries))


def _asked(library: Mapping[str, object], token: str, limit_s: float) -> tokens.Answer:
    """What a library says of its tokens, in a process of its own."""
    try:
        return tokens.ask(tokens.Question({**library, "name": "new", "token": token}, "", limit_s))
    except OperatorError as error:
        return tokens.Answer("", (), "", str(error))


def _free_member_with(settings: Config, tables: Sequence[Mapping[str, object]], serial: str) -> str:
    """The name of the configured member whose token has that serial number, empty if there is none.

    Raises OperatorError if it is in a group already.
    """
    homes = {name: group for group in settings.groups for name in (*group.members, *group.standby)}
    found = _member_with(settings, serial)
    if found is not None and found.name in homes:
        raise OperatorError(f"{serial} is in group {homes[found.name].label!r} already")
    if found is not None:
        return found.name
    known = identity_file.remembered(config.state_dir(os.environ))
    for member, table in zip(settings.members, tables, strict=True):
        # The core has no members that are in no group while haOnly is enabled.
        if member.name in homes or member.token.serial:
            continue
        answer = _asked(table, str(member.token), settings.recovery.connect_timeout_s)
        last = answer.tokens[0].serial if answer.tokens else identity_file.seen(member, known)
        if last == serial:
            return member.name
    return ""


# ---- changes


def _create(this: _Run) -> None:
    settings = config.load(this.path) if Path(this.path).exists() else None
    label = this.command.get(grammar.LABEL)
    if settings is not None and any(group.label == label for group in settings.groups):
        raise OperatorError(f"group {label!r} is there already: p11ha luna hagroup listGroups")
    name, serial, member = _newcomer(this, settings, "")
    number = f"1{serial}" if len(serial) < SERIAL_SIZE else None
    after = this.changed(
        edits.all_of(member, edits.new_group(label, number, name)),
        f'New group with label "{label}" created.  Group configuration is:',
    )
    _show(this, after, label)


def _add(this: _Run) -> None:
    settings = this.settings()
    group = this.group(settings)
    name, serial, member = _newcomer(this, settings, group.members[0])
    change = edits.lists(group.label, [*group.members, name], list(group.standby), None)
    after = this.changed(
        edits.all_of(member, change),
        f"Member {serial} successfully added to group {group.label}.  New group configuration is:",
    )
    _show(this, after, group.label)


def _lists(group: GroupConfig, members: list[str], standby: list[str]) -> Change:
    """Who is to be in the group.  If its serial came from a member that goes, it is written: it must not change."""
    if not members:
        raise OperatorError(
            f"the last active member of {group.label!r}: add another first, or deleteGroup -label {group.label}"
        )
    goes = group.serial is None and members[0] != group.members[0]
    serial = None
    if goes:
        with module.initialised() as library:
            serial = operator.slot_of(library, group.label).face.serial
    return edits.lists(group.label, members, standby, serial)


def _remove(this: _Run) -> None:
    settings = this.settings()
    group, member = this.group(settings), this.member(settings)
    if member.name not in (*group.members, *group.standby):
        raise OperatorError(f"{member.name} is not in group {group.label!r}")
    members = [name for name in group.members if name != member.name]
    standby = [name for name in group.standby if name != member.name]
    after = this.changed(
        _lists(group, members, standby),
        f"Member {this.serial(settings, member)} successfully removed from group {group.label}.",
    )
    _show(this, after, group.label)


def _add_standby(this: _Run) -> None:
    settings = this.settings()
    group, member = this.group(settings), this.member(settings)
    if member.name not in group.members:
        raise OperatorError(
            f"{member.name} is no active member of {group.label!r}: addMember comes first, as with Luna"
        )
    members = [name for name in group.members if name != member.name]
    after = this.changed(
        _lists(group, members, [*group.standby, member.name]),
        f"The member {this.serial(settings, member)} was successfully added to the standby list"
        f" for the HA Group {group.label}.",
    )
    _show(this, after, group.label)


def _remove_standby(this: _Run) -> None:
    settings = this.settings()
    group, member = this.group(settings), this.member(settings)
    if member.name not in group.standby:
        raise OperatorError(f"{member.name} is no standby of {group.label!r}")
    standby = [name for name in group.standby if name != member.name]
    after = this.changed(
        _lists(group, [*group.members, member.name], standby),
        f"The member {this.serial(settings, member)} was successfully removed from the standby list"
        f" for the HA Group {group.label}: it is active.",
    )
    _show(this, after, group.label)


def _show(this: _Run, settings: Config, label: str) -> None:
    said = next(group for group in settings.groups if group.label == label)
    group = configured(settings, said)
    if not _says_serials(settings, said):
        with (
            suppress(ModuleError),
            module.initialised() as library,
        ):  # the change is made, whatever comes of this
            live = next(each for each in _live(library, "") if each.label == label)
            group = replace(live, slot=group.slot, rows=())
    this.lines += listing.group_lines(group)
    this.data = {"groups": [asdict(group)]}


def _delete(this: _Run) -> None:
    settings = this.settings()
    group = this.group(settings)
    if len(settings.groups) == 1:
        raise OperatorError(f"{group.label!r} is the only group, and without one no application starts")
    this.changed(edits.without_group(group.label), f"The HA group {group.label} was successfully deleted.")


def _synchronise(this: _Run) -> None:
    settings = this.settings()
    group = this.group(settings)
    automatic = _switch(this.command)
    if automatic is not None:
        this.changed(
            edits.group_setting(group.label, {"replication": "domain" if automatic else "none"}),
            f"Synchronization of HA group {group.label} has been {'enabled' if automatic else 'disabled'}.",
        )
        if automatic:
            this.lines += [f"Keys travel under a key of its own: once, p11ha domain init {group.label}"]
        return
    failed = []
    with module.initialised() as library:
        slot = operator.slot_of(library, group.label)
        members = slot.up()
        with (
            _as_file(this.command.get(grammar.PASSWORD)) as source,
            operator.at_work(slot, members, source) as replication,
            progress(group.label) as bar,
        ):
            domain.take_part(replication, members)
            for name, outcome in objects.sync(replication, lambda _name: bar).items():
                this.lines += [f"{name}: {outcome}"]
                failed += [name] if outcome.failed else []
    if failed:
        raise OperatorError("; ".join(line for line in this.lines))
    this.lines += ["", "Synchronization completed."]


def _recover(this: _Run) -> None:
    settings = this.settings()
    group = this.group(settings)
    _ask_to_recover(group.label)
    this.lines += ["", f"Running applications were asked to recover the HA group {group.label}."]


def _ask_to_recover(label: str) -> None:
    """As `p11ha recover`; raises OperatorError."""
    where = directory()
    try:
        requests.ask_to_recover(where, label, "")
    except OSError as error:
        raise OperatorError(f"{where}: {error.strerror}") from None


def _switch(command: Command) -> bool | None:
    """-enable, -disable or neither; raises UsageError for both."""
    if command.has(grammar.ENABLE) and command.has(grammar.DISABLE):
        raise UsageError(f"type {command.verb.syntax}")
    return True if command.has(grammar.ENABLE) else False if command.has(grammar.DISABLE) else None


def _recovery(this: _Run) -> None:
    values: dict[str, object] = {}
    for option in (grammar.COUNT, grammar.RETRY):
        if this.command.has(option):
            values["attempts"] = _whole(this.command.get(option), option)
            if _whole(this.command.get(option), option) < -1:
                raise UsageError(f"-{option.name}: type -1 for no limit, 0 for none, or a number")
    if this.command.has(grammar.INTERVAL):
        values["interval_s"] = _whole(this.command.get(grammar.INTERVAL), grammar.INTERVAL)
        if _whole(this.command.get(grammar.INTERVAL), grammar.INTERVAL) < 1:
            raise UsageError("-interval: type a number of seconds above 0")
    edits.apply(this.path, edits.setting("recovery", values))
    if "attempts" in values:
        this.lines += ["", f"HA Auto Recovery Count has been set to {values['attempts']}"]
    if "interval_s" in values:
        seconds = _whole(this.command.get(grammar.INTERVAL), grammar.INTERVAL)
        this.lines += ["", f"HA Auto Recovery Interval has been set to {seconds} seconds."]
        if not _USUAL_S[0] <= seconds <= _USUAL_S[1]:
            this.lines += [f"Usual are {_USUAL_S[0]} to {_USUAL_S[1]} seconds."]


_MODES = {
    "activebasic": "background",
    "activeenhanced": "background",
    "background": "background",
    "passive": "call",
    "call": "call",
}


def _mode(this: _Run) -> None:
    wanted = this.command.get(grammar.MODE)
    if wanted.lower() not in _MODES:
        raise UsageError(f"-mode {wanted!r}: type activeBasic, activeEnhanced, or passive")
    mode = _MODES[wanted.lower()]
    this.changed(
        edits.setting("recovery", {"mode": mode}),
        f"HA Recovery Mode has been set to {listing.mode_of(mode)}.",
    )


def _only(this: _Run) -> None:
    wanted = _switch(this.command)
    if wanted is None:
        only = this.settings().ha.only
        this.lines += ["", f"HA Only is {'enabled' if only else 'disabled'}."]
        this.data = {"only": only}
        return
    this.changed(
        edits.setting("ha", {"only": wanted}), f"HA Only has been {'enabled' if wanted else 'disabled'}."
    )


def _log(this: _Run) -> None:
    command = this.command
    wanted = _switch(command)
    values: dict[str, object] = {}
    if command.has(grammar.LENGTH):
        values["log_max_bytes"] = _length(command.get(grammar.LENGTH))
    if command.has(grammar.PATH):
        directory = command.get(grammar.PATH)
        if not directory.startswith("/"):
            raise UsageError(f"-path {directory!r}: type an absolute path")
        values["log"] = f"file:{directory.rstrip('/')}/{LOG_FILE}"
    elif wanted is True and _is_off(this):
        values["log"] = "syslog"
    if wanted is False:
        if "log" in values:
            raise UsageError(f"type {command.verb.syntax}")
        values["log"] = "off"
    settings = edits.apply(this.path, edits.setting("ha", values)) if values else this.settings()
    where = settings.ha.log.removeprefix("file:")
    this.lines += ["", f"HA Log is {'disabled' if where == 'off' else f'enabled: {where}'}"]
    this.data = {"log": settings.ha.log}


def _length(text: str) -> int:
    """Raises UsageError for what the configuration would not take."""
    number, form = _whole(text, grammar.LENGTH), option_of("ha", "log_max_bytes").form
    try:
        form.read(number)
    except ValueError:
        raise UsageError(f"-maxLength {number}: type {form.words}") from None
    return number


def _is_off(this: _Run) -> bool:
    """Whether there is no log now."""
    return this.settings().ha.log == "off"


_DOES: Mapping[str, Callable[[_Run], None]] = {
    "list": _list,
    "create": _create,
    "add": _add,
    "remove": _remove,
    "add standby": _add_standby,
    "remove standby": _remove_standby,
    "delete": _delete,
    "synchronise": _synchronise,
    "recover": _recover,
    "recovery": _recovery,
    "mode": _mode,
    "only": _only,
    "log": _log,
    "slots": _slots,
}
