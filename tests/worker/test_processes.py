"""A worker is nobody's business but ours: no child of the application, and gone when the application is."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

from demo.members import SoftToken, Table, Toml, Worker, softhsm
from pkcs11_ha.runtime import native
from tests import p11
from tests.conftest import ROOT, GroupFactory
from tests.ha.app import until
from tests.ha.conftest import StartFactory
from tests.ha.program import Program
from tests.worker.conftest import WorkerFactory
from tests.worker.processes import children, processes, started_by, state

Tokens = tuple[SoftToken, SoftToken]

BUSY = """
import os, signal, subprocess
session = module.open(0)
session.login("123456")
len(session.random(8))
"""


def gone(*pids: int) -> bool:
    return all(state(pid) in ("", "Z") for pid in pids)


def test_application_has_no_child(tokens: Tokens, group: GroupFactory, module: Path) -> None:
    """Neither does waitpid(-1) find one, nor does SIGCHLD come, not while a worker is started nor when it dies."""
    group(*(token.member(host="worker") for token in tokens), recovery={"interval_s": 0.05})
    program = Program(
        module,
        f"""
        {BUSY.strip().replace(chr(10), chr(10) + "        ")}
        def waited():
            try:
                return os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return "no child"
        timed("before", waited)
        heard = []
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(20):
            session.random(8)
            time.sleep(0.02)
        timed("after", waited)
        timed("heard", lambda: len(heard))
        """,
    )
    program.wait_for("ready")
    application = program.process.pid
    workers = started_by(application)
    assert len(workers) == 2
    assert children(application) == []
    os.kill(workers[0], signal.SIGKILL)
    program.go_on()
    _, answers = program.end()
    assert (answers["before"], answers["after"], answers["heard"]) == ("no child", "no child", 0)
    assert answers["C_Finalize"] is None
    until(lambda: processes(str(tokens[0].directory.parent)) == [], "all are gone")


def test_nobody_is_left_when_the_application_is_killed(
    tokens: Tokens, group: GroupFactory, module: Path
) -> None:
    group(*(token.member(host="worker") for token in tokens))
    program = Program(module, BUSY + "print('ready', flush=True)\nsys.stdin.readline()\n")
    program.wait_for("ready")
    workers = started_by(program.process.pid)
    os.kill(workers[0], signal.SIGSTOP)  # one that cannot see it yet
    program.process.kill()
    program.process.communicate()
    until(lambda: gone(workers[1]), "its worker is gone")
    os.kill(workers[0], signal.SIGCONT)
    until(lambda: gone(*workers), "its workers are gone")


def test_child_of_a_fork_that_lives_on_does_not_keep_the_worker(
    tokens: Tokens, group: GroupFactory, module: Path
) -> None:
    """By a fork that runs no handlers, so that the child has a copy of every descriptor."""
    group(tokens[0].member(host="worker"))
    program = Program(
        module,
        BUSY
        + """
import ctypes
libc = ctypes.CDLL(None)
pid = libc.syscall(57)
if pid == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(pid, flush=True)
sys.stdin.readline()
""",
    )
    assert program.process.stdout
    child = int(program.process.stdout.readline())
    try:
        workers = started_by(program.process.pid)
        assert len(workers) == 1
        program.process.kill()
        program.process.communicate()
        until(lambda: gone(*workers), "its worker is gone")
        assert state(child) not in ("", "Z")
    finally:
        os.kill(child, signal.SIGKILL)


def test_child_of_a_fork_has_workers_of_its_own(tokens: Tokens, group: GroupFactory, module: Path) -> None:
    group(*(token.member(host="worker") for token in tokens))
    program = Program(
        module,
        BUSY
        + """
def held():
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    links = [os.readlink(path) for path in paths if os.path.lexists(path)]
    return [link for link in links if link.startswith(("socket:", "/memfd:")) or "pidfd" in link]
assert sum("pidfd" in link for link in held()) == 2 and len(held()) >= 6
pid = os.fork()
if pid == 0:
    left = held()
    rv = module.rv("C_GetInfo", None)
    module.initialize()
    other = module.open(0)
    other.login("123456")
    works = len(other.random(8)) == 8
    module.finalize()
    os._exit(0 if (left == [] and rv == 0x190 and works) else 1)
