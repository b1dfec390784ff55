"""What the configuration file says is taken as it is meant, or refused with file, line and key."""

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkcs11_ha import config
from pkcs11_ha.config import (
    NO_TIMEOUTS,
    OPTIONS,
    ConfigError,
    GroupConfig,
    HaOptions,
    MemberConfig,
    Place,
    RecoveryOptions,
    Timeouts,
    find_path,
    is_secure,
    load,
    locate,
    parse,
    state_dir,
)
from pkcs11_ha.spec.functions import Deadline
from pkcs11_ha.uri import parse_token_uri

EAST = '[[member]]\nname = "east"\nmodule = "/usr/lib/m.so"\ntoken = "pkcs11:token=east"\n'  # 4 lines
WEST = EAST.replace("east", "west")
TIMEOUTS = 'member.call_timeout_s: expected a number of seconds from 1e-9 to 1e9, a table of such by class, or "none"'
PROD = '[[group]]\nlabel = "prod"\nmembers = ["east", "west"]\n'


def refusal(text: str, path: str = "/x.toml") -> str:
    with pytest.raises(ConfigError) as refused:
        parse(text, path)
    assert str(refused.value).isprintable()  # so it is one line, too
    return str(refused.value)


def option(text: str, section: str) -> str:
    """The complaint about `text` as line 5 of a member or group, or line 2 of another section."""
    return refusal(
        {
            "ha": f"[ha]\n{text}\n{EAST}{WEST}{PROD}",
            "recovery": f"[recovery]\n{text}\n{EAST}{WEST}{PROD}",
            "member": f"{EAST}{text}\n{WEST}{PROD}",
            "group": f'\n[[group]]\nlabel = "prod"\nmembers = ["east", "west"]\n{text}\n{EAST}{WEST}',
        }[section]
    )


# what is accepted


def test_smallest_configuration_has_the_documented_defaults() -> None:
    assert parse(EAST + WEST + PROD, "/x.toml") == config.Config(
        path="/x.toml",
        ha=HaOptions(only=True, log="syslog", log_format="text", log_max_bytes=0, manufacturer="pkcs11-ha"),
        recovery=RecoveryOptions(interval_s=60, attempts=-1, mode="call", connect_timeout_s=5),
        members=tuple(
            MemberConfig(
                name=name,
                module="/usr/lib/m.so",
                token=parse_token_uri(f"pkcs11:token={name}"),
                env=(),
                init_args=None,
                pin_source=None,
                instance="shared",
                host="process",
                profile="auto",
                call_timeout_s=None,
                user=None,
                limits=(),
            )
            for name in ("east", "west")
        ),
        groups=(
            GroupConfig(
                label="prod",
                serial=None,
                manufacturer="pkcs11-ha",
                model="HA group",
                members=("east", "west"),
                standby=(),
                balance="least-busy",
                replication="none",
                min_copies=1,
                escrow="token",
                session_keys="pin",
                replay_limit_bytes=1048576,
                outlier="auto",
                outlier_interval_s=10,
                outlier_min_calls=20,
                outlier_latency_factor=5,
                outlier_ratio=0.2,
                eject_base_s=30,
                eject_max_s=300,
                slow_start_s=30,
            ),
        ),
    )


FULL = """
[ha]
only = false
log = "file:/var/log/pkcs11-ha/ha.log"
log_format = "json"
log_max_bytes = 1048576
manufacturer = "SafeNet"

[recovery]
interval_s = 0.5
attempts = 0
mode = "background"
connect_timeout_s = 20

[[member]]
name = "east"
module = "/usr/lib/m.so"
token = "pkcs11:serial=1234"
env = { A = "1", "B C" = "" }
init_args = "configdir='/x'"
pin_source = "file:/run/east.pin"
instance = "own"
host = "process"
profile = "p11-kit"

[[member]]
name = "spare"
module = "/usr/lib/m.so"
token = "pkcs11:"

[[group]]
label = "prod"
serial = "1599447001"
manufacturer = ""
model = "K6 Base"
members = ["east"]
standby = ["spare"]
balance = "primary-first"
replication = "domain"
min_copies = 2
escrow = "none"
session_keys = "replicate"
replay_limit_bytes = 0
outlier = "on"
outlier_interval_s = 1
outlier_min_calls = 100
outlier_latency_factor = 2.5
outlier_ratio = 0.5
eject_base_s = 2
eject_max_s = 3.5
slow_start_s = 4
"""


