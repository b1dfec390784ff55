"""A group of members with one domain key, as tests use it: its members go away and come back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.members import SoftToken, Table, write_config
from tests import p11
from tests.ha.app import Application, until

PIN = "123456"
LABEL = "prod"
NAMES = ("east", "west")
SOON = {"interval_s": 0.05}
P11HA = Path(sys.executable).parent / "p11ha"


@dataclass
class Domain(Application):
    """An application on a group whose members are SoftHSM tokens in its own process."""

    tokens: Sequence[SoftToken]

    def token(self, name: str) -> SoftToken:
        return next(token for token in self.tokens if token.label == name)

    def lose(self, name: str) -> None:
        """The member fails; it stays away as long as its store does, or as no attempt is due."""
        member = self.core.members[name]
        self.core.lose(member, p11.CKR_DEVICE_ERROR, "test", member.epoch)

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Some members are away, for this process and for all others; back in service at the end."""
        with missing(*(self.token(name) for name in names)):
            for name in names:
                self.lose(name)
            yield
        self.regain()

    def regain(self) -> None:
        """Calls until all members are back."""
        session = self.open(rw=False)
        until(lambda: session.random(1) and not self.away(), f"all are back, of {self.states()}")
        session.close()


@contextmanager
def missing(*tokens: SoftToken) -> Iterator[None]:
    """The stores of tokens are not there: whoever starts their library finds no token."""
    for token in tokens:
        token.directory.rename(hidden(token))
    try:
        yield
    finally:
        for token in tokens:
            hidden(token).rename(token.directory)


def hidden(token: SoftToken) -> Path:
    return token.directory.with_suffix(".away")


def initialise(directory: Path, members: Sequence[Table]) -> None:
    """`p11ha domain init` on a group of these members."""
    directory.mkdir(exist_ok=True)
    state, pin = directory / "state", directory / "pin"
    state.mkdir(mode=0o700)
    pin.touch(mode=0o600)
    pin.write_text(PIN)
    group: Table = {
        "label": LABEL,
        "serial": "1599447001",
        "members": [str(member["name"]) for member in members],
        "replication": "domain",
    }
    log: Table = {"log": f"file:{directory / 'init.log'}"}
    conf = write_config(directory / "init.toml", members, [group], SOON, log)
    done = subprocess.run(
        [str(P11HA), "domain", "init", LABEL, "--pin-source", f"file:{pin}"],
        env=os.environ | {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(state)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
