"""Runs the fuzzers: `python -m tests.fuzz.run` for $FUZZ_SECONDS each, `… merge` to keep the inputs that reach more.

tests/fuzz/corpus/NAME.txt has one input a line, in base64; build/fuzz/corpus/NAME what was found besides.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import build

CORPUS = Path(__file__).parent / "corpus"
OUTPUT = build.ROOT / "build" / "fuzz"
MOST_INPUTS = 500  # of one fuzzer: they are run with every test run

# The interpreter gives nothing back at its end, and what is in quarantine is not lost.
_ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16", "UBSAN_OPTIONS": "print_stacktrace=1"}
_LEAKS = {"boundary": "-detect_leaks=0"}


def clean_environment() -> dict[str, str]:
    """Without another sanitizer's runtime, which `make asan` has in every process."""
    return {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "ASAN_OPTIONS")}


class Fuzzer:
    """One of build.FUZZERS, built."""

    def __init__(self, name: str) -> None:
        self.name, self.program = name, OUTPUT / name
        self.kept = CORPUS / f"{name}.txt"
        self.found = OUTPUT / "corpus" / name

    def environment(self) -> Mapping[str, str]:
        return clean_environment() | (_ENVIRONMENT if self.name in _LEAKS else {})

    def command(self, *arguments: str | Path) -> Sequence[str | Path]:
        options = ["-timeout=25", "-rss_limit_mb=4096", f"-artifact_prefix={OUTPUT}/{self.name}-"]
        return [self.program, *options, *filter(None, [_LEAKS.get(self.name)]), *arguments]

    def inputs(self) -> list[bytes]:
        return (
            [base64.b64decode(line) for line in self.kept.read_text().split()] if self.kept.exists() else []
        )

    def unpack(self, directory: Path) -> Path:
        """The kept inputs as files, which libFuzzer wants."""
        directory.mkdir(parents=True, exist_ok=True)
        for data in self.inputs():
            name = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            directory.joinpath(name).write_bytes(data)
        return directory

    def fuzz(self, seconds: int) -> bool:
        """False: an input was found that must not be; libFuzzer says where it is."""
        self.unpack(self.found)
        limits = [f"-max_total_time={seconds}", "-max_len=512", "-print_final_stats=1", "-verbosity=1"]
        return (
            subprocess.run(self.command(*limits, self.found), env=self.environment(), check=False).returncode
            == 0
        )

    def merge(self) -> int:
        """Keeps the smallest inputs that reach all that those known reach, as far as there is room; how many."""
        merged = OUTPUT / "merged" / self.name
        merged.mkdir(parents=True, exist_ok=True)
        for file in merged.iterdir():
            file.unlink()
        self.unpack(self.found)
        subprocess.run(self.command("-merge=1", merged, self.found), env=self.environment(), check=True)
        self.keep(file.read_bytes() for file in merged.iterdir())
        return len(self.inputs())

    def keep(self, inputs: Iterable[bytes]) -> None:
        """The largest of them, which do most in one go."""
        largest = sorted(set(inputs), key=lambda data: (len(data), data))[-MOST_INPUTS:]
        CORPUS.mkdir(exist_ok=True)
        self.kept.write_text("".join(base64.b64encode(data).decode() + "\n" for data in largest if data))


def main() -> None:
    seconds = int(os.environ.get("FUZZ_SECONDS", "60"))
    for fuzzer in map(Fuzzer, os.environ.get("FUZZ", " ".join(build.FUZZERS)).split()):
        if sys.argv[1:] == ["merge"]:
            print(f"{fuzzer.name}: {fuzzer.merge()} inputs")
            continue
        print(f"=== {fuzzer.name}: {seconds} s", flush=True)
        if not fuzzer.fuzz(seconds):
            sys.exit(
                f"fuzz: {fuzzer.name}: the input that does it is named above; run {fuzzer.program} on it alone"
            )


if __name__ == "__main__":
    main()
