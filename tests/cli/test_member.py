"""`p11ha member`: entries of the configuration, tokens to be found, and one that is tried."""

from __future__ import annotations

import json
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from demo.members import SoftToken, softhsm
from tests.cli.p11ha import P11HA, good, refused, run
from tests.conftest import GroupFactory, SoftTokenFactory
from tests.fault import Fault, library


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


@pytest.fixture
def conf(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where none is yet."""
    path = directory / "conf" / "pkcs11-ha.toml"
    monkeypatch.setenv("PKCS11_HA_CONF", str(path))
    monkeypatch.setenv("PKCS11_HA_STATE", str(directory))
    return path


@pytest.mark.usefixtures("module")
def test_from_tokens_to_a_group_that_works(conf: Path, east: SoftToken, soft_token: SoftTokenFactory) -> None:
    """What `discover` prints is pasted as it is, once; the other member is added by hand."""
    west = soft_token("West site, 2")
    found = good("member", "discover", softhsm(), "--env", f"SOFTHSM2_CONF={west.conf}")
    (entry,) = tomllib.loads(found)["member"]
    assert entry == {
        "name": "West-site-2",
        "module": str(softhsm()),
        "token": f"pkcs11:token=West%20site,%202;serial={west.serial}",
        "env": west.env,
    }
    assert "# not initialised: " in found
    as_json = json.loads(
        good("member", "discover", softhsm(), "--json", "--env", f"SOFTHSM2_CONF={west.conf}")
    )
    assert as_json["members"] == [entry]

    conf.parent.mkdir()
    conf.write_text(found)
    again = good("member", "discover", softhsm(), "--env", f"SOFTHSM2_CONF={west.conf}")
    assert 'name = "West-site-2-2"' in again
    options = ["--env", f"SOFTHSM2_CONF={east.conf}", "--instance", "own", "--host", "worker"]
    good("member", "add", "east", softhsm(), east.uri, *options)
    good("group", "create", "prod", "east", "West-site-2")
    checked = good("check").splitlines()
    assert [line.partition(": ")[0] for line in checked] == ["West-site-2", "east"]
    listed = json.loads(good("member", "list", "--json"))["members"]
    assert [(each["name"], each["group"], each["role"], each["host"]) for each in listed] == [
        ("West-site-2", "prod", "active", "process"),
        ("east", "prod", "active", "worker"),
    ]
    assert all(len(line) <= 80 for line in good("member", "list").splitlines())


def test_adding_and_removing(conf: Path, east: SoftToken) -> None:
    good(
        "member",
        "add",
        "east",
        softhsm(),
        east.uri,
        "--init-args",
        "a b",
        "--pin-source",
        f"file:{east.conf}",
    )
    (member,) = tomllib.loads(conf.read_text())["member"]
    assert (member["init_args"], member["pin_source"]) == ("a b", f"file:{east.conf}")
    good("member", "add", "west", softhsm(), "pkcs11:token=west")
    good("group", "create", "prod", "east")
    before = conf.read_text()
    assert "there already" in refused("member", "add", "east", softhsm(), east.uri)
    assert "p11ha group remove-member prod east" in refused("member", "remove", "east")
    assert "no member 'north': there is east, west" in refused("member", "remove", "north")
    for wrong in (
        ["we st", "/x", "pkcs11:"],
        ["north", "/x", "token=north"],
        ["north", "/x", "pkcs11:", "--env", "A"],
    ):
        refused("member", "add", *wrong, status=2)
    assert conf.read_text() == before
    assert "all objects stay on west" in good("member", "remove", "west")
    assert "west" not in conf.read_text()


@pytest.mark.usefixtures("module")
def test_trying_a_member(east: SoftToken, directory: Path, group: GroupFactory) -> None:
    pin = directory / "pin"
    pin.write_text(east.pin)
    pin.chmod(0o600)
    # A PIN that is configured is not tried: it could be wrong.  But its file must be there, as for any process.
    wrong = directory / "wrong"
    wrong.write_text("000000")
    state = group(east.member(pin_source=f"file:{wrong}")).state

    shown = good("member", "test", "east")
    for word in (str(softhsm()), f"'east', serial {east.serial}", "LOGIN_REQUIRED", "login       not tried"):
        assert word in shown
    assert "login       CKR_OK" in good("member", "test", "east", "--pin-source", f"file:{pin}")
    found = run("member", "test", "east", "--json", "--pin-source", f"file:{wrong}")
    assert (found.returncode, found.stderr) == (1, "")
    said = json.loads(found.stdout)
    assert (said["login"], said["problem"]) == ("CKR_PIN_INCORRECT", "C_Login answers CKR_PIN_INCORRECT")
    assert said["tokens"][0]["serial"] == east.serial
    assert "no-such-file" in refused("member", "test", "east", "--pin-source", "file:/no-such-file")
    assert list(state.iterdir()) == []  # it leaves no trace with those that run
    assert "no member 'west'" in refused("member", "test", "west")
    wrong.unlink()
    assert refused("member", "test", "east") == f"east: member.pin_source: {wrong}: No such file or directory"


def test_no_pin_is_tried_where_it_could_be_the_last(
    east: SoftToken, directory: Path, group: GroupFactory
) -> None:
    fault = Fault(east)
    fault.script(
        "C_Login kill", "C_GetTokenInfo flip 98"
    )  # byte 2 of the flags: among them USER_PIN_FINAL_TRY
    group(fault.member())
    pin = directory / "pin"
    pin.write_text(east.pin)
    assert "not logged in: the token says USER_PIN_" in refused(
        "member", "test", "east", "--pin-source", f"file:{pin}"
    )


@pytest.mark.usefixtures("module")
def test_a_token_that_is_not_there(east: SoftToken, group: GroupFactory) -> None:
    group(east.member(token="pkcs11:token=nobody"))
    assert refused("member", "test", "east") == "east: no token matches pkcs11:token=nobody"


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("C_Initialize crash", "crashed (SIGSEGV)"),
        ("C_GetSlotList abort", "crashed (SIGABRT)"),
        ("C_Initialize exit 3", "ended its process with status 3"),
        ("C_Initialize return CKR_HOST_MEMORY", "C_Initialize answers CKR_HOST_MEMORY"),
        ("C_Initialize hang", "no answer in time"),
        ("C_GetTokenInfo hang", "no answer in time"),
        ("C_Finalize crash", "crashed (SIGSEGV) in C_Finalize"),
    ],
)
def test_a_library_that_fails_is_one_line(
    east: SoftToken, group: GroupFactory, script: str, why: str
) -> None:
    fault = Fault(east)
    fault.script(script)
    group(fault.member(), recovery={"connect_timeout_s": 1})
    if why.endswith("C_Finalize"):
        tried = run("member", "test", "east")
        assert (tried.returncode, tried.stderr.strip()) == (1, f"east: {library()}: {why}")
    else:
        assert refused("member", "test", "east").endswith(why)


@pytest.mark.usefixtures("module", "conf")
def test_discovering_a_library_that_fails(east: SoftToken, directory: Path) -> None:
    fault = Fault(east)
    env = [part for name, value in fault.env.items() for part in ("--env", f"{name}={value}")]
    assert 'name = "east"' in good("member", "discover", library(), *env)
    fault.script("C_GetSlotInfo crash")
    assert refused("member", "discover", library(), *env) == f"{library()}: crashed (SIGSEGV)"
    nothing = directory / "nothing.so"
    nothing.write_text("no library")
    assert str(nothing) in refused("member", "discover", nothing)
    assert refused("member", "discover", "/no/such.so") == "/no/such.so: No such file or directory"
    assert refused("member", "discover", "/") == "/: is a directory"


@pytest.mark.usefixtures("module", "conf")
def test_ctrl_c_while_a_library_hangs(east: SoftToken) -> None:
    fault = Fault(east)
    fault.script("C_Initialize hang")
    env = [part for name, value in fault.env.items() for part in ("--env", f"{name}={value}")]
    command: list[str | Path] = [P11HA, "member", "discover", library(), *env]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0) as asked:
        fault.wait_injected()
        asked.send_signal(signal.SIGINT)
        assert asked.communicate() == (b"", b"")
    assert asked.returncode == 130
