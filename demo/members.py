"""Real members for the demo and the tests: SoftHSM tokens, and killable p11-kit servers in front of them."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

Toml = str | bool | int | float | Sequence["Toml"] | Mapping[str, "Toml"]
Table = Mapping[str, Toml]

SOCKET_PATH_MAX = 107  # sun_path has 108 bytes, the last one a NUL
PATIENCE_S = 15.0


class MemberError(Exception):
    """A member could not be set up, or did not do what it was told."""


def library(name: str) -> Path:
    """Find a shared library in the system's library directories, first in that of this architecture."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    places = [
        Path(root, name) for root in (f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/lib", "/usr/local/lib")
    ]
    for place in places:
        if place.exists():
            return place
    raise MemberError(f"{name} is in none of {', '.join(str(place.parent) for place in places)}")


def softhsm() -> Path:
    return library("softhsm/libsofthsm2.so")


def p11_kit_client() -> Path:
    return library("pkcs11/p11-kit-client.so")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory with room for sockets, also where $TMPDIR is too deep for a socket's path."""
    deep = len(tempfile.gettempdir()) > SOCKET_PATH_MAX // 2
    return tempfile.TemporaryDirectory(prefix="p11ha-", dir="/tmp" if deep else None)  # noqa: S108 (made 0700)


