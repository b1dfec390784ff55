"""The crash module by itself: it forwards, counts, and ends its process at the call it was told to."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.members import SoftToken, softhsm
from tests import p11
from tests.chaos import crash
from tests.chaos.crash import CrashPlan
from tests.conftest import ROOT, SoftTokenFactory
from tests.ha.app import bare, environment

WRITER = textwrap.dedent(
    """
    import sys
    from tests import p11

    with p11.Module(sys.argv[1]) as module:
        session = module.open(module.slot("east"), rw=True)
        for number in range(3):
            session.create({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_PRIVATE: False,
                            p11.CKA_LABEL: f"note {number}"})
            session.find({})
    """
)


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


@pytest.fixture
def plan(directory: Path) -> CrashPlan:
    return CrashPlan(directory / "plan")


def write(library: Path, token: SoftToken, plan: CrashPlan) -> int:
    """A program that makes three notes; its exit status."""
    with environment(token.env | plan.env(softhsm())):
        program = subprocess.run(
            [sys.executable, "-c", WRITER, str(library)],
            cwd=ROOT,
            check=False,
            start_new_session=True,  # some plans end the whole process group
            timeout=60,
        )
    return program.returncode


def notes(token: SoftToken) -> int:
    with bare(token) as session:
        return len(session.find({p11.CKA_CLASS: p11.CKO_DATA}))


@pytest.fixture
def through(crash_library: Path, east: SoftToken, plan: CrashPlan) -> Iterator[p11.Module]:
    """The token through the crash module, in this process."""
    with environment(east.env | plan.env(softhsm())), p11.Module(crash_library) as module:
        yield module


def test_it_is_the_real_module_behind_another_list(through: p11.Module, plan: CrashPlan) -> None:
    assert through.version == (2, 40)
    session = through.open(through.slot("east"), rw=True)
    session.login("123456")
    keys: p11.Template = {p11.CKA_TOKEN: False, p11.CKA_EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}
    public, private = session.generate_key_pair(  # the function with the most arguments
        p11.CKM_EC_KEY_PAIR_GEN, dict(keys) | {p11.CKA_VERIFY: True}, {p11.CKA_SIGN: True}
    )
    session.verify(p11.CKM_ECDSA, public, b"d" * 32, session.sign(p11.CKM_ECDSA, private, b"d" * 32))
    assert through.rv("C_GenerateKey", session.handle, None, None, 0, None) == p11.CKR_ARGUMENTS_BAD
    assert plan.trace() == ["C_GenerateKeyPair", "C_GenerateKey"]


def test_calls_that_write_are_counted(crash_library: Path, east: SoftToken, plan: CrashPlan) -> None:
    assert write(crash_library, east, plan) == 0
    assert (plan.counted, notes(east)) == (3, 3)
    plan.forget()
    assert plan.counted == 0


def test_every_call_is_counted_if_wanted(crash_library: Path, east: SoftToken, directory: Path) -> None:
    plan = CrashPlan(directory / "plan of all", every=True)
    assert write(crash_library, east, plan) == 0
    assert plan.trace()[0] == "C_Initialize"
    assert plan.trace()[-1] == "C_Finalize"
    assert plan.trace().count("C_CreateObject") == 3


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_the_process_ends_at_the_nth_write(
    crash_library: Path, east: SoftToken, plan: CrashPlan, nth: int, after: bool
) -> None:
    plan.arm(nth, after=after)
    assert write(crash_library, east, plan) == crash.EXIT_STATUS
    assert notes(east) == nth - 1 + after
    assert not plan.disarm()


def test_a_plan_that_is_for_later_does_nothing_yet(
    crash_library: Path, east: SoftToken, plan: CrashPlan
) -> None:
    plan.arm(4, after=False)
    assert write(crash_library, east, plan) == 0
    assert plan.disarm()
    assert write(crash_library, east, plan) == 0


def test_the_whole_process_group_ends(crash_library: Path, east: SoftToken, directory: Path) -> None:
    plan = CrashPlan(directory / "plan of a group", whole_group=True)
    plan.arm(1, after=False)
    assert write(crash_library, east, plan) == -9
