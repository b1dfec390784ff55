"""The custodian's process: what it gives, what it refuses, and where the key and the words are not."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from shamir_mnemonic import EncryptedMasterSecret, Share, combine_mnemonics, generate_mnemonics, split_ems

from pkcs11_ha.cli import custody
from pkcs11_ha.cli.custody import Check, CustodyError, Shares, Target, parse_shares
from tests.memory import holds

LIMIT_S = 20.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"
ENTER, CTRL_C, CTRL_D = "\n", "\x03", "\x04"
CAP_IPC_LOCK, CAP_SYS_PTRACE = 14, 19  # <linux/capability.h>

# What starts the custodian: one question, its report on a pipe; it stays until it is killed.
PARENT = textwrap.dedent(
    """
    import json, os, sys, time, traceback
    from pkcs11_ha.cli import custody

    asked, report = json.loads(sys.argv[1]), int(sys.argv[2])
    targets = [custody.Target(**target) for target in asked["targets"]]
    if os.isatty(0):
        os.open(os.ttyname(0), os.O_RDWR)  # the terminal that sends this session its signals
    kept = []

    def take(name, key):
        kept.append(bytes(key) if asked["keeps"] else name)

    try:
        if asked["check"]:
            sealed = custody.restore(targets, custody.Check(**asked["check"]), asked["plain"], take)
        else:
            shares = custody.Shares(*asked["shares"]) if asked["shares"] else None
            sealed = custody.make(targets, shares, asked["plain"], take)
        ciphertexts = {name: text.hex() for name, text in sealed.ciphertexts.items()}
        said = {"ciphertexts": ciphertexts, "check": vars(sealed.check)}
    except custody.CustodyError as error:
        said = {"error": str(error), "traceback": traceback.format_exc()}
    except KeyboardInterrupt:
        said = {"error": "the parent was interrupted"}
    said["rest"] = "" if os.isatty(0) else os.read(0, 1000).decode()
    os.write(report, json.dumps(said).encode())
    os.close(report)
    time.sleep(600)
    """
)
# Runs a command without a capability, and with these limits of locked memory.
WITHOUT = textwrap.dedent(
    """
    import ctypes, os, resource, sys
    PR_CAPBSET_DROP = 24
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, int(sys.argv[1]), 0, 0, 0)  # one who is not root has none
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    limits = [hard if limit == "-" else int(limit) for limit in sys.argv[2:4]]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
    os.execvp(sys.argv[4], sys.argv[4:])
    """
)


def without(capability: int, soft: int | str = "-", hard: int | str = "-") -> list[str]:
    return [sys.executable, "-c", WITHOUT, str(capability), str(soft), str(hard)]


class Terminal:
    """A pseudo terminal; `slave` is what a program is given."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self.shown = ""

    def until(self, text: str) -> str:
        """What has been shown since the last time, up to `text` and with it."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.shown:
            if not select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} is not in {self.shown!r}")
            self.shown += os.read(self.master, 4096).decode().replace("\r\n", "\n")
        before, self.shown = self.shown.split(text, 1)
        return before + text

    def rest(self) -> str:
        """What is shown by now."""
        while select.select([self.master], [], [], 0)[0]:
            self.shown += os.read(self.master, 4096).decode()
        return self.shown

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


class Parent:
    """The process that asks; its standard streams are files, or the terminal, whose session it leads or not."""

    def __init__(
        self,
        directory: Path,
        targets: list[Target],
        *,
        shares: tuple[int, int] | None = None,
        check: Check | None = None,
        plain: tuple[str, ...] = (),
        keeps: bool = False,
        words: str = "",
        terminal: Terminal | None = None,
        before: list[str] | None = None,
        leads: bool = True,
    ) -> None:
        self._out, self._err = directory / "out", directory / "err"
        (directory / "in").write_text(words)
        asked = {
            "targets": [asdict(target) for target in targets],
            "shares": shares,
            "check": asdict(check) if check else None,
            "plain": plain,
            "keeps": keeps,
        }
        self._pipe, report = os.pipe()
        command = [*(before or []), sys.executable, "-c", PARENT, json.dumps(asked), str(report)]
        files = (directory / "in").open("rb"), self._out.open("wb"), self._err.open("wb")
        with files[0], files[1], files[2]:
            streams = [terminal.slave] * 3 if terminal else [file.fileno() for file in files]
            self.process = subprocess.Popen(
                command,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                pass_fds=[report],
                start_new_session=leads,
            )
        os.close(report)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What became of the question; the custodian has ended, the parent is still there."""
        with os.fdopen(self._pipe, "rb") as pipe:
            said = json.loads(pipe.read())
        assert isinstance(said, dict)
        return said

    @property
    def check(self) -> Check:
        return Check(**self.report["check"])

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def words(self) -> list[str]:
        """The shares that were shown, once all of them are."""
        assert "error" not in self.report
        return self.out.splitlines()[1::2]

    def child(self) -> int:
        """The custodian's process, where it has been started and has not ended."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):
                    parent = int(stat.read_text().rpartition(")")[2].split()[1])
                    if parent == self.process.pid and "custodian" in of(int(stat.parent.name), "cmdline"):
                        return int(stat.parent.name)
            time.sleep(0.02)
        raise AssertionError("no custodian")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if "report" not in self.__dict__:
            os.close(self._pipe)


class Ask(Protocol):
    def __call__(
        self,
        *,
        shares: tuple[int, int] | None = ...,
        check: Check | None = ...,
        plain: tuple[str, ...] = ...,
        keeps: bool = ...,
        words: str = ...,
        terminal: Terminal | None = ...,
        before: list[str] | None = ...,
        leads: bool = ...,
    ) -> Parent: ...


def of(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ")


def ended(pid: int) -> bool:
    """Whether it has gone, or goes, within the limit."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            if " (zombie)" in of(pid, "status"):
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def private() -> dict[str, rsa.RSAPrivateKey]:
    return {name: rsa.generate_private_key(65537, 2048) for name in ("east", "west")}


