"""`p11ha import-luna`: Luna's client configuration made into ours, and a word on what has no counterpart."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import tomlkit

from pkcs11_ha import config, luna
from pkcs11_ha.cli.luna import edits, listing
from pkcs11_ha.cli.luna.verbs import number_of, serial_of
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.config import Config, ConfigError
from pkcs11_ha.luna import LunaError, Place, Setting, Translation

_LEFT, _WIDTH = 46, 80
_TITLES = "Luna: hagroup listGroups", "pkcs11-ha"


def translate(path: str, module: str, client_config: str) -> tuple[str, Translation]:
    """The file's text, and the same in our words; raises ConfigError."""
    text = config.read(path, luna=True)
    env = {config.LUNA_PATH: client_config} if client_config else None
    try:
        return text, luna.translate(text, module or None, env, config.knows)
    except LunaError as error:
        raise ConfigError(path, error.line, error.key, error.problem) from None


# ---- our file


def render(path: str, translation: Translation) -> str:
    """The configuration as text, with where each value comes from."""
    document = tomlkit.document()
    document.add(
        tomlkit.comment(f"Made by p11ha import-luna from {_printable(path)}, whose lines are named.")
    )
    for section in ("ha", "recovery"):
        found = {place[-1]: s for place, s in translation.settings.items() if place[0] == section}
        if found:
            document.add(tomlkit.nl())
            document.add(section, _table(found))
    for section in ("member", "group"):
        tables = tomlkit.aot()
        for number in sorted({int(place[1]) for place in translation.settings if place[0] == section}):
            found = {p[-1]: s for p, s in translation.settings.items() if p[:2] == (section, number)}
            tables.append(_table(found))
        document.add(tomlkit.nl())
        document.add(section, tables)
    if translation.remarks:
        document.add(tomlkit.nl())
        document.add(tomlkit.comment("What it says besides, and what has no counterpart:"))
    for remark in translation.remarks:
        for number, line in enumerate(textwrap.wrap(_printable(str(remark)), 100)):
            document.add(tomlkit.comment(line if number == 0 else f"  {line}"))
    return tomlkit.dumps(document)


def _table(settings: Mapping[str | int, Setting]) -> tomlkit.items.Table:
    table = tomlkit.table()
    order = [option.name for option in config.OPTIONS]
    for key, setting in sorted(settings.items(), key=lambda each: order.index(str(each[0]))):
        value = setting.value
        if isinstance(value, dict):
            inline = tomlkit.inline_table()
            inline.update(value)
            value = inline
        item = tomlkit.item(value)
        item.comment(_printable(f"line {setting.entry.line}: {setting.entry.name}"))
        table.add(str(key), item)
    return table


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def write(path: str, output: str, translation: Translation) -> Config:
    """Our file, if it is a configuration that can be used; raises ConfigError that names Luna's line, OperatorError."""
    text = render(path, translation)
    try:
        return edits.write(output, text)
    except ConfigError as error:
        raise _blamed(error, path, text, translation) from None


def check(path: str, output: str, translation: Translation) -> Config:
    """The same without writing."""
    text = render(path, translation)
    try:
        return config.parse(text, output)
    except ConfigError as error:
        raise _blamed(error, path, text, translation) from None


def _blamed(error: ConfigError, path: str, text: str, translation: Translation) -> ConfigError:
    """The error, of the line of Luna's file that it comes from."""
    places: dict[int, Place] = {}
    for place, line in config.locate(text).items():
        places.setdefault(line, place)
    lines, names = translation.lines(), translation.names()
    for line, place in places.items():
        found = next((p for p in names if place[: len(p)] == p), None)
        if line == error.line and found is not None:
            return ConfigError(path, lines[found], names[found], error.problem)
    return ConfigError(path, None, error.key, error.problem)