timed("child", lambda: os.waitpid(pid, 0)[1])
timed("parent", lambda: len(session.random(8)))
timed("exec", lambda: subprocess.run(["/bin/sh", "-c", "ls -l /proc/self/fd"], capture_output=True, text=True).stdout)
timed("again", lambda: len(session.random(8)))
""",
    )
    _, answers = program.end()
    assert (answers["child"], answers["parent"], answers["again"]) == (0, 8, 8)
    assert "socket:" not in str(answers["exec"])
    until(lambda: processes(str(tokens[0].directory.parent)) == [], "all are gone")


def test_application_that_becomes_another_program_takes_its_workers_along(
    tokens: Tokens, group: GroupFactory, module: Path
) -> None:
    group(tokens[0].member(host="worker"))
    program = Program(
        module,
        BUSY + "print('ready', flush=True)\nsys.stdin.readline()\nos.execv('/bin/sleep', ['sleep', '60'])\n",
    )
    program.wait_for("ready")
    workers = started_by(program.process.pid)
    assert len(workers) == 1
    program.go_on()
    try:
        until(lambda: gone(*workers), "its worker is gone")
        assert program.process.poll() is None
    finally:
        program.process.kill()
        program.process.communicate()


def test_worker_has_its_own_descriptors_and_terminal(
    tokens: Tokens, group: GroupFactory, module: Path
) -> None:
    """Also where the application left some open for its children, and Ctrl-C is not for the worker."""
    group(tokens[0].member(host="worker"))
    program = Program(
        module,
        """
        import os
        module.finalize()
        for end in os.pipe():
            os.set_inheritable(end, True)
        module.initialize()
        print("ready", flush=True)
        sys.stdin.readline()
        """,
    )
    program.wait_for("ready")
    (worker,) = started_by(program.process.pid)
    links = {int(path.name): str(path.readlink()) for path in Path(f"/proc/{worker}/fd").iterdir()}
    assert (links[0], links[1]) == ("/dev/null", "/dev/null")
    assert links[3].startswith("socket:")
    assert [link for fd, link in links.items() if fd > 2 and link.startswith("pipe:")] == []
    assert os.getsid(worker) == worker
    program.go_on()
    program.end()


def test_member_env_is_the_workers_alone(tokens: Tokens, group: GroupFactory, module: Path) -> None:
    group(*(token.member(host="worker") for token in tokens))
    program = Program(
        module, BUSY + "timed('env', lambda: 'SOFTHSM2_CONF' in open('/proc/self/environ').read())\n"
    )
    _, answers = program.end()
    assert answers["env"] is False


def listen(token: SoftToken, path: Path) -> subprocess.Popen[str]:
    """As it is: the demo's Worker would remove a socket first."""
    command = Worker(token, path).command()
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | token.env)


def test_socket_that_was_left_behind_is_taken_over(tokens: Tokens, directory: Path) -> None:
    path = directory / "hsm.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with listen(tokens[0], path) as first:
        until(Worker(tokens[0], path).answers, "it listens")
        with listen(tokens[1], path) as second:
            assert (
                second.communicate(timeout=10)[1]
                == f"pkcs11-ha-worker: {path}: another worker listens there\n"
            )
            assert second.returncode == 1
        assert Worker(tokens[0], path).answers()
        first.terminate()
        assert first.wait(timeout=10) == 0
    assert not path.exists()


