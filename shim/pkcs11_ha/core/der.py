"""Reads the DER (X.690) in which tokens give public keys; what is malformed is None, never an exception."""

from typing import NamedTuple

INTEGER, BIT_STRING, OCTET_STRING, NULL, OID = 0x02, 0x03, 0x04, 0x05, 0x06
PRINTABLE_STRING, SEQUENCE = 0x13, 0x30
CONTEXT_0 = 0xA0  # [0] EXPLICIT


class Element(NamedTuple):
    tag: int
    content: bytes
    raw: bytes
    """The whole element, tag and length included."""


def row(data: bytes) -> tuple[Element, ...] | None:
    """All elements of `data`, which is nothing but elements one after the other; else None.

    Lengths need not be minimal: modules of vendors write BER, and the content is what counts.
    """
    elements = []
    start = 0
    while start < len(data):
        body, length = start + 2, data[start + 1] if start + 1 < len(data) else 0x80
        if data[start] & 0x1F == 0x1F or length in (0x80, 0xFF):  # long tags and open ends: in no public key
            return None
        if length > 0x80:
            body += length - 0x80
            length = int.from_bytes(data[start + 2 : body], "big")
        end = body + length
        if end > len(data):
            return None
        elements.append(Element(data[start], data[body:end], data[start:end]))
        start = end
    return tuple(elements)


def element(data: bytes, tag: int) -> bytes | None:
    """The content of `data`, which is one element with this tag and nothing else; else None."""
    elements = row(data)
    return elements[0].content if elements and len(elements) == 1 and elements[0].tag == tag else None


def sequence(data: bytes) -> tuple[Element, ...] | None:
    """The elements of `data`, which is one SEQUENCE and nothing else; else None."""
    content = element(data, SEQUENCE)
    return None if content is None else row(content)


def bits(content: bytes) -> bytes | None:
    """The bytes of a BIT STRING's content; None where it does not end on a byte."""
    return content[1:] if content[:1] == b"\0" else None
