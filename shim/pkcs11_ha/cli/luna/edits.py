"""The changes that Luna's commands make to pkcs11-ha.toml, from document to document; and one place that writes it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pkcs11_ha import config
from pkcs11_ha.cli.document import Document, DocumentError
from pkcs11_ha.cli.edit import EditError, replacing
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.config import Config
from pkcs11_ha.uri import TokenSelector

Change = Callable[[Document], None]

_FIRST_RECOVERY = {"interval_s": 60, "attempts": -1}


def apply(path: str, change: Change) -> Config:
    """Makes the change to the file, or none: raises ConfigError if the result would be no configuration, OperatorError.

    All edits of Luna's commands come through here.
    """
    with _replacing(path) as replace:
        document = Document(config.read(path) if Path(path).exists() else "")
        try:
            change(document)
        except DocumentError as error:
            raise OperatorError(f"{path}: {error}") from None
        return _put(path, document.text, replace)


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

    def change(document: Document) -> None:
        whole = section != "recovery" or document.has(section)
        document.set(section, values if whole else {**_FIRST_RECOVERY, **values})

    return change


def group_setting(label: str, values: Mapping[str, object]) -> Change:
    """Values of a [[group]]."""
    return lambda document: document.set("group", values, _group(document, label)[0])


def new_member(name: str, serial: str, library: Mapping[str, object]) -> Change:
    """A [[member]] for the token with that serial number, of a library as it is to be loaded."""
    more = {key: value for key, value in library.items() if key != "module"}
    token = str(TokenSelector((("serial", serial),)))
    values = {"name": name, "module": library["module"], "token": token, **more}
    return lambda document: document.add("member", values)


def new_group(label: str, serial: str | None, member: str) -> Change:
    """A [[group]] of one member."""
    said = {} if serial is None else {"serial": serial}
    return lambda document: document.add("group", {"label": label, **said, "members": [member]})


def lists(label: str, members: list[str], standby: list[str], serial: str | None) -> Change:
    """Who is in a group; a `serial` is written where there is none, for what it came from goes."""

    def change(document: Document) -> None:
        number, group = _group(document, label)
        values: dict[str, object] = {"members": members, "standby": standby, "serial": serial}
        kept = {"serial"} if serial is None or "serial" in group else set()
        kept |= {key for key, names in values.items() if group.get(key, []) == names}
        document.set("group", {key: said for key, said in values.items() if key not in kept}, number)

    return change


def without_group(label: str) -> Change:
    """Its members stay."""
    return lambda document: document.remove("group", _group(document, label)[0])


def all_of(*changes: Change) -> Change:
    """One after the other."""

    def change(document: Document) -> None:
        for each in changes:
            each(document)

    return change


def _group(document: Document, label: str) -> tuple[int, Mapping[str, object]]:
    """Its place among the groups, and what it says."""
    groups = tomllib.loads(document.text)["group"]
    return next((number, group) for number, group in enumerate(groups) if group["label"] == label)
