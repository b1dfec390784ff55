"""A host that is itself a Python: of our version it shares its interpreter, any other is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.boundary.conftest import NO_DEEPBIND, Hosts, Pair
from tests.boundary.pythons import SIGN, Python, of_other_versions, of_this_version
from tests.boundary.test_fail_closed import must_refuse
from tests.conftest import ROOT, Group, GroupFactory, is_sanitized

LOADED = ["", "RTLD_GLOBAL", "RTLD_DEEPBIND"]

REFUSED = """
import ctypes, os, sys
mode = os.RTLD_NOW | (getattr(os, sys.argv[2]) if sys.argv[2] else 0)
library = ctypes.CDLL(sys.argv[1], mode=mode)
library.C_Initialize.restype = library.C_GetInfo.restype = library.C_OpenSession.restype = ctypes.c_ulong
for _ in range(2):
    print(hex(library.C_Initialize(None)), hex(library.C_GetInfo(None)), hex(library.C_OpenSession(0, 4, 0, 0, None)))
"""


@pytest.mark.parametrize("python", of_this_version(), ids=str)
def test_a_python_of_this_version_shares_its_interpreter(
    python: Python, module: Path, signing: Group, pair: Pair
) -> None:
    done = python.run(SIGN, module, env=signing.env)
    assert done.stderr == ""
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["initialize"] == "CKR_OK"
    pair.verify(bytes.fromhex(answer["signature"]))
    assert answer["changed"] == []


@pytest.mark.parametrize("python", of_this_version(), ids=str)
def test_a_python_may_end_without_finalizing(
    python: Python, module: Path, pair: Pair, group: GroupFactory
) -> None:
    """Its interpreter goes down under our recovery thread."""
    made = group(pair.east.member(), pair.west.member(), recovery={"mode": "background"})
    done = python.run(SIGN, module, "leave", env=made.env)
    assert (done.returncode, done.stderr) == (0, "")
    pair.verify(bytes.fromhex(json.loads(done.stdout)["signature"]))


def test_a_python_that_calls_with_the_gil_held_does_not_block_itself(
    module: Path, signing: Group, pair: Pair
) -> None:
    """Many bindings keep the GIL in their calls: a thread that waits for another one's call must let go of it."""
    threads = """
import ctypes, json, threading
sys.path.insert(0, ROOT)
from tests import p11
p11._Function = ctypes.PYFUNCTYPE(ctypes.c_ulong)
module = p11.Module(sys.argv[1])
rvs, signatures, start = [], [], threading.Barrier(8)
def work():
    start.wait()
    rvs.append(p11.rv_name(module.rv("C_Initialize", None)))
    session = module.open(module.slots()[0])
    login = module.rv("C_Login", session.handle, p11.CKU_USER, b"123456", 6)
    assert p11.rv_name(login) in ("CKR_OK", "CKR_USER_ALREADY_LOGGED_IN"), login
    key = session.find_one({p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "signing"})
    for _ in range(20):
        signatures.append(session.sign(p11.CKM_ECDSA, key, bytes(range(32))).hex())
workers = [threading.Thread(target=work) for _ in range(8)]
for worker in workers: worker.start()
for worker in workers: worker.join()
module.finalize()
print(json.dumps([sorted(rvs), signatures]))
"""
    python = of_this_version()[0]
    done = python.run(f"import sys\nROOT = {str(ROOT)!r}\n{threads}", module, env=signing.env)
    assert (done.returncode, done.stderr) == (0, "")
    rvs, signatures = json.loads(done.stdout)
    assert rvs == ["CKR_CRYPTOKI_ALREADY_INITIALIZED"] * 7 + ["CKR_OK"]
    assert len(signatures) == 160
    for signature in signatures:
        pair.verify(bytes.fromhex(signature))