def test_every_option_can_be_set() -> None:
    given_ = parse(FULL, "/x.toml")
    assert given_.ha == HaOptions(False, "file:/var/log/pkcs11-ha/ha.log", "json", 1048576, "SafeNet")
    assert given_.recovery == RecoveryOptions(0.5, 0, "background", 20)
    east, spare = given_.members
    assert east == MemberConfig(
        name="east",
        module="/usr/lib/m.so",
        token=parse_token_uri("pkcs11:serial=1234"),
        env=(("A", "1"), ("B C", "")),
        init_args="configdir='/x'",
        pin_source="/run/east.pin",
        instance="own",
        host="process",
        profile="p11-kit",
        call_timeout_s=None,
        user=None,
        limits=(),
    )
    assert spare.name == "spare"
    assert given_.groups == (
        GroupConfig(
            *("prod", "1599447001", "", "K6 Base", ("east",), ("spare",)),
            *("primary-first", "domain", 2, "none", "replicate", 0),
            outlier="on",
            outlier_interval_s=1,
            outlier_min_calls=100,
            outlier_latency_factor=2.5,
            outlier_ratio=0.5,
            eject_base_s=2,
            eject_max_s=3.5,
            slow_start_s=4,
        ),
    )


def test_member_that_no_group_uses_is_allowed() -> None:
    assert len(parse(EAST + WEST + '[[group]]\nlabel = "prod"\nmembers = ["west"]', "/x").members) == 2


def test_several_groups_share_the_members_out() -> None:
    text = EAST + WEST + '[[group]]\nlabel="a"\nmembers=["east"]\n[[group]]\nlabel="b"\nmembers=["west"]'
    assert [group.members for group in parse(text, "/x").groups] == [("east",), ("west",)]


def test_profiles_are_those_that_are_shipped() -> None:
    text = EAST + 'profile = "luna"\n' + WEST + PROD
    assert parse(text, "/x", profiles=("auto", "luna")).members[0].profile == "luna"
    assert refusal(text) == (
        '/x.toml:5: member.profile: expected "auto" or "softhsm" or "p11-kit" or "generic"'
    )


def test_configuration_is_a_value() -> None:
    assert hash(parse(FULL, "/x")) == hash(parse(FULL, "/x"))


def test_table_and_types_have_the_same_options() -> None:
    sections = {"ha": HaOptions, "recovery": RecoveryOptions, "member": MemberConfig, "group": GroupConfig}
    for section, options in sections.items():
        rows = [row.name for row in OPTIONS if row.section == section]
        assert rows == [field.name for field in fields(options)]


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: f"{row.section}.{row.name}")
def test_every_option_says_what_it_is_and_how_it_is_written(row: config.Option) -> None:
    assert row.doc.endswith((".", ")."))
    assert row.form.words
    # a default is a value that could have been written (tuples are lists and tables in TOML)
    if not row.required and row.default is not None and row.default != ():
        assert row.form.read(row.default) == row.default


# what is refused

NAME32 = "n" * 33
BLANKS = "bytes of printable UTF-8 without a blank at either end"
LOG_BYTES = "expected a whole number of bytes: 0, or from 4096 to 1 TiB"
SERIAL = "expected 1 to 16 printable ASCII characters without a blank at either end"


