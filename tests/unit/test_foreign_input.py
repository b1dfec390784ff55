"""What comes from outside, from a file, a token or another host, is understood or refused; nothing else comes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pkcs11_ha import ck
from pkcs11_ha.config import OPTIONS, ConfigError, parse
from pkcs11_ha.core import der, ledger, template
from pkcs11_ha.core.identity import Name
from pkcs11_ha.core.ledger import Entry, LedgerError, Owner, Wrapped
from pkcs11_ha.uri import UriError, parse_pin_source
from tests.der import tlv

# ---- the configuration

NAMES = sorted({option.name for option in OPTIONS} | {"x", '"a b"'})
SCALARS = st.sampled_from(
    [
        *'0 -1 1 1e9 inf nan true 1979-05-27 "" "east" "west" "worker" "unix:" "/m.so" "pkcs11:token=a"'.split(),
        *'"\\u0000" "file:" "off" "domain" 0x7fffffffffffffffffff [] {} "\\U0010FFFF"'.split(),
        "'''\n'''",
    ]
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3).map(lambda items: f"[{', '.join(items)}]")
LINES = st.one_of(
    st.sampled_from(["[ha]", "[recovery]", "[[member]]", "[[group]]", "[member]", "[x]", "[[ha]]"]),
    st.builds("{} = {}".format, st.sampled_from(NAMES), VALUES),
    st.text(max_size=8),
)
GOOD = (
    '[[member]]\nname = "east"\nmodule = "/m.so"\ntoken = "pkcs11:token=east"\n'
    '[[group]]\nlabel = "prod"\nmembers = ["east"]\n'
)


@settings(deadline=None)
@given(st.lists(LINES, max_size=8).map("\n".join), st.sampled_from(["", GOOD]))
@example("x = " + "[" * 5000, "")
@example("x = " + "9" * 5000, "")
def test_any_configuration_is_read_or_refused_in_one_line(text: str, before: str) -> None:
    complaint = ""
    try:
        parse(before + text, "/x.toml")
    except ConfigError as refused:
        complaint = str(refused)
    assert complaint.isprintable()


@given(st.text() | st.builds("file:{}".format, st.text(alphabet="/%20loca\0|")))
def test_any_pin_source_is_a_path_or_refused(text: str) -> None:
    try:
        path = parse_pin_source(text)
    except UriError:
        return
    assert path.startswith("/")
    assert "\0" not in path


# ---- DER

TAGS = st.sampled_from([der.INTEGER, der.BIT_STRING, der.OCTET_STRING, der.NULL, der.OID, der.SEQUENCE, 0xA0])
NESTED = st.recursive(
    st.binary(max_size=20),
    lambda inner: st.lists(st.builds(tlv, TAGS, inner), max_size=3).map(b"".join),
    max_leaves=6,
)


@given(st.binary(max_size=64) | NESTED)
@example(b"\x30\x88" + b"\xff" * 8)
@example(b"\x30\x84\x00")
def test_any_bytes_are_elements_or_none(data: bytes) -> None:
    for read in (der.row, der.sequence):
        elements = read(data)
        if elements is not None and read is der.row:
            assert b"".join(element.raw for element in elements) == data
    der.bits(data)


@given(TAGS, st.binary(max_size=300))
def test_an_element_says_what_was_put_into_it(tag: int, content: bytes) -> None:
    assert der.element(tlv(tag, content), tag) == content


# ---- the ledger

BLOBS = st.binary(max_size=8)
NUMBERS = st.integers(0, 2**64 - 1)
TEXTS = st.text(max_size=8)
CALLED = st.builds(Name, st.none() | NUMBERS, st.none() | NUMBERS, BLOBS, BLOBS, BLOBS, BLOBS)
ALONE: dict[str, st.SearchStrategy[Any]] = {
    "uid": TEXTS,
    "version": NUMBERS,
    "alive": st.booleans(),
    "name": CALLED,
    "former": st.lists(CALLED, max_size=2).map(tuple),
    "fingerprint": st.none() | BLOBS,
    "evidence": st.none() | BLOBS,
    "wrapped": st.none() | st.builds(Wrapped, NUMBERS, TEXTS, BLOBS, NUMBERS),
    "change": st.dictionaries(NUMBERS, BLOBS, max_size=2),
    "owed": st.frozensets(TEXTS, max_size=2),
    "foreign": st.booleans(),
    "owner": st.none() | st.builds(Owner, TEXTS, NUMBERS, NUMBERS, TEXTS),
}
ENTRIES = st.builds(Entry, **ALONE, together=st.lists(st.builds(Entry, **ALONE), max_size=2).map(tuple))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


@given(ENTRIES)
def test_an_entry_survives_the_way_through_a_token(entry: Entry) -> None:
    assert ledger.decode(ledger.encode(entry)) == entry


def read(value: bytes) -> None:
    """The entry, if it is one, is one that can be worked with."""
    try:
        entry = ledger.decode(value)
    except LedgerError:
        return
    assert ledger.decode(ledger.encode(entry)) == entry
    assert max([entry, ledger.tombstone(entry, Owner("h", 1, 2, "n"))], key=lambda one: one.weight) != entry


@given(ENTRIES, st.data())
def test_a_damaged_entry_is_refused(entry: Entry, data: st.DataObject) -> None:
    plain = json.loads(ledger.encode(entry))
    for key in data.draw(
        st.lists(st.sampled_from([*plain, "format", "together", "change", "owner"]), max_size=2)
    ):
        plain[key] = data.draw(ANYTHING)
    read(json.dumps(plain).encode())


@given(st.binary() | st.text().map(str.encode) | ANYTHING.map(lambda plain: json.dumps(plain).encode()))
@example(b"[" * 100_000)
@example(b'{"format": ' + b"9" * 5000 + b"}")
@example(b"1" * 5000)
def test_any_value_is_an_entry_or_refused(value: bytes) -> None:
    read(value)


@pytest.mark.parametrize(
    "damage",
    [
        {"change": []},
        {"version": "2"},
        {"version": True},
        {"alive": 1},
        {"uid": None},
        {"owner": [1, 2, 3, 4]},
    ],
)
def test_what_an_entry_says_has_its_type(damage: dict[str, object]) -> None:
    """Or comparing versions would be the first to notice."""
    whole = Entry("0" * 32, 1, True, Name(4, 31, b"", b"", b"", b""))
    plain = json.loads(ledger.encode(whole)) | damage
    with pytest.raises(LedgerError):
        ledger.decode(json.dumps(plain).encode())


# ---- templates, as members show them and applications wish them

TYPES = st.sampled_from(sorted(ck.ATTRIBUTE_NAMES)) | NUMBERS
PLAIN = st.dictionaries(TYPES, BLOBS, max_size=4)
TEMPLATES = st.dictionaries(TYPES, BLOBS | PLAIN.map(lambda inner: tuple(inner.items())), max_size=8)


@given(TEMPLATES, TEMPLATES, st.booleans())
def test_any_template_can_be_copied_and_compared(one: Any, other: Any, is_key: bool) -> None:
    assert template.for_copy(one)[ck.CKA_TOKEN] == b"\1"
    assert template.for_seed(one, is_key=is_key)[ck.CKA_TOKEN] == b"\0"
    assert all(isinstance(value, bytes) for value in template.wished(one, is_key=is_key).values())
    assert template.contradictions(one, one) == []
    assert set(template.contradictions(one, other)) <= set(one) & set(other)
    template.is_reserved(one)
    template.is_stateful(None, one)
