"""What stands in a host's environment and directories has no say in the interpreter that is embedded.

Each trap is first sprung by an ordinary Python, so that a trap that would catch nobody is noticed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.boundary.conftest import Hosts, Installation, Pair, must_sign
from tests.boundary.hosts import environment
from tests.boundary.pythons import SIGN, of_this_version
from tests.conftest import Group

# posix is built in, so that this runs however early it is imported.
PLANTED = """
import posix
posix.write(posix.open({mark!r}, posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND, 0o600), __file__.encode() + b"\\n")
"""
NAMES = (
    *("pkcs11_ha", "_cffi_backend", "_pkcs11_ha", "encodings", "codecs", "ctypes", "os", "io", "site"),
    *("sitecustomize", "usercustomize", "threading", "tomllib", "socket", "signal", "re", "json", "_socket"),
)


@dataclass(frozen=True)
class Trap:
    """A directory full of modules that leave a mark when they are imported."""

    directory: Path
    mark: Path

    def plant(self, directory: Path, *names: str) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for name in names or NAMES:
            package = directory / name
            package.mkdir()
            (package / "__init__.py").write_text(PLANTED.format(mark=str(self.mark)))
        (directory / "planted.pth").write_text(f"import posix; posix.mkdir({str(self.mark)!r} + '.pth')\n")
        return directory

    def is_sprung(self) -> bool:
        pth = self.mark.with_name(self.mark.name + ".pth")
        sprung = self.mark.exists() or pth.exists()
        self.mark.unlink(missing_ok=True)
        if pth.exists():
            pth.rmdir()
        return sprung


@pytest.fixture
def trap(directory: Path) -> Trap:
    return Trap(directory / "trap", directory / "mark")


def python_path(trap: Trap) -> tuple[dict[str, str], Path | None]:
    return {"PYTHONPATH": str(trap.plant(trap.directory))}, None


def python_home(trap: Trap) -> tuple[dict[str, str], Path | None]:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    trap.plant(trap.directory / "lib" / version)
    trap.plant(trap.directory / "lib" / version / "lib-dynload")
    return {"PYTHONHOME": str(trap.directory), "PYTHONPLATLIBDIR": "lib"}, None


def user_site(trap: Trap) -> tuple[dict[str, str], Path | None]:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    trap.plant(trap.directory / ".local" / "lib" / version / "site-packages")
    return {"HOME": str(trap.directory), "PYTHONUSERBASE": str(trap.directory / ".local")}, None


def working_directory(trap: Trap) -> tuple[dict[str, str], Path | None]:
    """And what a Python looks for beside its program."""
    trap.plant(trap.directory)
    (trap.directory / "pyvenv.cfg").write_text(f"home = {trap.directory}\n")
    version = "".join(map(str, sys.version_info[:2]))
    (trap.directory / f"python{version}._pth").write_text(f"{trap.directory}\nimport site\n")
    return {"PYTHONPATH": ""}, trap.directory


TRAPS = [python_path, python_home, user_site, working_directory]


def spring(env: Mapping[str, str], cwd: Path | None) -> None:
    """What an ordinary Python of the same build does with it."""
    base = Path(sysconfig.get_config_var("BINDIR"), "python3")
    executable = base if base.exists() else Path(sys.executable)
    subprocess.run(
        [executable, "-c", "import pkcs11_ha"],
        env=environment(env),
        cwd=cwd,
        check=False,
        capture_output=True,
    )


@pytest.mark.parametrize("how", ["local", "preload"])
@pytest.mark.parametrize("set_up", TRAPS, ids=lambda value: value.__name__)
def test_no_foreign_code_runs(
    set_up: object, how: str, trap: Trap, signing: Group, pair: Pair, hosts: Hosts
) -> None:
    assert callable(set_up)
    env, cwd = set_up(trap)
    spring(env, cwd)
    assert trap.is_sprung()

    host = hosts(how, env=signing.env | env, cwd=cwd)
    host.ok("C_Initialize", None)
    must_sign(host, pair)
    host.ok("C_Finalize", None)
    assert host.exit() == 0
    assert host.lines() == []
    assert not trap.is_sprung()


SWITCHES = {
    "PYTHONVERBOSE": "1",
    "PYTHONINSPECT": "1",
    "PYTHONDEBUG": "3",
    "PYTHONDUMPREFS": "1",
    "PYTHONMALLOCSTATS": "1",
    "PYTHONIOENCODING": "no-such-encoding",
    "PYTHONHASHSEED": "not a number",
    "PYTHONMALLOC": "no-such-allocator",
    "PYTHONTRACEMALLOC": "no number",
    "PYTHONWARNINGS": "error",
    "PYTHONDEVMODE": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPROFILEIMPORTTIME": "1",
    "PYTHONUTF8": "2",
    "PYTHONCOERCECLOCALE": "warn",
    "PYTHONINTMAXSTRDIGITS": "x",
    "PYTHONEXECUTABLE": "/no/such/python",
    "PYTHONPYCACHEPREFIX": "/no/such/cache",
    "LC_ALL": "C",
}


def test_no_switch_of_a_python_is_heeded(signing: Group, pair: Pair, hosts: Hosts) -> None:
    """Some of these end an ordinary Python, others make it talk."""
    host = hosts(env=signing.env | SWITCHES)
    host.ok("C_Initialize", None)
    must_sign(host, pair)
    host.ok("C_Finalize", None)
    assert host.exit() == 0
    assert host.lines() == []


def test_a_python_host_takes_our_package_from_nowhere_else(
    trap: Trap, module: Path, signing: Group, pair: Pair
) -> None:
    """What its PYTHONPATH does to the host itself is its own affair; our part of it is ours."""
    trap.plant(trap.directory, "pkcs11_ha", "_pkcs11_ha", "_cffi_backend")
    env = {"PYTHONPATH": str(trap.directory)}
    spring(env, None)
    assert trap.is_sprung()
    for python in of_this_version():
        done = python.run(SIGN, module, env=signing.env | env, cwd=trap.directory)
        assert (done.returncode, done.stderr) == (0, "")
        answer = json.loads(done.stdout)
        assert answer["initialize"] == "CKR_OK"
        pair.verify(bytes.fromhex(answer["signature"]))
        assert answer["changed"] == []
        assert not trap.is_sprung()


def test_the_interpreter_sees_what_was_compiled_in_and_no_more(
    installation: Installation, trap: Trap, signing: Group, hosts: Hosts, directory: Path
) -> None:
    seen = directory / "seen"
    installation.append(
        "entry/__init__.py",
        f"import json, sys\nwith open({str(seen)!r}, 'w') as file:\n"
        "    json.dump([sys.path, sorted({'site', 'sitecustomize', 'usercustomize'} & set(sys.modules)),"
        " sys.flags.isolated, sys.flags.ignore_environment, sys.flags.no_user_site, sys.flags.no_site], file)",
    )
    env, cwd = working_directory(trap)
    host = hosts(module=installation.library, env=signing.env | env, cwd=cwd)
    host.ok("C_Initialize", None)
    stdlib = installation.stdlib
    paths = [installation.python, installation.runtime, stdlib, stdlib / "lib-dynload"]
    assert json.loads(seen.read_text()) == [list(map(str, paths)), [], 1, 1, 1, 1]
