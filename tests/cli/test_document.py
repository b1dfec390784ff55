"""Tables of a configuration are edited one by one: every other byte stays, comments stay with what they are about."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha.cli.document import Document, DocumentError

TEXT = """\
# HSMs of the signing service
# (ask Ann before you change it)

[ha]            # how we look
log = "stderr"  # containers

# ---- members ----

# in Berlin
[[member]]
name = "east"
module = "/x.so"
token = "pkcs11:token=east"
# pin_source = "file:/later"

# in Bonn
[[member]]
name = "west"
module = "/x.so"
token = "pkcs11:token=west"
[member.env]
A = "1"    # first
TEXT = \"\"\"
[[member]]
# not a comment
\"\"\"

# ---- groups ----

[[group]]
label = "prod"
members = [
    "east",   # the newer one
    "west",
]
standby = []   # none yet
"""


def lines_gone(before: str, after: str) -> list[str]:
    kept = after.splitlines()
    return [line for line in before.splitlines() if line not in kept]


def test_nothing_changes_by_itself() -> None:
    assert Document(TEXT).text == TEXT


def test_ends_of_lines_stay() -> None:
    document = Document(TEXT.replace("\n", "\r\n"))
    document.set("ha", {"only": False})
    document.add("member", {"name": "new", "module": "/new.so"})
    document.remove("member", 0)
    assert document.text.count("\n") == document.text.count("\r\n")
    changed = Document(TEXT)
    changed.set("ha", {"only": False})
    changed.add("member", {"name": "new", "module": "/new.so"})
    changed.remove("member", 0)
    assert document.text.replace("\r\n", "\n") == changed.text


def test_a_key_changes_in_its_line() -> None:
    document = Document(TEXT)
    document.set("ha", {"log": "off"})
    assert document.text == TEXT.replace('log = "stderr"  # containers', 'log = "off"  # containers')


def test_a_new_key_stands_in_its_table_and_not_below_the_comments_of_the_next() -> None:
    document = Document(TEXT)
    document.set("ha", {"only": False})
    assert document.text == TEXT.replace("# containers\n", "# containers\nonly = false\n")
    document.set("member", {"host": "worker"}, 1)
    assert tomllib.loads(document.text)["member"][1]["host"] == "worker"
    assert lines_gone(TEXT, document.text) == []


def test_lists_keep_their_layout() -> None:
    document = Document(TEXT)
    document.set("group", {"members": ["east", "north"], "standby": ["west"]})
    assert document.text == TEXT.replace('    "west",\n', '    "north",\n').replace("[]   #", '["west"]   #')
    document.set("group", {"members": ["north", "east"]})
    assert tomllib.loads(document.text)["group"][0]["members"] == ["north", "east"]


def test_a_new_table_stands_behind_the_last_of_its_kind() -> None:
    document = Document(TEXT)
    document.add("member", {"name": "north", "env": {"A": 'quo"te'}})
    document.add("recovery", {"attempts": 3})
    document.add("group", {"label": "test", "members": ["north"]})
    text = document.text
    assert lines_gone(TEXT, text) == []
    marks = [
        "[ha]",
        "[recovery]",
        "# ---- members",
        '"east"',
        "# in Bonn",
        '"west"',
        '"north"',
        "# ---- groups",
    ]
    places = [text.index(mark) for mark in [*marks, '"prod"', '"test"']]
    assert places == sorted(places)
    assert "\n\n\n" not in text
    assert text.endswith('members = ["north"]\n')


def test_a_table_goes_with_the_comments_that_are_about_it() -> None:
    document = Document(TEXT)
    document.remove("member", 1)
    assert document.text == TEXT[: TEXT.index("# in Bonn")] + TEXT[TEXT.index("# ---- groups") :]
    document.remove("member", 0)
    document.remove("group", 0)
    assert document.text == TEXT[: TEXT.index("# in Berlin")] + "# ---- groups ----\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[recovery]\nattempts = 1\n"),
        ("# only this", "# only this\n\n[recovery]\nattempts = 1\n"),
        ("[ha]\nonly = true", "[ha]\nonly = true\n\n[recovery]\nattempts = 1\n"),
        ("[[member]]\nname = 1\n", "[recovery]\nattempts = 1\n\n[[member]]\nname = 1\n"),
        ("recovery.interval_s = 7 # x\n[ha]\n", "recovery.interval_s = 7 # x\nrecovery.attempts = 1\n[ha]\n"),
        ("recovery = {interval_s = 7} # x\n", None),
        ("[ ha ]\r\nonly = true\r\n[ 'recovery' ]\r\n", None),
    ],
)
def test_wherever_a_section_stands(text: str, expected: str | None) -> None:
    document = Document(text)
    document.set("recovery", {"attempts": 1})
    before, after = tomllib.loads(text), tomllib.loads(document.text)
    assert after == before | {"recovery": before.get("recovery", {}) | {"attempts": 1}}
    assert expected is None or document.text == expected


def test_members_in_one_list_are_left_to_their_writer() -> None:
    document = Document('member = [{name = "east"}]\n')
    with pytest.raises(DocumentError, match=r"\[\[member\]\]"):
        document.add("member", {"name": "west"})


COMMENTS = st.lists(st.sampled_from(["# one", "  # two", "", "# three = 3", "# [[member]]"]), max_size=4)
BODIES = st.lists(
    st.sampled_from(["a = 1  # c", 'b = "#x"', 'c = """\n[ha]\n\n#\n"""', "d = [\n  1, # e\n\n]", "e.f = 2"]),
    unique=True,
    max_size=4,
)
TABLES = st.lists(st.tuples(COMMENTS, st.sampled_from(["member", "group"]), BODIES), max_size=5)


@given(COMMENTS, TABLES, COMMENTS, st.data())
def test_any_layout(
    head: list[str], tables: list[tuple[list[str], str, list[str]]], tail: list[str], data: st.DataObject
) -> None:
    """What the document says changes as it should, and no line outside of the table in question goes."""
    lines = list(head)
    for comments, section, body in tables:
        lines += [*comments, f"[[{section}]]", *body]
    text = "\n".join([*lines, *tail]) + data.draw(st.sampled_from(["", "\n", "\n\n"]))
    said, document = tomllib.loads(text), Document(text)
    assert document.text == text

    section = data.draw(st.sampled_from(["member", "group"]))
    there = said.get(section, [])
    number = data.draw(st.integers(0, len(there)))
    if number == len(there):
        document.add(section, {"new": 1})
        there = [*there, {"new": 1}]
    elif data.draw(st.booleans()):
        document.set(section, {"new": 1}, number)
        there = [table | {"new": 1} if n == number else table for n, table in enumerate(there)]
    else:
        document.remove(section, number)
        there = [table for n, table in enumerate(there) if n != number]
    assert tomllib.loads(document.text).get(section, []) == there
    assert len(there) < len(said.get(section, [])) or lines_gone(text, document.text) == []
