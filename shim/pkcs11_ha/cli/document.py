"""The text of pkcs11-ha.toml as its tables, each edited on its own: comments, order and blank lines stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tomlkit
from tomlkit.items import Array

from pkcs11_ha.config import SECTIONS, locate

ARRAYS = ("member", "group")
"""Sections of which there are several: `[[member]]`, `[[group]]`."""


class DocumentError(Exception):
    """The text cannot be edited in this form; `str` is one line."""


@dataclass(eq=False)
class _Block:
    """A table with the comments that stand right above its header; section "" is what precedes all tables."""

    section: str
    text: str

    @property
    def own(self) -> int:
        """How many characters are the table's own: a comment after a blank line belongs to what follows."""
        lines = self.text.split("\n")
        content = [n for n, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
        end = content[-1] + 1 if content else 0
        while end < len(lines) and lines[end].lstrip().startswith("#"):
            end += 1
        return min(len(self.text), sum(len(line) + 1 for line in lines[:end]))


class Document:
    """A valid document.  A change is made within one table, or adds or removes one; nothing else moves."""

    def __init__(self, text: str) -> None:
        # A file of CRLF stays one; where ends are mixed, each stays as it is.
        self._ends = "\r\n" if 0 < text.count("\n") == text.count("\r\n") else "\n"
        self._blocks = list(_split(text.replace(self._ends, "\n")))

    @property
    def text(self) -> str:
        """As it is now."""
        return "".join(block.text for block in self._blocks).replace("\n", self._ends)

    def has(self, section: str) -> bool:
        """Whether the section is written, as a table or otherwise."""
        return any(block.section == section for block in self._blocks) or section in self._preamble()

    def set(self, section: str, values: Mapping[str, object], number: int = 0) -> None:
        """Gives keys of a table their values; None takes a key away.  A missing `[section]` is made.

        A list is changed in place, so that its layout and comments stay.
        """
        block = self._find(section, number)
        if block is None:
            self.add(section, {key: value for key, value in values.items() if value is not None})
            return
        own = block.own
        document = tomlkit.parse(_ended(block.text[:own]))
        table: Any = document[section]
        if block.section in ARRAYS:
            table = table[0]
        for key, value in values.items():
            _put(table, key, value)
        block.text = _ended(tomlkit.dumps(document)) + block.text[own:]

    def add(self, section: str, values: Mapping[str, object]) -> None:
        """A new table, behind the last of its section, else where the section is usually found."""
        self._must_be_tables(section)
        place = -1
        for number, block in enumerate(self._blocks):
            if not block.section or SECTIONS.index(block.section) <= SECTIONS.index(section):
                place = number
        before = self._blocks[place]
        own = before.own if before.section else len(before.text)
        head, tail = _ended(before.text[:own]), before.text[own:]
        if head.strip() and not head.endswith("\n\n"):
            head += "\n"
        if not tail and place + 1 < len(self._blocks):
            tail = "\n"
        before.text = head
        self._blocks.insert(place + 1, _Block(section, render(section, values) + tail))

    def remove(self, section: str, number: int) -> None:
        """Takes a table away, with the comments right above it and in it."""
        self._must_be_tables(section)
        block = self._find(section, number)
        assert block is not None
        place = self._blocks.index(block)
        before, rest = self._blocks[place - 1], block.text[block.own :]
        if rest.startswith("\n") and (before.text.endswith("\n\n") or not before.text):
            rest = rest[1:]  # the blank line that parted it from what follows
        before.text += rest
        del self._blocks[place]
        if place == len(self._blocks) and before.text:
            before.text = before.text.rstrip("\n") + "\n"

    def _find(self, section: str, number: int) -> _Block | None:
        self._must_be_tables(section)
        blocks = [block for block in self._blocks if block.section == section]
        if not blocks and section in self._preamble():
            return self._blocks[0]  # `ha = { … }` or `ha.only = true`
        return blocks[number] if number < len(blocks) else None

    def _preamble(self) -> Mapping[str, Any]:
        return tomlkit.parse(self._blocks[0].text)

    def _must_be_tables(self, section: str) -> None:
        if section in ARRAYS and section in self._preamble():
            raise DocumentError(
                f"{section} is written as one list: write [[{section}]] tables to have it edited"
            )


def _split(text: str) -> Iterable[_Block]:
    """The preamble and the tables; joined they are the text again."""
    lines = text.split("\n")
    headers = {
        line - 1: str(place[0])
        for place, line in locate(text).items()
        if (len(place) == 1 or (len(place) == 2 and isinstance(place[1], int)))
        and lines[line - 1].lstrip().startswith("[")
    }
    starts = []
    for header in sorted(headers):
        start = header
        while start > 0 and lines[start - 1].lstrip().startswith("#"):
            start -= 1
        # what stands at the head of the file is said of the file
        starts.append((header if start == 0 else start, headers[header]))
    starts = [(0, ""), *starts]
    for (start, section), (end, _) in zip(starts, [*starts[1:], (len(lines), "")], strict=True):
        part = "\n".join(lines[start:end])
        yield _Block(section, part + "\n" if end < len(lines) and end > start else part)


def _put(table: Any, key: str, value: object) -> None:
    if value is None:
        if key in table:
            del table[key]
    elif isinstance(value, list) and isinstance(table.get(key), Array):
        array = table[key]
        for element in [old for old in array.unwrap() if old not in value]:
            array.remove(element)
        for element in [new for new in value if new not in array.unwrap()]:
            array.append(element)
        if array.unwrap() != value:  # another order
            table[key] = value
    else:
        table[key] = _item(value)


def _item(value: object) -> object:
    if isinstance(value, Mapping):
        inline = tomlkit.inline_table()
        inline.update(value)
        return inline
    return value


def render(section: str, values: Mapping[str, object]) -> str:
    """A table as it is written into the file."""
    table = tomlkit.table()
    for key, value in values.items():
        table.add(key, _item(value))
    document = tomlkit.document()
    if section in ARRAYS:
        tables = tomlkit.aot()
        tables.append(table)
        document.append(section, tables)
    else:
        document.append(section, table)
    return re.sub(r"\n+\Z", "\n", tomlkit.dumps(document))


def _ended(text: str) -> str:
    return text if text.endswith("\n") or not text else text + "\n"