@pytest.mark.parametrize(
    ("section", "text", "complaint"),
    [
        (
            "ha",
            "onyl = true",
            "ha.onyl: unknown key; there are only, log, log_format, log_max_bytes, manufacturer",
        ),
        ("ha", "only = 1", "ha.only: expected true or false"),
        ("ha", 'only = "true"', "ha.only: expected true or false"),
        ("ha", "log = true", 'ha.log: expected "file:/path", "syslog", "stderr" or "off"'),
        ("ha", 'log_format = "xml"', 'ha.log_format: expected "text" or "json"'),
        ("ha", "log_max_bytes = 4095", f"ha.log_max_bytes: {LOG_BYTES}"),
        ("ha", "log_max_bytes = true", f"ha.log_max_bytes: {LOG_BYTES}"),
        ("ha", f"log_max_bytes = {2**40 + 1}", f"ha.log_max_bytes: {LOG_BYTES}"),
        ("ha", 'manufacturer = "a\\nb"', f"ha.manufacturer: expected 0 to 32 {BLANKS}"),
        ("ha", f'manufacturer = "{NAME32}"', f"ha.manufacturer: expected 0 to 32 {BLANKS}"),
        ("ha", f'manufacturer = "{"ö" * 17}"', f"ha.manufacturer: expected 0 to 32 {BLANKS}"),
        ("recovery", "interval_s = 0", "recovery.interval_s: expected a number of seconds from 1e-9 to 1e9"),
        (
            "recovery",
            "interval_s = 1e-320",
            "recovery.interval_s: expected a number of seconds from 1e-9 to 1e9",
        ),
        (
            "recovery",
            "interval_s = -1.5",
            "recovery.interval_s: expected a number of seconds from 1e-9 to 1e9",
        ),
        (
            "recovery",
            "interval_s = nan",
            "recovery.interval_s: expected a number of seconds from 1e-9 to 1e9",
        ),
        (
            "recovery",
            "interval_s = inf",
            "recovery.interval_s: expected a number of seconds from 1e-9 to 1e9",
        ),
        (
            "recovery",
            "interval_s = true",
            "recovery.interval_s: expected a number of seconds from 1e-9 to 1e9",
        ),
        (
            "recovery",
            'interval_s = "60"',
            "recovery.interval_s: expected a number of seconds from 1e-9 to 1e9",
        ),
        (
            "recovery",
            f"connect_timeout_s = 1{'0' * 400}",
            "recovery.connect_timeout_s: expected a number of seconds from 1e-9 to 1e9",
        ),
        ("recovery", "attempts = -2", "recovery.attempts: expected a whole number from -1 to 2147483647"),
        ("recovery", "attempts = 1.0", "recovery.attempts: expected a whole number from -1 to 2147483647"),
        ("recovery", "attempts = true", "recovery.attempts: expected a whole number from -1 to 2147483647"),
        (
            "recovery",
            "attempts = 2147483648",
            "recovery.attempts: expected a whole number from -1 to 2147483647",
        ),
        ("recovery", 'mode = "thread"', 'recovery.mode: expected "call" or "background"'),
        ("recovery", "mode = []", 'recovery.mode: expected "call" or "background"'),
        ("member", "env = 1", "member.env: expected a table of strings"),
        ("member", "env = { A = 1 }", "member.env: expected a table of strings"),
        ("member", 'env = { "A=B" = "1" }', "member.env: expected a table of strings"),
        ("member", 'env = { "" = "1" }', "member.env: expected a table of strings"),
        ("member", 'env = { A = "\\u0000" }', "member.env: expected a table of strings"),
        ("member", "env.A.B = 'x'", "member.env: expected a table of strings"),
        ("member", "init_args = 1", "member.init_args: expected a string"),
        ("member", 'init_args = "a\\u0000"', "member.init_args: expected a string"),
        ("member", 'pin_source = "|pin"', "member.pin_source: commands are not run: name a file, file:/path"),
        ("member", "pin_source = 1234", 'member.pin_source: expected "file:/path"'),
        ("member", 'instance = "two"', 'member.instance: expected "shared" or "own"'),
        ("member", 'host = "remote"', 'member.host: expected "process", "worker" or "unix:/path"'),
        ("member", 'host = "unix:run/x"', 'member.host: expected "process", "worker" or "unix:/path"'),
        ("member", f'host = "unix:/{"x" * 107}"', "member.host: a socket's path has 107 bytes at most"),
        ("member", "host = 1", 'member.host: expected "process", "worker" or "unix:/path"'),
        ("member", "call_timeout_s = 0", TIMEOUTS),
        ("member", 'user = ""', "member.user: expected the name of a user"),
        ("member", "user = 0", "member.user: expected the name of a user"),
        ("member", "limits = 1", "member.limits: expected a table of whole numbers above 0"),
        ("member", "limits = { cpu_s = 0 }", "member.limits: expected a table of whole numbers above 0"),
        ("member", "limits = { core = -1 }", "member.limits: expected a table of whole numbers above 0"),
        ("member", "limits = { core = 1.5 }", "member.limits: expected a table of whole numbers above 0"),
        ("member", "limits = { core = true }", "member.limits: expected a table of whole numbers above 0"),
        (
            "member",
            "limits = { stack = 1 }",
            "member.limits: unknown limit 'stack'; there are memory_bytes, open_files, cpu_s, core",
        ),
        ("member", "call_timeout_s = true", TIMEOUTS),
        ("member", 'call_timeout_s = "20"', TIMEOUTS),
        ("member", "call_timeout_s = { generation = 0 }", TIMEOUTS),
        ("member", "call_timeout_s = { generation = inf }", TIMEOUTS),
        (
            "member",
            "call_timeout_s = { login = 5 }",
            "member.call_timeout_s: unknown class 'login'; there are information, cryptography, generation",
        ),
        ("member", "profile = 1", "member.profile: expected a string"),
        ("member", '"pin\\nsource" = 1', "member.pin\\nsource: unknown key; there are name, module"),
        ("group", 'serial = ""', f"group.serial: {SERIAL}"),
        ("group", 'serial = "12345678901234567"', f"group.serial: {SERIAL}"),
        ("group", 'serial = "1 "', f"group.serial: {SERIAL}"),
        ("group", 'serial = " 1"', f"group.serial: {SERIAL}"),
        ("group", 'serial = "ö"', f"group.serial: {SERIAL}"),
        ("group", 'serial = "1\\n"', f"group.serial: {SERIAL}"),
        ("group", "serial = 1599447001", f"group.serial: {SERIAL}"),
        ("group", f'manufacturer = "{NAME32}"', f"group.manufacturer: expected 0 to 32 {BLANKS}"),
        ("group", f'model = "{NAME32[:17]}"', f"group.model: expected 0 to 16 {BLANKS}"),
        ("group", 'standby = "west"', "group.standby: expected a list of member names"),
        ("group", "standby = [1]", "group.standby: expected a list of member names"),
        (
            "group",
            'balance = "random"',
            'group.balance: expected "least-busy" or "round-robin" or "primary-first"',
        ),
        ("group", "min_copies = 0", "group.min_copies: expected a whole number from 1 to 32"),
        ("group", 'escrow = "disk"', 'group.escrow: expected "token" or "none"'),
        ("group", 'session_keys = "copy"', 'group.session_keys: expected "pin" or "replicate"'),
        ("group", 'replication = "backend"', 'group.replication: "backend" is not available in this version'),
        ("group", 'replication = "all"', 'group.replication: expected "none" or "domain"'),
        ("group", 'standby = ["north"]', "group.standby: no [[member]] has the name 'north'"),
        ("group", 'standby = ["west"]', "group.standby: 'west' is already in group 'prod'"),
    ],
)
def test_option_of_the_wrong_kind_is_refused_at_its_line(section: str, text: str, complaint: str) -> None:
    line = 5 if section in ("member", "group") else 2
    assert option(text, section).startswith(f"/x.toml:{line}: {complaint}")


