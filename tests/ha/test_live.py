"""What operators change while applications run: members come and go, are drained and tried, and no call fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from demo.members import SoftToken, Table, Toml, write_config
from tests import p11
from tests.conftest import Group, ServerFactory
from tests.ha import operations
from tests.ha.app import FAR, Application, code, until, working_until
from tests.ha.conftest import Pair, StartFactory, clone
from tests.ha.keys import Keys
from tests.ha.operations import Use
from tests.ha.program import Program

P11HA = Path(sys.executable).parent / "p11ha"
FIRST = "primary-first"
Tokens = tuple[SoftToken, SoftToken]


def p11ha(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([P11HA, *arguments], capture_output=True, text=True, check=False, timeout=60)


def said(*arguments: str) -> str:
    done = p11ha(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments: str) -> str:
    """The one line that a command which fails says."""
    done = p11ha(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def edit(group: Group, *members: Table, recovery: Table | None = None, **options: Toml) -> None:
    """Another configuration in the place of the one there is, as an editor writes it."""
    standby = options.get("standby", [])
    assert isinstance(standby, list)
    active = [m["name"] for m in members if m["name"] not in standby]
    table: Table = {"label": group.label, "serial": "1599447001", "members": active} | options
    rule = FAR if recovery is None else recovery
    new = write_config(group.conf.with_suffix(".new"), members, [table], rule, {"log": f"file:{group.log}"})
    new.rename(group.conf)


@pytest.fixture
def third(models: Tokens, directory: Path) -> Table:
    """A third member with the same keys."""
    return clone(models[0], directory / "north").member(name="north")


def begin(app: Application, keys: Keys, tokens: Tokens) -> Use:
    use = Use.begin(app, keys, tokens[0].pin)
    operations.sign_ecdsa(use)
    return use


def serves(use: Use, name: str) -> Callable[[], bool]:
    return lambda: use.app.served(use.session) == name


def test_a_member_joins_and_another_leaves_under_an_operation(
    tokens: Tokens, third: Table, keys: Keys, start: StartFactory
) -> None:
    """What the one that leaves had begun is ended by another; its token is left as if nobody had been there."""
    east, west = (token.member() for token in tokens)
    app = start(east, west, balance=FIRST)
    use = begin(app, keys, tokens)
    assert serves(use, "east")()
    edit(app.group, third, east, west, balance=FIRST)
    working_until(lambda: operations.sign_ecdsa(use), serves(use, "north"), "the third one is the primary")
    assert len(app.module.ha_status(app.slot).members) == 3 - 1  # north has the serial number of east
    assert app.states() == dict.fromkeys(("north", "east", "west"), "up")

    edit(app.group, east, west, third, balance=FIRST)
    working_until(lambda: operations.sign_ecdsa(use), serves(use, "east"), "it is the last one")
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    use.session.feed("C_DigestUpdate", b"one ")
    assert serves(use, "east")()
    edit(app.group, west, third, balance=FIRST)
    other = app.open()
    until(lambda: other.random(8) and "east" not in app.states(), "it has left")
    until(lambda: other.random(8) and not app.core.former["east"].connecting, "its library is left")
    assert app.core.former["east"].instance is None
    use.session.feed("C_DigestUpdate", b"two")
    assert use.session.output("C_DigestFinal") == sha256(b"one two").digest()
    assert serves(use, "west")()
    for operation in operations.EVERY.values():
        operation(use)

    edit(app.group, east, west, balance=FIRST)
    working_until(lambda: operations.sign_ecdsa(use), serves(use, "east"), "it is back in its place")
    assert app.states() == {"east": "up", "west": "up"}
    assert not app.events("member.lost")
    assert len(app.events("config.reloaded")) >= 4


def test_a_member_that_alone_serves_is_replaced_without_a_gap(
    tokens: Tokens, third: Table, keys: Keys, start: StartFactory, server: ServerFactory
) -> None:
    east, west = tokens[0].member(), server(tokens[1])
    app = start(east)
    use = begin(app, keys, tokens)
    west.kill()
    edit(app.group, west.member(), recovery={"interval_s": 0.05})
    working_until(
        lambda: operations.sign_ecdsa(use), lambda: app.events("recovery.failed", "west"), "it is tried"
    )
    assert serves(use, "east")()
    (line,) = app.events("config.reloaded")
    assert "member east: it alone serves" in line
    west.start()
    working_until(lambda: operations.sign_ecdsa(use), serves(use, "west"), "the new one has come")
    until(lambda: use.session.random(8) and app.states() == {"west": "up"}, "the old one is gone")
    assert not app.events("group.vanished")
    edit(app.group, third, west.member(call_timeout_s=30))
    working_until(
        lambda: operations.sign_ecdsa(use),
        lambda: (
            app.states() == {"north": "up", "west": "up"} and len(app.events("member.recovered", "west")) == 2
        ),
        "it is connected anew as soon as another one serves",
    )


def test_twenty_edits_under_load_fail_no_call(
    tokens: Tokens, third: Table, keys: Keys, start: StartFactory
) -> None:
    east, west = (token.member() for token in tokens)
    app = start(east, west)
    over = threading.Event()
    counts, failures = [0, 0, 0], []

    def work(number: int) -> None:
        use = Use.begin(app, keys, tokens[0].pin) if number == 0 else None
        session = use.session if use else app.open()
        try:
            while not over.is_set():
                if use:
                    operations.sign_ecdsa(use)
                session.init("C_DigestInit", p11.CKM_SHA256)
                session.feed("C_DigestUpdate", b"a")
                session.feed("C_DigestUpdate", b"b")
                assert session.output("C_DigestFinal") == sha256(b"ab").digest()
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 (whatever it is)
            failures.append(error)
            over.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    choices = [(east, west), (third, east), (west, third), (third,), (east,), (west, east, third)]
    for number in range(20):
        members = choices[number % len(choices)]
        edit(app.group, *members, balance=FIRST if number % 3 else "least-busy")
        names = {str(member["name"]) for member in members}
        until(lambda names=names: over.is_set() or set(app.states()) == names, f"edit {number}")  # type: ignore[misc]
        before = list(counts)
        until(
            lambda before=before: over.is_set() or all(a > b for a, b in zip(counts, before, strict=True)),  # type: ignore[misc]
            "they go on",
        )
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not app.events("member.lost") + app.events("core.failed") + app.events("operation.lost")


def test_a_broken_configuration_changes_nothing_and_is_named(
    tokens: Tokens, third: Table, keys: Keys, start: StartFactory
) -> None:
    east, west = (token.member() for token in tokens)
    app = start(east, west)
    use = begin(app, keys, tokens)
    good = app.group.conf.read_text()
    broken = good.replace("[recovery]", "[recovery]\nnonsense = 1")
    line = broken.splitlines().index("nonsense = 1") + 1
    app.group.conf.write_text(broken)
    working_until(lambda: operations.sign_ecdsa(use), lambda: app.events("config.refused"), "it is refused")
    assert f"{app.group.conf}:{line}: recovery.nonsense" in app.events("config.refused")[0]
    app.group.conf.unlink()
    working_until(
        lambda: operations.sign_ecdsa(use), lambda: len(app.events("config.refused")) == 2, "as is none"
    )
    assert app.states() == {"east": "up", "west": "up"}
    edit(app.group, east, west, third, replication="domain", manufacturer="another")
    working_until(lambda: operations.sign_ecdsa(use), lambda: "north" in app.states(), "a good one is not")
    (line_,) = app.events("config.reloaded")
    assert "group prod: north joins" in line_
    assert "replication changes at the application's next start" in line_
    assert app.module.token(app.slot).manufacturer == "pkcs11-ha"


def test_an_idle_application_in_background_mode_follows_by_itself(
    tokens: Tokens, third: Table, start: StartFactory
) -> None:
    east, west = (token.member() for token in tokens)
    background = FAR | {"mode": "background"}
    app = start(east, west, recovery=background)
    edit(app.group, west, third, recovery=background)
    until(lambda: app.states() == {"west": "up", "north": "up"}, "it has followed")


def test_without_threads_it_is_noticed_at_the_next_query(
    tokens: Tokens, third: Table, start: StartFactory
) -> None:
    east, west = (token.member() for token in tokens)
    app = start(east, west)
    app.module.finalize()
    before = set(threading.enumerate())
    app.module.initialize(p11.CKF_OS_LOCKING_OK | p11.CKF_LIBRARY_CANT_CREATE_OS_THREADS)
    edit(app.group, west, third)
    assert app.module.slots() == [app.slot]
    app.open().random(8)
    assert app.states() == {"west": "up", "north": "up"}
    assert set(threading.enumerate()) <= before


# ---- drained


def test_a_drained_member_ends_what_it_has_and_takes_nothing_new(
    tokens: Tokens, keys: Keys, start: StartFactory
) -> None:
    app = start(*(token.member() for token in tokens), balance=FIRST)
    use = begin(app, keys, tokens)
    use.session.init("C_DigestInit", p11.CKM_SHA256)
    use.session.feed("C_DigestUpdate", b"one ")
    assert serves(use, "east")()
    assert said("drain", "east") == "east is drained: no new work until p11ha enable east\n"
    session = app.open()
    working_until(lambda: session.random(8), lambda: app.served(session) == "west", "the other one serves")
    use.session.feed("C_DigestUpdate", b"two")
    assert use.session.output("C_DigestFinal") == sha256(b"one two").digest()
    assert serves(use, "east")()  # where it was begun
    operations.sign_ecdsa(use)
    assert serves(use, "west")()
    assert set(app.status().values()) == {"CKR_OK"}
    made = use.session.create({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_LABEL: "note"})
    assert len(app.core.slots[0].objects.get(made).at) == 2  # what is written reaches it all the same
    use.session.destroy(made)

    assert "east is drained and not tried" in said("recover", "prod")
    line = refused("drain", "west")
    assert line == "no other member of group prod serves: --force drains west all the same"

    app.module.finalize()
    app.module.initialize()
    assert app.away() == {"east"}  # a process that starts later does not touch it
    use = begin(app, keys, tokens)
    assert serves(use, "west")()
    (shown,) = [
        m for m in json.loads(said("status", "--json"))["groups"][0]["members"] if m["name"] == "east"
    ]
    assert "drained" in shown["why"]
    assert said("enable", "east") == "east is enabled\n"
    working_until(lambda: operations.sign_ecdsa(use), serves(use, "east"), "it takes work again")
    assert said("enable", "east") == "east was not drained\n"
    assert len(app.events("member.drained", "east")) == len(app.events("member.enabled", "east")) == 1


def test_a_drained_member_is_asked_for_no_login(tokens: Tokens, keys: Keys, start: StartFactory) -> None:
    """Nor is one that dies tried again; enabled, it is logged in and has missed nothing."""
    app = start(*(token.member() for token in tokens), balance=FIRST)
    session = app.open()
    session.random(8)
    said("drain", "east")
    until(lambda: session.random(8) and app.served(session) == "west", "it is drained")
    use = begin(app, keys, tokens)
    assert app.core.members["east"].logins == set()
    note: p11.Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_LABEL: "note"}
    use.session.destroy(use.session.create(note))
    said("enable", "east")
    working_until(lambda: operations.sign_ecdsa(use), serves(use, "east"), "it takes work again")
    assert app.core.members["east"].logins == {app.slot}
    said("drain", "--force", "west")
    said("drain", "--force", "east")
    working_until(
        lambda: code(lambda: session.random(8)), lambda: app.events("group.vanished"), "nobody is left"
    )
    assert code(lambda: operations.sign_ecdsa(use)) == "CKR_DEVICE_ERROR"
    said("enable", "west")
    until(lambda: code(lambda: operations.sign_ecdsa(use)) == "CKR_OK", "one is")


# ---- tried by hand


def test_recover_gives_an_exhausted_member_its_attempts_again(pair: Pair, start: StartFactory) -> None:
    app = start(*pair.members(), recovery={"interval_s": 0.05, "attempts": 1})
    use = Use.begin(app, pair.keys, pair.pin)
    pair.east.kill()
    working_until(
        lambda: operations.sign_ecdsa(use), lambda: app.events("recovery.exhausted"), "it is given up"
    )
    assert "will try east at the next call" in said("recover", "prod", "east")
    working_until(
        lambda: operations.sign_ecdsa(use),
        lambda: len(app.events("recovery.exhausted")) == 2,
        "once more, in vain",
    )
    for _ in range(50):
        operations.sign_ecdsa(use)
    assert len(app.events("recovery.asked", "east")) == 1  # one request, one time
    pair.east.start()
    said("recover", "prod")
    working_until(lambda: operations.sign_ecdsa(use), lambda: not app.away(), "it is back")
    app.module.finalize()
    app.module.initialize()  # requests of before mean nothing to a new run
    app.open().random(8)
    assert len(app.events("recovery.asked")) == 2


def test_recover_works_where_recovery_is_off_but_tries_no_refused_pin(
    pair: Pair, start: StartFactory
) -> None:
    app = start(*pair.members(), recovery={"attempts": 0})
    use = Use.begin(app, pair.keys, pair.pin)
    pair.east.kill()
    working_until(lambda: operations.sign_ecdsa(use), app.away, "the loss is noticed")
    pair.east.start()
    said("recover", "prod")
    working_until(lambda: operations.sign_ecdsa(use), lambda: not app.away(), "it is back")
    app.core.refuse(app.core.members["east"], p11.CKR_PIN_INCORRECT)
    assert said("recover", "prod", "east").splitlines() == [
        f"east refused its PIN and is not tried by process {os.getpid()}: correct the PIN, then restart"
    ]
    working_until(
        lambda: operations.sign_ecdsa(use), lambda: len(app.events("recovery.asked")) == 2, "it is seen"
    )
    assert "its PIN was refused" in app.events("recovery.asked")[1]
    for _ in range(20):
        operations.sign_ecdsa(use)
    assert app.away() == {"east"}
    assert not app.events("recovery.failed")


def test_two_processes_heed_one_request_each(pair: Pair, start: StartFactory, module: Path) -> None:
    app = start(*pair.members(), recovery=FAR)
    session = app.open()
    program = Program(
        module,
        """
        session = module.open(module.slots()[0])
        def until(names):
            while set(module.ha_status(session.info().slot).members.values()) != names:
                session.random(8)
        print("ready", flush=True)
        input()
        until({"CKR_OK", "CKR_TOKEN_NOT_PRESENT"})
        print("noticed", flush=True)
        timed("recovered", lambda: until({"CKR_OK"}))
        """,
    )
    program.wait_for("ready")
    pair.east.kill()
    program.go_on()
    program.wait_for("noticed")
    working_until(lambda: session.random(8), app.away, "the loss is noticed")
    pair.east.start()
    said("recover", "prod")
    working_until(lambda: session.random(8), lambda: not app.away(), "it is back here")
    _, answers = program.end()
    assert answers["recovered"] is None


# ---- what is wrong


def test_wrong_names_and_places_are_one_line(tokens: Tokens, start: StartFactory) -> None:
    app = start(*(token.member() for token in tokens))
    assert refused("recover", "lab") == "no group 'lab': there is prod"
    assert refused("recover", "prod", "south") == "no member 'south' in group prod: there is east, west"
    assert refused("drain", "south") == "no member 'south' in any group: there is east, west"
    assert refused("enable", "south") == "no member 'south' in any group: there is east, west"
    where = app.group.state / "requests"
    where.rmdir()
    where.write_text("in the way")
    assert f"cannot write to {where}: " in refused("drain", "--force", "east")
    assert f"cannot write to {where}: " in refused("recover", "prod")


def test_files_that_are_no_requests_are_passed_over_and_named(tokens: Tokens, start: StartFactory) -> None:
    app = start(*(token.member() for token in tokens))
    session = app.open()
    where = app.group.state / "requests"
    (where / "recover-a.json").write_text("[" * 100_000)
    (where / "recover-b.json").write_text("{")
    (where / "recover-c.json").write_bytes(b"\xff")
    (where / "drained-east.json").symlink_to("/dev/zero")
    os.mkfifo(where / "drained-west.json")
    (where / "drained-x.json").write_text('{"version": 1, "member": "west"}')
    (where / "recover-d.json").write_text('{"version": 2, "group": "prod"}')
    (where / "else").write_text("x")
    working_until(
        lambda: session.random(8), lambda: len(app.events("request.refused")) >= 7, "they are named"
    )
    (where / "more").write_text("x")
    for _ in range(100):
        session.random(8)
    assert len(app.events("request.refused")) == 7
    assert not any(member.drained for member in app.core.members.values())
