"""OpenSSH: public keys of the group by ssh-keygen -D, signatures by an agent that has it as a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.clients.conftest import DATA, Key, Keys, KillableFactory
from tests.clients.programs import Token


def public_line(key: Key) -> str:
    public = key.private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return public.decode()


def lines_of(output: str) -> list[str]:
    """Type and key of each line, without the comment."""
    return sorted(line.rsplit(" ", 1)[0] for line in output.splitlines())


def all_lines(keys: Keys) -> list[str]:
    return sorted(public_line(key) for key in keys)


NOT_PRELOADED = "ssh-agent runs with its group's rights: nothing can be preloaded into it"

AgentFactory = Callable[[Token], dict[str, str]]


@pytest.fixture
def agent() -> Iterator[AgentFactory]:
    """An agent with the group as a card; gives the environment to reach it."""
    with ExitStack() as running:

        def start(token: Token) -> dict[str, str]:
            socket = token.path("agent.sock")
            command = ("ssh-agent", "-D", "-a", socket, "-P", token.module.resolve())
            program = running.enter_context(token.talk(*command))
            assert str(socket) in program.hear()  # it listens before it says so
            ask = token.write("askpass", f"#!/bin/sh\necho {token.pin}\n".encode())
            ask.chmod(0o700)
            env = {"SSH_AUTH_SOCK": str(socket), "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
            token.run("ssh-add", "-s", token.module, env=env)
            return env

        yield start


def sign(token: Token, key: Key, env: dict[str, str]) -> None:
    """A signature by the agent's key, verified without it."""
    data = token.write("data", DATA)
    public = token.write("key.pub", f"{public_line(key)} {key.label}\n".encode())
    token.path("data.sig").unlink(missing_ok=True)
    token.run("ssh-keygen", "-Y", "sign", "-f", public, "-n", "file", data, env=env)
    allowed = token.write("allowed", f"me {public_line(key)}\n".encode())
    verify = ("ssh-keygen", "-Y", "verify", "-f", allowed, "-I", "me", "-n", "file", "-s", "data.sig")
    assert "Good" in token.run(*verify, stdin=DATA.decode()).stdout


def test_public_keys_are_read_without_a_pin(prod: Token, keys: Keys) -> None:
    done = prod.run("ssh-keygen", "-D", prod.module)
    assert lines_of(done.stdout) == all_lines(keys)


@pytest.mark.parametrize("dead", ["east", "west"])
def test_public_keys_with_a_dead_member(killable: KillableFactory, keys: Keys, dead: str) -> None:
    made = killable()
    made[dead].kill()
    done = made.token.run("ssh-keygen", "-D", made.token.module)
    assert lines_of(done.stdout) == all_lines(keys)


@pytest.mark.not_sanitized(NOT_PRELOADED)
def test_an_agent_signs(prod: Token, keys: Keys, agent: AgentFactory) -> None:
    env = agent(prod)
    assert lines_of(prod.run("ssh-add", "-L", env=env).stdout) == all_lines(keys)
    for key in keys:
        sign(prod, key, env)
        prod.run("ssh-add", "-T", prod.write("key.pub", public_line(key).encode()), env=env)
    prod.run("ssh-add", "-e", prod.module, env=env)
    assert prod.run("ssh-add", "-L", ok=False, env=env).returncode == 1


@pytest.mark.not_sanitized(NOT_PRELOADED)
@pytest.mark.parametrize("dead", ["east", "west"])
def test_an_agent_signs_on_when_a_member_dies(
    killable: KillableFactory, keys: Keys, agent: AgentFactory, dead: str
) -> None:
    made = killable()
    env = agent(made.token)
    for number in range(6):
        if number == 3:
            made[dead].kill()
        for key in keys:
            sign(made.token, key, env)
    assert made.events("member.lost", dead) == 1
