"""`make demo`: two HSMs under a program that makes keys and signs, one is killed and comes back; all is checked."""

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

from rich.console import Console
from rich.text import Text

from demo import domain
from demo.audit import Audit, Broken
from demo.members import MemberError, Server, SoftToken, Worker, scratch, softhsm, write_config

ROOT = Path(__file__).parent.parent
THREADS = 4
INTERVAL_S = 2
KILL_AT_S = 3.0
DEAD_FOR_S = 2.0
PATIENCE_S = 10.0
TRIES = 100
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
        self._command("status")
        self.watch("it showed the HA status", lambda: len(self._audit.statuses) > answered)
        return self._audit.statuses[-1]

    def do(self, command: str) -> None:
        """A command that names a key, carried out; what the program answers is checked as all it writes."""
        answered = self._audit.answered
        self._command(command)
        self.watch(f"it answered to {command}", lambda: self._audit.answered > answered)
        self._no_failures()

    def _command(self, command: str) -> None:
        with suppress(BrokenPipeError):  # an early end is noticed, and named, by whoever waits for the answer
            self._commands.write(f"{command}\n".encode())

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
        self._no_failures()

    def _no_failures(self) -> None:
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


class Story:
    """One HSM dies, keys are made and destroyed meanwhile, it comes back and has them right.

    Each chapter raises Broken at the first fact that is not as it must be.
    """

    def __init__(self, run: Run, audit: Audit, log: Log, screen: Screen, east: Server, west: Server) -> None:
        self._run, self._audit, self._log, self._screen = run, audit, log, screen
        self._east, self._west = east, west

    def tell(self) -> None:
        self._begin()
        killed_us = self._lose_east()
        self._change_keys()
        self._start_east(killed_us)
        self._use_keys()

    def _begin(self) -> None:
        run, audit = self._run, self._audit
        run.do("generate third")
        self._screen.say("another key pair, third, is made in the group: it is to be destroyed")
        self._sign_on_east("third")
        run.watch("both members signed", lambda: audit.verified["east"] > 0 and audit.verified["west"] > 0)
        run.watch("it was time to kill east", lambda: run.elapsed_s >= KILL_AT_S)

    def _lose_east(self) -> int:
        self._screen.say("kill -9 of the HSM east")
        self._east.kill()
        killed_us = time.monotonic_ns() // 1000
        self._run.watch("the log said member.lost", lambda: self._log.count("member.lost") > 0)
        self._screen.say("HA status, asked for the first time since, and once more")
        self._show_status(self._status_with("CKR_DEVICE_ERROR"))
        self._show_status(self._status_with("CKR_TOKEN_NOT_PRESENT"))
        return killed_us

    def _change_keys(self) -> None:
        for command in ("generate second", "destroy third", "find second", "find third", "sign second"):
            self._run.do(command)
        if self._audit.keys["second"].maker == "east":
            raise Broken("east is said to have made a key while it was dead")
        self._screen.say("while east is away: the key pair second is made, third is destroyed")

    def _start_east(self, killed_us: int) -> None:
        run = self._run
        back_s = run.elapsed_s + DEAD_FOR_S
        run.watch("it was time to start east", lambda: run.elapsed_s >= back_s)
        if self._audit.newest_us["east"] > killed_us:
            raise Broken("east is said to have signed while it was dead")
        self._screen.say(f"the HSM east starts again; it is looked for every {INTERVAL_S} s")
        self._east.start()
        run.watch("east was recovered", self._recovered, within_s=3 * INTERVAL_S)
        recovered_us = time.monotonic_ns() // 1000
        self._screen.say("east is recovered")
        self._show_status(self._status_with("CKR_OK"))
        run.watch("east signed again", lambda: self._audit.newest_us["east"] > recovered_us)

    def _use_keys(self) -> None:
        self._sign_on_east("second")
        for command in ("find signing", "find second", "find third"):
            self._run.do(command)
        self._screen.say("east signs with second; third is not in the group")

    def _sign_on_east(self, label: str) -> None:
        """Sign until it was east that did it: which member serves is the group's choice."""
        for _ in range(TRIES):
            self._run.do(f"sign {label}")
            if self._audit.signed_with[label, "east"]:
                return
        raise Broken(f"east signed none of {TRIES} times with {label}")

    def _status_with(self, east_status: str) -> list[str]:
        lines = (f"HSM {self._east.token.serial} - {east_status}", f"HSM {self._west.token.serial} - CKR_OK")
        return [f"HA group {GROUP_SERIAL} status:", *lines]

    def _show_status(self, expected: list[str]) -> None:
        shown = self._run.status()
        self._screen.quote(shown)
        if shown != expected:
            raise Broken(f"the HA status should be {' | '.join(expected)} but is {' | '.join(shown)}")

    def _recovered(self) -> bool:
        status = self._run.status()
        if status not in (self._status_with("CKR_TOKEN_NOT_PRESENT"), self._status_with("CKR_OK")):
            raise Broken(f"the HA status during recovery is {' | '.join(status)}")
        return status == self._status_with("CKR_OK")


