"""`p11ha demo-menu`: every number on a real group, the HA status as on the reference page, and whatever is typed."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.members import Server, SoftToken, softhsm
from pkcs11_ha import ck
from pkcs11_ha.cli.meanings import meaning
from pkcs11_ha.cli.menu.client import Client
from pkcs11_ha.cli.menu.desk import Options
from pkcs11_ha.cli.menu.dialogue import Dialogue, Script
from pkcs11_ha.cli.menu.loop import Menu
from pkcs11_ha.cli.menu.table import ENTRIES, picture
from pkcs11_ha.spec import pages
from tests.conftest import ROOT, GroupFactory, ServerFactory, SoftTokenFactory

P11HA = Path(sys.executable).parent / "p11ha"
LIMIT_S = 30.0
GREAT = "Doing great, no errors (CKR_OK)"
CTRL_C, CTRL_D = "\x03", "\x04"
STANDARD = {*range(1, 16), *range(20, 28), *range(40, 47), 52, *range(60, 67), 90, 98, 108, 109, 110}
FAR = {"interval_s": 3600}


def run(*arguments: str, typed: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [P11HA, "demo-menu", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=cwd,
    )


def statuses(shown: str) -> list[tuple[str, str]]:
    """Each number that was chosen and the status it got, as one line."""
    found = re.findall(
        r"^Enter your choice : ([^\n]+)\n(.*?)^Status: (.*?)(?=^\S|\Z)", shown, re.MULTILINE | re.DOTALL
    )
    return [(number.strip(), " ".join(status.split())) for number, _, status in found]


@pytest.fixture
def bare(soft_token: SoftTokenFactory, monkeypatch: pytest.MonkeyPatch) -> SoftToken:
    """One token, to which the menu speaks through its own library."""
    token = soft_token("bare")
    monkeypatch.setenv("SOFTHSM2_CONF", str(token.conf))
    return token


BARE = ("--module", str(softhsm()))


# ---- the table


def test_the_menu_is_the_pages_in_80_columns() -> None:
    assert {entry.number for entry in ENTRIES.values() if entry.does} == STANDARD
    vendors = {*range(16, 20), 50, 51, 67, *range(70, 88), 94, 95, 97, *range(101, 108)}
    assert set(ENTRIES) == STANDARD | vendors
    assert max(map(len, picture().splitlines())) <= 80
    assert (ROOT / "docs" / "demo-menu.md").read_text() == pages.demo_menu()


def test_each_return_value_has_a_meaning() -> None:
    unknown = meaning(0x7FFF)
    assert [name for rv, name in ck.RV_NAMES.items() if meaning(rv) == unknown] == []


# ---- every number


EVERY_NUMBER = """
10
14
11
    0
12
    0
8
    0
9
    0
    ecdsa
1   # a session
    0
13
3
    so
    12345678
7
    654321
4
3
    user
    654321
5
    654321
    file:{directory}/pin
20
    data
    note

    what is written
21
    note
    second
    no
23
    last
24
    last
    value
25
    last
    label
    third
26
    data
    third
27
    last
22
    last
45
    aes256
    wrapping

    yes
40
    wrapping
    aes_cbc_pad

    @{directory}/plain
    {directory}/sealed
41
    wrapping
    AES_CBC_PAD

    @{directory}/sealed
    {directory}/opened
65
    all
    no
42
    KNOWN-TEST-KEY-rsa2048
    sha256_rsa_pkcs
    to be signed
43
    public:KNOWN-TEST-KEY-rsa2048
    CKM_SHA256_RSA_PKCS
    to be signed
44
    sha256
    abc
46
    KNOWN-TEST-KEY-aes128
    sha256
60
    wrapping
    aes_key_wrap_pad

    private:KNOWN-TEST-KEY-p256
61
    wrapping
    aes_key_wrap_pad


    ec
    unwrapped
    no
42
    last
    ecdsa
    0x00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
43
    public:KNOWN-TEST-KEY-p256
    ecdsa
    0x00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
62
    24