def test_listening_takes_nobodys_place(tokens: Tokens, directory: Path) -> None:
    """Two arguments that were swapped must not cost the vendor's library."""
    precious, socket_path = directory / "precious.so", directory / "hsm.sock"
    precious.write_text("precious")
    for path, module, says in (
        (precious, softhsm(), f"{precious}: is there and no socket"),
        (socket_path, directory / "none.so", f"{directory}/none.so: No such file or directory"),
    ):
        command = [*Worker(tokens[0], path).command()[:2], str(path), str(module)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        assert (done.returncode, done.stderr) == (1, f"pkcs11-ha-worker: {says}\n")
    assert precious.read_text() == "precious"
    assert not socket_path.exists()


def test_who_says_nothing_of_ours_is_not_served(tokens: Tokens, listening: WorkerFactory) -> None:
    worker = listening(tokens[0])
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"g" + b"rubbish"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(8)
            connection.connect(str(worker.socket))
            connection.sendall(said)
            with suppress(ConnectionResetError):  # it did not read all
                while connection.recv(1 << 16):
                    pass


def test_stopped_worker_is_continued_some_day(tokens: Tokens, start: StartFactory) -> None:
    """Else it would outlive an application that ends meanwhile (timers: proc(5))."""
    start(tokens[0].member(host="worker"))
    (worker,) = started_by(os.getpid())
    assert f"signal: {signal.SIGCONT:d}/" in Path(f"/proc/{worker}/timers").read_text()


@pytest.fixture(scope="module")
def forking_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SoftHSM behind a library that starts a process, which has a copy of every descriptor."""
    flags = "-std=c11 -Wall -Wextra -Werror -shared -fPIC -Wl,-Bsymbolic".split()
    made = tmp_path_factory.mktemp("forking") / "libforking.so"
    source = Path(__file__).with_name("forking.c")
    subprocess.run(["cc", *flags, f"-I{ROOT / 'include'}", "-o", made, source, "-ldl"], check=True)
    return made


def forking(token: SoftToken, module: Path, **options: Toml) -> Table:
    env = token.env | {"FORKING_MODULE": str(softhsm())}
    return token.member(host="worker", module=str(module), env=env, **options)


@pytest.mark.timeout(15)  # the limit of its calls is longer
def test_what_the_library_has_started_dies_with_its_worker(
    tokens: Tokens, start: StartFactory, forking_library: Path
) -> None:
    """And does not hide its death."""
    east = forking(tokens[0], forking_library)
    app = start(east, tokens[1].member(), balance="primary-first")
    session = app.open()
    session.random(1)
    (worker,) = [pid for pid in started_by(os.getpid()) if children(pid)]
    (kept,) = children(worker)
    os.kill(worker, signal.SIGKILL)
    session.random(1)
    assert app.served(session) == "west"
    until(lambda: gone(worker, kept), "both are gone")


@pytest.mark.timeout(15)
def test_death_is_heard_while_much_is_sent(
    tokens: Tokens, start: StartFactory, forking_library: Path
) -> None:
    """More than a socket holds: without a limit to the call, the socket alone would wait for ever."""
    east = forking(tokens[0], forking_library, call_timeout_s="none")
    app = start(east, tokens[1].member(), balance="primary-first")
    session = app.open()
    session.init("C_DigestInit", p11.CKM_SHA256)
    (worker,) = [pid for pid in started_by(os.getpid()) if children(pid)]
    (kept,) = children(worker)
    os.kill(worker, signal.SIGSTOP)
    data, digest = bytes(4 << 20), ctypes.create_string_buffer(32)
    arguments = ("C_Digest", data, len(data), digest, ctypes.byref(ctypes.c_ulong(32)))
    sender = threading.Thread(target=session.call, args=arguments, daemon=True)
    sender.start()
    until(lambda: native.lib.ha_member_in_flight(app.core.members["east"].native), "the call is inside")
    sender.join(0.2)
    os.kill(worker, signal.SIGKILL)
    sender.join(8)
    with suppress(ProcessLookupError):
        os.kill(kept, signal.SIGKILL)  # else nothing here ends if nobody has heard
    assert not sender.is_alive()
    assert digest.raw == sha256(data).digest()
    assert app.served(session) == "west"


def test_limit_of_file_sizes_is_no_death_of_the_application(
    tokens: Tokens, group: GroupFactory, module: Path
) -> None:
    """Memory to be shared counts as a file, and who goes beyond the limit is killed (SIGXFSZ)."""
    group(tokens[0].member(host="worker"))
    program = Program(
        module,
        f"""
        import resource, signal
        from types import SimpleNamespace
        from pkcs11_ha.runtime import native
        from tests.worker.remote import Remote
        remote = Remote()
        remote.start(SimpleNamespace(env={tokens[0].env}))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        timed("call", lambda: remote.call("C_GetInfo", native.ffi.new("CK_INFO *")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        timed("next", lambda: remote.call("C_GetInfo", native.ffi.new("CK_INFO *")))
        remote.free()
        """,
    )
    _, answers = program.end()
    assert (answers["call"], answers["next"]) == ("CKR_DEVICE_ERROR", "CKR_CRYPTOKI_NOT_INITIALIZED")
