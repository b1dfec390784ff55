"""Workers that die, hang or are killed: the group goes on, and the member comes back."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from pathlib import Path

import pytest

from demo.members import SoftToken, library
from pkcs11_ha.runtime import native
from tests import p11
from tests.ha import operations
from tests.ha.app import FAR, SOON, Application, until, working_until
from tests.ha.conftest import StartFactory
from tests.ha.keys import DIGEST, Keys, private
from tests.ha.operations import Use
from tests.worker.conftest import Hosted, WorkerFactory
from tests.worker.processes import processes, started_by, state
from tests.worker.remote import Remote

Tokens = tuple[SoftToken, SoftToken]
LIBC = str(library("libc.so.6"))


def worker_of(token: SoftToken) -> int:
    """The process that was started for a token."""
    (found,) = [pid for pid in started_by(os.getpid()) if str(token.conf) in environment_of(pid)]
    return found


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")


def test_killed_worker_is_one_member_lost_and_found(tokens: Tokens, start: StartFactory, keys: Keys) -> None:
    use = Use.begin(start(*(t.member(host="worker") for t in tokens), recovery=SOON), keys, "123456")
    for token in (*tokens, *tokens):
        before = worker_of(token)
        os.kill(before, signal.SIGKILL)
        for _ in range(4):
            operations.sign_ecdsa(use)
        use.app.wait_for_event("member.lost", token.label)
        working_until(lambda: operations.sign_ecdsa(use), lambda: use.app.away() == set(), "it is back")
        assert worker_of(token) != before
    assert [len(use.app.events("member.recovered", token.label)) for token in tokens] == [2, 2]


def test_killed_under_load(application: Application, tokens: Tokens, keys: Keys) -> None:
    """No call fails, whoever is inside; `application` has no recovery that is soon, so one dies."""
    application.login("123456")
    errors: list[BaseException] = []
    count = [0] * 8
    stop = threading.Event()

    def work(number: int) -> None:
        try:
            session = application.open()
            key = session.find_one(private("ec"))
            while not stop.is_set():
                keys.check_ec(session.sign(p11.CKM_ECDSA, key, DIGEST))
                count[number] += 1
        except BaseException as error:  # noqa: BLE001 (told below)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: min(count) > 5, "all work")
    for pid in processes(str(tokens[0].conf)):
        os.kill(pid, signal.SIGKILL)
    already = list(count)
    until(
        lambda: errors or all(now > then + 5 for now, then in zip(count, already, strict=True)), "all go on"
    )
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert application.away() == {"east"}


def test_killed_server_comes_back(
    tokens: Tokens, listening: WorkerFactory, start: StartFactory, keys: Keys
) -> None:
    workers = [listening(token) for token in tokens]
    use = Use.begin(start(*(w.member() for w in workers), recovery=SOON), keys, "123456")
    for worker in workers:
        worker.kill()
        for _ in range(4):
            operations.sign_ecdsa(use)
        use.app.wait_for_event("member.lost", worker.token.label)
        worker.start()
        working_until(lambda: operations.sign_ecdsa(use), lambda: use.app.away() == set(), "it is back")


def test_stopped_worker_has_as_long_as_a_call_may_take(
    tokens: Tokens, hosted: Hosted, start: StartFactory, keys: Keys
) -> None:
    members = [hosted(token, call_timeout_s=0.5) for token in tokens]
    use = Use.begin(start(*members, recovery=FAR), keys, "123456")
    stopped = processes(str(tokens[0].conf))
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(6):
            operations.sign_ecdsa(use)
        took = time.monotonic() - began
        assert 0.4 < took < 2.0
        assert use.app.away() == {"east"}
        began = time.monotonic()
        use.app.module.finalize()
        assert time.monotonic() - began < 3
    finally:
        for pid in stopped:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue


def test_stopped_worker_without_a_limit_holds_its_call_and_nothing_else(
    tokens: Tokens, start: StartFactory, keys: Keys
) -> None:
    """C_Finalize kills it in the end."""
    app = start(
        *(t.member(host="worker", call_timeout_s="none") for t in tokens),
        recovery={"interval_s": 3600, "connect_timeout_s": 0.5},
    )
    Use.begin(app, keys, "123456")
    pid = worker_of(tokens[0])
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    app.module.finalize()
    until(lambda: state(pid) in ("Z", ""), "it is dead")
    assert time.monotonic() - began < 6


def test_call_that_is_stuck_does_not_keep_its_member_away(
    tokens: Tokens, start: StartFactory, keys: Keys
) -> None:
    """It was found to be ill by somebody else: the call is freed, done elsewhere, and the member starts anew."""
    members = [token.member(host="worker") for token in tokens]
    use = Use.begin(start(*members, recovery=SOON, balance="primary-first"), keys, "123456")
    operations.sign_ecdsa(use)
    os.kill(worker_of(tokens[0]), signal.SIGSTOP)
    stuck = threading.Thread(target=operations.sign_ecdsa, args=(use,))
    stuck.start()
    core, other = use.app.core, use.app.open()
    east = core.members["east"]
    until(lambda: native.lib.ha_member_in_flight(east.native), "the call is inside")
    core.leave_out(east, p11.CKR_DEVICE_ERROR, "C_Sign", "")
    working_until(lambda: other.random(1), lambda: use.app.events("member.recovered", "east"), "it is back")
    stuck.join()
    operations.sign_ecdsa(use)


def test_call_hears_at_once_that_its_worker_is_killed(tokens: Tokens, remote: Remote) -> None:
    """However deep it sleeps, and without any limit to a call."""
    remote.start(tokens[0])
    worker = worker_of(tokens[0])
    info = native.ffi.new("CK_INFO *")
    assert remote.call("C_GetInfo", info) == "CKR_CRYPTOKI_NOT_INITIALIZED"
    os.kill(worker, signal.SIGSTOP)
    until(lambda: state(worker) == "T", "it is stopped")
    said: list[str] = []
    stuck = threading.Thread(target=lambda: said.append(remote.call("C_GetInfo", info)))
    stuck.start()
    until(lambda: waits_at_a_socket(stuck), "it sleeps")
    os.kill(worker, signal.SIGKILL)
    stuck.join(timeout=10)
    assert said == ["CKR_DEVICE_ERROR"]


def waits_at_a_socket(thread: threading.Thread) -> bool:
    """It is in poll(), or ppoll() where that is the same."""
    call = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()[0]
    return call == {"x86_64": "7", "aarch64": "73"}[platform.machine()]


def test_crash_of_a_library_is_the_death_of_a_member(tokens: Tokens, start: StartFactory, keys: Keys) -> None:
    use = Use.begin(start(*(t.member(host="worker") for t in tokens), recovery=SOON), keys, "123456")
    os.kill(worker_of(tokens[1]), signal.SIGSEGV)
    working_until(
        lambda: operations.sign_ecdsa(use), lambda: use.app.events("member.recovered", "west"), "it is back"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"module": "/etc/passwd"}, "/etc/passwd: "),
        (
            {"module": "/lib/x86_64-linux-gnu/libc.so.6"},
            "/lib/x86_64-linux-gnu/libc.so.6: no C_GetFunctionList of its own",
        ),
        ({"host": "unix:/nowhere/at-all.sock"}, "/nowhere/at-all.sock: No such file or directory"),
    ],
)
def test_worker_that_cannot_be_had_is_told_in_one_line(
    tokens: Tokens, start: StartFactory, change: dict[str, str], says: str
) -> None:
    member = dict(tokens[0].member(host="worker")) | change
    if change.get("host"):
        del member["env"]
    app = start(member, tokens[1].member())
    (line,) = app.events("member.lost", "east")
    assert f'why="{says}' in line
