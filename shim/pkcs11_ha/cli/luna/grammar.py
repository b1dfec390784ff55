"""What lunacm and vtl let people type about HA groups: verbs, options, short forms, and what is wrong with it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


class UsageError(Exception):
    """The command line is wrong; `str` is one line that says what to type."""


@dataclass(frozen=True)
class Option:
    """`-name VALUE`, or a switch, which has no `value`."""

    name: str
    value: str = ""

    def __str__(self) -> str:
        return f"-{self.name} {self.value}".rstrip()


SERIAL, SLOT = Option("serialNumber", "SERIAL"), Option("slot", "SLOT")
GROUP, LABEL = Option("group", "GROUP"), Option("label", "LABEL")
PASSWORD, MODULE = Option("password", "PASSWORD"), Option("module", "PATH")
COUNT, RETRY, INTERVAL = Option("count", "COUNT"), Option("retry", "COUNT"), Option("interval", "SECONDS")
MODE, PATH, LENGTH = Option("mode", "MODE"), Option("path", "DIRECTORY"), Option("maxLength", "BYTES")
ENABLE, DISABLE, SHOW = Option("enable"), Option("disable"), Option("show")
FORCE, JSON, CONFIG = Option("force"), Option("json"), Option("config", "FILE")
OURS = (CONFIG, JSON, FORCE, MODULE)
"""Those that Luna has not, or has with another sense: to be written in full, so that they take no short form away."""


@dataclass(frozen=True)
class Verb:
    """A sub-command: of each tuple in `needs` one option, of an `or_more` verb one or more."""

    tool: str
    name: str
    needs: tuple[tuple[Option, ...], ...]
    may: tuple[Option, ...]
    does: str
    ours: str
    short: str = ""
    or_more: bool = False

    @property
    def options(self) -> tuple[Option, ...]:
        return (*(option for each in self.needs for option in each), *self.may, CONFIG, JSON, FORCE)

    @property
    def syntax(self) -> str:
        needed = (
            str(each[0]) if len(each) == 1 else "{" + " | ".join(str(option) for option in each) + "}"
            for each in self.needs
        )
        return " ".join(
            [f"{self.tool} {self.name}".strip(), *needed, *(f"[{option}]" for option in self.may)]
        )


_TOKEN = (SERIAL, SLOT)


def _verbs(tool: str, listing: str, create: str, token: tuple[Option, ...]) -> tuple[Verb, ...]:
    """What both tools have."""
    return (
        Verb(tool, listing, (), (GROUP, PASSWORD), "list", "p11ha group list, p11ha status"),
        Verb(tool, create, (token, (LABEL,)), (PASSWORD, MODULE), "create", "p11ha group create"),
        Verb(tool, "addMember", (token, (GROUP,)), (PASSWORD, MODULE), "add", "p11ha group add-member"),
        Verb(tool, "removeMember", (token, (GROUP,)), (PASSWORD,), "remove", "p11ha group remove-member"),
        Verb(tool, "addStandby", (token, (GROUP,)), (PASSWORD,), "add standby", "p11ha group add-standby"),
        Verb(
            tool,
            "removeStandby",
            (token, (GROUP,)),
            (PASSWORD,),
            "remove standby",
            "p11ha group remove-standby",
        ),
        Verb(tool, "deleteGroup", ((LABEL, GROUP),), (PASSWORD,), "delete", "p11ha group delete"),
        Verb(tool, "synchronize", ((GROUP,),), (PASSWORD, ENABLE, DISABLE), "synchronise", "p11ha sync"),
        Verb(tool, "recover", ((GROUP,),), (PASSWORD,), "recover", "p11ha recover"),
        Verb(tool, "haOnly", ((ENABLE, DISABLE, SHOW),), (), "only", "p11ha ha only"),
    )


VERBS = (
    *_verbs("hagroup", "listGroups", "createGroup", _TOKEN),
    Verb("hagroup", "retry", ((COUNT,),), (), "recovery", "p11ha ha retry", short="rt"),
    Verb("hagroup", "interval", ((INTERVAL,),), (), "recovery", "p11ha ha interval"),
    Verb("hagroup", "recoveryMode", ((MODE,),), (), "mode", "p11ha ha recovery-mode"),
    Verb(
        "hagroup", "haLog", ((ENABLE, DISABLE, PATH, LENGTH, SHOW),), (), "log", "p11ha ha log", or_more=True
    ),
    *_verbs("haAdmin", "show", "newGroup", _TOKEN),
    Verb(
        "haAdmin",
        "autoRecovery",
        ((RETRY, INTERVAL),),
        (),
        "recovery",
        "p11ha ha retry, interval",
        or_more=True,
    ),
    Verb("listSlots", "", (), (), "slots", "p11ha status"),
)
"""Every sub-command, and the command of ours that does the same."""

TOOLS = {"hagroup": "hagroup", "ha": "hagroup", "haadmin": "haAdmin", "listslots": "listSlots"}
"""What the tools may be called."""


@dataclass(frozen=True)
class Command:
    """A command that is in order: a switch that is given has the value ""."""

    verb: Verb
    given: Mapping[str, str]

    def has(self, option: Option) -> bool:
        return option.name in self.given

    def get(self, option: Option) -> str:
        return self.given.get(option.name, "")


def read(words: Sequence[str]) -> Command:
    """The command that was typed, in whatever case, with options and verbs as short as is clear; raises UsageError."""
    rest = list(words)
    while rest and rest[0].lower() == "-q":  # lunacm's, for scripts
        rest.pop(0)
    tools = ", ".join(dict.fromkeys(TOOLS.values()))
    if not rest:
        raise UsageError(f"type one of {tools}, or help")
    tool = TOOLS.get(rest[0].lower())
    if tool is None:
        raise UsageError(f"{rest[0]!r} is not known: type one of {tools}, or help")
    verbs = [verb for verb in VERBS if verb.tool == tool]
    if verbs[0].name == "":
        verb, rest = verbs[0], rest[1:]
    else:
        if len(rest) < 2:
            raise UsageError(f"{tool}: type one of {', '.join(verb.name for verb in verbs)}")
        verb, rest = _verb(tool, verbs, rest[1].lstrip("-")), rest[2:]
    given = _options(verb, rest)
    for each in verb.needs:
        found = [option for option in each if option.name in given]
        if not found or (len(found) > 1 and not verb.or_more):
            raise UsageError(f"type {verb.syntax}")
    return Command(verb, given)


def _verb(tool: str, verbs: Sequence[Verb], word: str) -> Verb:
    for verb in verbs:
        if word.lower() in (verb.name.lower(), verb.short):
            return verb
    name = _meant(word, [verb.name for verb in verbs])
    if not name:
        raise UsageError(
            f"{tool} {word!r} is not known: type one of {', '.join(verb.name for verb in verbs)}"
        )
    if len(name) > 1:
        raise UsageError(f"{tool} {word!r} may mean {' or '.join(name)}: type one of them")
    return next(verb for verb in verbs if verb.name == name[0])


def _meant(word: str, names: Iterable[str]) -> list[str]:
    """The names that begin so, or whose words do (lg: listGroups)."""
    word = word.lower()
    found = []
    for name in names:
        initials = name[0] + "".join(c for c in name if c.isupper())
        if word and (name.lower().startswith(word) or (len(word) > 1 and initials.lower() == word)):
            found.append(name)
    return found


def _options(verb: Verb, words: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option = _option(verb, word)
        if option.value and not rest:
            raise UsageError(f"-{option.name} wants {option.value}: type {verb.syntax}")
        value = rest.pop(0) if option.value else ""
        if given.get(option.name, value) != value:
            raise UsageError(f"-{option.name} is given twice: type {verb.syntax}")
        given[option.name] = value
    # lunacm's users write -password "" where there is none
    return {name: value for name, value in given.items() if value or name != PASSWORD.name}


def _option(verb: Verb, word: str) -> Option:
    """Switches may come without their dash, as vtl's users write `HAOnly enable`.  Another word without one is not
    repeated: it may be a password."""
    name = word.lstrip("-").lower()
    dashed = word.startswith("-")
    options = [option for option in verb.options if dashed or not option.value]
    exact = [option for option in options if option.name.lower() == name]
    short = [option for option in options if option not in OURS]
    found = exact or [option for option in short if name and option.name.lower().startswith(name)]
    if len(found) > 1 and dashed:
        raise UsageError(f"{word!r} may mean {' or '.join(f'-{o.name}' for o in found)}: type {verb.syntax}")
    if len(found) != 1 or not (dashed or exact):
        what = repr(word) if dashed else "a word"
        raise UsageError(f"{what} is not known here: type {verb.syntax}")
    return found[0]


def _wrapped(syntax: str) -> list[str]:
    """In 80 columns; an option stays with its value."""
    whole = re.sub(r" (?![-\[{])", "\xa0", syntax)
    lines = textwrap.wrap(whole, 80, subsequent_indent=" " * 8, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def help_lines() -> list[str]:
    """Every command, and ours that does the same."""
    lines = ["Luna's commands, in any case; options and verbs may be as short as is clear.", ""]
    for verb in VERBS:
        lines += [*_wrapped(verb.syntax), f"    {verb.ours}"]
    return [*lines, "", "Everywhere: -config FILE; -json where something is shown."]
