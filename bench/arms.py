"""What `make bench` compares: p11bench processes, each with a module loaded, that take turns."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from demo.members import Server, SoftToken, library, p11_kit_client, softhsm, write_config

PATIENCE_S = 60.0
UNDER_CALLGRIND_S = 300.0


class ArmError(Exception):
    """An arm could not be started, did not answer, or its module failed."""


@dataclass(frozen=True)
class Target:
    """One token, as a program sees it through one module."""

    module: Path
    token: str
    pin: str
    env: dict[str, str]
    options: tuple[str, ...] = ()

    def command(self, program: Path, *arguments: str) -> list[str]:
        whose = ["--module", str(self.module), "--token", self.token, "--pin", self.pin]
        return [str(program), *whose, *self.options, *arguments]


def bare(token: SoftToken) -> Target:
    """SoftHSM itself."""
    return Target(softhsm(), token.label, token.pin, token.env)


def through_p11_kit(token: SoftToken) -> Target:
    """p11-kit-proxy in front of SoftHSM, with a configuration of its own.

    p11-kit gives root no configuration but the system's: there, SoftHSM's package has registered its module.
    """
    config = token.directory / "xdg" / "pkcs11"
    (config / "modules").mkdir(parents=True, exist_ok=True)
    (config / "pkcs11.conf").write_text("user-config: only\n")
    (config / "modules" / "softhsm.module").write_text(f"module: {softhsm()}\n")
    env = token.env | {"XDG_CONFIG_HOME": str(config.parent)}
    return Target(library("p11-kit-proxy.so"), token.label, token.pin, env)


def through_server(server: Server) -> Target:
    """p11-kit's client module in front of `p11-kit server`, which has SoftHSM in a process of its own."""
    return Target(p11_kit_client(), server.token.label, server.token.pin, server.env)


def group(module: Path, tokens: Sequence[SoftToken], directory: Path, host: str = "process") -> Target:
    """Our module with one group, each member a SoftHSM copy of its own in the same process or in a worker."""
    directory.mkdir(mode=0o700)
    config = write_config(
        directory / "pkcs11-ha.toml",
        members=[token.member(host=host) for token in tokens],
        groups=[{"label": "bench", "members": [token.label for token in tokens], "replication": "none"}],
        ha={"only": True, "log": "stderr"},
    )
    env = {"PKCS11_HA_CONF": str(config), "PKCS11_HA_STATE": str(directory / "state")}
    return Target(module, "bench", tokens[0].pin, env)


def provision(program: Path, token: SoftToken) -> None:
    """Put p11bench's keys on the token."""
    target = bare(token)
    command = target.command(program, "--provision")
    done = subprocess.run(command, env=os.environ | target.env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ArmError(f"{token.label}: {done.stderr.strip()}")


class Arm:
    """One p11bench process, waiting for requests."""

    def __init__(self, program: Path, target: Target) -> None:
        self._process = subprocess.Popen(
            target.command(program, "-"),
            env=os.environ | target.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._fault = ""

    def ask(self, operation: str, threads: int, seconds: float) -> None:
        """Have it begin; a fault is told by `rate`."""
        with suppress(BrokenPipeError, ValueError):  # it is gone; ValueError: and that is known
            print(operation, threads, seconds, file=self._requests, flush=True)

    def rate(self) -> float:
        """The answer to `ask`, in calls a second."""
        if self._fault:
            raise ArmError(self._fault)
        if not select.select([self._answers], [], [], PATIENCE_S)[0]:
            raise self._gone(f"no answer within {PATIENCE_S:.0f} s")
        line = self._answers.readline()
        if not line:
            raise self._gone()
        answer = json.loads(line)
        if "failed" in answer:
            raise ArmError(f"{answer['op']}: {answer['failed']}")
        return float(answer["rate"])

    def _gone(self, why: str = "") -> ArmError:
        self._process.kill()
        words = self._process.communicate()[1].strip().splitlines()
        self._fault = why or (words[-1] if words else f"ended with status {self._process.returncode}")
        return ArmError(self._fault)

    def close(self) -> None:
        if self._fault:
            return
        try:
            self._process.communicate(timeout=PATIENCE_S)  # no more requests: it finalizes and ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class Team:
    """Arms that work at the same time; their rates add up."""

    def __init__(self, program: Path, *targets: Target) -> None:
        self._arms: list[Arm] = []
        try:
            for target in targets:
                self._arms.append(Arm(program, target))
            self.rate("getsessioninfo", len(targets), 0.001)  # all loaded and logged in
        except BaseException:
            self.close()
            raise

    def rate(self, operation: str, threads: int, seconds: float) -> float:
        """Calls a second of `threads` threads in all."""
        for arm in self._arms:
            arm.ask(operation, threads // len(self._arms), seconds)
        total, fault = 0.0, None
        for arm in self._arms:  # to the last one, so that no answer is left for the next request
            try:
                total += arm.rate()
            except ArmError as error:
                fault = error
        if fault:
            raise fault
        return total

    def close(self) -> None:
        for arm in self._arms:
            arm.close()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


def instructions_per_call(program: Path, target: Target, operation: str, calls: int = 1000) -> float:
    """What one call of the application costs in instructions, all libraries included; exact, whatever the load."""
    callgrind = (
        "valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect=p11bench_repeat".split()
    )
    count = target.command(program, "--warmup", "0", "--count", str(calls), operation)
    try:
        done = subprocess.run(
            [*callgrind, *count],
            env=os.environ | target.env,
            capture_output=True,
            text=True,
            timeout=UNDER_CALLGRIND_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArmError(f"not done under callgrind within {UNDER_CALLGRIND_S:.0f} s") from None
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or not collected:
        words = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("==")]
        raise ArmError(words[-1] if words else f"ended with status {done.returncode}")
    return int(collected[1]) / calls
