"""`p11ha domain admit` of many keys: shown, interrupted, resumed, and then on every member once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.members import SoftToken, Table, Toml, softhsm, write_config
from tests import p11
from tests.chaos.conftest import crash_library as crash_library
from tests.chaos.crash import CrashPlan
from tests.ha.app import environment, until

KEYS = int(os.environ.get("P11HA_ADMIT", "80"))  # `make chaos` takes 10,000
P11HA = Path(sys.executable).parent / "p11ha"
NAMES = ("east", "west", "north")


@dataclass
class Growing:
    """A group of two with keys, and a third token that is to join."""

    directory: Path
    tokens: dict[str, SoftToken]
    words: list[str]
    env: dict[str, str]
    make_keys: Callable[[], None] = lambda: None
    join: Callable[[], None] = lambda: None

    def command(self, *arguments: str) -> list[str]:
        return [str(P11HA), *arguments, f"--pin-source=file:{self.directory}/pin"]

    def admit(self, words: str) -> subprocess.CompletedProcess[str]:
        command = self.command("domain", "admit", "north")
        return subprocess.run(
            command, input=words, capture_output=True, text=True, check=False, env=os.environ | self.env
        )

    def labels(self, name: str) -> Counter[str]:
        """What applications may see on one token, by the bare module; half-made objects under their own mark."""
        token = self.tokens[name]
        with environment(token.env), p11.Module(softhsm()) as module:
            session = module.open(module.slot(name))
            session.login(token.pin)
            # SoftHSM that is killed within C_UnwrapKey leaves an object with defaults alone: no name, no CKA_TOKEN.
            keys = session.find({p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_TOKEN: True})
            return Counter(session.get(key, p11.CKA_LABEL)[0].decode() for key in keys)


@pytest.fixture
def growing(directory: Path, module: Path) -> Growing:
    tokens = {name: SoftToken(directory / name, name) for name in NAMES}
    (directory / "pin").write_text("123456\n")
    (directory / "pin").chmod(0o600)

    def configure(*names: str) -> None:
        group = {"label": "prod", "serial": "1", "members": names, "replication": "domain"}
        write_config(directory / "c.toml", [tokens[n].member() for n in names], [group], ha={"log": "off"})

    configure("east", "west")
    env = {"PKCS11_HA_CONF": str(directory / "c.toml"), "PKCS11_HA_STATE": str(directory)}
    growing = Growing(directory, tokens, [], env)
    done = subprocess.run(
        growing.command("domain", "init", "prod"),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | env,
    )
    growing.words = [line for line in done.stdout.splitlines() if len(line.split()) > 20]
    growing.make_keys = lambda: make_keys(module, env)
    growing.join = lambda: configure(*NAMES)
    return growing


def make_keys(module: Path, env: dict[str, str]) -> None:
    with environment(env), p11.Module(module) as library:
        session = library.open(library.slots()[0], rw=True)
        session.login("123456")
        for number in range(KEYS):
            template: p11.Template = {
                p11.CKA_TOKEN: True,
                p11.CKA_VALUE_LEN: 32,
                p11.CKA_LABEL: f"key {number}",
                p11.CKA_ID: number.to_bytes(4, "big"),
                p11.CKA_SENSITIVE: True,
            }
            session.generate_key(p11.CKM_AES_KEY_GEN, template)


def expected() -> Counter[str]:
    return Counter(f"key {number}" for number in range(KEYS))


def of_the_application(labels: Counter[str]) -> Counter[str]:
    return Counter(
        {label: count for label, count in labels.items() if not label.startswith("pkcs11-ha domain key ")}
    )


def test_without_the_right_words_nothing_changes(growing: Growing) -> None:
    growing.join()
    one, two, _ = growing.words
    given = {
        one: "input ended before share 2",
        f"{one}\n{one}": "share",
        f"{one}\n{two.replace(two.split()[8], 'rubbish')}": "word 9 is not in the SLIP-39 word list",
        f"{one}\n{' '.join([*two.split()[:-1], one.split()[-1]])}": "checksum",
    }
    for words, says in given.items():
        done = growing.admit(words + "\n")
        assert done.returncode == 1
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert growing.labels("north") == Counter()


def test_an_interrupted_admission_is_resumed_without_duplicates(growing: Growing) -> None:
    growing.make_keys()
    growing.join()
    process = subprocess.Popen(
        growing.command("domain", "admit", "north"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | growing.env,
        start_new_session=True,
    )
    assert process.stdin
    process.stdin.write("\n".join(growing.words[1:]) + "\n")
    process.stdin.flush()
    deadline = time.monotonic() + 600
    store = growing.directory / "north" / "tokens"
    while len(list(store.glob("*/*.object"))) < KEYS // 2:  # an object and an entry for each key
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    half = of_the_application(growing.labels("north"))
    assert 0 < sum(half.values()) < KEYS
    done = growing.admit("")  # it has the domain key: no words are needed any more
    assert done.returncode == 0, done.stderr
    assert f"to north: {KEYS - sum(half.values())}" in done.stderr or f" of {KEYS}" not in done.stderr
    assert "0 not made" in done.stdout
    for name in NAMES:
        assert of_the_application(growing.labels(name)) == expected(), name
    compared = subprocess.run(
        growing.command("diff", "prod"),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | growing.env,
    )
    assert compared.stdout.splitlines()[-1] == f"{KEYS} objects, 0 not alike on all members"


def test_what_an_interrupted_admission_made_can_be_destroyed(
    growing: Growing, module: Path, crash_library: Path
) -> None:
    """Of a data object, which can bear no mark, the ledger says beforehand that it may be there."""
    plan = CrashPlan(growing.directory / "plan")
    members = [growing.tokens[name].member() for name in NAMES]
    group: Table = {"label": "prod", "serial": "1", "members": NAMES, "replication": "domain"}

    def configure(**north: Toml) -> None:
        changed: Table = {**members[2], **north}
        write_config(growing.directory / "c.toml", [*members[:2], changed], [group], ha={"log": "off"})

    def data(name: str) -> list[int]:
        token = growing.tokens[name]
        with environment(token.env), p11.Module(softhsm()) as bare:
            session = bare.open(bare.slot(name))
            session.login(token.pin)
            return session.find({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_APPLICATION: "ours"})

    configure()
    assert growing.admit("\n".join(growing.words[1:]) + "\n").returncode == 0
    mine: p11.Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_APPLICATION: "ours"}

    def without_north(work: Callable[[p11.Session], object]) -> None:
        configure(token="pkcs11:token=away")
        with environment(growing.env), p11.Module(module) as library:
            session = library.open(library.slots()[0], rw=True)
            session.login("123456")
            work(session)

    died = 0
    for nth, goes_on in ((6, False), (7, False), (7, True), (8, True)):  # announced; made; said to be there
        without_north(lambda session: session.create(mine))
        configure(module=str(crash_library), env=growing.tokens["north"].env | plan.env(softhsm()))
        plan.arm(nth, after=True)
        died += growing.admit("").returncode != 0
        plan.disarm()
        if goes_on:  # and makes no second one
            configure()
            assert growing.admit("").returncode == 0
            assert [len(data(name)) for name in NAMES] == [1, 1, 1], nth
        without_north(lambda session: session.destroy(session.find_one(mine)))
        configure()
        assert growing.admit("").returncode == 0
        assert [data(name) for name in NAMES] == [[], [], []], nth
    assert died >= 3
    plan.close()


def test_a_running_application_takes_in_who_is_admitted(growing: Growing, module: Path) -> None:
    """Not before; and what is written while a member is drained reaches it, as it was logged in."""
    named: dict[int, p11.Value] = {p11.CKA_TOKEN: True, p11.CKA_VALUE_LEN: 32, p11.CKA_SENSITIVE: True}

    def ask(*command: str) -> None:
        subprocess.run([P11HA, *command], check=True, capture_output=True, env=os.environ | growing.env)

    with environment(growing.env), p11.Module(module) as library:
        session = library.open(library.slots()[0], rw=True)
        session.login("123456")
        slot = session.info().slot

        def served() -> str:
            session.random(8)
            return library.session_member(session)[0]

        session.generate_key(p11.CKM_AES_KEY_GEN, named | {p11.CKA_LABEL: "before"})
        growing.join()
        until(lambda: session.random(8) and len(library.ha_status(slot).members) == 3, "it is known")
        assert sorted(library.ha_status(slot).members.values())[0::2] == ["CKR_OK", "CKR_TOKEN_NOT_PRESENT"]
        assert growing.admit("\n".join(growing.words[1:]) + "\n").returncode == 0
        ask("recover", "prod")
        until(
            lambda: session.random(8) and set(library.ha_status(slot).members.values()) == {"CKR_OK"},
            "it is in",
        )
        ask("drain", "west")
        until(lambda: "west" not in {served() for _ in range(6)}, "it is drained")
        session.generate_key(p11.CKM_AES_KEY_GEN, named | {p11.CKA_LABEL: "drained"})
        ask("enable", "west")
    for name in NAMES:
        assert of_the_application(growing.labels(name)) == Counter(("before", "drained")), name


def test_what_a_member_missed_is_told_to_programs(growing: Growing) -> None:
    def told(*arguments: str) -> dict[str, dict[str, object]]:
        command = growing.command("sync", "prod", "--json", *arguments)
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | growing.env
        )
        return {each.pop("member"): each for each in json.loads(done.stdout)}

    store = growing.directory / "west"
    store.rename(growing.directory / "gone")
    growing.make_keys()
    (growing.directory / "gone").rename(store)
    nothing: list[str] = []
    before = told("--dry-run")
    assert before["east"] == {"to_do": nothing}
    to_do = before["west"]["to_do"]
    assert isinstance(to_do, list)
    assert [sum(f"'key {number}' " in line for line in to_do) for number in range(KEYS)] == [1] * KEYS
    assert told()["west"] == {"made": 0, "there": KEYS, "failed": nothing}  # what was owed is made before
    assert told("--dry-run")["west"] == {"to_do": nothing}
