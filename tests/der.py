"""Writes DER (X.690) for tests."""


def tlv(tag: int, content: bytes) -> bytes:
    """One element, of less than 64 KiB."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content
