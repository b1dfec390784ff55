"""The module against bare SoftHSM, p11-kit-proxy and p11-kit server, in one run in which they take turns.

An operation is measured in short rounds, every arm once a round and in another order each time, so that whatever
else the machine does falls on all of them alike. Figures are medians over the rounds; ratios and differences are
taken within a round first. The exit status says whether it could be measured, not whether the goals are met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from bench.arms import (
    ArmError,
    Target,
    Team,
    bare,
    group,
    instructions_per_call,
    provision,
    through_p11_kit,
    through_server,
)
from demo.members import MemberError, Server, SoftToken, scratch

ROOT = Path(__file__).parent.parent

OPERATIONS = {
    "getsessioninfo": "C_GetSessionInfo",
    "random32": "C_GenerateRandom(32)",
    "sha256_32": "SHA-256, 32 bytes",
    "hmac_sha256_64": "HMAC-SHA-256, 64 bytes",
    "ecdsa_p256_sign": "ECDSA P-256 sign",
    "rsa2048_sign": "RSA-2048 sign",
    "aes_cbc_1k": "AES-256-CBC, 1 KiB",
    "aes_gcm_1k": "AES-256-GCM, 1 KiB",
    "find_label": "find by label",
    "open_close": "open + close session",
}
PAIR_OPERATIONS = ["ecdsa_p256_sign", "rsa2048_sign", "hmac_sha256_64", "aes_cbc_1k", "aes_gcm_1k"]
COUNTED_OPERATIONS = ["getsessioninfo", "sha256_32"]
THREADS = [1, 2, 8]

WORKER_OPERATIONS = ["random32", "hmac_sha256_64"]
WORKER_THREADS = [1, 8]
SPINNING_OPERATIONS = ["getsessioninfo", "sha256_32", "hmac_sha256_64"]
BARE, PROXY, OURS, TWO_BARE, SPINNING = "bare", "proxy", "ours", "two bare", "spinning"
SERVER, WORKER = "server", "worker"

# What is to be reached. A call that takes LONG_CALL_US shows by its ratio that we add next to nothing; in a shorter
# one what we add is held against what p11-kit-proxy adds.
LONG_CALL_US = 10.0
LONG_CALL_RATIO = 0.97
OPEN_CLOSE_ADDED_NS = 1000.0
PAIR_TO_TWO_BARE = 0.9
WORKER_TO_SERVER = {"random32": 3.0, "hmac_sha256_64": 3.0}  # where the way there and back is what costs
PAIR_TO_BARE = {"ecdsa_p256_sign": 1.9, "hmac_sha256_64": 3.3, "aes_cbc_1k": 3.3, "aes_gcm_1k": 3.3}


@dataclass
class Cell:
    """One operation at one number of threads: calls a second of each arm, round by round."""

    operation: str
    threads: int
    rates: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def us(self, arm: str) -> float | None:
        """How long a call takes the thread that makes it."""
        return median(self._us(arm)) if arm in self.rates else None

    def ratio(self, arm: str, base: str) -> float | None:
        """Speed of `arm` in units of `base`."""
        if arm not in self.rates or base not in self.rates:
            return None
        return median(rate / of for rate, of in zip(self.rates[arm], self.rates[base], strict=True))

    def added_ns(self, arm: str) -> float | None:
        """What a call costs more than with the bare module."""
        if arm not in self.rates or BARE not in self.rates:
            return None
        return median(us - of for us, of in zip(self._us(arm), self._us(BARE), strict=True)) * 1e3

    def _us(self, arm: str) -> list[float]:
        return [self.threads * 1e6 / rate for rate in self.rates[arm]]


@dataclass(frozen=True)
class Goal:
    """A figure to be reached, and the one that was; None: it was not measured."""

    what: str
    reached: float | None
    wanted: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.wanted if self.at_least else self.reached <= self.wanted

    def __str__(self) -> str:
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[self.met]
        reached = "-" if self.reached is None else f"{self.reached:.4g}{self.unit}"
        relation = "at least" if self.at_least else "at most"
        return f"{verdict:<13}{self.what}: {reached}, wanted {relation} {self.wanted:.4g}{self.unit}"


def take_turns(
    teams: Mapping[str, Team], cells: Sequence[tuple[str, int]], seconds: float, rounds: int
) -> Iterator[Cell]:
    """Measure each operation with each number of threads, the teams in turn."""
    for operation, threads in cells:
        cell = Cell(operation, threads)
        order = list(teams)
        for _ in range(rounds):
            for name in order:
                if name in cell.failed:
                    continue
                try:
                    rate = teams[name].rate(operation, threads, seconds)
                except ArmError as error:
                    cell.failed[name] = str(error)
                    cell.rates.pop(name, None)
                else:
                    cell.rates.setdefault(name, []).append(rate)
            order.append(order.pop(0))
        yield cell


def figure(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None else "-".rjust(int(form.split(".")[0]))


def show_one(cells: Iterator[Cell]) -> list[Cell]:
    print("\nGroup of one SoftHSM member. Times are µs a call and thread; ratios are of speed.\n")
    print(f"{'':24}{'threads':>7}{'bare':>11}{'proxy':>11}{'ours':>11}", end="")
    print(f"{'proxy/bare':>12}{'ours/bare':>11}{'proxy +ns':>12}{'ours +ns':>11}")
    done = []
    for cell in cells:
        print(f"{OPERATIONS[cell.operation]:24}{cell.threads:7}", end="")
        print("".join(figure(cell.us(arm), "11.3f") for arm in (BARE, PROXY, OURS)), end="")
        print(figure(cell.ratio(PROXY, BARE), "12.3f") + figure(cell.ratio(OURS, BARE), "11.3f"), end="")
        print(figure(cell.added_ns(PROXY), "12.0f") + figure(cell.added_ns(OURS), "11.0f"), flush=True)
        show_failures(cell)
        done.append(cell)
    return done


def show_pair(cells: Iterator[Cell]) -> list[Cell]:
    print("\nGroup of two SoftHSM copies at two threads; two bare: two programs,")
    print("each with one thread and one copy. Calls a second in all.\n")
    print(f"{'':24}{'bare':>11}{'two bare':>11}{'ours':>11}{'ours/bare':>12}{'ours/two bare':>16}")
    done = []
    for cell in cells:
        rates = [median(cell.rates[arm]) if arm in cell.rates else None for arm in (BARE, TWO_BARE, OURS)]
        print(f"{OPERATIONS[cell.operation]:24}" + "".join(figure(rate, "11.0f") for rate in rates), end="")
        print(figure(cell.ratio(OURS, BARE), "12.2f"), end="")
        print(figure(cell.ratio(OURS, TWO_BARE), "16.2f"), flush=True)
        show_failures(cell)
        done.append(cell)
    return done


def show_worker(cells: Iterator[Cell]) -> list[Cell]:
    print("\nOne SoftHSM token in a process of its own: through `p11-kit server` and its client module,")
    print("and as a group's member with a worker. Times are µs a call and thread; the ratio is of speed.\n")
    print(f"{'':24}{'threads':>7}{'bare':>11}{'server':>11}{'worker':>11}{'worker/server':>15}")
    done = []
    for cell in cells:
        print(f"{OPERATIONS[cell.operation]:24}{cell.threads:7}", end="")
        print("".join(figure(cell.us(arm), "11.3f") for arm in (BARE, SERVER, WORKER)), end="")
        print(figure(cell.ratio(WORKER, SERVER), "15.2f"), flush=True)
        show_failures(cell)
        done.append(cell)
    return done


def show_spinning(cells: Iterator[Cell]) -> list[Cell]:
    print("\nOne thread, while a Python thread spins in the core and holds the GIL. Times are µs a call.\n")
    print(f"{'':24}{'ours':>11}{'spinning':>11}{'ratio':>9}")
    done = []
    for cell in cells:
        print(f"{OPERATIONS[cell.operation]:24}", end="")
        print("".join(figure(cell.us(arm), "11.3f") for arm in (OURS, SPINNING)), end="")
        print(figure(cell.ratio(SPINNING, OURS), "9.2f"), flush=True)
        show_failures(cell)
        done.append(cell)
    return done


def show_instructions(program: Path, targets: Mapping[str, Target]) -> dict[str, dict[str, float]]:
    print("\nInstructions a call, the library below included (callgrind).\n")
    if not shutil.which("valgrind"):
        print("not counted: valgrind is not installed")
        return {}
    print(
        f"{'':24}"
        + "".join(f"{arm:>11}" for arm in targets)
        + "".join(f"{arm + ' +':>11}" for arm in (PROXY, OURS))
    )
    counts: dict[str, dict[str, float]] = {}
    for operation in COUNTED_OPERATIONS:
        counts[operation] = row = {}
        for arm, target in targets.items():
            try:
                row[arm] = instructions_per_call(program, target, operation)
            except ArmError as error:
                print(f"  {arm}: {error}")
        print(f"{OPERATIONS[operation]:24}", end="")
        print("".join(figure(row.get(arm), "11.0f") for arm in targets), end="")
        print("".join(figure(added(row, arm), "11.0f") for arm in (PROXY, OURS)), flush=True)
    return counts


def added(row: Mapping[str, float], arm: str) -> float | None:
    return row[arm] - row[BARE] if arm in row and BARE in row else None


def show_failures(cell: Cell) -> None:
    for arm, why in cell.failed.items():
        print(f"  {arm}: {why}")


def goals_of_one(cells: Sequence[Cell]) -> Iterator[Goal]:
    alone_us = {cell.operation: cell.us(BARE) or 0.0 for cell in cells if cell.threads == 1}
    for cell in cells:
        name = f"{OPERATIONS[cell.operation]}, {cell.threads} thread{'s' * (cell.threads > 1)}"
        ours_ns, proxy_ns = cell.added_ns(OURS), cell.added_ns(PROXY)
        if cell.operation == "open_close":
            if cell.threads == 1:
                yield Goal(f"{name}, added", ours_ns, OPEN_CLOSE_ADDED_NS, at_least=False, unit=" ns")
        elif alone_us[cell.operation] >= LONG_CALL_US:
            yield Goal(f"{name}, ours/bare", cell.ratio(OURS, BARE), LONG_CALL_RATIO, at_least=True)
        elif proxy_ns is not None:
            yield Goal(f"{name}, added, to the proxy's", ours_ns, proxy_ns, at_least=False, unit=" ns")


def goals_of_pair(cells: Sequence[Cell]) -> Iterator[Goal]:
    for cell in cells:
        name = f"{OPERATIONS[cell.operation]}, two members"
        yield Goal(f"{name}, ours/two bare", cell.ratio(OURS, TWO_BARE), PAIR_TO_TWO_BARE, at_least=True)
        if wanted := PAIR_TO_BARE.get(cell.operation):
            yield Goal(f"{name}, ours/bare", cell.ratio(OURS, BARE), wanted, at_least=True)


def goals_of_worker(cells: Sequence[Cell]) -> Iterator[Goal]:
    for cell in cells:
        if wanted := WORKER_TO_SERVER.get(cell.operation):
            name = f"{OPERATIONS[cell.operation]}, {cell.threads} thread{'s' * (cell.threads > 1)}"
            yield Goal(f"{name}, worker/server", cell.ratio(WORKER, SERVER), wanted, at_least=True)


def goals_of_spinning(cells: Sequence[Cell]) -> Iterator[Goal]:
    """A call that took the GIL would wait for the switch interval of 5 ms: a thousandth of the speed."""
    for cell in cells:
        name = f"{OPERATIONS[cell.operation]}, with a Python thread spinning"
        yield Goal(name, cell.ratio(SPINNING, OURS), 0.8, at_least=True)


def goals_of_instructions(counts: Mapping[str, Mapping[str, float]]) -> Iterator[Goal]:
    for operation, row in counts.items():
        wanted = added(row, PROXY)
        if wanted is not None:
            name = f"{OPERATIONS[operation]}, instructions added, to the proxy's"
            yield Goal(name, added(row, OURS), wanted, at_least=False)


def form(stack: ExitStack, program: Path, arms: Mapping[str, Sequence[Target]]) -> dict[str, Team]:
    """The teams that can be had; what is wrong with another is said."""
    teams = {}
    for name, targets in arms.items():
        try:
            teams[name] = stack.enter_context(Team(program, *targets))
        except (ArmError, OSError) as error:
            print(f"left out: {name}: {error}")
    return teams


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--module", type=Path, default=ROOT / "build" / "libpkcs11-ha.so", help="ours")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "p11bench", help="p11bench")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: figures for a first look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, directory: Path) -> dict[str, object]:
    seconds, rounds = 0.05, 5 if options.quick else 21
    east, west = (SoftToken(directory / name, f"bench-{name}") for name in ("east", "west"))
    for token in (east, west):
        provision(options.program, token)
    one = {
        BARE: [bare(east)],
        PROXY: [through_p11_kit(east)],
        OURS: [group(options.module, [east], directory / "one")],
    }
    pair = {
        BARE: [bare(east)],
        TWO_BARE: [bare(east), bare(west)],
        OURS: [group(options.module, [east, west], directory / "pair")],
    }
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    with ExitStack() as stack:
        cells = [(operation, threads) for operation in OPERATIONS for threads in THREADS]
        one_cells = show_one(take_turns(form(stack, options.program, one), cells, seconds, rounds))
    with ExitStack() as stack:
        cells = [(operation, 2) for operation in PAIR_OPERATIONS]
        pair_cells = show_pair(take_turns(form(stack, options.program, pair), cells, seconds, rounds))
    with ExitStack() as stack:
        apart = {
            BARE: [bare(east)],
            SERVER: [through_server(stack.enter_context(Server(east)))],
            WORKER: [group(options.module, [east], directory / "worker", host="worker")],
        }
        cells = [(operation, threads) for operation in WORKER_OPERATIONS for threads in WORKER_THREADS]
        worker_cells = show_worker(take_turns(form(stack, options.program, apart), cells, seconds, rounds))
    quiet = group(options.module, [east], directory / "quiet")
    spinning = {OURS: [quiet], SPINNING: [replace(quiet, options=("--spin-python",))]}
    with ExitStack() as stack:
        cells = [(operation, 1) for operation in SPINNING_OPERATIONS]
        spinning_cells = show_spinning(
            take_turns(form(stack, options.program, spinning), cells, seconds, rounds)
        )
    counts = show_instructions(options.program, {name: targets[0] for name, targets in one.items()})

    goals = [
        *goals_of_one(one_cells),
        *goals_of_pair(pair_cells),
        *goals_of_worker(worker_cells),
        *goals_of_spinning(spinning_cells),
        *goals_of_instructions(counts),
    ]
    print("\nGoals\n")
    print(*goals, sep="\n")
    count = Counter(goal.met for goal in goals)
    print(f"\n{count[True]} met, {count[False]} not met, {count[None]} not measured")
    return {
        "machine": machine(),
        "seconds": seconds,
        "group_of_one": [vars(cell) for cell in one_cells],
        "group_of_two": [vars(cell) for cell in pair_cells],
        "worker": [vars(cell) for cell in worker_cells],
        "spinning": [vars(cell) for cell in spinning_cells],
        "instructions": counts,
        "goals": [vars(goal) | {"met": goal.met} for goal in goals],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with scratch() as directory:
            figures = measure(options, Path(directory))
    except (ArmError, MemberError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
