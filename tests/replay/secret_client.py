"""A client that has a secret pass through an operation, forgets it, and stands still while its memory is searched.

    secret_client.py MODULE PIN MASK SECRET-XOR-MASK [OPTION=VALUE…]

The secret itself is put together in one buffer here and wiped there.  It says each step on a line of its own, and
goes on with a line from its standard input.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import byref, c_ulong

from tests import p11

SIZE = 32
Done = Callable[[], object]


class Secret:
    """The only copy of it that is ours, while it is there."""

    def __init__(self, mask: bytes, masked: bytes) -> None:
        self.mask, self.masked = mask, masked
        self.memory = (ctypes.c_ubyte * SIZE)()

    def __enter__(self) -> ctypes.Array[ctypes.c_ubyte]:
        for at, (one, other) in enumerate(zip(self.mask, self.masked, strict=True)):
            self.memory[at] = one ^ other
        return self.memory

    def __exit__(self, *_: object) -> None:
        ctypes.memset(self.memory, 0, SIZE)


def stop(step: str) -> None:
    print(step, flush=True)
    sys.stdin.readline()


def main() -> None:
    path, pin, mask, masked, ending = sys.argv[1:6]
    secret = Secret(bytes.fromhex(mask), bytes.fromhex(masked))
    module = p11.Module(path)
    module.initialize()
    slot = module.slots()[-1]
    session = module.open(slot, rw=True)
    session.login(pin)
    other = module.open(slot)  # so that the login outlives a session that is closed
    key = session.find_one({p11.CKA_LABEL: "generic"})
    aes = session.find_one({p11.CKA_LABEL: "aes"})
    out, size = (ctypes.c_ubyte * 64)(), c_ulong(64)

    stop("idle")
    if ending == "encrypted":
        session.init("C_EncryptInit", p11.CKM_AES_ECB, aes)
        with secret as memory:
            session.call("C_EncryptUpdate", memory, SIZE, out, byref(size))
    else:
        session.init("C_SignInit", p11.CKM_SHA256_HMAC, key)
        with secret as memory:
            session.call("C_SignUpdate", memory, SIZE)
    stop("taken")
    ends: dict[str, Done] = {
        "encrypted": lambda: session.output("C_EncryptFinal"),
        "ended": lambda: session.output("C_SignFinal"),
        "cancelled": lambda: session.call("C_SignInit", None, key),
        "session cancelled": lambda: session.call("C_SessionCancel", p11.CKF_SIGN),
        "closed": session.close,
        "all closed": lambda: module.close_all(slot),
        "finalised": module.finalize,
        "saved": lambda: saved(session, other, key),
    }
    ends[ending]()
    stop("over")
    if ending != "finalised":
        module.finalize()


def saved(session: p11.Session, other: p11.Session, key: int) -> None:
    """A saved state holds it, too: that is in the application's hands, and so wiped there."""
    size = c_ulong()
    session.call("C_GetOperationState", None, byref(size))
    state = (ctypes.c_ubyte * size.value)()
    session.call("C_GetOperationState", state, byref(size))
    other.call("C_SetOperationState", state, size.value, 0, key)
    ctypes.memset(state, 0, size.value)
    assert session.output("C_SignFinal") == other.output("C_SignFinal")


if __name__ == "__main__":
    main()