@pytest.mark.parametrize("host", ["worker", "unix:/run/hsm.sock"])
@pytest.mark.parametrize(
    ("said", "limits"),
    [
        ("", Timeouts(5, 20, 300)),
        ("call_timeout_s = 0.5", Timeouts(0.5, 0.5, 7.5)),
        ("call_timeout_s = 60", Timeouts(5, 60, 900)),
        ("call_timeout_s = { generation = 7 }", Timeouts(5, 20, 7)),
        ("call_timeout_s = { information = 1, cryptography = 2, generation = 3 }", Timeouts(1, 2, 3)),
        ('call_timeout_s = "none"', NO_TIMEOUTS),
    ],
)
def test_a_call_has_a_limit_where_it_can_be_ended(host: str, said: str, limits: Timeouts) -> None:
    member = parse(f'{EAST}host = "{host}"\n{said}\n{WEST}{PROD}', "/x.toml").members[0]
    assert (member.host, member.timeouts) == (host, limits)


def test_a_call_in_this_process_has_none_unless_it_is_said() -> None:
    members = parse(f"{EAST}call_timeout_s = 1\n{WEST}{PROD}", "/x.toml").members
    assert [m.timeouts for m in members] == [Timeouts(1, 1, 15), NO_TIMEOUTS]


def test_the_limits_are_those_of_the_classes() -> None:
    names = [each.value for each in Deadline if each is not Deadline.CONNECT]
    assert [field.name for field in fields(Timeouts)] == names


