"""What a worker has of its application, and what it may: its member's `env`, `limits` and `user`."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

import pytest

from demo.members import SoftToken
from pkcs11_ha.config import WORKER_ENVIRONMENT
from tests.conftest import GroupFactory
from tests.ha.app import until
from tests.ha.conftest import StartFactory
from tests.ha.program import LIMIT_S, Program
from tests.worker.processes import started_by, state

Tokens = tuple[SoftToken, SoftToken]
SOMEBODY = "nobody"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def the_worker(application: int) -> Path:
    """Its directory in /proc."""
    (pid,) = started_by(application)
    return Path(f"/proc/{pid}")


def environment(process: Path) -> dict[str, str]:
    entries = (process / "environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def test_worker_has_its_env_and_little_else(
    tokens: Tokens, start: StartFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No secret of the application, nothing that steers what is loaded."""
    for name, value in {
        "DATABASE_PASSWORD": "s3cret",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "HOME": "/here",
    }.items():
        monkeypatch.setenv(name, value)
    kept = {name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ}
    env = tokens[0].env | {"TZ": "CET", "P11_X": "1"}
    start(tokens[0].member(host="worker", env=env))
    found = environment(the_worker(os.getpid()))
    assert found.pop("PKCS11_HA_INSIDE_A_WORKER") == "1"
    assert found == kept | env
    assert found["HOME"] == "/here"


def test_limits_are_the_systems(tokens: Tokens, start: StartFactory) -> None:
    limits = {"memory_bytes": 1 << 47, "open_files": 100, "cpu_s": 600, "core": 0}
    start(tokens[0].member(host="worker", limits=limits))
    lines = (the_worker(os.getpid()) / "limits").read_text().splitlines()
    names = ("Max address space", "Max open files", "Max cpu time", "Max core file size")
    found = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert [found[name] for name in names] == [[str(value)] * 2 for value in limits.values()]


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"open_files": 1 << 62}, f"limit open_files={1 << 62}: Operation not permitted"),
        ({"memory_bytes": 1 << 20}, "libsofthsm2.so: "),
    ],
)
def test_limit_that_cannot_be_is_told(
    tokens: Tokens, start: StartFactory, limits: dict[str, int], says: str
) -> None:
    app = start(tokens[0].member(host="worker", limits=limits), tokens[1].member())
    (line,) = app.events("member.lost", "east")
    assert says in line
    assert len(app.login("123456").random(8)) == 8


@as_root
def test_worker_runs_as_its_user(tokens: Tokens, start: StartFactory, directory: Path) -> None:
    """The store is that user's alone, so what works here works as nobody else."""
    somebody = pwd.getpwnam(SOMEBODY)
    directory.chmod(0o711)
    for path in (tokens[0].directory, *tokens[0].directory.rglob("*")):
        shutil.chown(path, SOMEBODY, somebody.pw_gid)
    app = start(tokens[0].member(host="worker", user=SOMEBODY, limits={"core": 0}))
    assert len(app.login("123456").random(8)) == 8
    worker = the_worker(os.getpid())
    lines = (worker / "status").read_text().splitlines()
    status = {name: words.split() for name, _, words in (line.partition(":") for line in lines)}
    assert status["Uid"] == [str(somebody.pw_uid)] * 4
    assert status["Gid"] == [str(somebody.pw_gid)] * 4
    assert {int(group) for group in status["Groups"]} == set(os.getgrouplist(SOMEBODY, somebody.pw_gid))
    assert int(status["CapPrm"][0], 16) == int(status["CapEff"][0], 16) == 0
    assert environment(worker)["HOME"] == somebody.pw_dir


@as_root
def test_worker_ends_though_the_application_may_not_kill_it_any_more(
    tokens: Tokens, group: GroupFactory, module: Path
) -> None:
    """A server that begins as root and goes on as somebody else, and takes in orphans."""
    group(tokens[0].member(host="worker"))
    program = Program(
        module,
        f"""
        import ctypes, os
        assert ctypes.CDLL(None).prctl(36, 1) == 0
        print("ready", flush=True)
        sys.stdin.readline()
        os.setresuid(*[{pwd.getpwnam(SOMEBODY).pw_uid}] * 3)
        """,
    )
    program.wait_for("ready")
    (worker,) = started_by(program.process.pid)
    program.go_on()
    took, answers = program.end()
    assert answers["C_Finalize"] is None
    assert took["C_Finalize"] < LIMIT_S
    until(lambda: state(worker) in ("", "Z"), "its worker is gone")
