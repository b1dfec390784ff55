"""The changes that Luna's commands make to pkcs11-ha.toml, from document to document; and one place that writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit import TOMLDocument

from pkcs11_ha import config
from pkcs11_ha.cli.edit import EditError, replacing
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.config import Config
from pkcs11_ha.uri import TokenSelector

Change = Callable[[TOMLDocument], None]

_OF_ONE_MEMBER = ("name", "token", "pin_source")


def apply(path: str, change: Change) -> Config:
    """Makes the change to the file, or none: raises ConfigError if the result would be no configuration, OperatorError.

    All edits of Luna's commands come through here.
    """
    with _replacing(path) as replace:
        document = tomlkit.parse(config.read(path) if Path(path).exists() else "")
        change(document)
        return _put(path, tomlkit.dumps(document), replace)


def write(path: str, text: str) -> Config:
    """The file with this text, whole or not at all, if it is a configuration; raises ConfigError, OperatorError."""
    with _replacing(path) as replace:
        return _put(path, text, replace)


def _put(path: str, text: str, replace: Callable[[str], None]) -> Config:
    settings = config.parse(text, path)
    for missing in config.unusable(settings, text):
        raise missing
    replace(text)
    return settings


@contextmanager
def _replacing(path: str) -> Iterator[Callable[[str], None]]:
    try:
        with replacing(path) as replace:
            yield replace
    except EditError as error:
        raise OperatorError(str(error)) from None


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
