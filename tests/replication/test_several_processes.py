"""Several processes write to one group at once, bring one member up at once, or die at that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from demo.members import SoftToken
from pkcs11_ha.core.ledger import decode
from tests import p11
from tests.conftest import ROOT
from tests.ha.app import code, until
from tests.replication import contents
from tests.replication.compare import ON_COPIES
from tests.replication.contents import Contents, Held
from tests.replication.domain import PIN, Domain, missing

OK = "CKR_OK"
MANY = 8
OWED = 10
LIMIT_S = 8.0  # of a login beside a process that holds the lease and is alive: its patience, twice
DEAD_LIMIT_S = 3.0  # of a login after one that held the lease and is dead


class Client:
    """A client process."""

    def __init__(self, module: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.replication.client", str(module), PIN],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, *request: object) -> None:
        """Without waiting for the answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the client ended"
        return json.loads(line)

    def ask(self, *request: object) -> Any:
        """What it yields; the call must succeed."""
        self.tell(*request)
        rv, value = self.answer()
        assert rv == OK, (request, rv)
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


ClientFactory = Callable[[], Client]


@pytest.fixture
def other(module: Path) -> Iterator[Client]:
    """One beside this process."""
    client = Client(module)
    client.ask("initialise")
    yield client
    client.close()


def test_object_that_another_process_destroyed_is_gone_also_while_a_member_is_away(
    app: Domain, other: Client
) -> None:
    """It can be told from one that is only on the member that is away."""
    session = app.login(PIN)
    session.create({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_LABEL: "note"})
    note = session.find_one({p11.CKA_LABEL: "note"})
    assert session.get(note, p11.CKA_LABEL)[0] == b"note"
    other.ask("login")
    other.ask("destroy", "note")
    with app.without("west"):
        assert code(lambda: session.get(note, p11.CKA_LABEL)) == "CKR_OBJECT_HANDLE_INVALID"


@pytest.fixture
def client(module: Path, app: Domain) -> Iterator[ClientFactory]:
    """Starts clients of the pair, initialised and not logged in; none outlives the test."""
    app.module.finalize()
    with ExitStack() as stack:

        def start() -> Client:
            made = Client(module)
            stack.callback(made.close)
            made.ask("initialise")
            return made

        yield start


def logged_in(*clients: Client) -> None:
    """One after the other."""
    for each in clients:
        each.ask("login")


def all_at_once(clients: Sequence[Client], *request: object) -> list[tuple[str, Any]]:
    for each in clients:
        each.tell(*request)
    return [tuple(each.answer()) for each in clients]


def ended(clients: Sequence[Client], tokens: Sequence[SoftToken]) -> list[str]:
    """Ends clients; the labels of what both tokens hold: the same, and nothing half done."""
    for each in clients:
        each.ask("finalise")
    east, west = map(contents.of, tokens)
    assert sorted(map(state, east.seen)) == sorted(map(state, west.seen))
    for token in east, west:
        assert token.others == []
        assert set(token.ledger) <= {"kept"}
        assert kept(token) == sorted(held.label.decode() for held in token.seen)
    return sorted(held.label.decode() for held in east.seen)


def kept(held: Contents) -> list[str]:
    """What the objects are called of which a token has an entry, or were."""
    entries = [decode(value) for value in values(held) if isinstance(value, bytes)]
    return sorted(each.name.label.decode() + ("" if each.alive else " destroyed") for each in entries)


def values(held: Contents) -> list[object]:
    return [each.shown["CKA_VALUE"] for each in held.objects if each.label == contents.RESERVED + b"kept"]


def state(held: Held) -> str:
    """What one object is, less what a copy may have otherwise."""
    return repr(sorted((name, value) for name, value in held.shown.items() if name not in ON_COPIES))


# ---- what one does the others see