@pytest.fixture(scope="module")
def targets(private: dict[str, rsa.RSAPrivateKey]) -> list[Target]:
    east, west = (private[name].public_key().public_numbers() for name in ("east", "west"))
    return [Target("east", east.n, east.e, "sha1"), Target("west", west.n, west.e, "sha256")]


def unsealed(report: dict[str, Any], private: dict[str, rsa.RSAPrivateKey]) -> bytes:
    """What both members find in their ciphertexts, each with its own hash."""
    oaep = {
        "east": padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None),
        "west": padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None),
    }
    ciphertexts = {name: bytes.fromhex(text) for name, text in report["ciphertexts"].items()}
    assert set(ciphertexts) == set(oaep)
    (key,) = {private[name].decrypt(text, oaep[name]) for name, text in ciphertexts.items()}
    return key


@pytest.fixture
def ask(targets: list[Target], tmp_path: Path) -> Iterator[Ask]:
    parents: list[Parent] = []

    def start(**asked: Any) -> Parent:
        directory = tmp_path / str(len(parents))
        directory.mkdir()
        parents.append(Parent(directory, targets, **asked))
        return parents[-1]

    yield start
    for parent in parents:
        parent.close()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def module_parent(factory: pytest.TempPathFactory, targets: list[Target]) -> Iterator[Parent]:
    parent = Parent(factory.mktemp("parent"), targets, shares=(2, 3))
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def made(targets: list[Target], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    """A group's key, 2of3."""
    yield from module_parent(tmp_path_factory, targets)


@pytest.fixture(scope="module")
def other(targets: list[Target], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    """Another group's key, 2of3."""
    yield from module_parent(tmp_path_factory, targets)


# ---- what it gives


def test_any_two_of_three_shares_give_the_key(
    made: Parent, ask: Ask, private: dict[str, rsa.RSAPrivateKey]
) -> None:
    key = unsealed(made.report, private)
    assert len(key) == 32
    assert len(made.words) == 3
    for pair in itertools.permutations(made.words, 2):
        assert combine_mnemonics(pair) == key
    for one, two in itertools.combinations(made.words, 2):
        restored = ask(check=made.check, words=f"{one}\n{two}\n")
        assert unsealed(restored.report, private) == key
        assert restored.check == made.check
        assert (restored.out, restored.err) == ("", "")


def test_words_are_shown_as_plain_lines_off_a_terminal(made: Parent) -> None:
    assert made.report
    lines = made.out.splitlines()
    assert lines[::2] == [f"share {number} of 3 (any 2 are enough):" for number in (1, 2, 3)]
    assert [len(line.split(" ")) for line in lines[1::2]] == [33, 33, 33]
    assert made.err == ""


def test_one_share_of_one(ask: Ask, private: dict[str, rsa.RSAPrivateKey]) -> None:
    parent = ask(shares=(1, 1))
    assert combine_mnemonics(parent.words) == unsealed(parent.report, private)
    assert parent.out.startswith("share 1 of 1 (any 1 is enough):\n")


def test_without_shares_nothing_is_shown(ask: Ask, private: dict[str, rsa.RSAPrivateKey]) -> None:
    keys = []
    for parent in (ask(), ask()):
        keys.append(unsealed(parent.report, private))
        assert (parent.out, parent.err) == ("", "")
    assert keys[0] != keys[1]


def wrapped(key: bytes, known: bytes, first: bytes) -> bytes:
    """RFC 3394 2.2.1, index based; `first` is the initial value."""
    aes = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    a, r = first, [known[i : i + 8] for i in range(0, len(known), 8)]
    for j in range(6):
        for i, word in enumerate(r, 1):
            b = aes.update(a + word)
            a, r[i - 1] = (int.from_bytes(b[:8], "big") ^ (len(r) * j + i)).to_bytes(8, "big"), b[8:]
    return a + b"".join(r)


def test_check_values_are_those_of_the_wrapped_zero_key(
    made: Parent, private: dict[str, rsa.RSAPrivateKey]
) -> None:
    key, known = unsealed(made.report, private), bytes(16)
    kw = wrapped(key, known, bytes.fromhex("A6A6A6A6A6A6A6A6"))
    kwp = wrapped(key, known, bytes.fromhex("A65959A600000010"))  # RFC 5649 3: the length is in it
    assert made.check == Check(hashlib.sha256(kwp).hexdigest()[:8], hashlib.sha256(kw).hexdigest()[:8])


def test_words_are_read_as_people_type_them(
    made: Parent, ask: Ask, private: dict[str, rsa.RSAPrivateKey]
) -> None:
    one, two, _ = made.words
    typed = f"\n  \n{one.upper()}\n\t{two.replace(' ', '   ')}\r\nfor the parent\n"
    restored = ask(check=made.check, words=typed)
    assert unsealed(restored.report, private) == unsealed(made.report, private)
    assert restored.report["rest"] == "for the parent\n"  # nothing is read ahead


def test_last_line_needs_no_end(made: Parent, ask: Ask) -> None:
    restored = ask(check=made.check, words="\n".join(made.words[1:]))
    assert restored.check == made.check


# ---- what it refuses


def changed(words: str, place: int, word: str) -> str:
    every = words.split()
    every[place - 1] = word if every[place - 1] != word else "academic"
    return " ".join(every)


def with_identifier_of(share: str, key: bytes) -> list[str]:
    """The shares of another 2of3 set that happens to have this one's 15-bit identifier."""
    identifier = Share.from_mnemonic(share).identifier
    secret = EncryptedMasterSecret.from_master_secret(key, b"", identifier, True, 1)
    return [each.mnemonic() for each in split_ems(1, [(2, 3)], secret)[0]]


def wallet() -> str:
    """A share of SLIP-39's other uses: several groups."""
    return generate_mnemonics(1, [(2, 3), (1, 1)], bytes(32))[0][0]


LIST = "is not in the SLIP-39 word list"
CHECKSUM = "its checksum is wrong, so a word is wrong or out of its place"
REFUSALS = {
    "nothing given": ([], "input ended before share 1: none was given"),
    "too few": (["a1"], "input ended before share 2: 2 are needed"),
    "a wrong word": (["a1", "a2 with zzzz at 17"], f"share 2: word 17 {LIST}"),
    "not ASCII": (["a1 with äther at 3"], f"share 1: word 3 {LIST}"),
    "another word": (["a1 with zero at 20"], f"share 1: {CHECKSUM}"),
    "a word left out": (["a1 without its last"], "share 1 has 32 words, not 33"),
    "a set of another key": (["a1", "b2"], "share 2 is of another set than share 1"),
    "the same twice": (["a1", "a1"], "share 2 is the same as share 1"),
    "same identifier, same index": (["a1", "c1"], "share 2 is of another set than share 1"),
    "same identifier": (
        ["a1", "c2"],
        "the shares are of different sets: they do not give a key together",
    ),
    "a wallet": (["wallet"], "share 1 is not of a domain key"),
    "no end": (["endless"], "a line of the input is longer than any share"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_is_one_line_and_without_words(case: str, made: Parent, other: Parent, ask: Ask) -> None:
    names, line = REFUSALS[case]
    a, b, c = made.words, other.words, with_identifier_of(made.words[0], bytes(32))
    lines = {
        **{f"a{i}": share for i, share in enumerate(a, 1)},
        **{f"b{i}": share for i, share in enumerate(b, 1)},
        **{f"c{i}": share for i, share in enumerate(c, 1)},
        "a2 with zzzz at 17": changed(a[1], 17, "zzzz"),
        "a1 with äther at 3": changed(a[0], 3, "äther"),
        "a1 with zero at 20": changed(a[0], 20, "zero"),
        "a1 without its last": a[0].rpartition(" ")[0],
        "wallet": wallet(),
        "endless": "academic " * 500,
    }
    parent = ask(check=made.check, words="".join(f"{lines[name]}\n" for name in names))
    assert parent.report["error"] == line
    assert "ciphertexts" not in parent.report
    assert (parent.out, parent.err) == ("", "")
    for share in (lines[name].split() for name in names):
        assert not [
            pair for pair in itertools.pairwise(share) if " ".join(pair) in parent.report["traceback"]
        ]
    assert not re.search("zzzz|äther", parent.report["traceback"])


def test_refuses_words_of_another_key(made: Parent, other: Parent, ask: Ask) -> None:
    parent = ask(check=made.check, words="\n".join(other.words[:2]))
    line = f"these words give another key ({other.check}) than the group's ({made.check})"
    assert parent.report["error"] == line
    for check in (made.check, other.check):
        assert check.kwp in line
        assert check.kw in line


@pytest.mark.parametrize("value", ["kwp", "kw"])
def test_both_check_values_count(value: str, made: Parent, ask: Ask) -> None:
    check = Check(**{**asdict(made.check), value: "00000000"})
    parent = ask(check=check, words="\n".join(made.words[:2]))
    assert parent.report["error"].startswith("these words give another key (")


NOT_RSA = "its wrapping key is not an RSA public key"


@pytest.mark.parametrize(
    ("modulus", "exponent", "line"),
    [
        ((1 << 1024) - 1, 65537, "weak: its wrapping key has 1024 bits, not 2048 or more"),
        ((1 << 2048) - 1, 2, f"weak: {NOT_RSA}"),
        ((1 << 2048) - 2, 65537, "weak: its wrapping key does no OAEP with sha256"),
    ],
    ids=["short", "even exponent", "even modulus"],
)
def test_refuses_a_wrapping_key_before_words_are_shown(
    modulus: int, exponent: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CustodyError) as refused:
        custody.make([Target("weak", modulus, exponent, "sha256")], Shares(2, 3))
    assert str(refused.value) == line
    assert capfd.readouterr() == ("", "")


def test_exit_status_of_the_process_itself() -> None:
    for check, status in ((None, 0), (Check("0", "0"), 1)):
        answer, child_out = os.pipe()
        child_in, request = os.pipe()
        os.write(request, custody.Question((), None, check, False).to_json())
        os.close(request)
        command = f"-m pkcs11_ha.cli.custodian --request {child_in} --answer {child_out}"
        ran = subprocess.run(
            [sys.executable, *command.split()],
            stdin=subprocess.DEVNULL,
            pass_fds=[child_in, child_out],
            check=False,
        )
        os.close(child_in)
        os.close(child_out)
        with os.fdopen(answer, "rb") as pipe:
            said = json.loads(pipe.read())
        assert ran.returncode == status
        assert ("error" in said) == bool(status)


def test_an_internal_error_is_its_name_alone() -> None:
    answer, child_out = os.pipe()
    child_in, request = os.pipe()
    os.write(request, b'{"targets": [{"secret of a test": 1}]}')
    os.close(request)
    command = f"-m pkcs11_ha.cli.custodian --request {child_in} --answer {child_out}"
    ran = subprocess.run(
        [sys.executable, *command.split()], pass_fds=[child_in, child_out], capture_output=True, check=False
    )
    for fd in (child_in, child_out, answer):
        os.close(fd)
    assert (ran.stderr, ran.returncode) == (b"custodian: internal error (TypeError)\n", 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rubbish",
        "[" * 100_000,
        "[]\n",
        "{}\n",
        '{"ciphertexts": {}}\n',
        '{"ciphertexts": {}, "check": {"kwp": "12345678", "kw": "x"}}\n',
        '{"ciphertexts": {"x": "00"}, "check": {"kwp": "12345678", "kw": "12345678"}}\n',
        '{"ciphertexts": {}, "check": {"kwp": "12345678", "kw": "12345678"}}\nand more',
    ],
    ids=["none", "rubbish", "nested", "a list", "empty", "no check", "bad check", "a stranger", "more"],
)
def test_an_unusable_answer_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nos.write(int(sys.argv[-1]), {text.encode()!r})\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(CustodyError, match="no usable answer" if text else "without an answer") as refused:
        custody.make([], None)
    assert "\n" not in str(refused.value)


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CustodyError, match="cannot be started: No such file"):
        custody.make([], None)


def test_a_custodian_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nos.close(int(sys.argv[-1]))\ntime.sleep(600)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(CustodyError, match=re.escape("without an answer (signal 9)")):
        custody.make([], None)


def test_a_killed_custodian_is_an_error(ask: Ask, terminal: Terminal) -> None:
    parent = ask(shares=(2, 3), terminal=terminal)
    terminal.until("press Enter")
    os.kill(parent.child(), signal.SIGKILL)
    assert parent.report["error"] == "the custodian's process ended without an answer (signal 9)"


# ---- for members without RSA unwrap


def test_plain_hands_the_key_to_each_of_them_and_zeroes_it(
    targets: list[Target], private: dict[str, rsa.RSAPrivateKey]
) -> None:
    taken: list[tuple[str, bytes]] = []
    buffers: list[bytearray] = []

    def take(name: str, key: bytearray) -> None:
        taken.append((name, bytes(key)))
        buffers.append(key)

    sealed = custody.make(targets, None, ("north", "south"), take)
    report = {"ciphertexts": {name: text.hex() for name, text in sealed.ciphertexts.items()}}
    key = unsealed(report, private)
    assert taken == [("north", key), ("south", key)]
    assert all(buffer == bytes(32) for buffer in buffers)


def test_plain_zeroes_the_key_when_the_import_fails() -> None:
    buffers: list[bytearray] = []

    def take(_: str, key: bytearray) -> None:
        assert any(key)
        buffers.append(key)
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        custody.make([], None, ("north",), take)
    assert buffers == [bytearray(32)]


# ---- where the key and the words are not


@pytest.mark.parametrize(
    ("plain", "keeps", "found"),
    [((), False, False), (("north",), False, False), (("north",), True, True)],
    ids=["sealed", "plain", "planted"],
)
def test_parent_does_not_hold_the_key(plain: tuple[str, ...], keeps: bool, found: bool, ask: Ask) -> None:
    parent = ask(shares=(2, 3), plain=plain, keeps=keeps)
    key = combine_mnemonics(parent.words[:2])
    assert holds(parent.process.pid, key) is found
    assert not any(holds(parent.process.pid, words.encode()) for words in parent.words)
    assert holds(parent.process.pid, parent.check.kwp.encode())  # the search finds what is there


def test_custodian_is_closed_while_words_are_shown(ask: Ask, terminal: Terminal) -> None:
    parent = ask(shares=(2, 3), terminal=terminal, before=without(CAP_SYS_PTRACE, soft=4096))
    words = re.findall("(?:[a-z]+ ){32}[a-z]+", terminal.until("press Enter"))
    child = parent.child()
    assert len(words) == 1
    assert words[0] not in of(child, "cmdline")
    with suppress(PermissionError):  # closed, as it is
        assert words[0] not in of(child, "environ")
    limits = of(child, "limits")
    assert re.search(r"Max core file size +0 +0 ", limits)
    soft, hard = re.findall(r"Max locked memory +(\S+) +(\S+)", limits)[0]
    assert soft == hard
    # One of the same user, without root's right to trace: reads the parent's memory, not the custodian's.
    read = "import sys; open(f'/proc/{sys.argv[1]}/mem', 'rb')"
    for pid, readable in ((parent.process.pid, True), (child, False)):
        reader = [*without(CAP_SYS_PTRACE), sys.executable, "-c", read, str(pid)]
        ran = subprocess.run(reader, capture_output=True, text=True, check=False)
        assert (ran.returncode == 0) is readable, ran.stderr
    assert "PermissionError" in ran.stderr


def test_custodian_gets_nothing_in_its_environment_that_loads_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/env\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("OPENSSL_CONF", "/etc/with-a-provider.cnf")
    monkeypatch.setenv("SETTING_OF_A_VENDOR", "x")
    with pytest.raises(CustodyError):
        custody.make([], None)
    env = (tmp_path / "env").read_text()
    assert "OPENSSL_CONF=/dev/null\n" in env
    assert "PATH=" in env
    assert "VENDOR" not in env


def can_lock() -> bool:
    """Whether a process of ours can lock all its memory, with the limit raised as far as it goes."""
    raised = "hard = getrlimit(RLIMIT_MEMLOCK)[1]; setrlimit(RLIMIT_MEMLOCK, (hard, hard))"
    lock = f"import ctypes; from resource import *; {raised}; assert ctypes.CDLL(None).mlockall(3) == 0"
    return subprocess.run([sys.executable, "-c", lock], capture_output=True, check=False).returncode == 0


def locked_kb(pid: int) -> int:
    return int(re.findall(r"VmLck:\s+(\d+) kB", of(pid, "status"))[0])


def test_memory_is_locked_where_that_is_allowed(ask: Ask, terminal: Terminal) -> None:
    if not can_lock():
        pytest.skip("locked memory is limited here")
    parent = ask(shares=(2, 3), terminal=terminal)
    terminal.until("press Enter")
    assert locked_kb(parent.child()) > 10_000


SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
SWAPPING = f"{SWAPS}/dev/sda2                               partition\t8388604\t\t0\t\t-2\n"


@pytest.mark.parametrize(
    ("swaps", "may_lock", "warns"),
    [(SWAPPING, False, True), (SWAPS, False, False), (SWAPPING, True, False)],
    ids=["swaps and cannot lock", "does not swap", "locks"],
)
def test_warns_where_the_key_could_be_swapped_out(
    swaps: str, may_lock: bool, warns: bool, ask: Ask, tmp_path: Path
) -> None:
    (tmp_path / "swaps").write_text(swaps)
    mounted = f"mount --bind {tmp_path}/swaps /proc/swaps"
    with_swaps = ["unshare", "--mount", "sh", "-c", f'{mounted} && exec "$@"', "sh"]
    if subprocess.run([*with_swaps, "true"], capture_output=True, check=False).returncode:
        pytest.skip("/proc/swaps cannot be covered here")
    if may_lock and not can_lock():
        pytest.skip("locked memory is limited here")
    parent = ask(before=with_swaps + ([] if may_lock else without(CAP_IPC_LOCK, 65536, 65536)))
    assert "error" not in parent.report
    assert len(parent.err.splitlines()) == int(warns)
    if warns:
        assert "may be left on a swap device" in parent.err
        assert "ulimit -Hl" in parent.err


def test_custodian_loads_nothing_that_loads_vendor_libraries() -> None:
    look = "import sys, pkcs11_ha.cli.custodian; print(*sorted(m for m in sys.modules if 'pkcs11_ha' in m))"
    ran = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    expected = "pkcs11_ha pkcs11_ha.cli pkcs11_ha.cli.custodian pkcs11_ha.cli.custody pkcs11_ha.cli.shares"
    assert ran.stdout.split() == expected.split()


# ---- on a terminal


def test_terminal_shows_one_share_at_a_time(ask: Ask, terminal: Terminal) -> None:
    parent = ask(shares=(2, 3), terminal=terminal)
    words = []
    for number in (1, 2, 3):
        prompt = f"share {number} of 3, any 2 are enough - hand it to its custodian, then press Enter "
        shown = terminal.until(prompt)
        assert shown.startswith(CLEAR) if number == 1 else shown.startswith(f"\n{CLEAR}{CLEAR}")
        words += re.findall("(?:[a-z]+ ){32}[a-z]+", shown)
        assert len(words) == number
        terminal.type(ENTER)
    assert terminal.until(CLEAR) == f"\n{CLEAR}"
    assert "error" not in parent.report
    assert terminal.rest() == ""
    assert len(combine_mnemonics(words[1:])) == 32


def test_terminal_is_cleared_when_the_operator_presses_ctrl_c(ask: Ask, terminal: Terminal) -> None:
    parent = ask(shares=(2, 3), terminal=terminal)
    terminal.until("press Enter ")
    child = parent.child()
    terminal.type(CTRL_C)
    assert terminal.until(CLEAR) == f"^C{CLEAR}"
    assert parent.report["error"] == "the parent was interrupted"
    assert ended(child)
    assert terminal.rest().replace(CLEAR, "") == ""


def test_many_signals_are_as_one(ask: Ask, terminal: Terminal) -> None:
    parent = ask(shares=(2, 3), terminal=terminal)
    terminal.until("press Enter ")
    child = parent.child()
    with suppress(ProcessLookupError):  # until it has ended
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 100_000:
            os.kill(child, number)
    assert parent.report["error"] == "interrupted"
    assert terminal.until(CLEAR) == CLEAR
    assert terminal.rest().replace(CLEAR, "") == ""


def test_input_that_ends_stops_the_showing(ask: Ask, terminal: Terminal) -> None:
    parent = ask(shares=(2, 3), terminal=terminal)
    terminal.until("press Enter ")
    terminal.type(CTRL_D)
    assert terminal.until(CLEAR) == CLEAR
    assert parent.report["error"] == "input ended before all shares were shown"
    assert terminal.rest() == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_terminal_is_cleared_when_the_parent_ends(number: int, ask: Ask, terminal: Terminal) -> None:
    parent = ask(shares=(2, 3), terminal=terminal, leads=False)  # the session is a shell's, and goes on
    terminal.until("press Enter ")
    child = parent.child()
    parent.process.send_signal(number)
    assert terminal.until(CLEAR) == CLEAR
    assert ended(child)
    assert terminal.rest().replace(CLEAR, "") == ""


def test_terminal_asks_and_clears(made: Parent, ask: Ask, terminal: Terminal) -> None:
    parent = ask(check=made.check, terminal=terminal)
    one, two, _ = made.words
    assert terminal.until("share 1: ") == "share 1: "
    terminal.type(f"{one}\n")
    shown = terminal.until("share 2 of 2: ")
    assert shown == f"{one}\n{CLEAR}share 2 of 2: "  # typed words can be read, until the line is done
    terminal.type(f"{two}\n")
    assert terminal.until(CLEAR) == f"{two}\n{CLEAR}"
    assert parent.check == made.check


def test_terminal_is_cleared_of_words_half_typed(made: Parent, ask: Ask, terminal: Terminal) -> None:
    parent = ask(check=made.check, terminal=terminal)
    terminal.until("share 1: ")
    terminal.type("academic acid")
    terminal.until("acid")
    terminal.type(CTRL_C)
    assert terminal.until(CLEAR) == f"^C{CLEAR}"
    assert parent.report["error"] == "the parent was interrupted"
    assert terminal.rest().replace(CLEAR, "") == ""


# ---- how many shares


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("none", None),
        ("1of1", Shares(1, 1)),
        ("2of3", Shares(2, 3)),
        ("3of3", Shares(3, 3)),
        ("16of16", Shares(16, 16)),
    ],
)
def test_parse_shares(text: str, shares: Shares | None) -> None:
    assert parse_shares(text) == shares


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1of3", "1of3: SLIP-39 has no copies of one share; say 1of1 and copy it, or 2of3"),
        ("4of3", "4of3: of 3 shares, 1 to 3 can be required"),
        ("0of3", "0of3: of 3 shares, 1 to 3 can be required"),
        ("0of0", "0of0: SLIP-39 makes 1 to 16 shares"),
        ("2of17", "2of17: SLIP-39 makes 1 to 16 shares"),
        ("", "'' is not like 2of3, and not none"),
        ("2 of 3", "'2 of 3' is not like 2of3, and not none"),
        ("-2of3", "'-2of3' is not like 2of3, and not none"),
        ("2of3\n", "'2of3\\n' is not like 2of3, and not none"),
        ("٢of3", "'٢of3' is not like 2of3, and not none"),
    ],
)
def test_parse_shares_refuses(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        parse_shares(text)
