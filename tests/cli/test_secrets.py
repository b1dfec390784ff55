"""What the commands handle in secret stays out of logs, arguments, messages and what a core dump shows of memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import shamir_mnemonic

from demo.members import SoftToken, Toml, write_config

PIN = "pin-Zq7vK2-9431"  # like nothing else in any process
TOKENS = ("east", "west", "north")

# Runs a command of p11ha and then writes all of its memory that a core dump would hold.
_DUMPING = """
import re, sys
from pkcs11_ha.cli.main import app
try:
    app(sys.argv[2:], standalone_mode=False)
except SystemExit:
    pass
finally:
    with open("/proc/self/smaps") as maps, open("/proc/self/mem", "rb", 0) as memory, open(sys.argv[1], "wb") as dump:
        place = None
        for line in maps.readlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line):
                place = int(found[1], 16), int(found[2], 16)
            elif line.startswith("VmFlags:") and place and " dd" not in line and " io" not in line:
                try:
                    memory.seek(place[0])
                    dump.write(memory.read(place[1] - place[0]))
                except OSError:
                    pass
                place = None
"""


class Commands:
    """p11ha as a real process, looked at from all sides; `seen` is all that it and its children showed."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.directory, self.env = directory, env
        self.seen: dict[str, bytes] = {}

    def run(self, *arguments: str, words: str = "") -> str:
        """The command's standard output, where words belong; everything else is remembered."""
        dump = self.directory / "dump"
        command = [sys.executable, "-c", _DUMPING, str(dump), *arguments]
        with _watched_arguments() as shown:
            done = subprocess.run(
                command, input=words, capture_output=True, text=True, check=False, env=os.environ | self.env
            )
        name = " ".join(arguments[:2])
        self.seen[f"{name}: memory"] = dump.read_bytes()
        self.seen[f"{name}: stderr"] = done.stderr.encode()
        self.seen[f"{name}: arguments"] = b"\n".join(shown)
        log = self.directory / "ha.log"
        self.seen["log"] = log.read_bytes() if log.exists() else b""
        assert "Error" not in done.stderr, done.stderr
        return done.stdout


class _watched_arguments:  # noqa: N801 (used as a function)
    """The command lines and environments of all processes while a block runs."""

    def __enter__(self) -> set[bytes]:
        self.shown: set[bytes] = set()
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self.shown

    def _watch(self) -> None:
        while not self.end.is_set():
            for name in ("cmdline", "environ"):
                for path in Path("/proc").glob(f"[0-9]*/{name}"):
                    try:
                        self.shown.add(path.read_bytes())
                    except OSError:
                        continue
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.thread.join()


def share_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if len(line.split()) > 20]


def domain_key(shares: list[str]) -> bytes:
    return shamir_mnemonic.combine_mnemonics(shares[:2])


@pytest.fixture
def commands(directory: Path) -> Commands:
    tokens = [SoftToken(directory / name, name, pin=PIN) for name in TOKENS]
    (directory / "pin").write_text(f"{PIN}\n")
    (directory / "pin").chmod(0o600)
    group: dict[str, Toml] = {"label": "prod", "serial": "1", "members": TOKENS, "replication": "domain"}
    log = {"log": f"file:{directory}/ha.log"}
    conf = write_config(directory / "c.toml", [t.member() for t in tokens], [group], ha=log)
    two = group | {"members": TOKENS[:2]}
    write_config(directory / "two.toml", [t.member() for t in tokens[:2]], [two], ha=log)
    return Commands(directory, {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(directory)})


def test_the_search_finds_what_is_there(commands: Commands) -> None:
    """A dump in which nothing can be found would let everything pass."""
    commands.run("version")
    assert b"pkcs11_ha.cli.main" in commands.seen["version: memory"]
    os.environ["PLANTED"] = "planted-in-the-environment"
    try:
        commands.run("version")
    finally:
        del os.environ["PLANTED"]
    assert b"planted-in-the-environment" in commands.seen["version: arguments"]
    assert b"planted-in-the-environment" in commands.seen["version: memory"]


def test_domain_commands_show_no_secret(commands: Commands) -> None:
    source = f"--pin-source=file:{commands.directory}/pin"
    here = f"--config={commands.directory}/two.toml"
    first = share_lines(commands.run("domain", "init", "prod", source, here))
    assert len(first) == 3
    commands.run("domain", "admit", "north", source, words=f"{first[0]}\n{first[2]}\n")
    second = share_lines(commands.run("domain", "rotate", "prod", source))
    assert len(second) == 3
    commands.run("diff", "prod", source)
    commands.run("check", source)
    secrets = {"PIN": PIN.encode(), "key 1": domain_key(first), "key 2": domain_key(second)}
    for number, line in enumerate(first + second):
        middle = " ".join(line.split()[6:14])
        secrets[f"share {number}"] = middle.encode()
    found = [
        (where, what) for where, text in commands.seen.items() for what, it in secrets.items() if it in text
    ]
    assert found == []
    assert len(re.findall(rb"domain|admit", commands.seen["domain init: arguments"])) > 0


def test_wrong_words_show_no_secret(commands: Commands) -> None:
    source = f"--pin-source=file:{commands.directory}/pin"
    shares = share_lines(
        commands.run("domain", "init", "prod", source, f"--config={commands.directory}/two.toml")
    )
    words = shares[1].split()
    words[9] = "acadamic"
    for given in (shares[0], f"{shares[0]}\n{' '.join(words)}", f"{shares[0]}\n{shares[0]}"):
        commands.run("domain", "admit", "north", source, words=given + "\n")
        assert (
            b"SLIP-39" in commands.seen["domain admit: stderr"]
            or b"share" in commands.seen["domain admit: stderr"]
        )
        for where, text in commands.seen.items():
            for line in shares:
                assert " ".join(line.split()[6:14]).encode() not in text, where
            assert PIN.encode() not in text, where
    shown = commands.run("domain", "show", "prod", source)
    assert "north: it has no domain key" in shown
