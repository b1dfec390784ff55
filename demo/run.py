"""`make demo`: two HSMs under a program that signs, one is killed and comes back, every fact is checked."""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rich.console import Console
from rich.text import Text

from demo.audit import Audit, Broken
from demo.members import MemberError, Server, SoftToken, scratch, write_config

ROOT = Path(__file__).parent.parent
THREADS = 4
INTERVAL_S = 2
KILL_AT_S = 3.0
DEAD_FOR_S = 2.0
PATIENCE_S = 10.0
GROUP_SERIAL = "1599447001"


class Log:
    """The HA log: what the module says happened to its members."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def count(self, event: str) -> int:
        return sum(event in line.split() for line in self.lines())

    def states(self) -> dict[str, str]:
        """The newest state, `lost` or `recovered`, of each member to which something happened."""
        return dict(re.findall(r" member=(\S+) member\.(lost|recovered)\b", "\n".join(self.lines())))


class Screen:
    """Where the story is told: coloured with bars on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        console = Console()
        plain = not console.is_terminal or "NO_COLOR" in os.environ
        self._console = Console(highlight=False, soft_wrap=True, force_terminal=False if plain else None)
        self._bar_size = 0 if plain else max(0, min(16, (console.width - 84) // 2))
        self._peak = 1

    def say(self, text: str, style: str = "bold") -> None:
        self._console.print(Text(text, style))

    def quote(self, lines: list[str]) -> None:
        for line in lines:
            self.say(f"    {line}", "green" if line.endswith("CKR_OK") else "red" if "CKR_" in line else "")

    def second(self, number: int, rates: dict[str, int], states: dict[str, str], failed: int) -> None:
        self._peak = max(self._peak, *rates.values())
        line = Text(f"{number:4} s {sum(rates.values()):7}/s")
        for member, rate in rates.items():
            state = states.get(member, "up")
            line.append(f"   {member} ")
            line.append(("█" * round(rate / self._peak * self._bar_size)).ljust(self._bar_size), "cyan")
            line.append(f"{rate:6}/s ")
            line.append(f"{state:9}", "red" if state == "lost" else "green")
        line.append(f"   failed {failed}", "red" if failed else "")
        self._console.print(line)


class Run:
    """The signing program at work, read and checked while the story goes on."""

    def __init__(self, program: subprocess.Popen[bytes], audit: Audit, log: Log, screen: Screen) -> None:
        assert program.stdin is not None
        assert program.stdout is not None
        self._program, self._commands, self._output = program, program.stdin, program.stdout
        self._audit, self._log, self._screen = audit, log, screen
        self._rest = b""
        self._began = time.monotonic()
        self._seconds = 0
        self._shown: Counter[str] = Counter()
        self.ended = False

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def watch(self, what: str, until: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
        """Read and check what the program writes until something is so."""
        deadline = time.monotonic() + within_s
        while not until():
            if self.ended:
                raise Broken(f"the signing program ended ({self._program.wait(PATIENCE_S)}) before {what}")
            if time.monotonic() > deadline:
                raise Broken(f"not within {within_s:.0f} s: {what}")
            self._read(timeout_s=0.02)
            self._tick()

    def status(self) -> list[str]:
        """What the program shows as the HA status when asked now."""
        answered = len(self._audit.statuses)
        with suppress(BrokenPipeError):  # an early end is noticed, and named, below
            self._commands.write(b"status\n")
        self.watch("it showed the HA status", lambda: len(self._audit.statuses) > answered)
        return self._audit.statuses[-1]

    def _read(self, timeout_s: float) -> None:
        if not select.select([self._output], [], [], timeout_s)[0]:
            return
        piece = os.read(self._output.fileno(), 1 << 16)
        self.ended = not piece
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._audit.read(line.decode())

    def _tick(self) -> None:
        if self.elapsed_s < self._seconds + 1:
            return
        self._seconds += 1
        rates = {member: self._audit.verified[member] - self._shown[member] for member in ("east", "west")}
        self._shown = self._audit.verified.copy()
        self._screen.second(self._seconds, rates, self._log.states(), self._audit.failed)
        if self._audit.failed:
            raise Broken(f"{self._audit.failed} calls failed, the first: {self._audit.first_failure}")


@contextmanager
def signing(command: list[str], env: dict[str, str], errors: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The signing program, running; it does not outlive the block."""
    pipe = subprocess.PIPE
    with errors.open("wb") as stderr:
        program = subprocess.Popen(
            command, bufsize=0, env=os.environ | env, stdin=pipe, stdout=pipe, stderr=stderr
        )
    with program:
        try:
            yield program
        finally:
            program.kill()


def tell(run: Run, audit: Audit, log: Log, screen: Screen, east: Server, west: Server) -> None:
    """One HSM dies and comes back; raises Broken at the first fact that is not as it must be."""

    def status_with(east_status: str) -> list[str]:
        lines = (f"HSM {east.token.serial} - {east_status}", f"HSM {west.token.serial} - CKR_OK")
        return [f"HA group {GROUP_SERIAL} status:", *lines]

    def show_status(expected: list[str]) -> None:
        shown = run.status()
        screen.quote(shown)
        if shown != expected:
            raise Broken(f"the HA status should be {' | '.join(expected)} but is {' | '.join(shown)}")

    def recovered() -> bool:
        status = run.status()
        if status not in (status_with("CKR_TOKEN_NOT_PRESENT"), status_with("CKR_OK")):
            raise Broken(f"the HA status during recovery is {' | '.join(status)}")
        return status == status_with("CKR_OK")

    def now_us() -> int:
        return time.monotonic_ns() // 1000

    run.watch("both members signed", lambda: audit.verified["east"] > 0 and audit.verified["west"] > 0)
    run.watch("it was time to kill east", lambda: run.elapsed_s >= KILL_AT_S)

    screen.say("kill -9 of the HSM east")
    east.kill()
    killed_us = now_us()
    run.watch("the log said member.lost", lambda: log.count("member.lost") > 0)
    screen.say("HA status, asked for the first time since, and once more")
    show_status(status_with("CKR_DEVICE_ERROR"))
    show_status(status_with("CKR_TOKEN_NOT_PRESENT"))

    back_s = run.elapsed_s + DEAD_FOR_S
    run.watch("it was time to start east", lambda: run.elapsed_s >= back_s)
    if audit.newest_us["east"] > killed_us:
        raise Broken("east is said to have signed while it was dead")
    screen.say(f"the HSM east starts again; it is looked for every {INTERVAL_S} s")
    east.start()
    run.watch("east was recovered", recovered, within_s=3 * INTERVAL_S)
    recovered_us = now_us()
    screen.say("east is recovered")
    show_status(status_with("CKR_OK"))
    run.watch("east signed again", lambda: audit.newest_us["east"] > recovered_us)


def settle(program: subprocess.Popen[bytes], audit: Audit, log: Log) -> str:
    """The account of the run: the program's own count, ours, and the log's must agree."""
    if program.wait(PATIENCE_S) != 0 or audit.done is None:
        raise Broken(f"the signing program ended with {program.returncode}")
    signatures, failed = audit.done
    verified = audit.verified.total()
    lost, recovered = log.count("member.lost"), log.count("member.recovered")
    account = f"signatures={signatures} failed={failed} verified={verified} lost={lost} recovered={recovered}"
    if (failed, verified, lost, recovered) != (0, signatures, 1, 1):
        raise Broken(account)
    return account


def demo(client: Path, module: Path, seconds: int, screen: Screen) -> str:
    """Set the stage, tell the story, and return its account."""
    for needed in (client, module):
        if not needed.exists():
            raise Broken(f"{needed} is missing: run `make build`")
    with ExitStack() as stack:
        place = Path(stack.enter_context(scratch()))
        state, log, errors = place / "state", Log(place / "ha.log"), place / "client.err"
        state.mkdir()

        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        tokens = [SoftToken(place / label, label) for label in ("east", "west")]
        for token in tokens:
            token.import_key(pem, "signing", "5167")
        east, west = (stack.enter_context(Server(token)) for token in tokens)
        conf = write_config(
            place / "pkcs11-ha.toml",
            [east.member(), west.member()],
            # The key was put on both tokens above: there is nothing to replicate.
            [{"label": "prod", "serial": GROUP_SERIAL, "members": ["east", "west"], "replication": "none"}],
            recovery={"interval_s": INTERVAL_S},
            ha={"log": f"file:{log.path}"},
        )

        screen.say(f"{THREADS} threads sign for {seconds} s with one key that is on two HSMs: east and west")
        command = [str(client), "--token", "prod", "--pin", tokens[0].pin, "--key", "signing"]
        command += ["--threads", str(THREADS), "--seconds", str(seconds), str(module)]
        env = {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(state)}
        program = stack.enter_context(signing(command, env, errors))
        stack.callback(ignore_interrupts)  # a second Ctrl-C must not stop the clearing up
        audit = Audit(key.public_key())
        run = Run(program, audit, log, screen)
        try:
            tell(run, audit, log, screen, east, west)
            run.watch("the end of the signing program", lambda: run.ended, within_s=seconds + PATIENCE_S)
            return settle(program, audit, log)
        except Broken:
            screen.say("the last lines of the HA log and of the signing program's errors")
            screen.quote(log.lines()[-8:] + errors.read_text(errors="replace").splitlines()[-8:])
            raise


def ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    def at_least_ten(text: str) -> int:
        if int(text) < 10:
            raise argparse.ArgumentTypeError("the story takes at least 10 seconds")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", type=Path, default=ROOT / "build" / "demo-client")
    parser.add_argument("--module", type=Path, default=ROOT / "build" / "libpkcs11-ha.so")
    parser.add_argument("--seconds", type=at_least_ten, default=12)
    options = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # all ends clear up as Ctrl-C does
    try:
        account = demo(options.client, options.module, options.seconds, Screen())
    except KeyboardInterrupt:
        reason = "interrupted"
    except (Broken, MemberError, OSError) as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 (the last line is promised, also for mistakes of the demo itself)
        traceback.print_exc()
        reason = repr(error)
    else:
        print(f"demo: ok {account}")
        return 0
    print("demo: FAILED", " ".join(reason.split()))
    return 1


if __name__ == "__main__":
    sys.exit(main())
