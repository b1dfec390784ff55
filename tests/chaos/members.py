"""Domains to copy, and the members of one history: tokens that can be killed, alone or in the middle of a write."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.members import Server, SoftToken, Table, softhsm, write_config
from tests.chaos import keywrap
from tests.chaos.crash import CrashPlan
from tests.ha.conftest import clone

PIN = "123456"
LABEL = "prod"
P11HA = Path(sys.executable).parent / "p11ha"
SOON = {"interval_s": 0.05}


@dataclass(frozen=True)
class Domain:
    """Initialised tokens of a group; each history works on copies of them."""

    tokens: tuple[SoftToken, ...]
    replication: str
    module: Path
    crash_library: Path
    provider: Path  # of servers: p11-kit does not carry the wrapping of keys


def prepare(
    directory: Path, names: Sequence[str], module: Path, crash_library: Path, replication: str
) -> Domain:
    """New tokens, with a domain key on each if the group replicates by one."""
    tokens = tuple(SoftToken(directory / name, name, PIN) for name in names)
    ends = keywrap.build(directory)
    for token in tokens:  # members side by side in one process must be different files
        shutil.copy(softhsm(), _near(token))
        shutil.copy(ends.client, _far(token))
    if replication == "domain":
        _initialise_domain(directory, tokens)
    return Domain(tokens, replication, module, crash_library, ends.provider)


def _initialise_domain(directory: Path, tokens: Sequence[SoftToken]) -> None:
    env = configure(directory, "domain", [token.member() for token in tokens], "domain")
    pin = directory / "pin"
    pin.touch(mode=0o600)
    pin.write_text(PIN)
    command = [str(P11HA), "domain", "init", LABEL, "--pin-source", f"file:{pin}"]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def configure(directory: Path, name: str, members: Sequence[Table], replication: str) -> dict[str, str]:
    """A group of these members; what an application must have in its environment to use it."""
    state = directory / "state"
    state.mkdir(exist_ok=True, mode=0o700)
    group: Table = {
        "label": LABEL,
        "serial": "1599447001",
        "members": [str(member["name"]) for member in members],
        "replication": replication,
    }
    log = {"log": f"file:{directory / name}.log"}
    conf = write_config(directory / f"{name}.toml", members, [group], SOON, log)
    return {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(state)}


def _near(token: SoftToken) -> Path:
    """The library of a member in the client's process."""
    return token.directory.parent / f"{token.label}.so"


def _far(token: SoftToken) -> Path:
    """The library of a member behind a server."""
    return token.directory.parent / f"{token.label}-client.so"


class Hsm:
    """A member: in the client's process, or behind a server that can be killed."""

    def __init__(self, domain: Domain, number: int, directory: Path, *, served: bool) -> None:
        model = domain.tokens[number]
        self.name, self.number, self.serial = model.label, number, model.serial
        self._library = _far(model) if served else _near(model)
        self._crash_library = domain.crash_library
        self.token = clone(model, directory / model.label)
        self.plan = CrashPlan(self.token.directory / "plan", whole_group=True)
        self.server = (
            Server(self._to_crash(domain.provider), provider=self._crash_library) if served else None
        )
        self.up = True

    def _to_crash(self, real: Path) -> SoftToken:
        """The token with the crash module around its library, as its server is to load it."""
        token = copy.copy(self.token)
        token.env = token.env | self.plan.env(real)
        return token

    def start(self) -> None:
        if self.server:
            self.server.start()
        self.up = True

    def kill(self) -> None:
        assert self.server
        self.server.kill()
        self.up = False

    def close(self) -> None:
        if self.server:
            self.server.close()
        self.plan.close()

    def member(self) -> Table:
        return dict(self.server.member() if self.server else self.token.member()) | {
            "module": str(self._library),
            "instance": "own",
            "profile": "p11-kit" if self.server else "softhsm",
        }

    def crashing(self, plan: CrashPlan) -> Table:
        """As a member of a client that ends when that plan says so."""
        member = self.member()
        env = member["env"]
        assert isinstance(env, dict)
        return dict(member) | {"module": str(self._crash_library), "env": env | plan.env(self._library)}
