"""The demo's audit: what is so passes, and each fact that is not as it must be ends the demo in one clear line."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from demo.audit import Audit, Broken

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())


def point(key: ec.EllipticCurvePrivateKey) -> str:
    return "0441" + key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint).hex()


def generated(label: str, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    return f"generated {label} west {point(key)}"


def signed(
    label: str,
    thread: int,
    counter: int,
    member: str = "west",
    key: ec.EllipticCurvePrivateKey = KEY,
    data: bytes | None = None,
) -> str:
    data = thread.to_bytes(16) + counter.to_bytes(16) if data is None else data
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(Prehashed(hashes.SHA256()))))
    signature = (r.to_bytes(32) + s.to_bytes(32)).hex()
    return f"signed {label} {thread} {counter} {1000 + counter} 7 {member} {data.hex()} {signature}"


def read(*lines: str, audit: Audit | None = None) -> Audit:
    audit = audit or Audit()
    for line in lines:
        audit.read(line)
    return audit


def test_keys_that_are_made_used_and_destroyed() -> None:
    audit = read(
        generated("second"),
        generated("third", OTHER),
        signed("second", 1, 0, "east"),
        signed("third", 0, 0, key=OTHER),
        signed("second", 0, 1),
        "found third 1 1",
        "destroyed third 2",
        "found third 0 0",
        "found second 1 1",
        "done 3 0",
    )
    assert audit.verified == {"east": 1, "west": 2}
    assert audit.signed_with == {("second", "east"): 1, ("third", "west"): 1, ("second", "west"): 1}
    assert audit.answered == 8  # all but the signature of thread 1 and `done`
    assert audit.keys["second"].maker == "west"
    assert (audit.done, audit.failed) == ((3, 0), 0)


def test_a_failure_is_counted_and_named() -> None:
    audit = read(generated("second"), "failed second 0 0 1 2 C_Sign CKR_DEVICE_ERROR")
    assert (audit.failed, audit.answered) == (1, 2)
    assert audit.first_failure == "C_Sign answered CKR_DEVICE_ERROR in thread 0"


def test_a_token_must_have_the_keys_of_the_group() -> None:
    group = read(generated("second"), generated("third"), "destroyed third 2")
    token = read(
        "found second 1 1",
        "found third 0 0",
        signed("second", 0, 0, "-"),
        audit=Audit("the token east", group.keys),
    )
    assert (token.answered, group.answered) == (3, 3)


BROKEN = {
    "signature of another key": (
        [signed("second", 1, 0, key=OTHER)],
        "of thread 1 with second by west does not",
    ),
    "signature over other data": ([signed("second", 1, 0, data=bytes(32))], "is over other data"),
    "signature with a key never made": ([signed("first", 1, 0)], "speaks of a key first that was never made"),
    "signature with a destroyed key": ([signed("third", 0, 0)], "is with a key that was destroyed"),
    "signature missing": ([signed("second", 1, 1)], "thread 1 went on with call 1 instead of 0"),
    "signature repeated": ([signed("second", 1, 0)] * 2, "thread 1 went on with call 0 instead of 1"),
    "made twice": ([generated("second", OTHER)], "the key second was made twice"),
    "no point": (["generated fourth west 044104" + "11" * 64], "CKA_EC_POINT of fourth, 0441.*, is no point"),
    "point not in DER": (["generated fourth west " + point(KEY)[4:]], "is no point: not that of P-256"),
    "one of the pair destroyed": (["destroyed second 1"], "1 keys named second were destroyed instead of"),
    "destroyed and there": (
        ["found third 1 0"],
        "the group shows 1 private and 0 public keys named third, which were",
    ),
    "destroyed, the public key there": (["found third 0 1"], "which were destroyed"),
    "not there": (["found second 0 0"], "0 private and 0 public keys named second instead of one of each"),
    "there twice": (["found second 2 1"], "2 private and 1 public keys named second instead of"),
    "public key missing": (["found second 1 0"], "instead of one of each"),
    "refused": (
        ["refused find second C_FindObjects CKR_HOST_MEMORY"],
        "refused to find second: C_FindObjects answ",
    ),
    "a hung thread": (["hung 2"], "a call of thread 2 never returned"),
    "half an answer": (["found second 1"], "said: found second 1"),
    "no line of ours": (["anything else"], "said: anything else"),
}


@pytest.mark.parametrize(("lines", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken(lines: list[str], reason: str) -> None:
    audit = read(generated("second"), generated("third"), "destroyed third 2")
    with pytest.raises(Broken, match=reason) as caught:
        read(*lines, audit=audit)
    assert "\n" not in str(caught.value)


def test_broken_on_a_token_names_the_token() -> None:
    group = read(generated("second"))
    with pytest.raises(Broken, match="the token east shows 0 private and 1 public keys named second"):
        read("found second 0 1", audit=Audit("the token east", group.keys))
