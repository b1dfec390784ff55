"""PKCS#11 URIs select the token that is meant and no other; file URIs name a file and run nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkcs11_ha.uri import TokenSelector, UriError, parse_file_uri, parse_pin_source, parse_token_uri

SLOT = {"slotDescription": "SoftHSM slot ID 0x2a", "manufacturerID": "SoftHSM project"}
TOKEN = {"label": "east", "manufacturerID": "Snake Oil", "serialNumber": "0123456789abcdef", "model": "v2"}
LIBRARY = {"libraryDescription": "Oil library", "manufacturerID": "Oil & Sons", "libraryVersion": (3, 0)}


def matches(uri: str, **changed: str) -> bool:
    return parse_token_uri(uri).matches(42, SLOT, {**TOKEN, **changed}, LIBRARY)


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:",
        "pkcs11:?",
        "PKCS11:token=east",
        "pkcs11:token=e%61st",
        "pkcs11:token=east%20%20",
        "pkcs11:manufacturer=Snake%20Oil",
        "pkcs11:serial=0123456789abcdef",
        "pkcs11:model=v2",
        "pkcs11:slot-id=42",
        "pkcs11:slot-description=SoftHSM%20slot%20ID%200x2a",
        "pkcs11:slot-manufacturer=SoftHSM%20project",
        "pkcs11:library-description=Oil%20library",
        "pkcs11:library-manufacturer=Oil%20&%20Sons",
        "pkcs11:library-version=3",
        "pkcs11:library-version=3.0",
        "pkcs11:model=v2;token=east;slot-id=42",
    ],
)
def test_what_the_token_says_of_itself_matches(uri: str) -> None:
    assert matches(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:token=west",
        "pkcs11:token=East",
        "pkcs11:token=eas",
        "pkcs11:token=",
        "pkcs11:manufacturer=SoftHSM%20project",
        "pkcs11:serial=0123456789abcde",
        "pkcs11:model=v3",
        "pkcs11:slot-id=43",
        "pkcs11:slot-description=Snake%20Oil",
        "pkcs11:slot-manufacturer=Snake%20Oil",
        "pkcs11:library-description=east",
        "pkcs11:library-manufacturer=Snake%20Oil",
        "pkcs11:library-version=3.1",
        "pkcs11:token=east;slot-id=43",
        "pkcs11:slot-id=42;token=west",
    ],
)
def test_another_token_does_not_match(uri: str) -> None:
    assert not matches(uri)


def test_empty_attribute_matches_an_empty_field_only() -> None:
    assert matches("pkcs11:token=", label="")


def test_fact_that_is_not_given_matches_nothing() -> None:
    assert not parse_token_uri("pkcs11:library-version=3").matches(42, SLOT, TOKEN)
    assert not parse_token_uri("pkcs11:model=").matches(42, SLOT, {})


def test_slot_id_is_that_of_the_slot_and_not_of_its_description() -> None:
    assert not parse_token_uri("pkcs11:slot-id=42").matches(7, {"slotID": 42}, TOKEN)


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("", "expected a PKCS#11 URI (RFC 7512) such as pkcs11:token=NAME"),
        ("east", "expected a PKCS#11 URI (RFC 7512) such as pkcs11:token=NAME"),
        ("pkcs12:token=east", "expected a PKCS#11 URI (RFC 7512) such as pkcs11:token=NAME"),
        (" pkcs11:token=east", "expected a PKCS#11 URI (RFC 7512) such as pkcs11:token=NAME"),
        ("pkcs11:token", "expected attribute=value between semicolons"),
        ("pkcs11:token=east;", "expected attribute=value between semicolons"),
        ("pkcs11:;token=east", "expected attribute=value between semicolons"),
        ("pkcs11:token=east;token=east", "'token' is given twice"),
        ("pkcs11:token=my token", "token: ' ' must be written %20"),
        ("pkcs11:token=a/b", "token: '/' must be written %2F"),
        ("pkcs11:token=ö", "token: 'ö' must be written %C3%B6"),
        ("pkcs11:token=a\nb", "token: '\\n' must be written %0A"),
        ("pkcs11:token=100%", "token: '%' must be written %25"),
        ("pkcs11:token=%4", "token: '%' must be written %25"),
        ("pkcs11:token=%zz", "token: '%' must be written %25"),
        ("pkcs11:token=%ff", "token: the percent-encoded bytes are not UTF-8"),
        ("pkcs11:token=" + "x" * 33, "token: longer than the 32 bytes this field has in PKCS#11"),
        ("pkcs11:token=" + "%C3%B6" * 17, "token: longer than the 32 bytes this field has in PKCS#11"),
        ("pkcs11:serial=" + "0" * 17, "serial: longer than the 16 bytes this field has in PKCS#11"),
        ("pkcs11:slot-id=", "slot-id: expected a slot number"),
        ("pkcs11:slot-id=-1", "slot-id: expected a slot number"),
        ("pkcs11:slot-id=0x1", "slot-id: expected a slot number"),
        ("pkcs11:slot-id=%D9%A3", "slot-id: expected a slot number"),
        ("pkcs11:slot-id=18446744073709551616", "slot-id: expected a slot number"),
        ("pkcs11:library-version=", "library-version: expected a version such as 2 or 2.40"),
        ("pkcs11:library-version=2.", "library-version: expected a version such as 2 or 2.40"),
        ("pkcs11:library-version=2.256", "library-version: expected a version such as 2 or 2.40"),
        ("pkcs11:library-version=256", "library-version: expected a version such as 2 or 2.40"),
        ("pkcs11:object=key", "'object' names an object, and a member is a token"),
        ("pkcs11:type=cert", "'type' names an object, and a member is a token"),
        ("pkcs11:id=%01", "'id' names an object, and a member is a token"),
        ("pkcs11:vendor-x=1", "'vendor-x' is unknown, so a token cannot be selected by it"),
        ("pkcs11:Token=east", "'Token' is unknown, so a token cannot be selected by it"),
        ("pkcs11:a\nb=1", "'a\\nb' is unknown, so a token cannot be selected by it"),
        ("pkcs11:token=east?x-vendor=1", "'x-vendor' is unknown, so a token cannot be selected by it"),
        ("pkcs11:token=east?pin-source=file:/p", "'pin-source' has no place in a token URI: set pin_source"),
        ("pkcs11:token=east?module-path=/m.so", "'module-path' has no place in a token URI: set module"),
        ("pkcs11:token=east?module-name=m", "'module-name' has no place in a token URI: set module"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(uri: str, complaint: str) -> None:
    with pytest.raises(UriError) as refused:
        parse_token_uri(uri)
    assert str(refused.value) == complaint


@pytest.mark.parametrize("uri", ["pkcs11:token=east?pin-value=31415926", "pkcs11:pin-value=31415926"])
def test_pin_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UriError) as refused:
        parse_token_uri(uri)
    assert "pin_source" in str(refused.value)
    assert "31415926" not in str(refused.value)


def test_order_and_spelling_do_not_make_another_selector() -> None:
    one = parse_token_uri("pkcs11:slot-id=042;token=e%61st;library-version=3")
    assert one == parse_token_uri("pkcs11:library-version=3.0;token=east;slot-id=42")
    assert hash(one) == hash(parse_token_uri(str(one)))
    assert str(one) == "pkcs11:token=east;slot-id=42;library-version=3.0"


FIELDS = ("token", "manufacturer", "serial", "model", "slot-description", "library-description")


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional={name: st.text(max_size=4) for name in FIELDS}))
def test_every_text_survives_the_way_through_a_uri(texts: dict[str, str]) -> None:
    selector = TokenSelector(tuple((name, texts[name].rstrip(" ")) for name in FIELDS if name in texts))
    assert str(selector).isascii()
    assert parse_token_uri(str(selector)) == selector


PIECES = st.sampled_from(
    ["token", "slot-id", "pin-value", "=", ";", "?", "&", "%", "%4", "%0A", "1", "\n", "ö"]
)


@settings(deadline=None)
@given(st.lists(PIECES).map(lambda pieces: "pkcs11:" + "".join(pieces)) | st.text())
def test_any_text_is_either_understood_or_refused_in_one_line(text: str) -> None:
    complaint = ""
    try:
        parse_token_uri(text)
    except UriError as refused:
        complaint = str(refused)
    assert complaint == "" or complaint.isprintable()


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/run/pin", "/run/pin"),
        ("/run/a%20b|c?d", "/run/a%20b|c?d"),
        ("file:/run/pin", "/run/pin"),
        ("file:///run/pin", "/run/pin"),
        ("file://localhost/run/pin", "/run/pin"),
        ("FILE:/run/a%20b;c", "/run/a b;c"),
    ],
)
def test_pin_source_names_a_file(text: str, path: str) -> None:
    assert parse_pin_source(text) == path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("|/bin/pin", "commands are not run: name a file, file:/path"),
        ("run/pin", "expected a file URI such as file:/path"),
        ("", "expected a file URI such as file:/path"),
        ("http://host/pin", "expected a file URI such as file:/path"),
        ("file:run/pin", "expected an absolute path"),
        ("file:", "expected an absolute path"),
        ("file://host/run/pin", "a file on another host ('host') cannot be read"),
        ("file:/run/a b", "' ' must be written %20"),
        ("file:/run/a?b", "'?' must be written %3F"),
        ("file:/run/%00", "expected an absolute path"),
        ("/run/\0", "expected an absolute path"),
    ],
)
def test_pin_source_that_is_no_file_is_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(UriError) as refused:
        parse_pin_source(text)
    assert str(refused.value) == complaint


def test_plain_path_is_no_file_uri() -> None:
    with pytest.raises(UriError):
        parse_file_uri("/run/pin")