def write_client_config(path: str, text: str, directory: str) -> str:
    """A file for Luna's library that knows nothing of groups, in its own directory; its path.  Raises OperatorError."""
    name = "crystoki.ini" if path.lower().endswith(".ini") else "Chrystoki.conf"
    target = Path(directory, name)
    try:
        if target.exists() and target.samefile(path):
            raise OperatorError(f"{directory}: that is where Luna's own file is: name another directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(luna.without_ha(text), encoding="utf-8", errors="surrogateescape")
        target.chmod(Path(path).stat().st_mode & 0o777)
    except OSError as error:
        raise OperatorError(f"{target}: {error.strerror}") from None
    return str(target)


# ---- what is shown


def side_by_side(translation: Translation, settings: Config) -> list[str]:
    """Both listings, in 80 columns."""
    both = [(_TITLES[0], _TITLES[1]), ("-" * len(_TITLES[0]), "-" * len(_TITLES[1]))]
    both += _beside(_luna_settings(translation), _our_settings(settings))
    for group in translation.groups:
        ours = next(each for each in settings.groups if each.label == group.label)
        theirs = listing.Group(
            group.label,
            group.serial,
            "Not Available",
            group.synchronised,
            tuple(serial for serial in group.members),
            group.standby,
        )
        right = [
            ("group", ours.label),
            ("serial", number_of(settings, ours)),
            ("members", "\n".join(serial_of(settings, name) for name in ours.members)),
            ("standby", "\n".join(serial_of(settings, name) for name in ours.standby) or "-"),
            ("replication", ours.replication),
        ]
        both += [("", ""), *_beside(listing.group_lines(theirs, _LEFT), _fields(right))]
    return [f"{left:<{_LEFT}}  {right}".rstrip() for left, right in both]


def _beside(left: list[str], right: list[str]) -> list[tuple[str, str]]:
    size = max(len(left), len(right))
    return list(zip(left + [""] * (size - len(left)), right + [""] * (size - len(right)), strict=True))


def _fields(fields: list[tuple[str, str]]) -> list[str]:
    lines = []
    for name, text in fields:
        parts = [
            part for line in text.split("\n") for part in textwrap.wrap(line, _WIDTH - _LEFT - 15) or [""]
        ]
        lines += [f"{name if number == 0 else '':<12} {part}" for number, part in enumerate(parts)]
    return lines


def _said(translation: Translation, *place: str) -> Setting | None:
    return translation.settings.get(place)


def _luna_settings(translation: Translation) -> list[str]:
    """The head of Luna's listing, from what the file says; what it does not say is as Luna has it.

    But for the mode: what Luna does without it has changed from version to version.
    """
    attempts, interval = (
        _said(translation, "recovery", "attempts"),
        _said(translation, "recovery", "interval_s"),
    )
    mode, only = _said(translation, "recovery", "mode"), _said(translation, "ha", "only")
    log = _said(translation, "ha", "log")
    lines = [
        ("HA auto recovery", "enabled" if attempts and attempts.value != 0 else "disabled"),
        ("HA recovery mode", mode.entry.value if mode else "not given"),
        ("Maximum auto recovery retry", str(attempts.value if attempts else 0)),
        ("Auto recovery poll interval", f"{interval.value if interval else 60} seconds"),
        ("HA logging", "enabled" if log and log.value != "off" else "disabled"),
        ("Only Show HA Slots", "yes" if only and only.value else "no"),
    ]
    return [f"{name:>27}:  {value}" for name, value in lines]


def _our_settings(settings: Config) -> list[str]:
    attempts = settings.recovery.attempts
    return _fields(
        [
            ("attempts", {-1: "without limit", 0: "none"}.get(attempts, str(attempts))),
            ("interval", f"{settings.recovery.interval_s:g} s"),
            ("recovery", f"{settings.recovery.mode} mode"),
            ("log", settings.ha.log),
            ("slots", "groups only" if settings.ha.only else "members, then groups"),
        ]
    )


def as_json(output: str, client: str, dry_run: bool, translation: Translation, settings: Config) -> str:
    """What --json prints."""
    said = [
        {"key": ".".join(map(str, place)), "value": s.value, "line": s.entry.line, "from": s.entry.name}
        for place, s in translation.settings.items()
    ]
    return json.dumps(
        {
            "output": output,
            "client_config": client,
            "written": not dry_run,
            "settings": said,
            "remarks": [asdict(remark) for remark in translation.remarks],
            "luna": [asdict(group) for group in translation.groups],
            "groups": [asdict(group) for group in settings.groups],
        },
        indent=2,
    )
