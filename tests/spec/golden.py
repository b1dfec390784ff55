"""The generated text that tests/spec/golden.c.txt holds; `python -m tests.spec.golden` writes it anew."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pkcs11_ha.spec import emit, signature
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX

ROOT = Path(__file__).parent.parent.parent
FILE = Path(__file__).parent / "golden.c.txt"

# Each takes another way through the generator.
NAMES = (
    "C_Initialize",  # answers before C_Initialize
    "C_GetSlotList",  # the core, without a session
    "C_GetMechanismList",  # on a slot
    "C_OpenSession",  # our own tables
    "C_GetAttributeValue",  # a template that is filled in
    "C_CreateObject",  # the core, with a session
    "C_SignInit",  # a mechanism and a key
    "C_Sign",  # input and output
    "C_GenerateRandom",  # memory that is filled whole
    "C_GenerateKeyPair",  # templates and new objects
    "C_DeriveKey",  # a new object that need not be
    "C_EncryptMessage",  # a message's parameter
    "C_SignMessageNext",  # an output of the last part
    "C_EncapsulateKey",  # a new object beside an output
)


@cache
def prototypes() -> dict[str, tuple[signature.Argument, ...]]:
    return signature.prototypes(signature.preprocess(str(ROOT / "include" / "pkcs11.h")))


def text() -> str:
    """What the generator makes of them now."""
    return "\n".join(emit.entry(FUNCTIONS[INDEX[name]], prototypes()[name]) for name in NAMES)


if __name__ == "__main__":
    FILE.write_text(text())
