"""The changes that Luna's commands make to pkcs11-ha.toml, from document to document; and one place that writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit import TOMLDocument

from pkcs11_ha import config
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.config import Config, ConfigError
from pkcs11_ha.uri import TokenSelector

Change = Callable[[TOMLDocument], None]

_OF_ONE_MEMBER = ("name", "token", "pin_source")


def apply(path: str, change: Change) -> Config:
    """Makes the change to the file, or none: raises ConfigError if the result would be no configuration, OperatorError.

    All edits of Luna's commands come through here.
    """
    if config.is_luna(path):
        raise OperatorError(
            f"{path} is Luna's own: p11ha import-luna {path} makes a file that can be changed"
        )
    document = tomlkit.parse(read(path) if Path(path).exists() else "")
    change(document)
    return write(path, tomlkit.dumps(document))


def read(path: str) -> str:
    """Raises OperatorError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def write(path: str, text: str) -> Config:
    """The file with this text, whole or not at all, if it is a configuration; raises ConfigError, OperatorError."""
    new = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.new")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            new.chmod(Path(path).stat().st_mode & 0o7777)
        loaded = config.load(str(new))
        new.replace(path)
    except ConfigError as error:
        raise ConfigError(path, error.line, error.key, error.problem) from None
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror}") from None
    finally:
        new.unlink(missing_ok=True)
    return loaded


# ---- changes


def setting(section: str, values: Mapping[str, object]) -> Change:
    """Values of [ha] or [recovery]; the first of [recovery] brings the section into being, whole."""

    def change(document: TOMLDocument) -> None:
        if section not in document:
            table = tomlkit.table()
            if section == "recovery":
                table.update({"interval_s": 60, "attempts": -1})
            document.add(section, table)
        for key, value in values.items():
            document[section][key] = value

    return change


def group_setting(label: str, values: Mapping[str, object]) -> Change:
    """Values of a [[group]]."""
    return lambda document: _group(document, label).update(values)


def new_member(name: str, serial: str, like: str, module: str) -> Change:
    """A [[member]] for the token with that serial number: as the member `like` is, else with that library."""

    def change(document: TOMLDocument) -> None:
        table = tomlkit.table()
        table.add("name", name)
        model = next(
            (each for each in document.get("member", []) if each["name"] == like), {"module": module}
        )
        token = str(TokenSelector((("serial", serial),)))
        for key, value in model.items():
            if key not in _OF_ONE_MEMBER:
                table.add(key, value)
            if key == "module":
                table.add("token", token)
        _append(document, "member", table)

    return change


def new_group(label: str, serial: str | None, member: str) -> Change:
    """A [[group]] of one member."""

    def change(document: TOMLDocument) -> None:
        table = tomlkit.table()
        table.add("label", label)
        if serial is not None:
            table.add("serial", serial)
        table.add("members", [member])
        _append(document, "group", table)

    return change


def lists(label: str, members: list[str], standby: list[str], serial: str | None) -> Change:
    """Who is in a group; a `serial` is written where there is none, for what it came from goes."""

    def change(document: TOMLDocument) -> None:
        group = _group(document, label)
        if serial is not None and "serial" not in group:
            group["serial"] = serial
        for key, names in (("members", members), ("standby", standby)):
            if list(group.get(key, [])) != names:
                group[key] = names

    return change


def without_group(label: str) -> Change:
    """Its members stay."""

    def change(document: TOMLDocument) -> None:
        groups: Any = document["group"]
        groups.remove(_group(document, label))
        if not groups:
            del document["group"]

    return change


def all_of(*changes: Change) -> Change:
    """One after the other."""

    def change(document: TOMLDocument) -> None:
        for each in changes:
            each(document)

    return change


def _group(document: TOMLDocument, label: str) -> Any:
    return next(group for group in document["group"] if group["label"] == label)


def _append(document: TOMLDocument, section: str, table: tomlkit.items.Table) -> None:
    if section not in document:
        document.add(section, tomlkit.aot())
    document[section].append(table)
