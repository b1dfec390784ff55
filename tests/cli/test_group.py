"""`p11ha group`: what is changed, what is said of it, and what is refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Protocol

import pytest

from demo.members import SoftToken, Table
from tests.cli.p11ha import good, refused
from tests.conftest import Group, GroupFactory, ServerFactory, SoftTokenFactory

NORTH = '\n[[member]]\nname = "north"\nmodule = "/bin/sh"\ntoken = "pkcs11:token=north"\n'
SOUTH = NORTH.replace("north", "south")


@pytest.fixture
def east(soft_token: SoftTokenFactory) -> SoftToken:
    return soft_token("east")


class ProdFactory(Protocol):
    def __call__(self, east: Table) -> Group: ...


@pytest.fixture
def prod_of(group: GroupFactory) -> ProdFactory:
    """A group of east and of west, which is not there, and two members in no group; its serial is not given."""

    def make(east: Table) -> Group:
        made = group(east, {"name": "west", "module": "/bin/sh", "token": "pkcs11:token=west;serial=7777"})
        text = made.conf.read_text().replace('serial = "1599447001"\n', "")
        made.conf.write_text(text.replace("[[group]]", f"{NORTH}{SOUTH}\n[[group]]"))
        return made

    return make


@pytest.fixture
def prod(east: SoftToken, prod_of: ProdFactory) -> Group:
    return prod_of(east.member())


def said(conf: Path, number: int = 0) -> dict[str, Any]:
    group: dict[str, Any] = tomllib.loads(conf.read_text())["group"][number]
    return group


def test_a_group_from_its_beginning_to_its_end(prod: Group) -> None:
    assert "west is in group 'prod'" in refused("group", "create", "test", "west")
    assert "no member 'nobody'" in refused("group", "create", "test", "nobody")
    assert "named twice" in refused("group", "create", "test", "north", "--standby", "north")
    assert "there already" in refused("group", "create", "prod", "north")
    assert refused("group", "create", "x" * 33, "north", status=2).startswith("p11ha group create: ")

    options = ["--standby", "south", "--serial", "42", "--balance", "round-robin", "--replication", "domain"]
    made = good("group", "create", "test", "north", *options)
    assert "p11ha domain init test" in made
    expected = {"label": "test", "members": ["north"], "standby": ["south"], "serial": "42"}
    assert said(prod.conf, 1) == expected | {"balance": "round-robin", "replication": "domain"}

    listed = json.loads(good("group", "list", "--json"))["groups"]
    assert [(each["label"], each["serial"], each["members"]) for each in listed] == [
        ("prod", None, ["east", "west"]),
        ("test", "42", ["north"]),
    ]
    assert all(word in good("group", "list") for word in ("prod", "test", "round-robin"))
    assert json.loads(good("group", "show", "test", "--json"))["member"][1]["name"] == "south"
    shown = good("group", "show", "test")
    assert "south: standby" in shown
    assert "min_copies              1  (default)" in shown
    assert "no group 'tset': there is 'prod', 'test'" in refused("group", "show", "tset")

    assert "must look for 'live'" in good("group", "rename", "test", "live")
    assert "there already" in refused("group", "rename", "live", "prod")
    gone = good("group", "delete", "live")
    assert "all objects stay on the members north, south" in gone
    assert "'live' find it no more" in gone
    assert [each["label"] for each in tomllib.loads(prod.conf.read_text())["group"]] == ["prod"]
    assert "the only group" in refused("group", "delete", "prod")


def test_members_come_and_go(prod: Group) -> None:
    assert "must have the group's keys already" in good("group", "add-member", "prod", "north")
    assert good("group", "add-member", "prod", "north") == "nothing to change\n"
    good("group", "add-standby", "prod", "south")
    assert said(prod.conf) == {"label": "prod", "members": ["east", "west", "north"], "standby": ["south"]}

    assert "is a standby: p11ha group remove-standby" in refused("group", "remove-member", "prod", "south")
    assert "is an active member: p11ha group" in refused("group", "remove-standby", "prod", "north")
    assert "p11ha group add-member prod south" in good("group", "remove-standby", "prod", "south")
    good("group", "add-standby", "prod", "west")  # an active one
    good("group", "add-member", "prod", "west")  # and back
    assert said(prod.conf) == {"label": "prod", "members": ["east", "north", "west"], "standby": []}
    assert "all objects stay on west" in good("group", "remove-member", "prod", "west")
    assert "is not in group 'prod'" in refused("group", "remove-member", "prod", "west")


def test_the_serial_outlives_the_member_it_came_from(prod: Group, east: SoftToken) -> None:
    serial = f"1{east.serial}"[:16]
    assert f"serial {serial} is written" in good("group", "remove-member", "prod", "east")
    assert said(prod.conf)["serial"] == serial
    line = refused("group", "remove-member", "prod", "west")
    assert "west is the last active member of 'prod'" in line
    assert "last active member" in refused("group", "add-standby", "prod", "west")


@pytest.mark.usefixtures("module")
def test_the_serial_of_a_member_that_is_away(
    east: SoftToken, server: ServerFactory, prod_of: ProdFactory
) -> None:
    """As processes of this host have seen it, else as whoever removes it says."""
    dead = server(east)
    prod = prod_of(dead.member())
    before = prod.conf.read_text()
    good("status")  # it is seen once
    dead.kill()
    shown = good("group", "remove-member", "prod", "east", "--dry-run")
    assert f"serial {f'1{east.serial}'[:16]} is written" in shown

    (prod.state / "serials.json").unlink()
    assert "say it with --serial" in refused("group", "remove-member", "prod", "east")
    assert prod.conf.read_text() == before
    good("group", "remove-member", "prod", "east", "--serial", "1234")
    assert said(prod.conf)["serial"] == "1234"
    good("group", "add-member", "prod", "north")
    assert "leave --serial out" in refused("group", "remove-member", "prod", "west", "--serial", "5")


def test_the_serial_that_a_selector_names_needs_no_library(prod: Group) -> None:
    prod.conf.write_text(prod.conf.read_text().replace('["east", "west"]', '["west", "east"]'))
    assert "serial 17777 is written" in good("group", "add-standby", "prod", "west")
    assert said(prod.conf) == {"label": "prod", "members": ["east"], "standby": ["west"], "serial": "17777"}


def test_a_member_in_two_groups(prod: Group) -> None:
    good("group", "create", "test", "north")
    before = prod.conf.read_text()
    for verb in ("add-member", "add-standby"):
        assert refused("group", verb, "prod", "north").startswith("north is in group 'test'")
    assert prod.conf.read_text() == before
