"""What of a changed configuration is done live, and what waits: by the texts of both."""

from __future__ import annotations

from pkcs11_ha.config import Config, parse
from pkcs11_ha.core.reload import Plan, plan

MEMBER = '[[member]]\nname = "{0}"\nmodule = "/lib/{0}.so"\ntoken = "pkcs11:token={0}"\n'
NAMES = ("east", "west", "north")


def made(*groups: str, head: str = "", names: tuple[str, ...] = NAMES, **changes: str) -> Config:
    """Groups as `label: members / standby`; a change of a member is a line of its table."""
    text = head + "\n"
    for name in names:
        text += MEMBER.format(name) + changes.get(name, "") + "\n"
    for group in groups:
        label, _, rest = group.partition(": ")
        active, _, options = rest.partition("; ")
        members, _, standby = active.partition(" / ")
        text += f'[[group]]\nlabel = "{label}"\nmembers = {members.split()}\nstandby = {standby.split()}\n{options}\n'
    return parse(text, "/x.toml")


def changed(before: Config, after: Config) -> Plan:
    found = plan(before, after)
    assert plan(found.settings, found.settings) == Plan(found.settings)  # there is an end to it
    return found


def test_nothing_changes_where_nothing_is_said() -> None:
    one = made("prod: east west")
    assert plan(one, made("prod: east west", head="# a remark")) == Plan(one)


def test_who_stays_as_all_others_are_bound_is_still_described() -> None:
    """They belong to a group that is only removed at the next start; so the group keeps whom it had."""
    found = changed(made("prod: east", "test: west"), made("prod: west", names=("west",)))
    assert [group.members for group in found.settings.groups] == [("east",), ("west",)]
    assert {member.name for member in found.settings.members} == {"east", "west"}


def test_members_come_go_and_change_places() -> None:
    found = changed(made("prod: east west"), made('prod: north west / ; serial = "7"'))
    assert found.done == ("group prod: north joins", "group prod: east leaves")
    assert found.restart == ("group prod: serial changes at the application's next start",)
    (group,) = found.settings.groups
    assert (group.members, group.serial) == (("north", "west"), None)
    moved = changed(made("prod: east west north"), made("prod: west east / north; balance = 'round-robin'"))
    assert moved.done == (
        "group prod: members west, east; standby north",
        "group prod: balance = round-robin",
    )
    assert not moved.restart
    assert len(moved.warnings) == 1  # another member is the first, and gives the group its serial


def test_groups_wait_and_keep_their_members() -> None:
    before = made("prod: east", "lab: west", west="call_timeout_s = 3")
    found = changed(before, made("prod: east west", "new: north"))
    assert found.restart == (
        "group new: it is new, and shown at the application's next start",
        "group lab: removed at the application's next start",
        "group prod: west joins at the application's next start",
        "member west: changes at the application's next start",
    )
    assert found.settings.groups == before.groups
    assert {m.name: m for m in found.settings.members}["west"] == before.members[1]


def test_a_member_that_is_said_otherwise_is_connected_anew() -> None:
    found = changed(
        made("prod: east west"),
        made("prod: east west", east='pin_source = "file:/pin"', north="user='x'\nhost='worker'"),
    )
    assert found.done == ("member east: connected anew for its pin_source",)
    assert not found.restart


def test_recovery_and_log_change_and_slots_do_not() -> None:
    head = '[ha]\nonly = false\nlog = "stderr"\n[recovery]\ninterval_s = 5'
    found = changed(made("prod: east"), made("prod: east", head=head))
    assert found.done == ("[ha]: log = stderr", "[recovery]: interval_s = 5")
    assert found.restart == ("[ha] only: at the application's next start",)
    assert found.settings.ha.only


def test_members_with_slots_of_their_own_keep_them() -> None:
    head = "[ha]\nonly = false"
    before = made("prod: east", head=head, names=("east", "west"))
    found = changed(
        before, made("prod: west north", head=head, names=("north", "west"), west="call_timeout_s = 3")
    )
    assert found.restart == (
        "member north: its own slot appears at the application's next start",
        "member east: its own slot is empty until the application's next start",
    )
