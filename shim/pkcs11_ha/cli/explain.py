"""`p11ha explain`: what a return value, an event or a whole line of the HA log means, and what to do."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from pkcs11_ha import ck
from pkcs11_ha.cli.meanings import ReturnValue, explain_rv, number_of
from pkcs11_ha.log import EVENTS
from pkcs11_ha.spec.messages import MESSAGES

_WIDTH = 79
_NEAREST = 5
# What a name or a quoted text says is not looked into.
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
_EVENT = re.compile(r"(?<![\w.=-])[a-z]+\.[a-z_]+(?![\w.-])")
_CODE = re.compile(r"\bCKR_\w+|\b0x8[0-9A-Fa-f]{7}\b")


class UnknownMessage(Exception):
    """It is neither code nor message; `str` is one line, `nearest` what may have been meant."""

    def __init__(self, text: str, nearest: Sequence[str]) -> None:
        self.nearest = tuple(nearest)
        meant = f"; did you mean {', '.join(nearest)}" if nearest else ": docs/messages.md has the messages"
        super().__init__(f"no return value or message of this name: {text}{meant}")


@dataclass(frozen=True)
class LogMessage:
    """An event of the HA log explained."""

    name: str
    meaning: str
    cause: str
    cure: str


Explained = ReturnValue | LogMessage


def explain(text: str) -> list[Explained]:
    """All that the text names: one code or event, or the event of a log line and the codes in it.

    Raises UnknownMessage.
    """
    rv = number_of(text)
    if rv is not None:
        return [explain_rv(rv)]
    event, codes = _in_object(text) if text.lstrip().startswith("{") else _in_line(text)
    found: list[Explained] = [_message(event)] if event else []
    numbers = (number_of(code) for code in codes)
    found += [explain_rv(number) for number in dict.fromkeys(numbers) if number is not None]
    if not found:
        raise UnknownMessage(text, nearest(text))
    return found


def _message(name: str) -> LogMessage:
    return LogMessage(name, EVENTS[name], *MESSAGES[name])


def _in_line(text: str) -> tuple[str, list[str]]:
    """The event of a line of text, if it has one, and all codes in it."""
    bare = _QUOTED.sub('""', text)
    event = next((name for name in _EVENT.findall(bare.lower()) if name in EVENTS), "")
    return event, _CODE.findall(text)


def _in_object(text: str) -> tuple[str, list[str]]:
    """The same of a JSON line."""
    with suppress(ValueError):
        record = json.loads(text)
        if isinstance(record, dict) and record.get("event") in EVENTS:
            return record["event"], _CODE.findall(json.dumps(record.get("details")))
    return _in_line(text.replace('"', " "))


def nearest(text: str) -> list[str]:
    """Codes and events that look like the text, the likeliest first."""
    wanted = re.sub(r"[\W_]+", "_", text.strip().lower()).removeprefix("ckr_")[:64]
    names = {
        name.lower().removeprefix("ckr_").replace(".", "_"): name for name in (*ck.RV_NAMES.values(), *EVENTS)
    }
    alike = difflib.get_close_matches(wanted, names, _NEAREST, 0.6)
    words = set(wanted.split("_")) - {""}
    sharing = sorted(
        (name for name in names if words & set(name.split("_"))),
        key=lambda name: (-len(words & set(name.split("_"))), len(name), name),
    )
    return [names[name] for name in dict.fromkeys((*alike, *sharing))][:_NEAREST]


def as_json(found: Sequence[Explained]) -> list[dict[str, object]]:
    """What --json prints."""
    return [
        {"kind": "return value" if isinstance(each, ReturnValue) else "message"}
        | ({key.replace("kind", "class"): value for key, value in asdict(each).items()})
        for each in found
    ]


def show(found: Sequence[Explained]) -> str:
    """For people, in 80 columns."""
    return "\n\n".join(_paragraphs(each) for each in found)


def _paragraphs(each: Explained) -> str:
    if isinstance(each, ReturnValue):
        head = f"{each.name} (0x{each.number:X}, {each.number})"
        parts = {
            "Meaning": each.meaning,
            "From a member": f"{each.kind}: {each.here}",
            "What to do": each.cure,
        }
    else:
        head = each.name
        parts = {"Meaning": each.meaning, "Cause": each.cause, "What to do": each.cure}
    return "\n".join([head, *(_part(title, text) for title, text in parts.items())])


def _part(title: str, text: str) -> str:
    sentence = text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
    return textwrap.fill(
        f"{title + ':':15}{sentence}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 17
    )