@pytest.mark.parametrize("host", ["process", "unix:/run/x"])
@pytest.mark.parametrize("said", ['user = "hsm-east"', "limits = { core = 0 }"])
def test_only_a_worker_of_ours_is_confined(host: str, said: str) -> None:
    key = said.partition(" ")[0]
    complaint = f'/x.toml:6: member.{key}: only with host = "worker"'
    assert option(f'host = "{host}"\n{said}', "member") == complaint


def test_a_worker_is_confined_as_it_is_said() -> None:
    said = 'user = "hsm-east"\nlimits = { memory_bytes = 1_000_000, core = 0 }'
    member = parse(f'{EAST}host = "worker"\n{said}\n{WEST}{PROD}', "/x.toml").members[0]
    assert (member.user, member.limits) == ("hsm-east", (("memory_bytes", 1000000), ("core", 0)))


@pytest.mark.parametrize(
    ("user", "euid", "problem"),
    [
        ("root", 1000, "only an application that runs as root can do that"),
        ("root", 0, None),
        ("nobody-of-that-name", 0, "there is no user 'nobody-of-that-name'"),
    ],
)
def test_a_worker_is_run_as_another_user_by_root_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, euid: int, problem: str | None
) -> None:
    module = tmp_path / "m.so"
    module.touch()
    text = f'{EAST}host = "worker"\nuser = "{user}"\n{PROD}'.replace(', "west"', "")
    path = tmp_path / "x.toml"
    path.write_text(text.replace("/usr/lib/m.so", str(module)))
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    if problem is None:
        assert load(str(path)).members[0].user == user
        return
    with pytest.raises(ConfigError) as refused:
        load(str(path))
    assert str(refused.value) == f"{path}:6: member.user: {problem}"


def test_a_worker_at_a_socket_takes_no_environment() -> None:
    complaint = "/x.toml:6: member.env: the worker at a socket has an environment of its own"
    assert option('host = "unix:/run/x"\nenv = { A = "1" }', "member") == complaint


def test_log_that_is_no_target_is_refused_with_the_reason() -> None:
    assert option('log = "file:ha.log"', "ha") == (
        '/x.toml:2: ha.log: expected "file:/path", "syslog", "stderr" or "off" (expected an absolute path)'
    )


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('name = "east"', 'name = ""', "2: member.name: expected a name of letters, digits and . _ -"),
        ('name = "east"', 'name = "a b"', "2: member.name: expected a name of letters, digits and . _ -"),
        ('name = "east"', 'name = "a\\n"', "2: member.name: expected a name of letters, digits and . _ -"),
        ('name = "east"', 'name = ".."', "2: member.name: expected a name of letters, digits and . _ -"),
        ('name = "east"', "", "1: member.name: required, but not given"),
        ('name = "east"', 'name = "west"', "6: member.name: 'west' is taken"),
        ('"/usr/lib/m.so"', '"m.so"', "3: member.module: expected an absolute path"),
        ("pkcs11:token=east", "east", "4: member.token: expected a PKCS#11 URI (RFC 7512) such as"),
        ('"pkcs11:token=east"', "1", "4: member.token: expected a PKCS#11 URI (RFC 7512)"),
        ('token = "pkcs11:token=east"', "", "1: member.token: required, but not given"),
        ('label = "prod"', 'label = ""', f"10: group.label: expected 1 to 32 {BLANKS}"),
        ('label = "prod"', 'label = "prod "', f"10: group.label: expected 1 to 32 {BLANKS}"),
        ('label = "prod"', "", "9: group.label: required, but not given"),
        ('["east", "west"]', "[]", "11: group.members: expected a list of at least one member name"),
        ('["east", "west"]', '["east",\n"oest"]', "12: group.members: no [[member]] has the name 'oest'"),
        ('["east", "west"]', '["east",\n"east"]', "12: group.members: 'east' is already in group 'prod'"),
        ("[[group]]", "[group]", "9: group: expected [[group]]"),
        (PROD, "", "1: group: expected at least one [[group]]"),
        (PROD, PROD + PROD, "13: group.label: 'prod' is taken"),
        (PROD, f'{PROD}[[group]]\nlabel = "x"\nmembers = ["west"]', "14: group.members: 'west' is already"),
        (PROD, f"{PROD}[groups]", "12: groups: unknown section; there are ha, recovery, member, group"),
        ("[[member]]", "[[members]]", "1: members: unknown section; there are ha, recovery, member, group"),
    ],
)
def test_what_does_not_fit_together_is_refused_at_its_line(old: str, new: str, complaint: str) -> None:
    text = (EAST + WEST + PROD).replace(old, new, 1)
    assert refusal(text).startswith(f"/x.toml:{complaint}")