@pytest.mark.parametrize("kind", ["aes-256", "p256", "note"])
def test_what_one_process_does_the_others_see(
    client: ClientFactory, tokens: Sequence[SoftToken], kind: str
) -> None:
    one, *others = clients = [client() for _ in range(3)]
    logged_in(*clients)
    count = 2 if kind == "p256" else 1
    one.ask("make", kind, "object")
    assert [each.ask("labels") for each in clients] == [["object"] * count] * 3
    for each in others:
        each.ask("remember")
    others[0].ask("rename", "object", "renamed")
    assert [each.ask("labels") for each in clients] == [["renamed"] * count] * 3
    one.ask("rename", "renamed", "again")  # which the others did, since it made it
    assert [each.ask("labels") for each in clients] == [["again"] * count] * 3
    others[1].ask("destroy", "again")
    assert [each.ask("labels") for each in clients] == [[]] * 3
    assert ended(clients, tokens) == []


def test_handle_of_a_process_is_good_for_what_another_renamed_and_not_for_what_it_destroyed(
    client: ClientFactory, tokens: Sequence[SoftToken]
) -> None:
    one, other = clients = [client(), client()]
    logged_in(*clients)
    one.ask("make", "aes-256", "key")
    one.ask("remember")
    before = one.ask("encrypt", "key")
    other.ask("rename", "key", "renamed")
    assert one.ask("encrypt", "key") == before
    assert one.ask("work", [("rename", "key", "by one")]) == [["rename", "key", OK]]
    other.ask("destroy", "by one")
    assert one.ask("work", [("rename", "key", "x"), ("destroy", "key", "")]) == [
        ["rename", "key", "CKR_OBJECT_HANDLE_INVALID"],
        ["destroy", "key", "CKR_OBJECT_HANDLE_INVALID"],
    ]
    assert ended(clients, tokens) == []


def test_copy_of_what_another_renamed_can_be_given_to_a_member_that_comes_later(
    client: ClientFactory, tokens: Sequence[SoftToken]
) -> None:
    """Its blob is that of its source, whose entry bears another name by now."""
    one, other = clients = [client(), client()]
    logged_in(*clients)
    other.ask("make", "aes-256", "key")
    one.ask("remember")
    other.ask("rename", "key", "renamed")
    assert one.ask("work", [("copy", "key", "copy")]) == [["copy", "key", OK]]
    assert ended(clients, tokens) == ["copy", "renamed"]
    for token in tokens:
        entries = [decode(value) for value in values(contents.of(token)) if isinstance(value, bytes)]
        assert [each.name.label for each in entries if each.wrapped is None] == []


def test_processes_that_make_objects_at_once_make_each_once(
    client: ClientFactory, tokens: Sequence[SoftToken]
) -> None:
    """Also under one name: then there are as many."""
    clients = [client() for _ in range(4)]
    logged_in(*clients)
    for label in "one", "two", "three":
        answers = all_at_once(clients, "make", "aes-256", label)
        assert [rv for rv, _ in answers] == [OK] * 4
    wanted = sorted(["one", "two", "three"] * 4)
    assert [each.ask("labels") for each in clients] == [wanted] * 4
    assert ended(clients, tokens) == wanted


# ---- one member, brought up by many


def owe(client: ClientFactory, tokens: Sequence[SoftToken], what: str) -> list[str]:
    """The second member missed something with ten objects; the labels that all are to have."""
    one = client()
    logged_in(one)
    before = [] if what == "made" else [f"object {n}" for n in range(OWED)]
    for label in before:
        one.ask("make", "aes-256" if label < "object 5" else "note", label)
    one.ask("finalise")
    with missing(tokens[1]):
        one.ask("initialise")
        logged_in(one)
        for n in range(OWED):
            if what == "made":
                one.ask("make", "aes-256" if n < 5 else "note", f"object {n}")
            elif what == "renamed":
                one.ask("rename", f"object {n}", f"renamed {n}")
            else:
                one.ask("destroy", f"object {n}")
        labels = one.ask("labels")
        one.ask("finalise")
    assert isinstance(labels, list)
    assert len(labels) == (0 if what == "destroyed" else OWED)
    return labels


