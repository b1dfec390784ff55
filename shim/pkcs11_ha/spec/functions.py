"""THE TABLE: one row per PKCS#11 function, with the judgement a header cannot hold.

Prototypes are read from include/pkcs11.h (`signature.py`); a row says what each argument means, where the
call goes and what it does.  Entry points, function lists, linker map, data plane, docs and parametrised
tests are drawn from these rows.  Rows stand in the order of CK_FUNCTION_LIST_3_2, so that the index of a
row is the index of its pointer in a member's function list.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.Enum):
    """What one argument of a function is, and so when NULL is wrong (CKR_ARGUMENTS_BAD)."""

    SESSION = "session"  # virtual session handle
    SLOT = "slot"  # virtual slot id
    OBJECT = "object"  # virtual object handle, translated for the member
    MECHANISM = "mechanism"  # CK_MECHANISM *, handles inside translated; NULL is judged by the data plane
    TEMPLATE = "template"  # CK_ATTRIBUTE[] that is read; NULL only with a count of 0
    ANSWERS = "answers"  # CK_ATTRIBUTE[] that is filled in; NULL only with a count of 0
    COUNT = "count"  # number of attributes of the template before it
    IN = "in"  # bytes that are read; NULL only with a length of 0
    IN_LEN = "in_len"  # length of the buffer before it
    OUT = "out"  # bytes that are written; NULL asks for the length
    OUT_LEN = "out_len"  # its capacity and then its length; never NULL
    LAST_OUT = "last_out"  # bytes that the last part of a message writes; NULL asks for the length
    LAST_OUT_LEN = "last_out_len"  # its capacity and then its length; NULL: another part follows
    FILL = "fill"  # bytes that are written whole; NULL only with a length of 0
    NEW_OBJECT = "new_object"  # where the handle of a new object goes; never NULL
    NEW_OBJECT_OR_NULL = "new_object?"  # the same, may be NULL
    PARAMETER = "parameter"  # parameter of a message, passed as it is
    VALUE = "value"  # a number, passed as it is
    RESULT = "result"  # where a structure or number goes; never NULL
    RESULT_OR_NULL = "result?"  # the same, NULL asks for the count
    POINTER = "pointer"  # anything else, passed as it is, may be NULL


class Route(enum.Enum):
    """Who carries the call out."""

    MEMBER = "member"  # the data plane, in C, on one member
    NATIVE = "native"  # the data plane, in C, on our own tables
    CORE = "core"  # the core, in Python
    CORE_SESSION = "core_session"  # the core, with the session locked by the data plane


class Effect(enum.Enum):
    """What a call changes on the member, and so what may be repeated after a fault."""

    READ = "read"  # nothing: any number of times, anywhere
    CRYPTO = "crypto"  # nothing but the session's operation: repeated from its Init
    CREATE = "create"  # makes objects: repeated only if all of them are session objects
    WRITE = "write"  # changes token objects: never repeated blindly
    CREDENTIAL = "credential"  # spends a try of a PIN: never repeated
    LOCAL = "local"  # ours alone


class Op(enum.IntFlag):
    """Operation slots of a session (PKCS#11 5.2 "session events", 3.0 message-based operations)."""

    NONE = 0
    ENCRYPT = 1 << 0
    DECRYPT = 1 << 1
    DIGEST = 1 << 2
    SIGN = 1 << 3
    SIGN_RECOVER = 1 << 4
    VERIFY = 1 << 5
    VERIFY_RECOVER = 1 << 6
    VERIFY_SIGNATURE = 1 << 7
    MESSAGE_ENCRYPT = 1 << 8
    MESSAGE_DECRYPT = 1 << 9
    MESSAGE_SIGN = 1 << 10
    MESSAGE_VERIFY = 1 << 11
    FIND = 1 << 12


class Phase(enum.IntEnum):
    """Where in its operation a call stands."""

    NONE = 0
    INIT = 1  # starts the operation
    SINGLE = 2  # all of it; ends it
    UPDATE = 3  # takes part of the input
    MESSAGE = 4  # one message; the operation goes on whatever the answer
    FINAL = 5  # ends it


class Deadline(enum.Enum):
    """Which of the limits a call of a member has; how long each is, the configuration says."""

    CONNECT = "connect"  # starting a library
    INFORMATION = "information"  # slots, tokens, sessions, attributes, finding
    CRYPTOGRAPHY = "cryptography"  # operations, and what makes, moves or changes objects
    GENERATION = "generation"  # new keys, and what waits for a person or a whole token


@dataclass(frozen=True)
class Function:
    """One row.  `roles` has one entry per argument of the prototype, in its order."""

    name: str
    since: str
    roles: tuple[Role, ...]
    route: Route
    effect: Effect
    ops: Op = Op.NONE
    phase: Phase = Phase.NONE
    primary: bool = False  # asked of the first member that can answer, so that answers do not vary


def _row(
    name: str,
    roles: str,
    route: Route,
    effect: Effect,
    ops: Op = Op.NONE,
    phase: Phase = Phase.NONE,
    primary: bool = False,
) -> Function:
    return Function(name, "", tuple(Role(word) for word in roles.split()), route, effect, ops, phase, primary)


_M, _N, _C, _S = Route.MEMBER, Route.NATIVE, Route.CORE, Route.CORE_SESSION
_READ, _CRYPTO, _CREATE, _WRITE = Effect.READ, Effect.CRYPTO, Effect.CREATE, Effect.WRITE
_PIN, _OURS = Effect.CREDENTIAL, Effect.LOCAL
_INIT, _SINGLE, _UPDATE, _MESSAGE, _FINAL = (
    Phase.INIT,
    Phase.SINGLE,
    Phase.UPDATE,
    Phase.MESSAGE,
    Phase.FINAL,
)

# fmt: off
_2_40 = (
    _row("C_Initialize", "pointer", _N, _OURS),
    _row("C_Finalize", "pointer", _N, _OURS),
    _row("C_GetInfo", "result", _C, _OURS),
    _row("C_GetFunctionList", "result", _N, _OURS),
    _row("C_GetSlotList", "value result? result", _C, _OURS),
    _row("C_GetSlotInfo", "slot result", _C, _READ),
    _row("C_GetTokenInfo", "slot result", _C, _READ),
    _row("C_GetMechanismList", "slot result? result", _C, _READ),
    _row("C_GetMechanismInfo", "slot value result", _C, _READ),
    _row("C_InitToken", "slot in in_len result", _C, _PIN),
    _row("C_InitPIN", "session in in_len", _S, _PIN),
    _row("C_SetPIN", "session in in_len in in_len", _S, _PIN),
    _row("C_OpenSession", "slot value pointer pointer result", _N, _OURS),
    _row("C_CloseSession", "session", _N, _OURS),
    _row("C_CloseAllSessions", "slot", _N, _OURS),
    _row("C_GetSessionInfo", "session result", _N, _OURS),
    _row("C_GetOperationState", "session out out_len", _N, _OURS),
    _row("C_SetOperationState", "session in in_len value value", _N, _OURS),
    _row("C_Login", "session value in in_len", _S, _PIN),
    _row("C_Logout", "session", _S, _OURS),
    _row("C_CreateObject", "session template count new_object", _S, _CREATE),
    _row("C_CopyObject", "session object template count new_object", _S, _CREATE),
    _row("C_DestroyObject", "session object", _S, _WRITE),
    _row("C_GetObjectSize", "session object result", _M, _READ, primary=True),
    _row("C_GetAttributeValue", "session object answers count", _M, _READ, primary=True),
    _row("C_SetAttributeValue", "session object template count", _S, _WRITE),
    _row("C_FindObjectsInit", "session template count", _N, _READ, Op.FIND, _INIT),
    _row("C_FindObjects", "session result value result", _N, _READ, Op.FIND, _UPDATE),
    _row("C_FindObjectsFinal", "session", _N, _READ, Op.FIND, _FINAL),
    _row("C_EncryptInit", "session mechanism object", _M, _CRYPTO, Op.ENCRYPT, _INIT),
    _row("C_Encrypt", "session in in_len out out_len", _M, _CRYPTO, Op.ENCRYPT, _SINGLE),
    _row("C_EncryptUpdate", "session in in_len out out_len", _M, _CRYPTO, Op.ENCRYPT, _UPDATE),
    _row("C_EncryptFinal", "session out out_len", _M, _CRYPTO, Op.ENCRYPT, _FINAL),
    _row("C_DecryptInit", "session mechanism object", _M, _CRYPTO, Op.DECRYPT, _INIT),
    _row("C_Decrypt", "session in in_len out out_len", _M, _CRYPTO, Op.DECRYPT, _SINGLE),
    _row("C_DecryptUpdate", "session in in_len out out_len", _M, _CRYPTO, Op.DECRYPT, _UPDATE),
    _row("C_DecryptFinal", "session out out_len", _M, _CRYPTO, Op.DECRYPT, _FINAL),
    _row("C_DigestInit", "session mechanism", _M, _CRYPTO, Op.DIGEST, _INIT),
    _row("C_Digest", "session in in_len out out_len", _M, _CRYPTO, Op.DIGEST, _SINGLE),
    _row("C_DigestUpdate", "session in in_len", _M, _CRYPTO, Op.DIGEST, _UPDATE),
    _row("C_DigestKey", "session object", _M, _CRYPTO, Op.DIGEST, _UPDATE),
    _row("C_DigestFinal", "session out out_len", _M, _CRYPTO, Op.DIGEST, _FINAL),
    _row("C_SignInit", "session mechanism object", _M, _CRYPTO, Op.SIGN, _INIT),
    _row("C_Sign", "session in in_len out out_len", _M, _CRYPTO, Op.SIGN, _SINGLE),
    _row("C_SignUpdate", "session in in_len", _M, _CRYPTO, Op.SIGN, _UPDATE),
    _row("C_SignFinal", "session out out_len", _M, _CRYPTO, Op.SIGN, _FINAL),
    _row("C_SignRecoverInit", "session mechanism object", _M, _CRYPTO, Op.SIGN_RECOVER, _INIT),
    _row("C_SignRecover", "session in in_len out out_len", _M, _CRYPTO, Op.SIGN_RECOVER, _SINGLE),
    _row("C_VerifyInit", "session mechanism object", _M, _CRYPTO, Op.VERIFY, _INIT),
    _row("C_Verify", "session in in_len in in_len", _M, _CRYPTO, Op.VERIFY, _SINGLE),
    _row("C_VerifyUpdate", "session in in_len", _M, _CRYPTO, Op.VERIFY, _UPDATE),
    _row("C_VerifyFinal", "session in in_len", _M, _CRYPTO, Op.VERIFY, _FINAL),
    _row("C_VerifyRecoverInit", "session mechanism object", _M, _CRYPTO, Op.VERIFY_RECOVER, _INIT),
    _row("C_VerifyRecover", "session in in_len out out_len", _M, _CRYPTO, Op.VERIFY_RECOVER, _SINGLE),
    _row("C_DigestEncryptUpdate", "session in in_len out out_len", _M, _CRYPTO, Op.DIGEST | Op.ENCRYPT, _UPDATE),
    _row("C_DecryptDigestUpdate", "session in in_len out out_len", _M, _CRYPTO, Op.DECRYPT | Op.DIGEST, _UPDATE),
    _row("C_SignEncryptUpdate", "session in in_len out out_len", _M, _CRYPTO, Op.SIGN | Op.ENCRYPT, _UPDATE),
    _row("C_DecryptVerifyUpdate", "session in in_len out out_len", _M, _CRYPTO, Op.DECRYPT | Op.VERIFY, _UPDATE),
    _row("C_GenerateKey", "session mechanism template count new_object", _M, _CREATE),
    _row("C_GenerateKeyPair", "session mechanism template count template count new_object new_object", _M, _CREATE),
    _row("C_WrapKey", "session mechanism object object out out_len", _M, _READ),
    _row("C_UnwrapKey", "session mechanism object in in_len template count new_object", _M, _CREATE),
    _row("C_DeriveKey", "session mechanism object template count new_object?", _M, _CREATE),
    _row("C_SeedRandom", "session in in_len", _M, _READ),
    _row("C_GenerateRandom", "session fill in_len", _M, _READ),
    _row("C_GetFunctionStatus", "session", _N, _OURS),
    _row("C_CancelFunction", "session", _N, _OURS),
    _row("C_WaitForSlotEvent", "value result pointer", _C, _OURS),
)

_3_0 = (
    _row("C_GetInterfaceList", "result? result", _N, _OURS),
    _row("C_GetInterface", "pointer pointer result value", _N, _OURS),
    _row("C_LoginUser", "session value in in_len in in_len", _S, _PIN),
    _row("C_SessionCancel", "session value", _N, _OURS),
    _row("C_MessageEncryptInit", "session mechanism object", _M, _CRYPTO, Op.MESSAGE_ENCRYPT, _INIT),
    _row("C_EncryptMessage", "session parameter value in in_len in in_len out out_len",
         _M, _CRYPTO, Op.MESSAGE_ENCRYPT, _MESSAGE),
    _row("C_EncryptMessageBegin", "session parameter value in in_len", _M, _CRYPTO, Op.MESSAGE_ENCRYPT, _MESSAGE),
    _row("C_EncryptMessageNext", "session parameter value in in_len out out_len value",
         _M, _CRYPTO, Op.MESSAGE_ENCRYPT, _MESSAGE),
    _row("C_MessageEncryptFinal", "session", _M, _CRYPTO, Op.MESSAGE_ENCRYPT, _FINAL),
    _row("C_MessageDecryptInit", "session mechanism object", _M, _CRYPTO, Op.MESSAGE_DECRYPT, _INIT),
    _row("C_DecryptMessage", "session parameter value in in_len in in_len out out_len",
         _M, _CRYPTO, Op.MESSAGE_DECRYPT, _MESSAGE),
    _row("C_DecryptMessageBegin", "session parameter value in in_len", _M, _CRYPTO, Op.MESSAGE_DECRYPT, _MESSAGE),
    _row("C_DecryptMessageNext", "session parameter value in in_len out out_len value",
         _M, _CRYPTO, Op.MESSAGE_DECRYPT, _MESSAGE),
    _row("C_MessageDecryptFinal", "session", _M, _CRYPTO, Op.MESSAGE_DECRYPT, _FINAL),
    _row("C_MessageSignInit", "session mechanism object", _M, _CRYPTO, Op.MESSAGE_SIGN, _INIT),
    _row("C_SignMessage", "session parameter value in in_len out out_len", _M, _CRYPTO, Op.MESSAGE_SIGN, _MESSAGE),
    _row("C_SignMessageBegin", "session parameter value", _M, _CRYPTO, Op.MESSAGE_SIGN, _MESSAGE),
    _row("C_SignMessageNext", "session parameter value in in_len last_out last_out_len",
         _M, _CRYPTO, Op.MESSAGE_SIGN, _MESSAGE),
    _row("C_MessageSignFinal", "session", _M, _CRYPTO, Op.MESSAGE_SIGN, _FINAL),
    _row("C_MessageVerifyInit", "session mechanism object", _M, _CRYPTO, Op.MESSAGE_VERIFY, _INIT),
    _row("C_VerifyMessage", "session parameter value in in_len in in_len", _M, _CRYPTO, Op.MESSAGE_VERIFY, _MESSAGE),
    _row("C_VerifyMessageBegin", "session parameter value", _M, _CRYPTO, Op.MESSAGE_VERIFY, _MESSAGE),
    _row("C_VerifyMessageNext", "session parameter value in in_len in in_len",
         _M, _CRYPTO, Op.MESSAGE_VERIFY, _MESSAGE),
    _row("C_MessageVerifyFinal", "session", _M, _CRYPTO, Op.MESSAGE_VERIFY, _FINAL),
)

_3_2 = (
    _row("C_EncapsulateKey", "session mechanism object template count out out_len new_object", _M, _CREATE),
    _row("C_DecapsulateKey", "session mechanism object template count in in_len new_object", _M, _CREATE),
    _row("C_VerifySignatureInit", "session mechanism object in in_len", _M, _CRYPTO, Op.VERIFY_SIGNATURE, _INIT),
    _row("C_VerifySignature", "session in in_len", _M, _CRYPTO, Op.VERIFY_SIGNATURE, _SINGLE),
    _row("C_VerifySignatureUpdate", "session in in_len", _M, _CRYPTO, Op.VERIFY_SIGNATURE, _UPDATE),
    _row("C_VerifySignatureFinal", "session", _M, _CRYPTO, Op.VERIFY_SIGNATURE, _FINAL),
    _row("C_GetSessionValidationFlags", "session value result", _M, _READ, primary=True),
    # Sessions of a group are never opened with CKF_ASYNC_SESSION, so nothing is ever pending.
    _row("C_AsyncComplete", "session pointer pointer", _N, _OURS),
    _row("C_AsyncGetID", "session pointer pointer", _N, _OURS),
    _row("C_AsyncJoin", "session pointer value pointer value", _N, _OURS),
    _row("C_WrapKeyAuthenticated", "session mechanism object object in in_len out out_len", _M, _READ),
    _row("C_UnwrapKeyAuthenticated", "session mechanism object in in_len template count in in_len new_object",
         _M, _CREATE),
)
# fmt: on


def _since(version: str, rows: tuple[Function, ...]) -> tuple[Function, ...]:
    return tuple(
        Function(r.name, version, r.roles, r.route, r.effect, r.ops, r.phase, r.primary) for r in rows
    )


FUNCTIONS: tuple[Function, ...] = _since("2.40", _2_40) + _since("3.0", _3_0) + _since("3.2", _3_2)
INDEX: dict[str, int] = {row.name: index for index, row in enumerate(FUNCTIONS)}


def deadline_class(row: Function) -> Deadline:
    """How patient a caller of a member's function is."""
    if row.name == "C_Initialize":
        return Deadline.CONNECT
    # Keys from nothing.  And a PIN may be a person's at the device (CKF_PROTECTED_AUTHENTICATION_PATH), who is looked
    # for first; C_InitToken erases a token.  For a PIN that is given the stubs have less patience: `wire.stub`.
    is_generated = (
        row.effect is Effect.CREATE and Role.MECHANISM in row.roles and Role.OBJECT not in row.roles
    )
    if is_generated or row.effect is Effect.CREDENTIAL:
        return Deadline.GENERATION
    # Of what changes nothing: wrapping, and random numbers.
    has_data = not {Role.MECHANISM, Role.IN, Role.FILL}.isdisjoint(row.roles)
    if row.effect in (Effect.CRYPTO, Effect.CREATE, Effect.WRITE) or (row.effect is Effect.READ and has_data):
        return Deadline.CRYPTOGRAPHY
    return Deadline.INFORMATION
