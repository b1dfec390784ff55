"""Pythons on this machine that may host the module: of the version that it embeds, and of others."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.boundary.hosts import PATIENCE_S, environment
from tests.conftest import ROOT

_ASK = """
import ctypes, json, os, sys, sysconfig
print(json.dumps([list(sys.version_info[:2]), os.path.realpath(sys.executable),
                  sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LIBDIR")]))
"""


@dataclass(frozen=True)
class Python:
    """An interpreter with ctypes; `library` is its shared libpython, if it has one."""

    executable: Path
    version: tuple[int, int]
    library: Path | None

    def __str__(self) -> str:
        return str(self.executable).strip("/").replace("/", "-")

    def run(
        self,
        script: str,
        *arguments: Path | str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        options: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script to its end; raises subprocess.TimeoutExpired if that does not come."""
        return subprocess.run(
            [self.executable, *options, "-c", script, *map(str, arguments)],
            env=environment(env),
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )


@functools.cache
def all_pythons() -> tuple[Python, ...]:
    """Python 3.8 and later, each once; the one that runs the tests is the first."""
    found: dict[Path, Python] = {}
    for path in _candidates():
        python = _ask(path)
        if python is not None and python.version >= (3, 8):
            found.setdefault(python.executable, python)
    return tuple(found.values())


def of_this_version() -> tuple[Python, ...]:
    return tuple(each for each in all_pythons() if each.version == sys.version_info[:2])


def of_other_versions() -> tuple[Python, ...]:
    """One of each version."""
    others = {each.version: each for each in all_pythons() if each.version != sys.version_info[:2]}
    return tuple(others.values())


def _candidates() -> Iterator[Path]:
    yield Path(sys.executable)
    directories = [Path(each) for each in os.get_exec_path()]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    directories += sorted(pyenv.glob("versions/*/bin"))
    for directory in directories:
        if pyenv / "shims" != directory:  # scripts that choose among the versions
            yield from sorted(directory.glob("python3"))
            yield from sorted(directory.glob("python3.[0-9]"))
            yield from sorted(directory.glob("python3.[0-9][0-9]"))


@functools.cache
def _ask(path: Path) -> Python | None:
    try:
        done = subprocess.run(
            [path, "-I", "-c", _ASK], check=False, capture_output=True, text=True, timeout=PATIENCE_S
        )
        version, executable, name, directory = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    library = Path(directory or "", name or "")
    shared = library if ".so" in library.name and library.exists() else None
    # A virtual environment has packages of its own: it is a host of its own.
    own = path if Path(sys.executable) == path else Path(executable)
    return Python(own, (version[0], version[1]), shared)


# What a Python host does: argv is the module's path and how it is loaded. It writes one line of JSON.
SIGN = f"""
import json, os, signal, sys, threading
before = [list(sys.path), [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
          str(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))), sys.excepthook is sys.__excepthook__,
          sys.stderr is sys.__stderr__, os.getcwd(), sys.flags]
sys.path.append({str(ROOT)!r})
from tests import p11
sys.path.remove({str(ROOT)!r})
module = p11.Module(sys.argv[1])
rv = module.rv("C_Initialize", None)
answer = dict(initialize=p11.rv_name(rv))
if rv == 0:
    (slot,) = module.slots()
    session = module.open(slot)
    session.login("123456")
    key = session.find_one({{p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "signing"}})
    answer["signature"] = session.sign(p11.CKM_ECDSA, key, bytes(range(32))).hex()
    if "leave" not in sys.argv:
        module.finalize()
after = [list(sys.path), [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
         str(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))), sys.excepthook is sys.__excepthook__,
         sys.stderr is sys.__stderr__, os.getcwd(), sys.flags]
answer["changed"] = [[a, b] for a, b in zip(before, after) if a != b]
print(json.dumps(answer, default=str), flush=True)
"""