@pytest.mark.parametrize("what", ["made", "renamed", "destroyed"])
def test_many_that_log_in_at_once_bring_a_member_up_once(
    client: ClientFactory, tokens: Sequence[SoftToken], app: Domain, what: str
) -> None:
    wanted = owe(client, tokens, what)
    clients = [client() for _ in range(MANY)]
    assert [rv for rv, _ in all_at_once(clients, "login")] == [OK] * MANY
    assert [each.ask("labels") for each in clients] == [wanted] * MANY
    for each in clients:
        until(lambda: not each.ask("away"), "both members serve it")  # noqa: B023
    assert ended(clients, tokens) == wanted
    settled = [
        line for line in app.events("object.settled") if f"done={what.replace('renamed', 'changed')}" in line
    ]
    assert len(settled) == OWED


# ---- two at the same objects


@pytest.mark.parametrize("kind", ["aes-256", "note"])
@pytest.mark.parametrize("order", ["the same", "opposite"])
def test_two_processes_at_the_same_objects(
    client: ClientFactory, tokens: Sequence[SoftToken], kind: str, order: str
) -> None:
    """Each renames all and destroys every other: what was destroyed is gone, the rest bears one of the names."""
    names = [f"object {n:02}" for n in range(20)]
    one, _ = clients = [client(), client()]
    logged_in(*clients)
    for name in names:
        one.ask("make", kind, name)
    assert all_at_once(clients, "remember") == [(OK, 20)] * 2
    orders = [names, names if order == "the same" else names[::-1]]
    for each, mine, by in zip(clients, orders, "ab", strict=True):
        acts = []
        for name in mine:
            acts.append(("rename", name, f"{name} {by}"))
            if int(name[-2:]) % 2:
                acts.append(("destroy", name, ""))
        each.tell("work", acts)
    done = [act for each in clients for act in each.answer()[1]]
    assert {answer for _, _, answer in done} <= {OK, "CKR_OBJECT_HANDLE_INVALID"}
    destroyed = {label for act, label, answer in done if act == "destroy" and answer == OK}
    assert destroyed == set(names[1::2])
    left = ended(clients, tokens)
    assert [label[:9] for label in left] == names[::2]
    assert {label[9:] for label in left} <= {" a", " b"}


# ---- one dies, or hangs, at work


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("what", ["made", "renamed", "destroyed"])
def test_holder_of_a_lease_that_was_killed_keeps_nobody(
    client: ClientFactory, tokens: Sequence[SoftToken], what: str, steps: int
) -> None:
    wanted = owe(client, tokens, what)
    holder, after = client(), client()
    holder.tell("login_and_hang", steps)
    assert holder.answer() == "hanging"
    holder.kill()
    assert "lease" in contents.of(tokens[1]).ledger
    began = time.monotonic()
    logged_in(after)
    assert time.monotonic() - began < DEAD_LIMIT_S
    assert after.ask("away") == []
    assert after.ask("labels") == wanted
    assert ended([after], tokens) == wanted


@pytest.mark.parametrize("what", ["made", "destroyed"])
def test_login_beside_a_holder_that_hangs_goes_on_without_that_member(
    client: ClientFactory, tokens: Sequence[SoftToken], what: str
) -> None:
    """And it takes the member in as soon as the holder is dead."""
    wanted = owe(client, tokens, what)
    holder, after = client(), client()
    holder.tell("login_and_hang", 4)
    assert holder.answer() == "hanging"
    holder.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    logged_in(after)
    assert time.monotonic() - began < LIMIT_S
    assert after.ask("labels") == wanted
    assert after.ask("away") == [tokens[1].serial]
    holder.kill()
    until(lambda: not after.ask("away"), "the member serves")
    assert after.ask("labels") == wanted
    assert ended([after], tokens) == wanted