def test_serial_is_given_once() -> None:
    groups = "".join(f'[[group]]\nlabel = "{m}"\nserial = "1"\nmembers = ["{m}"]\n' for m in ("east", "west"))
    assert refusal(EAST + WEST + groups) == "/x.toml:15: group.serial: '1' is taken"


def test_group_has_at_most_32_members_and_standbys() -> None:
    members = "".join(EAST.replace("east", f"m{n}") for n in range(33))
    names = [f"m{n}" for n in range(33)]
    text = f'{members}[[group]]\nlabel = "prod"\nmembers = {names[:30]}\nstandby = '
    assert len(parse(f"{text}{names[30:32]}", "/x").members) == 33
    assert refusal(f"{text}{names[30:]}") == "/x.toml:135: group.members: more than 32 with the standbys"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ha = 1", "/x.toml:1: ha: expected a table"),
        ("\n[[ha]]", "/x.toml:2: ha: expected a table"),
        ("group = []", "/x.toml:1: group: expected at least one [[group]]"),
        ("\nmember = [1]", "/x.toml:2: member: expected a table"),
        ("\n[ha", "/x.toml:2: not valid TOML: Expected ']' at the end of a table declaration"),
        ("\n\nonly =", "/x.toml:3: not valid TOML: Invalid value"),
        ("[ha]\nonly = true\nonly = true\n", "/x.toml:3: not valid TOML: Cannot overwrite a value"),
        ("[ha]\nlog = '''\n\n", "/x.toml:2: not valid TOML: Expected"),
        ("a = " + "1" * 5000, "/x.toml:1: not valid TOML: Exceeds the limit"),
        ("a = " + "[" * 100000, "/x.toml: not valid TOML: nested too deeply"),
    ],
)
def test_text_that_is_no_configuration_is_refused(text: str, complaint: str) -> None:
    assert refusal(text).startswith(complaint)


def test_path_in_a_message_stays_on_its_line() -> None:
    assert refusal("", "/a\nb\x1b.toml") == "/a\\nb\\x1b.toml:1: group: expected at least one [[group]]"


# lines


def test_lines_are_those_of_the_text() -> None:
    text = '''# [[member]]
title = """
[[member]]
name = "decoy" \\""" ""\\
""""" # two quotes of the text, three that end it
literal = \'\'\'
[ha]\'\'\'\'
a."b.c".'d"' = 1

[[member]]   # one
name = "x" # "y
env = { A = "}", B = ["]", [
  1979-05-27 07:32:00, # ]
  -1_000.5e3 ] ] }

[member.more]
k = 'x'
[[member.list]]
[[member.list]]
k = 1

[ [[member]] ]
'''.replace("[ [[member]] ]", "[[ member ]]\nname\t=\t'''a\n'''\n\"na\\u006De2\" = 2")
    assert tomllib.loads(text)["member"][1] == {"name": "a\n", "name2": 2}
    assert locate(text) == {
        ("title",): 2,
        ("literal",): 6,
        ("a",): 8,
        ("a", "b.c"): 8,
        ("a", "b.c", 'd"'): 8,
        ("member",): 10,
        ("member", 0): 10,
        ("member", 0, "name"): 11,
        ("member", 0, "env"): 12,
        ("member", 0, "env", "A"): 12,
        ("member", 0, "env", "B"): 12,
        ("member", 0, "env", "B", 0): 12,
        ("member", 0, "env", "B", 1): 12,
        ("member", 0, "env", "B", 1, 0): 13,
        ("member", 0, "env", "B", 1, 1): 14,
        ("member", 0, "more"): 16,
        ("member", 0, "more", "k"): 17,
        ("member", 0, "list"): 18,
        ("member", 0, "list", 0): 18,
        ("member", 0, "list", 1): 19,
        ("member", 0, "list", 1, "k"): 20,
        ("member", 1): 22,
        ("member", 1, "name"): 23,
        ("member", 1, "name2"): 25,
    }


