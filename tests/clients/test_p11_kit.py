"""p11-kit: the group as a configured module, found by programs that name none, also through p11-kit-proxy.so."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from demo.members import library
from tests.clients.conftest import DATA, Keys, Killable, KillableFactory
from tests.clients.programs import Token
from tests.clients.test_hosts import must_sign, python
from tests.conftest import P11_KIT_DOES_NOT_END

SYSTEM = Path("/etc/pkcs11/modules")
NAME = "pkcs11-ha-test"
PROGRAMS = f"p11-kit p11tool pkcs11-tool ssh-keygen {Path(sys.executable).name}"


@contextmanager
def configured(token: Token) -> Iterator[None]:
    """The module is configured: for the user, whose home is the test's own; for root, whom p11-kit heeds no
    configuration of the user for, in the system's place for as long as the test runs."""
    text = f"module: {token.module}\nenable-in: {PROGRAMS}\n"
    with ExitStack() as undo:
        if os.geteuid() != 0:
            place = token.path("config") / "pkcs11" / "modules"
            place.mkdir(parents=True)
            (place / f"{NAME}.module").write_text(text)
            yield
            return
        others = list(SYSTEM.glob(f"{NAME}-*.module"))  # of test runs that go on, or were killed
        for directory in (SYSTEM.parent, SYSTEM):
            if others or not directory.exists():
                directory.mkdir(exist_ok=True)
                undo.callback(_remove_if_empty, directory)
        for other in others:
            if not Path("/proc", other.stem.rpartition("-")[2]).exists():
                other.unlink(missing_ok=True)
        path = SYSTEM / f"{NAME}-{os.getpid()}.module"
        undo.callback(path.unlink)
        path.write_text(text)
        yield


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def proxied(token: Token) -> Token:
    """The same token, found through p11-kit's module of modules."""
    return replace(token, module=library("p11-kit-proxy.so"))


@pytest.fixture
def known(prod: Token) -> Iterator[Token]:
    with configured(prod):
        yield prod


@pytest.mark.not_sanitized(P11_KIT_DOES_NOT_END)
def test_the_module_is_listed(known: Token) -> None:
    listed = known.run("p11-kit", "list-modules").stdout
    section = re.search(rf"^{NAME}\S*: {re.escape(str(known.module))}\n((?: .*\n)*)", listed, re.MULTILINE)
    assert section, listed
    assert "    token: prod\n" in section[1]
    assert "        serial-number: 1599447001\n" in section[1]


@pytest.mark.not_sanitized(P11_KIT_DOES_NOT_END)
def test_gnutls_finds_the_token_and_signs(known: Token) -> None:
    listed = known.run("p11tool", "--list-token-urls").stdout.split()
    assert "pkcs11:model=HA%20group;manufacturer=pkcs11-ha;serial=1599447001;token=prod" in listed
    for label in ("eckey", "rsakey"):
        key = f"{known.uri};object={label};type=private"
        done = known.run("p11tool", "--login", "--batch", "--test-sign", key, env={"GNUTLS_PIN": known.pin})
        assert "Verifying against public key in the token... ok" in done.stdout + done.stderr


def sign(token: Token, keys: Keys) -> None:
    token.write("data", DATA)
    token.run(
        *("pkcs11-tool", "--module", token.module, "--token-label", token.label, "--login"),
        *("--pin", token.pin, "--sign", "--mechanism", "SHA256-RSA-PKCS", "--id", keys.rsa.id),
        *("--input-file", "data", "--output-file", "signature"),
    )
    keys.rsa.verify(token.read("signature"))


def test_through_the_proxy_programs_sign(known: Token, keys: Keys) -> None:
    sign(proxied(known), keys)
    listed = known.run("ssh-keygen", "-D", proxied(known).module).stdout
    assert listed.count("eckey") == listed.count("rsakey") == 1


@pytest.fixture
def behind(killable: KillableFactory) -> Iterator[Killable]:
    made = killable()
    with configured(made.token):
        yield made


@pytest.mark.parametrize("dead", ["east", "west"])
def test_through_the_proxy_with_a_dead_member(behind: Killable, keys: Keys, dead: str) -> None:
    behind[dead].kill()
    sign(proxied(behind.token), keys)


@pytest.mark.parametrize("dead", ["east", "west"])
def test_through_the_proxy_a_program_signs_on_when_a_member_dies(
    behind: Killable, keys: Keys, dead: str
) -> None:
    with python("pykcs11_host.py")(proxied(behind.token)) as program:
        assert program.hear() == "eckey rsakey"
        for _ in range(4):
            must_sign(program, keys)
        behind[dead].kill()
        for _ in range(8):
            must_sign(program, keys)
        program.end()
    assert behind.events("member.lost", dead) == 1
