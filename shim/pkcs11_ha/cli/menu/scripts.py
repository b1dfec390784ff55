"""Numbers 98 and 108 to 110: the options, and scripts of menu numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pkcs11_ha.cli.menu.attributes import ValueForm, boolean
from pkcs11_ha.cli.menu.desk import Background, Desk, at_most, choice, number
from pkcs11_ha.cli.menu.dialogue import NotDone, numbered, parts, script_of

_MAX_PART = 1 << 30


def options(desk: Desk) -> None:
    """98"""
    now = desk.options
    slot = "none" if now.slot is None else str(now.slot)
    for name, value, words in (
        ("verbose", _word(now.verbose), "show each call, its answer and its time"),
        ("ask", _word(now.ask), "ask a person before something is destroyed"),
        ("slot", slot, "slot that Enter selects, or none"),
        ("menu", _word(now.show_menu), "show the menu after each number, not on Enter alone"),
        ("keep-going", _word(now.keep_going), "scripts go on after an error"),
        ("part", str(now.part), "bytes of data in one call; more go in parts"),
        ("width", str(now.width), "bytes shown of a long attribute"),
    ):
        desk.say(f"  {name:<11}{value:<8}{words}")
    names = ("verbose", "ask", "slot", "menu", "keep-going", "part", "width", "none")
    name = desk.dialogue.ask("Which to change (or none)", choice(names), "none")
    if name == "none":
        return
    if name == "slot":
        now.slot = desk.dialogue.ask("Slot, or none", lambda text: None if text == "none" else number(text))
    elif name == "part":
        now.part = desk.dialogue.ask("Bytes", at_most(_MAX_PART, 1))
    elif name == "width":
        now.width = desk.dialogue.ask("Bytes", at_most(_MAX_PART, 1))
    else:
        field = {"keep-going": "keep_going", "menu": "show_menu"}.get(name, name)
        setattr(now, field, desk.dialogue.ask("yes or no", boolean))


def _word(value: bool) -> str:
    return "yes" if value else "no"


def execute(desk: Desk) -> None:
    """108"""
    path = Path(desk.dialogue.text("Script file"))
    _run(desk, path, numbered(path))


def execute_in_background(desk: Desk) -> None:
    """109: a process with a session and a login of its own, as another application would be."""
    path = Path(desk.dialogue.text("Script file"))
    numbered(path)
    output = Path(desk.dialogue.text("File for its output", f"{path}.out"))
    try:
        with output.open("wb") as file:
            # Isolated and with our own paths: what runs there is what runs here. A Ctrl-C meant for us is not its.
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-c"),
                    f"import sys; sys.path[:] = {sys.path!r}; from pkcs11_ha.cli.main import main; main()",
                    *("demo-menu", *desk.command, "--script", str(path.absolute())),
                    *(("--keep-going",) if desk.options.keep_going else ()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
    except (OSError, ValueError) as error:
        raise NotDone(f"{output}: {error}") from None
    desk.background.append(Background(path, output, process))
    desk.say(f"{path} runs in process {process.pid}; what it says is in {output}")


def execute_part(desk: Desk) -> None:
    """110"""
    path = Path(desk.dialogue.text("Script file"))
    there = parts(numbered(path))
    if not there:
        raise NotDone(f"{path} has no parts: a line like [NAME] begins one")
    desk.say(f"Parts: {', '.join(there)}")

    def read(text: str) -> str:
        if text not in there:
            raise ValueForm(f"{text!r} is none of {', '.join(there)}")
        return text

    name = desk.dialogue.ask("Part", read)
    _run(desk, path, there[name])


def _run(desk: Desk, path: Path, lines: list[tuple[int, str]]) -> None:
    script = script_of(path, lines, desk.dialogue.out)
    failed = desk.run(script)
    if failed:
        raise NotDone(f"{failed} failed in the script, the last at {script.where}")