def test_lines_of_a_dos_file_are_the_same() -> None:
    text = "[[member]]\n# x\nname = '''\n'''\nenv = [\n1,\n2]\n"
    assert locate(text.replace("\n", "\r\n")) == locate(text)


NOISE = "[[member]]\\n[ha]\\n# ' \\\" = { ] ,"
KEYS = st.sampled_from(["a", "b-c", "1", '"q.r"', "'s t'", '"#"', '"\\""', "'='", '"]"'])
SCALARS = st.sampled_from(
    [
        *("1", "-1.5e3", "true", "1979-05-27 07:32:00Z", "07:32:00"),
        *('""', "''", f'"{NOISE}"', "'[[member]] # \"'", "''''''", '""""""'),
        *('"""\n[[member]]\n""\\""""""', "'''\n[ha]\nx = [\n''''", '"""a\\\n   b"""'),
    ]
)
GAPS = st.sampled_from(["", " ", "\n", " # [x] = '\n", "\n\n"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(st.tuples(GAPS, inner, GAPS), max_size=3).map(
            lambda found: "[" + ",".join(before + value + after for before, value, after in found) + "]"
        ),
        st.dictionaries(KEYS, inner, max_size=3).map(
            lambda found: "{" + ", ".join(f"{key} = {value}" for key, value in found.items()) + "}"
        ),
    ),
    max_leaves=8,
)
TABLES = st.dictionaries(KEYS, st.tuples(VALUES, GAPS), max_size=4)
HEADERS = st.sampled_from(["[[m]]", "[[ n ]]", "[[m]] # x", '[["[x]"]]'])


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    if place:
        yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*place, number))


@settings(deadline=None)
@given(st.lists(st.tuples(HEADERS, TABLES), max_size=4))
def test_every_place_of_any_document_is_found_on_its_line(tables: list[tuple[str, dict[str, Any]]]) -> None:
    text, counts = "", dict.fromkeys(("m", "n", "[x]"), 0)
    expected: dict[Place, int] = {}
    for header, pairs in tables:
        (section,) = tomllib.loads(header)
        place: Place = (section, counts[section])
        counts[section] += 1
        expected[place] = 1 + text.count("\n")
        text += header + "\n"
        for key, (value, gap) in pairs.items():
            (name,) = tomllib.loads(f"{key} = 1")
            expected[(*place, name)] = 1 + text.count("\n")
            text += f"{key} = {value}{gap}\n"
    lines = locate(text)
    assert {place: lines.get(place) for place in expected} == expected
    assert set(lines) == set(places(tomllib.loads(text)))


@settings(deadline=None)
@given(st.text(alphabet="[]{}=,.'\"\\#\n\t ab1"))
def test_lines_of_any_text_are_looked_for_without_error(text: str) -> None:
    assert all(1 <= line <= 1 + text.count("\n") for line in locate(text).values())