def test_a_python_with_another_package_of_our_name_is_refused(module: Path, signing: Group) -> None:
    planted = "import sys, types\nsys.modules['pkcs11_ha'] = types.ModuleType('pkcs11_ha')\n" + REFUSED
    done = of_this_version()[0].run(planted, module, "", env=signing.env)
    assert done.stdout.splitlines() == ["0x5 0x190 0x190"] * 2
    assert done.returncode == 0
    assert all(line.startswith("pkcs11-ha: broken installation") for line in done.stderr.splitlines())
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("how", LOADED)
@pytest.mark.parametrize("python", of_other_versions(), ids=str)
def test_a_python_of_another_version_is_refused(
    python: Python, how: str, module: Path, signing: Group
) -> None:
    if how == "RTLD_DEEPBIND" and is_sanitized(module):
        pytest.skip(NO_DEEPBIND)
    done = python.run(REFUSED, module, how, env=signing.env)
    assert done.stdout.splitlines() == ["0x5 0x190 0x190"] * 2
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("pkcs11-ha: ")
        assert "Python" in line


FORKS = """
import multiprocessing, os, signal, sys, threading
sys.path.insert(0, ROOT)
from tests import p11

def use(module):
    signal.alarm(20)
    assert module.rv("C_GetInfo", None) == p11.CKR_CRYPTOKI_NOT_INITIALIZED
    module.initialize()
    sign(module)
    module.finalize()

def sign(module):
    session = module.open(module.slots()[0])
    login = module.rv("C_Login", session.handle, p11.CKU_USER, b"123456", 6)
    assert login in (p11.CKR_OK, p11.CKR_USER_ALREADY_LOGGED_IN), login
    key = session.find_one({p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "signing"})
    for _ in range(3):
        signature = session.sign(p11.CKM_ECDSA, key, bytes(range(32)))
    public = session.find_one({p11.CKA_CLASS: p11.CKO_PUBLIC_KEY, p11.CKA_LABEL: "signing"})
    session.verify(p11.CKM_ECDSA, public, bytes(range(32)), signature)
    session.close()

if __name__ == "__main__":
    signal.alarm(60)
    module = p11.Module(sys.argv[1])
    module.initialize()
    keep = module.open(module.slots()[0])
    over, rounds = threading.Event(), threading.Semaphore(0)

    def work():
        while not over.is_set():
            sign(module)
            rounds.release()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers: worker.start()
    try:
        for _ in range(5):
            for _ in workers: rounds.acquire()
            child = os.fork()
            if child == 0:
                use(module)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert module.rv("C_GetInfo", bytes(256)) == 0
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=use, args=(module,)) for _ in range(4)]
        for child in children: child.start()
        for child in children: child.join()
        assert [child.exitcode for child in children] == [0] * 4
    finally:
        over.set()
        for worker in workers: worker.join()
    sign(module)
    module.finalize()
    print("ok")
"""


@pytest.mark.parametrize("mode", ["call", "background"])
def test_a_python_host_forks(mode: str, module: Path, pair: Pair, group: GroupFactory) -> None:
    """os.fork and multiprocessing, with threads at work: its own fork handlers run, and ours must not run twice."""
    made = group(pair.east.member(), pair.west.member(), recovery={"mode": mode, "interval_s": 0.01})
    options = ("-W", "ignore::DeprecationWarning")  # 3.12 and later warn of forks beside threads
    for python in of_this_version():
        done = python.run(f"ROOT = {str(ROOT)!r}\n{FORKS}", module, env=made.env, options=options)
        assert done.stderr == ""
        assert (done.returncode, done.stdout) == (0, "ok\n")


def _other_library() -> Path | None:
    return next((each.library for each in of_other_versions() if each.library), None)


@pytest.mark.skipif(_other_library() is None, reason="no other Python with a shared library")
def test_a_host_that_has_loaded_another_python_is_refused(signing: Group, hosts: Hosts) -> None:
    """Say, a plugin of it: its symbols are not ours, but two Pythons in a process share what they must not."""
    host = hosts(env=signing.env)
    assert host.command(f"load {_other_library()}") == "ok"
    line = must_refuse(host)
    assert str(_other_library()) in line
