"""URIs of the configuration: a PKCS#11 URI (RFC 7512) selects a token, a file URI (RFC 8089) names a file."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Value = str | int | tuple[int, int]
"""What an attribute wants: a text, a slot number, or a version (major, minor)."""


class UriError(ValueError):
    """A URI that cannot be parsed or cannot be honoured: one line, which never repeats the value of a PIN."""


# Characters that stand for themselves; all others are percent-encoded. RFC 7512 section 2.3 (pk11-pchar) and
# RFC 3986 section 3.3 (pchar and "/").
_ATTRIBUTE_CHARACTERS = r"A-Za-z0-9\-._~:\[\]@!$'()*+,=&"
_PATH_CHARACTERS = r"A-Za-z0-9\-._~:@!$'()*+,;=&/"


def _decode(text: str, characters: str) -> str:
    """Undo percent-encoding; refuses what RFC 3986 section 2 wants encoded, and what is not UTF-8."""
    bad = re.search(rf"%(?![0-9A-Fa-f]{{2}})|[^%{characters}]", text)
    if bad is not None:
        encoded = "".join(f"%{byte:02X}" for byte in bad[0].encode("utf-8", "backslashreplace"))
        raise UriError(f"{bad[0]!r} must be written {encoded}")
    data = re.sub(rb"%(..)", lambda code: bytes([int(code[1], 16)]), text.encode("ascii"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UriError("the percent-encoded bytes are not UTF-8") from None


def _encode(text: str) -> str:
    legal = re.compile(rf"[{_ATTRIBUTE_CHARACTERS}]")
    return "".join(c if legal.match(c) else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)


def _field(width: int) -> Callable[[str], Value]:
    """A blank-padded character field of `width` bytes: what is longer can match no token."""

    def parse(text: str) -> Value:
        if len(text.encode()) > width:
            raise UriError(f"longer than the {width} bytes this field has in PKCS#11")
        return text.rstrip(" ")

    return parse


def _slot_id(text: str) -> Value:
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= 2**64:
        raise UriError("expected a slot number")
    return int(text)


def _version(text: str) -> Value:
    """RFC 7512 section 2.3: `M` or `M.N`, where `M` means `M.0`; CK_VERSION has a byte for each."""
    version = re.fullmatch(r"([0-9]{1,3})(?:\.([0-9]{1,3}))?", text)
    major, minor = (int(version[1]), int(version[2] or 0)) if version else (256, 256)
    if max(major, minor) > 255:
        raise UriError("expected a version such as 2 or 2.40")
    return major, minor


@dataclass(frozen=True)
class _Attribute:
    structure: str
    field: str
    parse: Callable[[str], Value]


# RFC 7512 section 2.3: the attributes that say something of a token, its slot or its library, and where
# PKCS#11 keeps it.
_ATTRIBUTES = {
    "token": _Attribute("token", "label", _field(32)),
    "manufacturer": _Attribute("token", "manufacturerID", _field(32)),
    "serial": _Attribute("token", "serialNumber", _field(16)),
    "model": _Attribute("token", "model", _field(16)),
    "slot-id": _Attribute("slot", "slotID", _slot_id),
    "slot-description": _Attribute("slot", "slotDescription", _field(64)),
    "slot-manufacturer": _Attribute("slot", "manufacturerID", _field(32)),
    "library-description": _Attribute("library", "libraryDescription", _field(32)),
    "library-manufacturer": _Attribute("library", "manufacturerID", _field(32)),
    "library-version": _Attribute("library", "libraryVersion", _version),
}

_REFUSED = {
    "object": "names an object, and a member is a token",
    "type": "names an object, and a member is a token",
    "id": "names an object, and a member is a token",
    "pin-source": "has no place in a token URI: set pin_source",
    "pin-value": "has no place in a token URI: put the PIN into a file and set pin_source",
    "module-name": "has no place in a token URI: set module",
    "module-path": "has no place in a token URI: set module",
}


def _refusal(name: str) -> UriError:
    return UriError(f"{name!r} {_REFUSED.get(name, 'is unknown, so a token cannot be selected by it')}")


_NO_FACTS: Mapping[str, object] = {}


@dataclass(frozen=True)
class TokenSelector:
    """What a token must be to be meant: (URI attribute, wanted value) pairs in a fixed order.

    `str(selector)` is the URI again, in normal form.
    """

    wanted: tuple[tuple[str, Value], ...]

    @property
    def serial(self) -> str:
        """The serial number that it names; empty if it names none."""
        return str(dict(self.wanted).get("serial", ""))

    def matches(
        self,
        slot_id: int,
        slot: Mapping[str, object],
        token: Mapping[str, object],
        library: Mapping[str, object] = _NO_FACTS,
    ) -> bool:
        """Whether every attribute is equal to what the slot, token and library say of themselves.

        Keys are the field names of CK_SLOT_INFO, CK_TOKEN_INFO and CK_INFO ("label", "serialNumber",
        "slotDescription", …), values plain Python: texts without their padding, versions (major, minor).
        An empty attribute matches an empty field only; a fact that is not given matches nothing.
        """
        facts = {"slot": {**slot, "slotID": slot_id}, "token": token, "library": library}
        places = ((_ATTRIBUTES[name], value) for name, value in self.wanted)
        return all(facts[place.structure].get(place.field) == value for place, value in places)

    def __str__(self) -> str:
        return "pkcs11:" + ";".join(f"{name}={_write(value)}" for name, value in self.wanted)


def _write(value: Value) -> str:
    match value:
        case str():
            return _encode(value)
        case int():
            return str(value)
        case major, minor:
            return f"{major}.{minor}"


def parse_token_uri(text: str) -> TokenSelector:
    """Parse a PKCS#11 URI that selects a token; raises UriError.

    `pkcs11:` alone is allowed (RFC 7512 section 2.3) and matches every token.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme.lower() != "pkcs11":
        raise UriError("expected a PKCS#11 URI (RFC 7512) such as pkcs11:token=NAME")
    path, _, query = rest.partition("?")
    if query:
        raise _refusal(query.partition("&")[0].partition("=")[0])
    wanted: dict[str, Value] = {}
    for part in path.split(";") if path else ():
        name, equals, value = part.partition("=")
        if not equals:
            raise UriError("expected attribute=value between semicolons")
        if name not in _ATTRIBUTES:
            raise _refusal(name)
        if name in wanted:
            raise UriError(f"{name!r} is given twice")
        try:
            wanted[name] = _ATTRIBUTES[name].parse(_decode(value, _ATTRIBUTE_CHARACTERS))
        except UriError as error:
            raise UriError(f"{name}: {error}") from None
    return TokenSelector(tuple((name, wanted[name]) for name in _ATTRIBUTES if name in wanted))


def parse_file_uri(text: str) -> str:
    """The absolute path a file URI names (RFC 8089): file:/path or file:///path; raises UriError."""
    scheme, colon, rest = text.partition(":")
    if not colon or scheme.lower() != "file":
        raise UriError("expected a file URI such as file:/path")
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise UriError(f"a file on another host ({host!r}) cannot be read")
        rest = "/" + path
    return _absolute(_decode(rest, _PATH_CHARACTERS))


def parse_pin_source(text: str) -> str:
    """The absolute path of a file that holds a PIN: `/path` as it stands, or a file URI; raises UriError."""
    if text.startswith("|"):
        # RFC 7512 section 2.4 lets a consumer run it; a library inside somebody else's process does not.
        raise UriError("commands are not run: name a file, file:/path")
    if text.startswith("/"):
        return _absolute(text)
    return parse_file_uri(text)


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise UriError("expected an absolute path")
    return path