def inspect(client: Path, token: SoftToken, audit: Audit) -> None:
    """The token by itself, with SoftHSM: it has each key once and signs with it, and nothing that was destroyed."""
    living = [label for label, key in audit.keys.items() if not key.destroyed]
    commands = [f"find {label}" for label in audit.keys] + [f"sign {label}" for label in living]
    command = [str(client), "--token", token.label, "--pin", token.pin, str(softhsm())]
    script = "\n".join([*commands, "stop", ""])
    try:
        done = subprocess.run(
            command,
            input=script,
            env=os.environ | token.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise Broken(f"the token {token.label} did not answer within {PATIENCE_S:.0f} s") from None
    seen = Audit(f"the token {token.label}", audit.keys)
    for line in done.stdout.splitlines():
        seen.read(line)
    if (done.returncode, seen.answered, seen.failed) != (0, len(commands), 0):
        reason = seen.first_failure or done.stderr.strip()
        raise Broken(
            f"the token {token.label} answered {seen.answered} of {len(commands)} commands: {reason}"
        )


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


def demo(client: Path, module: Path, p11ha: Path, seconds: int, screen: Screen) -> str:
    """Set the stage, tell the story, and return its account."""
    for needed in (client, module, p11ha):
        if not needed.exists():
            raise Broken(f"{needed} is missing: run `make build`")
    with ExitStack() as stack:
        place = Path(stack.enter_context(scratch()))
        state, log, errors = place / "state", Log(place / "ha.log"), place / "client.err"
        state.mkdir()

        tokens = [SoftToken(place / label, label) for label in ("east", "west")]
        east, west = (stack.enter_context(Worker(token)) for token in tokens)
        conf = write_config(
            place / "pkcs11-ha.toml",
            [east.member(), west.member()],
            [{"label": "prod", "serial": GROUP_SERIAL, "members": ["east", "west"], "replication": "domain"}],
            recovery={"interval_s": INTERVAL_S},
            ha={"log": f"file:{log.path}"},
        )
        env = {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(state)}

        screen.say(
            f"two empty HSMs, east and west, get a domain key: p11ha domain init prod --shares {domain.SHARES}"
        )
        pin_file = place / "pin"
        pin_file.touch(0o600)
        pin_file.write_text(tokens[0].pin)
        screen.quote(domain.init(p11ha, "prod", pin_file, env))
        screen.say(
            "    (the first two words only name the set; the others are for a custodian, not for a screen or a log)",
            "dim",
        )

        screen.say(
            f"{THREADS} threads sign for {seconds} s with one key pair, signing, that is made in the group"
        )
        command = [str(client), "--token", "prod", "--pin", tokens[0].pin, "--key", "signing"]
        command += ["--threads", str(THREADS), "--seconds", str(seconds), str(module)]
        program = stack.enter_context(signing(command, env, errors))
        stack.callback(ignore_interrupts)  # a second Ctrl-C must not stop the clearing up
        audit = Audit()
        run = Run(program, audit, log, screen)
        try:
            Story(run, audit, log, screen, east, west).tell()
            run.watch("the end of the signing program", lambda: run.ended, within_s=seconds + PATIENCE_S)
            account = settle(program, audit, log)
            for token in tokens:
                inspect(client, token, audit)
        except Broken:
            screen.say("the last lines of the HA log and of the signing program's errors")
            screen.quote(log.lines()[-8:] + errors.read_text(errors="replace").splitlines()[-8:])
            raise
        screen.say("each token by itself: signing and second are on it, once, and sign; third is not")
        return account


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
    parser.add_argument("--p11ha", type=Path, default=Path(sys.executable).with_name("p11ha"))
    parser.add_argument("--seconds", type=at_least_ten, default=12)
    options = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # all ends clear up as Ctrl-C does
    try:
        account = demo(options.client, options.module, options.p11ha, options.seconds, Screen())
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
