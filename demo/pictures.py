"""`make pictures`: the screens of docs/pictures, each of a real run on the HSMs of `demo.practice`, 80 columns wide."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from demo.members import Server, SoftToken, Worker, scratch, write_config
from demo.practice import PIN, prepare

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
P11HA = str(ROOT / ".venv" / "bin" / "p11ha")
COLUMNS, ROWS = 80, 24


class Screen:
    """A program in a terminal of 80 columns, and what stands there."""

    def __init__(self, command: Sequence[str], env: dict[str, str], rows: int = ROWS) -> None:
        self.rows = rows
        self.screen = pyte.Screen(COLUMNS, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._child, self._terminal = pty.fork()
        if self._child == 0:
            os.execvpe(command[0], list(command), os.environ | env | {"TERM": "xterm-256color"})  # noqa: S606
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))

    def wait(self, patience_s: float) -> Screen:
        """Until nothing has come for so long, or it has ended; of what paints itself anew, three times as long."""
        end = time.monotonic() + 3 * patience_s
        while select.select([self._terminal], [], [], patience_s)[0] and time.monotonic() < end:
            try:
                self._stream.feed(os.read(self._terminal, 65536))
            except OSError:
                os.waitpid(self._child, 0)
                break
        return self

    def type(self, *texts: str) -> Screen:
        for text in texts:
            os.write(self._terminal, text.encode())
            self.wait(0.7)
        return self

    def text(self, first: str = "", last: str = "") -> Text:
        """From the last line that begins like `first` to the next that begins like `last`, or all that is not empty."""
        shown = [self._line(row) for row in range(self.rows)]
        while shown and not shown[-1].plain.strip():
            shown.pop()
        begin = (
            max((k for k, line in enumerate(shown) if line.plain.startswith(first)), default=0)
            if first
            else 0
        )
        end = next(
            (k for k, line in enumerate(shown) if last and k > begin and line.plain.startswith(last)),
            len(shown),
        )
        return Text("\n").join(shown[begin : end + 1])

    def _line(self, row: int) -> Text:
        line = Text()
        cells = (self.screen.buffer[row][column] for column in range(COLUMNS))
        for style, alike in groupby(cells, _style):
            line.append("".join(cell.data for cell in alike), style)
        line.rstrip()
        return line


def _style(cell: pyte.screens.Char) -> Style:
    colour = None if cell.fg == "default" else cell.fg if not _is_hex(cell.fg) else f"#{cell.fg}"
    return Style(color=colour, bold=cell.bold, reverse=cell.reverse)


def _is_hex(colour: str) -> bool:
    return len(colour) == 6 and all(c in "0123456789abcdef" for c in colour.lower())


def save(name: str, title: str, text: Text) -> None:
    console = Console(record=True, width=COLUMNS + 1, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(text)
    PICTURES.mkdir(exist_ok=True)
    console.save_svg(str(PICTURES / f"{name}.svg"), title=title)


def main() -> None:
    """A group of two, an application; one member dies."""
    with scratch() as path:
        directory = Path(path) / "p"
        prepare(directory)
        servers = [Worker(_existing(directory, name)) for name in ("east", "west")]
        try:
            for server in servers:
                server.start()
            log = {"log": f"file:{directory}/ha.log"}
            group = {
                "label": "prod",
                "serial": "1599447001",
                "members": ["east", "west"],
                "replication": "domain",
            }
            conf = directory / "pkcs11-ha.toml"
            write_config(conf, [server.member() for server in servers], [group], None, log)
            _take(directory, {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": f"{directory}/state"}, servers)
        finally:
            for server in servers:
                server.close()


def _existing(directory: Path, name: str) -> SoftToken:
    """A token that `prepare` has made."""
    token = SoftToken.__new__(SoftToken)
    token.directory, token.label, token.pin = directory / name, name, PIN
    token.uri, token.env = f"pkcs11:token={name}", {"SOFTHSM2_CONF": f"{directory}/{name}/softhsm2.conf"}
    return token


def _take(directory: Path, env: dict[str, str], servers: Sequence[Server]) -> None:
    pin = f"file:{directory}/pin"
    Screen([P11HA, "domain", "init", "prod", "--shares", "none", "--pin-source", pin], env).wait(8)
    menu = Screen([P11HA, "demo-menu"], env, 100).wait(2)
    menu.type("1\n", "0\n", "yes\n", "3\n", "user\n", f"{PIN}\n")
    for _ in range(8):
        menu.type("62\n", "16\n", "\n")
    diff = Screen([P11HA, "diff", "prod", "--pin-source", pin], env).wait(4)
    save("diff", "p11ha diff prod", diff.text())
    servers[0].kill()
    for _ in range(2):
        menu.type("62\n", "16\n", "\n")
    menu.type("52\n", "0\n")
    save("demo-menu-52", "p11ha demo-menu, number 52", menu.text("Slots available:", "Status:"))
    save("status", "p11ha status", Screen([P11HA, "status"], env).wait(3).text())
    watch = Screen([P11HA, "watch"], env).wait(2)
    save("watch", "p11ha watch", watch.text())
    watch.type("q")
    menu.type("0\n")


if __name__ == "__main__":
    main()
