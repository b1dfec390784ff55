"""The script: how rules count and share calls, that it is read anew, and that a wrong one lets nothing pass."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pkcs11_ha.spec.functions import FUNCTIONS
from tests import p11
from tests.fault import Fault
from tests.fault.conftest import Program, Use
from tests.ha.app import code, environment

RANDOM = "C_GenerateRandom"


def failures(use: Use, calls: int) -> list[int]:
    """Which calls fail, counted from 1."""
    return [number + 1 for number in range(calls) if code(lambda: use.session.random(8)) != "CKR_OK"]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ("", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("times 2", [1, 2]),
        ("after 7", [8, 9, 10]),
        ("every 4", [4, 8]),
        ("after 3 every 2 times 2", [5, 7]),
        ("probability 100% times 3", [1, 2, 3]),
    ],
)
def test_conditions_choose_calls(use: Use, conditions: str, expected: list[int]) -> None:
    use.fault.script(f"{RANDOM} {conditions} return CKR_DEVICE_ERROR")
    assert failures(use, 10) == expected
    assert (use.fault.counts()[0].calls, use.fault.injected()) == (10, len(expected))


def test_chance_is_the_same_for_the_same_seed(use: Use) -> None:
    rule = f"{RANDOM} probability 12.5% return CKR_DEVICE_ERROR"
    drawn = []
    for seed in ("seed 42", "seed 43", "seed 42"):
        use.fault.script(seed, rule)
        drawn.append(failures(use, 1000))
    assert drawn[0] == drawn[2] != drawn[1]
    assert 90 < len(drawn[0]) < 165  # 125, and four standard deviations


def test_the_first_rule_that_hits_has_the_call(use: Use) -> None:
    """Those below it do not hear of it, so that lines follow one another; sleeping lets it pass."""
    use.fault.script(
        "C_* every 2 sleep 1us",
        f"{RANDOM} times 2 return CKR_DEVICE_ERROR  # first these",
        f"{RANDOM} times 1 return CKR_FUNCTION_FAILED",
        "",
        "# and then all is well",
        f"{RANDOM} after 1 times 1 return 0x80000001",
    )
    codes = [code(lambda: use.session.random(8)) for _ in range(6)]
    assert codes == [*["CKR_DEVICE_ERROR"] * 2, "CKR_FUNCTION_FAILED", "CKR_OK", "0x80000001", "CKR_OK"]
    assert [(c.line, c.calls, c.injected) for c in use.fault.counts()] == [
        *((1, 6, 3), (2, 6, 2), (3, 4, 1), (6, 3, 1)),
    ]


def test_patterns_leave_finding_the_functions_alone(fault: Fault) -> None:
    fault.script("C_* return CKR_DEVICE_ERROR")
    with pytest.raises(p11.CkError, match=r"C_Initialize: CKR_DEVICE_ERROR"), fault.module():
        pass
    fault.script("C_GetFunctionList return CKR_HOST_MEMORY")
    with pytest.raises(p11.CkError, match=r"C_GetFunctionList: CKR_HOST_MEMORY"), fault.module():
        pass


WRONG = {
    "C_Sing crash": "no function of PKCS#11 is called C_Sing",
    "C_Sign": "there is no action",
    "C_Sign explode": 'there is no action "explode"',
    "C_Sign session found": 'there is no action "session found"',
    "C_Sign return": "return what? nothing is no code",
    "C_Sign return CKR_NONSENSE": "return what? CKR_NONSENSE is no code",
    "C_Sign return CKR_OK": 'CKR_OK without the work is "pretend"',
    "C_Sign return CKR_DEVICE_ERROR flip 3": 'what is "flip" behind the action? A rule has one',
    "C_Sign after soon crash": "after after comes a number of calls",
    "C_Sign every 0 crash": "after every comes a number of calls",
    "C_Sign times -1 crash": "after times comes a number of calls",
    "C_Sign after 1 after 2 crash": "after is there twice",
    "C_Sign query times 1 query crash": "query is there twice",
    "C_Sign times": "after times comes a number of calls",
    "C_Sign probability 1 crash": "after probability comes 1%, for example",
    "C_Sign probability 101% crash": "after probability comes 1%, for example",
    "C_Sign sleep 250": "after sleep comes a time, 250ms for example",
    "C_Sign exit 256": "after exit comes a status from 0 to 255",
    "C_Sign length 3": "after length comes +1, -1 or =100, for example",
    "C_Sign flip": "after flip comes the offset of a byte",
    "C_Sign late": "after late comes a code, CKR_DEVICE_ERROR for example, or an action",
    "C_Sign late flip 3": "flip is never late",
    "C_GenerateRandom query crash": 'C_GenerateRandom: "query" needs an output whose length can be asked for',
    "C_FindObjects query crash": 'C_FindObjects: "query" needs an output whose length can be asked for',
    "\0 C_Sign crash": "there is a NUL byte",
    "C_Sign crash # \0": "there is a NUL byte",
    "C_Sign query flip 3": 'a query has no output for "flip 3"',
    "C_SignInit flip 3": 'C_SignInit: "flip 3" needs an output',
    "C_Sign swap": 'C_Sign: "swap" needs an object handle',
    "C_GetInfo session lost": 'C_GetInfo: "session lost" needs a session',
    "C_LoginUser crash": "the wrapped library has no C_LoginUser",  # SoftHSM is of 2.40
    "seed tomato": "after seed comes a number",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_and_c_initialize_fails(
    fault: Fault, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fault.script("# a comment", line)
    with pytest.raises(p11.CkError, match="C_Initialize: CKR_GENERAL_ERROR"), fault.module():
        pass
    script = Path(fault.env["PKCS11_FAULT_SCRIPT"])
    assert capfd.readouterr().err == f"pkcs11-fault: {script}:2: {WRONG[line]}\n"


@pytest.mark.parametrize("gone", ["PKCS11_FAULT_SCRIPT", "PKCS11_FAULT_STATE", "PKCS11_FAULT_LOG"])
def test_a_file_that_cannot_be_used_is_no_reason_to_go_on(
    fault: Fault, gone: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fault.env[gone] = "/nonexistent/file"
    with (
        pytest.raises(p11.CkError, match=r"C_(Initialize|GetFunctionList): CKR_GENERAL_ERROR"),
        fault.module(),
    ):
        pass
    assert "pkcs11-fault: /nonexistent/file: No such file or directory" in capfd.readouterr().err


def test_a_script_that_is_written_wrong_stops_a_running_program(
    use: Use, capfd: pytest.CaptureFixture[str]
) -> None:
    use.fault.script("C_Sign krash")
    assert [code(use.sign), code(use.session.info)] == ["CKR_GENERAL_ERROR"] * 2
    assert capfd.readouterr().err.count("\n") == 1  # said once
    Path(use.fault.env["PKCS11_FAULT_SCRIPT"]).unlink()
    assert code(use.sign) == "CKR_GENERAL_ERROR"
    use.fault.script()
    use.sign()


def test_a_script_that_is_written_again_begins_again(use: Use) -> None:
    for _ in range(3):
        use.fault.script(f"{RANDOM} after 2 times 1 return CKR_DEVICE_ERROR")
        assert failures(use, 5) == [3]


def test_a_program_that_is_started_again_goes_on_in_the_script(program: Program, fault: Fault) -> None:
    fault.script("C_CreateObject after 2 times 1 crash")
    done = program("session.create(NOTE)\nsession.create(NOTE)")
    assert done.returncode == 0, done.stderr
    assert program("session.create(NOTE)").returncode == -11
    assert program("session.create(NOTE)").returncode == 0
    assert [(count.calls, count.injected) for count in fault.counts()] == [(4, 1)]
    del fault.env["PKCS11_FAULT_STATE"]  # without it each process has its own
    assert [program("session.create(NOTE)").returncode for _ in range(3)] == [0, 0, 0]


def test_children_of_a_fork_share_its_counts(use: Use) -> None:
    use.fault.script(f"{RANDOM} after 3 return CKR_DEVICE_ERROR")
    assert failures(use, 2) == []
    child = os.fork()
    if child == 0:  # SoftHSM goes on in a child as it is
        os._exit(0 if failures(use, 3) == [2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert failures(use, 1) == [1]


def test_eight_threads_get_each_fault_once(use: Use) -> None:
    """While the script changes, a token is lost under them, and the log is written."""
    wrong: list[BaseException] = []
    failed = [0] * 8
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            session = use.open()
            barrier.wait(20)
            for _ in range(250):
                failed[number] += code(lambda: session.random(8)) == "CKR_DEVICE_MEMORY"
        except BaseException as error:  # noqa: BLE001 (told below)
            wrong.append(error)

    use.fault.script(f"{RANDOM} every 7 times 200 return CKR_DEVICE_MEMORY")
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(failed) == 200 == use.fault.injected()
    assert use.fault.counts()[0].calls == 2000
    lines = [line for line in use.fault.log() if f" {RANDOM} " in line]
    assert len(lines) == 2000
    assert (
        sum(line.endswith(" rv=CKR_DEVICE_MEMORY rule=1 return CKR_DEVICE_MEMORY") for line in lines) == 200
    )


def test_losses_wait_for_who_is_inside(use: Use) -> None:
    """All sessions are lost while others work for milliseconds: SoftHSM would free what it uses."""
    stop = threading.Event()
    wrong: list[str] = []
    data = bytes(3_000_000)

    def digest(session: p11.Session) -> str:
        return code(lambda: session.digest(p11.CKM_SHA256, data))

    def work() -> None:
        session = use.open()
        while not stop.is_set():
            said = digest(session)
            if said == "CKR_SESSION_HANDLE_INVALID":
                session = use.open()
            elif said != "CKR_OK":
                wrong.append(said)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        use.fault.script("C_GenerateRandom times 1 sessions lost")
        session = use.open()
        assert code(lambda: session.random(1)) == "CKR_SESSION_HANDLE_INVALID"  # noqa: B023 (called at once)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert use.fault.injected() == 1


def test_every_line_of_the_log_says_what_it_must(use: Use) -> None:
    use.fault.script("C_Sign sleep 1us", "C_Sign times 1 late CKR_DEVICE_ERROR")
    assert code(use.sign) == "CKR_DEVICE_ERROR"
    *_, asked, signed = use.fault.log()
    handle, here = use.session.handle, f"pid={os.getpid()} tid={threading.get_native_id()}"
    time, _, said = signed.partition(" ")
    assert len(time) == len("2025-01-01T00:00:00.000000Z")
    assert said == (
        f"{here} C_Sign session={handle} rv=CKR_DEVICE_ERROR rule=1 sleep 1us rule=2 late CKR_DEVICE_ERROR"
    )
    assert asked.partition(" ")[2] == f"{here} C_Sign session={handle} rv=CKR_OK"


def test_the_environment_is_read_once(fault: Fault) -> None:
    """A member's is there only while its library is loaded."""
    with fault.module() as module, environment(dict.fromkeys(fault.env, "/nonexistent")):
        assert module.token(module.slot("east")).label == "east"


def test_all_functions_are_in_the_table() -> None:
    assert len(FUNCTIONS) == 104
