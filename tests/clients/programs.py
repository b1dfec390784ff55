"""Programs as tests run them: one that runs to its end, one that is talked with, and where both find a token."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

PATIENCE_S = 30.0

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Token:
    """A token as programs are told about it: the group's, or a bare one of a vendor's library."""

    module: Path
    label: str
    pin: str
    home: Path  # a directory of its own: of the program's files, and its $HOME
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"pkcs11:token={self.label}"

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The program's environment: nothing of the user's own configuration, no terminal to ask at."""
        own = {
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "LC_ALL": "C.UTF-8",
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",  # openvpn
            "SOFTHSM2_CONF": "/nonexistent",  # a store that nobody named is not to be found
        }
        drop = ("DISPLAY", "OPENSSL_CONF", "SSH_AUTH_SOCK", "SSH_ASKPASS", "PYTHONPATH")
        outer = {name: value for name, value in os.environ.items() if name not in drop}
        return outer | own | dict(self.env) | dict(more or {})

    def run(
        self, *command: str | Path, stdin: str = "", ok: bool = True, env: Mapping[str, str] | None = None
    ) -> Done:
        """Runs a program to its end; `ok`: it must have succeeded, and nothing of ours have complained."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment(env),
            cwd=self.home,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            start_new_session=True,  # no terminal: a question for a PIN would wait for ever
        )
        if ok:
            assert done.returncode == 0, _words(command, done)
            assert "pkcs11-ha:" not in done.stderr, _words(command, done)
        return done

    def talk(self, *command: str | Path, env: Mapping[str, str] | None = None) -> Conversation:
        """Starts a program that answers each line with a line."""
        return Conversation(command, self.environment(env), self.home)

    def path(self, name: str) -> Path:
        return self.home / name

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def write(self, name: str, content: bytes) -> Path:
        path = self.path(name)
        path.write_bytes(content)
        return path


class Conversation:
    """A program that runs until its input ends; its standard error is kept in a file and shown if it fails."""

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str], cwd: Path) -> None:
        self._command = command
        self._errors = cwd / "stderr.txt"
        self._unread = b""
        with self._errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,
            )

    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")

    def hear(self) -> str:
        """The next line it writes; fails if none comes."""
        assert self.process.stdout
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, left))
            assert ready, f"{self._command[0]} says nothing: {self.errors()}"
            more = os.read(self.process.stdout.fileno(), 65536)
            assert more, f"{self._command[0]} has ended: {self.errors()}"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def end(self) -> None:
        """Closes its input; it must end well, and nothing of ours have complained."""
        assert self.process.stdin
        self.process.stdin.close()
        code = self.process.wait(PATIENCE_S)
        assert code == 0, f"{self._command[0]} ended with {code}: {self.errors()}"
        assert "pkcs11-ha:" not in self.errors()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


def _words(command: Sequence[str | Path], done: Done) -> str:
    words = " ".join(str(word) for word in command)
    return f"{words}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}"