# files


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A configuration with a module and a PIN that exist."""
    (tmp_path / "m.so").touch()
    (tmp_path / "pin").touch()
    path = tmp_path / "ha.toml"
    pin_source = f'pin_source = "file:{tmp_path}/pin"\n'
    path.write_text((EAST + pin_source + WEST + PROD).replace("/usr/lib", str(tmp_path)))
    return path


def refused_file(path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        load(str(path))
    return str(refused.value)


def test_file_is_read(written: Path) -> None:
    assert load(str(written)) == parse(written.read_text(), str(written))


def test_dos_file_is_read_and_its_lines_are_counted(written: Path) -> None:
    written.write_bytes(written.read_bytes().replace(b"\n", b"\r\n"))
    assert load(str(written)).groups[0].label == "prod"
    (written.parent / "pin").unlink()
    assert refused_file(written).startswith(f"{written}:5: member.pin_source: ")


def test_file_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    assert refused_file(tmp_path / "none") == (
        f"{tmp_path}/none: No such file or directory: p11ha member add begins one, PKCS11_HA_CONF or --config"
        " names another"
    )
    assert refused_file(tmp_path / "x.conf") == f"{tmp_path}/x.conf: No such file or directory"
    os.mkfifo(tmp_path / "fifo")
    assert refused_file(tmp_path / "fifo") == f"{tmp_path}/fifo: not a regular file"
    assert refused_file(tmp_path) == f"{tmp_path}: Is a directory"
    assert re.fullmatch(r"/a\\x00b: .*null.*", refused_file(Path("/a\0b")))  # Python's words, which change


def test_file_that_is_not_utf8_is_refused_at_its_line(written: Path) -> None:
    written.write_bytes(b"# a\n# \xff\n")
    assert refused_file(written) == f"{written}:2: not UTF-8"
    written.write_bytes(b"\xef\xbb\xbf[ha]\n")
    assert refused_file(written) == (
        f"{written}:1: begins with a byte order mark, which TOML has not: save it as UTF-8 without one"
    )


def test_module_that_is_missing_is_refused_at_its_line(written: Path) -> None:
    (written.parent / "m.so").unlink()
    module = written.parent / "m.so"
    assert refused_file(written) == f"{written}:3: member.module: {module}: No such file or directory"
    module.mkdir()
    assert refused_file(written) == f"{written}:3: member.module: {module}: is a directory"


def test_pin_file_that_is_missing_is_refused_at_its_line(written: Path) -> None:
    (written.parent / "pin").unlink()
    pin = written.parent / "pin"
    assert refused_file(written) == f"{written}:5: member.pin_source: {pin}: No such file or directory"


def test_pin_may_come_through_a_fifo_which_is_not_opened(written: Path) -> None:
    (written.parent / "pin").unlink()
    os.mkfifo(written.parent / "pin")
    load(str(written))


def test_module_that_may_not_be_read_is_refused_at_its_line(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = written.parent / "m.so"
    module.chmod(0)

    def access(path: str, mode: int, *, effective_ids: bool) -> bool:
        """What a user without root's rights would be told."""
        assert effective_ids
        return mode != os.R_OK or bool(Path(path).stat().st_mode & stat.S_IRUSR)

    monkeypatch.setattr(os, "access", access)
    assert refused_file(written) == f"{written}:3: member.module: {module}: permission denied"


# places


def test_configuration_is_looked_for_in_the_order_of_the_contract(tmp_path: Path) -> None:
    environ = {"PKCS11_HA_CONF": "/my.toml", "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    mine = tmp_path / "pkcs11-ha" / "pkcs11-ha.toml"
    assert find_path(environ) == "/my.toml"
    environ["PKCS11_HA_CONF"] = ""
    assert find_path(environ) == "/etc/pkcs11-ha/pkcs11-ha.toml"
    mine.parent.mkdir()
    mine.touch()
    assert find_path(environ) == str(mine)
    assert find_path({}) == "/etc/pkcs11-ha/pkcs11-ha.toml"


def test_state_is_kept_where_the_contract_says() -> None:
    environ = {"PKCS11_HA_STATE": "/my", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert state_dir(environ) == "/my"
    environ["PKCS11_HA_STATE"] = ""
    assert state_dir(environ) == "/run/user/7/pkcs11-ha"
    assert state_dir({}) == "/run/pkcs11-ha"


def test_relative_xdg_directories_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pkcs11-ha").mkdir()
    (tmp_path / "pkcs11-ha" / "pkcs11-ha.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert find_path({"XDG_CONFIG_HOME": "."}) == "/etc/pkcs11-ha/pkcs11-ha.toml"
    assert state_dir({"XDG_RUNTIME_DIR": "."}) == "/run/pkcs11-ha"


def test_environment_has_no_say_in_a_setuid_process(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"PKCS11_HA_CONF": "/my.toml", "PKCS11_HA_STATE": "/my"}
    assert find_path(environ, secure=True) == "/etc/pkcs11-ha/pkcs11-ha.toml"
    assert state_dir(environ, secure=True) == "/run/pkcs11-ha"
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert find_path(environ) == "/etc/pkcs11-ha/pkcs11-ha.toml"
    assert state_dir(environ) == "/run/pkcs11-ha"
    assert find_path(environ, secure=False) == "/my.toml"


def test_process_is_secure_when_its_rights_are_not_its_callers() -> None:
    assert not is_secure(7, 7, 8, 8)
    assert is_secure(7, 0, 8, 8)
    assert is_secure(7, 7, 8, 0)