63
    private:KNOWN-TEST-KEY-p256
    ecdh1_derive
    KNOWN-TEST-KEY-p256
    secret
    32
    derived
    no
66
    0x0011
64
    a password





    from a password
15
90
    0
98
    verbose
    yes
52
    0
108
    {directory}/inner
110
    {directory}/inner
    second
109
    {directory}/inner
    {directory}/background
2
6
    0
    new
    12345678
"""
INNER = """
[first]
14
    yes
[second]
10
"""
# What the group or its tokens do not have, and a slot in which nothing happens.
REFUSED = {
    "64": "C_GenerateKey answers CKR_MECHANISM_INVALID",
    "6": "C_InitToken answers CKR_FUNCTION_NOT_SUPPORTED",
}


@pytest.mark.usefixtures("module")
def test_every_number_on_a_group(directory: Path, soft_token: SoftTokenFactory, group: GroupFactory) -> None:
    tokens = [soft_token(name) for name in ("east", "west")]
    (directory / "pin").write_text("123456\n")
    (directory / "pin").chmod(0o600)
    (directory / "plain").write_bytes(os.urandom(5000))
    (directory / "inner").write_text(INNER)
    (directory / "script").write_text(EVERY_NUMBER.format(directory=directory), encoding="utf-8-sig")
    group(*(token.member() for token in tokens), replication="domain")
    source = f"--pin-source=file:{directory}/pin"
    init = [str(P11HA), "domain", "init", "prod", "--shares=none", source]
    subprocess.run(init, check=True, capture_output=True, timeout=60)

    done = run("--script", str(directory / "script"), "--keep-going")
    got = statuses(done.stdout)
    assert {int(number) for number, _ in got} == STANDARD
    for number, status in got:
        assert status.partition(" : ")[0] == REFUSED.get(number, GREAT), (number, done.stdout)
    assert (done.returncode, done.stderr) == (1, f"{len(REFUSED)} failed\n")
    assert (directory / "opened").read_bytes() == (directory / "plain").read_bytes()
    assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in done.stdout
    assert "C_WaitForSlotEvent answers CKR_NO_EVENT: nothing has happened" in done.stdout
    assert "26 good, 0 wrong, 7 not tried" in done.stdout
    assert "  CKA_LABEL                  third" in done.stdout
    assert [number for number, _ in statuses((directory / "background").read_text())] == ["14", "10"]
    assert "654321" not in done.stdout  # PINs are not repeated
    # Less the answers, which are as long as the script has them.
    asked = [re.sub(r"([])]: ).*", r"\1", line) for line in done.stdout.splitlines()]
    long = [line for line in asked if len(line) > 80 and str(directory) not in line]
    assert long == []


@pytest.mark.usefixtures("bare")
def test_a_vendors_numbers_are_not_supported() -> None:
    vendors = [str(number) for number, entry in ENTRIES.items() if entry.does is None]
    done = run(*BARE, "--keep-going", typed="\n".join(vendors))
    got = dict(statuses(done.stdout))
    assert list(got) == vendors
    for number in vendors:
        assert " answers CKR_FUNCTION_NOT_SUPPORTED : one vendor's firmware" in got[number]
    assert done.returncode == 1


# ---- scripts


@pytest.mark.usefixtures("bare")
def test_a_script_stops_at_its_first_error(directory: Path) -> None:
    script = directory / "script"
    script.write_text("10\n# a number that is none\n99\n10\n")
    stopped = run(*BARE, "--script", str(script))
    assert (stopped.returncode, stopped.stderr) == (1, "1 failed\n")
    assert [number for number, _ in statuses(stopped.stdout)] == ["10", "99"]
    assert stopped.stdout.endswith(f"{script}:3: stopped at the first error\n")
    gone_on = run(*BARE, "--script", str(script), "--keep-going")
    assert [number for number, _ in statuses(gone_on.stdout)] == ["10", "99", "10"]
    assert gone_on.returncode == 1
    good = run(*BARE, typed="10\n\n0\n99\n")  # nothing behind a 0
    assert (good.returncode, good.stderr) == (0, "")


@pytest.mark.usefixtures("bare")
def test_answers_that_nobody_asks_for_and_answers_that_are_missing() -> None:
    unasked = run(*BARE, typed="10\n  an answer\n")
    (_, good), (_, refused) = statuses(unasked.stdout)
    assert (good, "is indented: an answer, and nothing asks for one here" in refused) == (GREAT, True)
    # After the error the two answers below are not taken for numbers.
    skipped = run(*BARE, "--keep-going", typed="9\n  999\n  10\n  10\n14\n")
    assert [number for number, _ in statuses(skipped.stdout)] == ["9", "14"]
    ended = run(*BARE, typed="11\n")
    assert "Status: not done : the script ends where an answer is asked for" in ended.stdout
    assert ended.returncode == 1
    empty = run(*BARE, typed="108\n\n")
    assert "Status: not done : the answer is empty where one is asked for: " in empty.stdout


@pytest.mark.usefixtures("bare")
def test_a_script_that_calls_itself_ends(directory: Path) -> None:
    script = directory / "script"
    script.write_text(f"108\n  {script}\n")
    done = run(*BARE, "--script", str(script))
    assert "scripts call each other more than 8 deep" in done.stdout
    assert done.returncode == 1


@pytest.mark.usefixtures("bare")
def test_what_is_wrong_before_the_menu_begins_is_one_line(directory: Path) -> None:
    (directory / "text.so").write_text("no library")
    for wrong in (["--module", f"{directory}/text.so"], ["--module", f"{directory}/none.so"]):
        refused = run(*wrong)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    refused = run(*BARE, "--script", f"{directory}/none")
    assert (refused.returncode, refused.stderr) == (1, f"{directory}/none: No such file or directory\n")
    refused = run(*BARE, "--script", str(directory))
    assert (refused.returncode, refused.stderr) == (1, f"{directory}: is a directory\n")
    refused = run("--config", f"{directory}/none")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1), refused.stderr


# ---- at a terminal


class Seat:
    """The menu with a person before it."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        command = [str(P11HA), "demo-menu", *arguments]
        self._process = subprocess.Popen(
            # The terminal is that of its session, so that Ctrl-C is a signal.
            ["setsid", "--ctty", "--wait", *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self._unread = ""

    def until(self, text: str) -> str:
        """What is shown up to `text`, less what was shown before."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self._unread:
            if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} is not in {self._unread!r}")
            self._unread += os.read(self._master, 1 << 16).decode().replace("\r\n", "\n")
        before, self._unread = self._unread.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def choose(self, number: str, *answers: tuple[str, str]) -> str:
        """Types a number and the answers to its prompts; returns all that is shown up to the menu."""
        self.type(f"{number}\n")
        shown = ""
        for prompt, answer in answers:
            shown += self.until(prompt) + prompt
            self.type(f"{answer}\n")
        shown += self.until("TOKEN FUNCTIONS\n")
        self.until("Enter your choice : ")
        return shown

    def end(self) -> int:
        return self._process.wait(LIMIT_S)

    def __enter__(self) -> Self:
        self.until("Enter your choice : ")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture
def two(
    soft_token: SoftTokenFactory, server: ServerFactory, group: GroupFactory, module: Path
) -> list[Server]:
    """A group of two killable members whose own slots are shown too."""
    assert module.exists()
    servers = [server(soft_token(name)) for name in ("east", "west")]
    group(*(each.member() for each in servers), recovery=FAR, ha={"only": False})
    return servers


def test_the_ha_status_is_the_reference_pages(two: list[Server]) -> None:
    east, west = two
    with Seat() as seat:
        listing = seat.choose("14", ("[no]: ", ""))
        slots = re.findall(r"^slot#(\d+) - (.*)$", listing, re.MULTILINE)
        assert [text for _, text in slots][-1] == "HA Virtual Card Slot"
        ha = slots[-1][0]
        seat.choose("1", ("Select a slot: ", ha), ("[yes]: ", ""))
        east.kill()
        for _ in range(2):  # one of two calls goes to the dead one
            seat.choose("62", ("[16]: ", ""), ("nothing): ", ""))

        def page(lost: str) -> str:
            return "\n".join(
                (
                    "52",
                    "Slots available:",
                    *(f"slot#{number} - {text}" for number, text in slots),
                    f"Select a slot: {ha}",
                    "HA group 1599447001 status:",
                    f"HSM {east.token.serial} - {lost}",
                    f"HSM {west.token.serial} - CKR_OK",
                    "Status: Doing great, no errors (CKR_OK)",
                    "",
                )
            )

        for lost in ("CKR_DEVICE_ERROR", "CKR_TOKEN_NOT_PRESENT", "CKR_TOKEN_NOT_PRESENT"):
            assert seat.choose("52", ("Select a slot: ", ha)) == page(lost)


def test_wrong_input_and_ctrl_c_never_end_the_menu(bare: SoftToken) -> None:
    with Seat(*BARE) as seat:
        for wrong in ("wrong", "-1", "10.5", "99", "9" * 2000):
            assert "is not in the menu" in " ".join(seat.choose(wrong).split())
        assert "no session is open: 1 opens one" in seat.choose("3")

        seat.type("1\n")
        slot = re.findall(r"slot#(\d+)", seat.until("Select a slot: "))[0]
        for wrong, said in {
            "x": "'x' is no number",
            "": "nothing was typed",
            "-3": "'-3' is no number",
        }.items():
            seat.type(f"{wrong}\n")
            assert said in seat.until("Select a slot: ")  # and it is asked again
        seat.type(CTRL_C)
        assert "Status:" not in seat.until("Enter your choice : ")

        seat.choose("1", ("Select a slot: ", slot), ("[yes]: ", ""))
        shown = seat.choose("3", ("[user]: ", ""), ("/PATH): ", bare.pin))
        assert GREAT in shown
        assert bare.pin not in shown

        seat.choose("45", ("Kind of key: ", "aes128"), ("Label: ", "k"), ("[yes]: ", "no"), ("[no]: ", ""))
        kept = seat.choose("22", ("[last]: ", ""), ("[no]: ", ""))
        assert "nothing was destroyed" in kept
        assert "1 objects" in seat.choose("26", ("[any]: ", ""), *((": ", "") for _ in range(3)))

        seat.type(CTRL_C)
        seat.until("Enter your choice : ")
        seat.type(CTRL_D)
        assert seat.end() == 0


# ---- whatever is typed


WORDS = "yes no user so last data secret any all other aes128 p256 k1 private:k1 id=00 0x00 0xzz @none @. file:/none"
WORDS += " 123456 sha256 CKM_ECDSA aes_gcm aes_cbc ecdsa label value CKA_LABEL=x verbose slot keep-going none [x] \\#"
LINES = st.one_of(
    st.sampled_from([str(number) for number in ENTRIES if number not in (15, 109)]),  # the first may wait
    st.sampled_from(["1", "3", "26", "45", "65"]),
    st.sampled_from(WORDS.split()),
    st.just(""),
    st.text(max_size=12),
    st.binary(max_size=8).map(lambda data: data.decode("utf-8", "surrogateescape")),
)


def test_random_lines_always_get_a_status(
    bare: SoftToken, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    client = Client(softhsm())
    client.initialize()
    slot = next(s for s in client.slots() if bare.label in client.token_info(s).label.decode())
    opening = ["1", str(slot), "yes", "3", "user", "123456"]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(("", "  ")), LINES), max_size=25))
    def anything(lines: list[tuple[str, str]]) -> None:
        out = io.StringIO()
        text = [*opening, *(indent + line for indent, line in lines)]
        source = Script("random", enumerate("\n".join(text).splitlines(), 1), out)
        menu = Menu(client, Dialogue(source, out), Options(slot=slot, keep_going=True), ())
        menu.run(source)
        for each in menu.desk.sessions:
            client.close(each.handle)
        shown = out.getvalue()
        assert shown.count("Enter your choice : ") - shown.count("\nStatus: ") in (0, 1)  # 0 has none

    try:
        anything()
    finally:
        client.finalize()
