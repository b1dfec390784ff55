"""`p11ha watch`: what `p11ha status` shows, live in a terminal, ordered and filtered by keys."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pkcs11_ha.cli import screen, segments
from pkcs11_ha.cli.screen import SORTS, Look
from pkcs11_ha.cli.segments import Found, Process
from pkcs11_ha.cli.terminal import put_back
from pkcs11_ha.config import Form


def _seconds(given: object) -> object:
    if not isinstance(given, int | float) or not 0.1 <= given <= 3600:
        raise ValueError
    return given


INTERVAL = Form("a number of seconds from 0.1 to 3600", _seconds)
"""Between two looks."""

_KEYS = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "k": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "j": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    " ": "page down",
    "\x1b[H": "home",
    "\x1bOH": "home",
    "g": "home",
    "\x1b[F": "end",
    "\x1bOF": "end",
    "G": "end",
    "q": "quit",
    "\x03": "quit",
    "\x04": "quit",
    "s": "sort",
    "f": "filter",
    "/": "filter",
    "a": "all",
}
_HELP = "q quit  s sort  f filter  a all  arrows, pages: scroll"
_ESCAPE, _ENTER, _ERASE = "\x1b", ("\r", "\n"), ("\x7f", "\b")
_STEP_S = 0.05  # a key that is a sequence comes whole within so long


@dataclass
class Counts:
    """Calls as they were last, and what came of them a second."""

    at_ns: int = 0
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    rates: dict[tuple[str, str], float] = field(default_factory=dict)

    def take(self, processes: Sequence[Process], now_ns: int) -> None:
        calls = {
            (process.name, member.name): process.of(member).calls
            for process in processes
            for group in (process.text.groups if process.text else ())
            for member in group.members
        }
        passed_s = (now_ns - self.at_ns) / 1e9
        self.rates = {k: (n - self.calls[k]) / passed_s for k, n in calls.items() if k in self.calls}
        self.at_ns, self.calls = now_ns, calls


@dataclass(frozen=True)
class State:
    """What the keys have chosen; `typed` is the filter while it is typed, None else."""

    look: Look
    top: int = 0
    typed: str | None = None
    ended: bool = False


def press(state: State, key: str, lines: int, page: int) -> State:
    """The state after a key, with so many lines to be shown and so many on a page."""
    if state.typed is not None:
        return _typed(state, key)
    last = max(0, lines - page)
    moves = {"up": -1, "down": 1, "page up": -page, "page down": page, "home": -lines, "end": lines}
    match _KEYS.get(key):
        case "quit":
            return replace(state, ended=True)
        case "sort":
            names = list(SORTS)
            after = names[(names.index(state.look.sort) + 1) % len(names)]
            return replace(state, look=replace(state.look, sort=after))
        case "all":
            return replace(state, look=replace(state.look, every=not state.look.every))
        case "filter":
            return replace(state, typed=state.look.wanted)
        case str(name):
            return replace(state, top=min(last, max(0, min(state.top, last) + moves[name])))
    return state


def _typed(state: State, key: str) -> State:
    """A filter is being typed: it holds at once, Enter keeps it, Escape takes it back."""
    assert state.typed is not None
    if key in _ENTER:
        return replace(state, typed=None)
    if key in (_ESCAPE, "\x03"):
        return replace(state, typed=None, look=replace(state.look, wanted=""))
    text = state.typed[:-1] if key in _ERASE else state.typed + key if key.isprintable() else state.typed
    return replace(state, typed=text, top=0, look=replace(state.look, wanted=text))


def picture(found: Found, state: State, size: tuple[int, int]) -> tuple[list[Text], int]:
    """The screen, and how many lines there would be to show."""
    width, height = size
    groups = segments.join(found.processes)
    body = screen.lines(groups, state.look)
    page = page_of(height)
    top = min(state.top, max(0, len(body) - page))
    shown = [_title(found, state), screen.heading(state.look), *body[top : top + page]]
    if not body:
        nothing = "nothing that fits the filter" if groups else "no process uses the library now"
        shown.append(Text(f"  {nothing}"))
    shown = [*shown, *[Text()] * height][: height - 1]
    where = f"{top + 1}-{min(len(body), top + page)} of {len(body)}  " if len(body) > page else ""
    prompt = (
        f"filter: {state.typed}_  Enter keeps it, Escape ends it"
        if state.typed is not None
        else where + _HELP
    )
    shown.append(Text(prompt, style="dim" if state.typed is None else "bold"))
    for line in shown:
        line.truncate(width - 1)
        line.no_wrap = True
    return shown, len(body)


def page_of(height: int) -> int:
    """Lines between the heads and the foot."""
    return max(1, height - 3)


def _title(found: Found, state: State) -> Text:
    many = len(found.processes)
    parts = [
        f"p11ha  {time.strftime('%H:%M:%S')}  {many} process{'es' if many != 1 else ''}  by {state.look.sort}"
    ]
    if state.look.wanted and state.typed is None:
        parts.append(f"filter {segments.printable(state.look.wanted)}")
    if found.skipped:
        parts.append(f"{len(found.skipped)} unreadable: p11ha status")
    return Text("  ".join(parts), style="reverse")


# ---- the terminal ----


def watch(look_there: Callable[[], Found], every_s: float, console: Console) -> None:
    """Until q or Ctrl-C; needs a terminal on stdin and stdout."""
    state, counts = State(Look(rates={})), Counts()
    with (
        put_back(),
        _keys() as (keys, resized),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        due = 0.0
        found = Found((), ())
        while not state.ended:
            if time.monotonic() >= due:
                found = look_there()
                counts.take(found.processes, time.monotonic_ns())
                due = time.monotonic() + every_s
            state = replace(state, look=replace(state.look, rates=counts.rates, now_ns=time.monotonic_ns()))
            size = os.get_terminal_size(sys.stdout.fileno())
            lines, many = picture(found, state, size)
            console.size = (size.columns, size.lines)
            live.update(Group(*lines), refresh=True)
            ready, _, _ = select.select([sys.stdin, resized], [], [], max(0.0, due - time.monotonic()))
            if resized in ready:
                os.read(resized, 1024)
            if sys.stdin in ready:
                pressed = list(keys())
                if not pressed:
                    return  # the terminal is gone
                for key in pressed:
                    state = press(state, key, many, page_of(size.lines))


@contextmanager
def _keys() -> Iterator[tuple[Callable[[], Iterator[str]], int]]:
    """Reads the keys that were pressed, each as it is sent; and a descriptor to read when the size has changed."""
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    previous = signal.signal(signal.SIGWINCH, lambda *_: None)
    before_waker = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    tty.setcbreak(file)
    try:
        yield lambda: _split(file), woken
    finally:
        signal.set_wakeup_fd(before_waker)
        signal.signal(signal.SIGWINCH, previous)
        termios.tcsetattr(file, termios.TCSADRAIN, before)
        os.close(woken)
        os.close(waker)


def _split(file: int) -> Iterator[str]:
    """What has been typed, key by key: a sequence that begins with Escape may come in two."""
    text = ""
    with suppress(OSError):  # the terminal is gone
        text = os.read(file, 1024).decode(errors="ignore")
    if text.endswith(_ESCAPE) and select.select([file], [], [], _STEP_S)[0]:
        text += os.read(file, 1024).decode(errors="ignore")
    while text:
        known = max((k for k in _KEYS if text.startswith(k)), key=len, default=text[0])
        if known == _ESCAPE and text[1:2] in ("[", "O"):
            known = text[: 2 + next((n for n, c in enumerate(text[2:], 1) if c.isalpha() or c == "~"), 0)]
        yield known
        text = text[len(known) :]