class SoftToken:
    """A SoftHSM store of its own with one initialised token in it."""

    def __init__(self, directory: Path, label: str, pin: str = "123456", so_pin: str = "12345678") -> None:
        self.directory, self.label, self.pin, self.so_pin = directory, label, pin, so_pin
        self.uri = "pkcs11:token=" + quote(label, safe="")
        tokens = directory / "tokens"
        tokens.mkdir(parents=True)
        self.conf = directory / "softhsm2.conf"
        self.conf.write_text(
            f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        self.env = {"SOFTHSM2_CONF": str(self.conf)}
        self._util("--init-token", "--free", "--label", label, "--so-pin", so_pin, "--pin", pin)
        self.serial = self._read_serial()

    def import_key(self, pem: bytes, label: str, id_hex: str) -> None:
        """Put a PKCS#8 private key and its public key on the token."""
        # The file holds a private key: it is made readable for us alone, and lives as long as the import.
        with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".pem") as file:
            file.write(pem)
            file.flush()
            self._util(
                *(
                    "--import",
                    file.name,
                    "--token",
                    self.label,
                    "--pin",
                    self.pin,
                    "--label",
                    label,
                    "--id",
                    id_hex,
                )
            )

    def member(self, **options: Toml) -> Table:
        """This token as a `[[member]]`: the library in the application's own process."""
        member: dict[str, Toml] = {
            "name": self.label,
            "module": str(softhsm()),
            "token": self.uri,
            "env": self.env,
            "instance": "own",
        }
        return member | options

    def _read_serial(self) -> str:
        serial = ""
        for line in self._util("--show-slots").splitlines():
            key, _, value = line.strip().partition(":")
            if key == "Serial number":
                serial = value.strip()
            elif key == "Label" and value.strip() == self.label:
                return serial
        raise MemberError(f"softhsm2-util shows no token {self.label}")

    def _util(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                ["softhsm2-util", *arguments],
                env=os.environ | self.env,
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise MemberError("softhsm2-util is not installed") from None
        if done.returncode != 0:
            raise MemberError(f"softhsm2-util {arguments[0]}: {(done.stderr or done.stdout).strip()}")
        return done.stdout


class Server:
    """A `p11-kit server` with one token behind a Unix socket: an HSM that can die, hang and come back."""

    program = "p11-kit"

    def __init__(self, token: SoftToken, path: Path | None = None, provider: Path | None = None) -> None:
        self.token = token
        self.provider = provider or softhsm()
        self.socket = path or token.directory / "p11.sock"
        if len(os.fsencode(self.socket)) > SOCKET_PATH_MAX:
            raise MemberError(f"too long for a socket: {self.socket}")
        self.env = {"P11_KIT_SERVER_ADDRESS": f"unix:path={self.socket}"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        if self._process is not None:
            raise MemberError(f"the server of {self.token.label} runs already")
        self.socket.unlink(missing_ok=True)  # a killed server leaves its socket behind
        log = self.token.directory / f"{self.program}.log"
        command = self.command()
        try:
            with log.open("wb") as stderr:
                # A session of its own: the server forks for each connection, and the group is what we kill.
                # It also keeps a Ctrl-C that is meant for us away from it.
                self._process = process = subprocess.Popen(
                    command,
                    env=os.environ | self.token.env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                )
            _wait_until(
                lambda: self.answers() or process.poll() is not None,
                f"the server of {self.token.label} to answer",
            )
        except FileNotFoundError:
            raise MemberError(f"{self.program} is not installed") from None
        except BaseException:
            self.close()  # an interrupted start leaves nothing behind
            raise
        if process.poll() is not None:
            self.close()
            raise MemberError(
                f"the server of {self.token.label} ended: {log.read_text(errors='replace').strip()}"
            )

    def command(self) -> list[str]:
        start = ["p11-kit", "server", "-f", "-n", str(self.socket)]
        return [*start, "--provider", str(self.provider), self.token.uri]

    def answers(self) -> bool:
        """Ask for the protocol version: it is answered once the token's library is loaded and initialised."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            try:
                connection.connect(os.fspath(self.socket))
                connection.sendall(b"\0")
                return connection.recv(1) == b"\0"
            except OSError:
                return False

    def kill(self) -> None:
        """SIGKILL it with all its connections; none of its processes runs any more on return."""
        if self._process is None:
            return
        process, self._process = self._process, None
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        _wait_until(lambda: not _states(process.pid), f"the server of {self.token.label} to be dead")

    def stop(self) -> None:
        """SIGSTOP it: connections stay open, nothing is answered."""
        group = self.pid
        _signal_group(group, signal.SIGSTOP)
        _wait_until(lambda: set(_states(group)) == {"T"}, f"the server of {self.token.label} to stop")

    def cont(self) -> None:
        """SIGCONT it."""
        _signal_group(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self.socket.unlink(missing_ok=True)

    def member(self, **options: Toml) -> Table:
        """This server as a `[[member]]`, reached through p11-kit's client module."""
        member: dict[str, Toml] = {
            "name": self.token.label,
            "module": str(p11_kit_client()),
            "token": self.token.uri,
            "env": self.env,
        }
        return member | options

    @property
    def pid(self) -> int:
        """Of its process, which is the leader of its group."""
        if self._process is None:
            raise MemberError(f"the server of {self.token.label} does not run")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


class Worker(Server):
    """A `pkcs11-ha-worker` in front of one token: an HSM like a Server, with every mechanism that its library has."""

    program = "pkcs11-ha-worker"

    def __init__(self, token: SoftToken, path: Path | None = None, provider: Path | None = None) -> None:
        super().__init__(token, path or token.directory / "worker.sock", provider)
        self.env = {}

    def command(self) -> list[str]:
        built = (
            os.environ.get("PKCS11_HA_MODULE") or Path(__file__).parent.parent / "build" / "libpkcs11-ha.so"
        )
        return [str(Path(built).with_name(self.program)), "--listen", str(self.socket), str(self.provider)]

    def answers(self) -> bool:
        """It greets once the token's library is loaded."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            try:
                connection.connect(os.fspath(self.socket))
                connection.sendall(b"g")
                return connection.recv(1) != b""
            except OSError:
                return False

    def member(self, **options: Toml) -> Table:
        """This worker as a `[[member]]`, reached by the group's own stubs."""
        member: dict[str, Toml] = {
            "name": self.token.label,
            "module": str(self.provider),
            "token": self.token.uri,
            "host": f"unix:{self.socket}",
        }
        return member | options


def write_config(
    path: Path,
    members: Iterable[Table],
    groups: Iterable[Table],
    recovery: Table | None = None,
    ha: Table | None = None,
) -> Path:
    """Write a pkcs11-ha.toml; the tables are taken as they are, so that wrong ones can be written too."""
    sections = [("[ha]", ha or {}), ("[recovery]", recovery or {})]
    sections += [("[[member]]", member) for member in members]
    sections += [("[[group]]", group) for group in groups]
    path.write_text("\n".join(_toml_section(head, table) for head, table in sections if table))
    return path


def _toml_section(head: str, table: Table) -> str:
    return "\n".join([head, *(f"{key} = {_toml(value)}" for key, value in table.items())]) + "\n"


def _toml(value: Toml) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in both


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _states(group: int) -> list[str]:
    """State letters of the group's processes, less zombies: they hold no socket and may wait for init."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        if int(its_group) == group and state not in "ZX":
            states.append(state)
    return states


def _wait_until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            raise MemberError(f"waited {PATIENCE_S:.0f} s for {what}")
        time.sleep(0.005)
