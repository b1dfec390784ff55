"""A member that cannot do what the others can is left out and owed it; what all of them say is the answer."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from demo.members import SoftToken, Worker
from tests import p11
from tests.fault import Fault
from tests.ha.app import code
from tests.replication import contents, domain
from tests.replication.conftest import StartFactory
from tests.replication.domain import PIN, Domain, missing
from tests.replication.kinds import KINDS
from tests.replication.test_away import CERTIFICATE, MAKES, settled
from tests.soak.faults import processes


class Enduring(Worker):
    """A worker whose library is told by write() that a file cannot grow, and does not die of it."""

    def command(self) -> list[str]:
        return ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh", *super().command()]


SOME = ("ec", "aes", "certificate", "note")


@contextmanager
def full_disk(token: SoftToken) -> Iterator[None]:
    """No file of the token's worker can grow: SoftHSM has no room for what it is given.

    On a disk there would be for token.object, which it truncates at a login to write it anew: that one is kept.
    """
    (own,) = token.directory.glob("tokens/*/token.object")
    kept = own.read_bytes()
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in processes(token)}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        for pid in processes(token):  # those that were started meanwhile have inherited it
            resource.prlimit(pid, resource.RLIMIT_FSIZE, next(iter(limits.values())))
        own.write_bytes(kept)


Begin = Callable[[str], Domain]


@pytest.fixture
def behind_worker(start: StartFactory, tokens: Sequence[SoftToken]) -> Iterator[Begin]:
    """The group of the pair, with one member behind a worker that others have started."""
    with ExitStack() as stack:

        def begin(name: str) -> Domain:
            return start(
                *(
                    stack.enter_context(Enduring(token)).member(profile="softhsm")
                    if token.label == name
                    else token.member()
                    for token in tokens
                )
            )

        yield begin


@pytest.mark.parametrize("full", domain.NAMES)
@pytest.mark.parametrize("name", SOME)
def test_object_is_made_where_there_is_room(behind_worker: Begin, name: str, full: str) -> None:
    app = behind_worker(full)
    session = app.login(PIN)
    with full_disk(app.token(full)):
        made = MAKES[name](session, "object")
        assert app.away() == {full}
    app.regain()
    held = settled(app, kept=len(made))
    assert len(held[0].seen) == len(made)


@pytest.mark.parametrize("full", domain.NAMES)
@pytest.mark.parametrize("name", SOME)
def test_object_is_changed_and_destroyed_where_there_is_room(
    behind_worker: Begin, name: str, full: str
) -> None:
    app = behind_worker(full)
    session = app.login(PIN)
    renamed, *destroyed = MAKES[name](session, "renamed") + MAKES[name](session, "destroyed")
    with full_disk(app.token(full)):
        session.set(renamed, {p11.CKA_LABEL: "new"})
        for handle in destroyed:
            session.destroy(handle)
        assert app.away() == {full}
    app.regain()
    held = settled(app)
    assert [each.label for each in held[0].seen] == [b"new"]


@pytest.mark.parametrize(
    "fault",
    [
        *("return CKR_DEVICE_MEMORY", "return CKR_DEVICE_ERROR", "return CKR_GENERAL_ERROR"),
        *("return CKR_FUNCTION_FAILED", "return 0x80000001", "pretend"),
    ],
)
@pytest.mark.parametrize("after", range(3))
def test_what_one_member_refuses_is_its_own_fault(
    start: StartFactory, tokens: Sequence[SoftToken], after: int, fault: str
) -> None:
    east = Fault(tokens[0])
    app = start(east.member(), tokens[1].member())
    session = app.login(PIN)
    east.script(f"C_CreateObject after {after} {fault}")
    session.create(CERTIFICATE | {p11.CKA_LABEL: "object"})
    assert app.away() == {"east"} if any(c.injected for c in east.counts()) else app.away() == set()
    east.script()
    app.regain()
    settled(app, kept=1)


@pytest.mark.parametrize("fault", ["return CKR_DEVICE_MEMORY", "return CKR_FUNCTION_FAILED"])
def test_what_all_members_refuse_is_the_answer(
    start: StartFactory, tokens: Sequence[SoftToken], fault: str
) -> None:
    faults = [Fault(token) for token in tokens]
    app = start(*(each.member() for each in faults))
    session = app.login(PIN)
    for each in faults:
        each.script(f"C_CreateObject {fault}")
    assert code(lambda: session.create(CERTIFICATE)) == fault.split()[-1]
    assert app.away() == set()
    for each in faults:
        each.script()
    assert settled(app, kept=0)[0].seen == []


def test_what_the_application_did_wrong_is_nobodys_fault(app: Domain) -> None:
    session = app.login(PIN)
    assert code(lambda: session.create(CERTIFICATE | {p11.CKA_MODULUS: b"1"})) != "CKR_OK"
    assert app.away() == set()
    settled(app, kept=0)


@pytest.mark.parametrize("lost", domain.NAMES)
@pytest.mark.parametrize("name", SOME)
def test_member_whose_store_is_out_of_reach_is_not_believed(
    app: Domain, monkeypatch: pytest.MonkeyPatch, name: str, lost: str
) -> None:
    """Once all is announced it finds nothing, with CKR_OK: not the object, nor what its ledger says of it."""
    from pkcs11_ha.runtime.changing import Claim

    session = app.login(PIN)
    made = MAKES[name](session, "object")
    with ExitStack() as away:
        stake = Claim.stake

        def staked(claim: Claim) -> bool:
            done = stake(claim)
            if not app.away():
                away.enter_context(missing(app.token(lost)))
            return done

        monkeypatch.setattr(Claim, "stake", staked)
        for handle in made:
            session.destroy(handle)
        assert app.away() == {lost}
    monkeypatch.undo()
    app.regain()
    assert settled(app)[0].seen == []


@pytest.mark.parametrize(("call", "name"), [("C_WrapKey", "p256"), ("C_CopyObject", "ed25519")])
def test_key_is_generated_on_another_member(
    start: StartFactory, tokens: Sequence[SoftToken], call: str, name: str
) -> None:
    """Where it can be wrapped; or, if it cannot be, where it can be kept."""
    faults = [Fault(token) for token in tokens]
    app = start(*(each.member() for each in faults), balance="primary-first")
    session = app.login(PIN)
    for each in faults:
        each.script(f"{call} return CKR_FUNCTION_FAILED")
    assert code(lambda: KINDS[name].generate(session, "none")) == "CKR_FUNCTION_FAILED"
    assert app.away() == set()
    faults[1].script()
    KINDS[name].generate(session, "object")
    assert app.away() == {"east"}
    faults[0].script()
    app.regain()
    app.module.finalize()
    held = [contents.of(token) for token in tokens]
    assert {each.label for one in held for each in one.seen} == {b"object"}
    assert len(held[1].labelled("object")) == 2


def test_member_is_not_at_fault_when_the_application_logs_out_under_the_group_s_own_work(
    start: StartFactory,
) -> None:
    """The ledger is looked through again and again, and what is private is not to be seen any more."""
    app = start()
    session = app.login(PIN)
    for name in SOME:
        MAKES[name](session, name)
    for delay in range(80):
        time.sleep(0.05)
        session.random(1)  # a look is due, and begins
        time.sleep(delay % 8 / 1000)
        session.logout()
        session.login(PIN)
    assert app.events("member.lost") == []
