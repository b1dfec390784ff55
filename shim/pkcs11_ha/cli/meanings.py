"""What each return value of PKCS#11 means, and what to do about it: the one table of it for people.

What a value says about the member that gave it is `core.codes`' to know, and what follows `spec.messages.FOLLOWS`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pkcs11_ha import ck
from pkcs11_ha.core.codes import classify
from pkcs11_ha.spec.messages import FOLLOWS


class Meaning(NamedTuple):
    """What the standard says, in our words, and what to do where an application gets it."""

    text: str
    cure: str


_SESSION_GONE = (
    "Open a session anew. Behind this module a member's lost sessions are replaced without your notice."
)
_TEMPLATE = "Correct the application's template."
_ARGUMENT = "Correct the application's call."
_PIN = "Ask for the PIN anew; never try a wrong one again by itself, as each costs one of the token's tries."

MEANINGS: Mapping[int, Meaning] = {
    ck.CKR_OK: Meaning("It was done.", "Nothing."),
    ck.CKR_CANCEL: Meaning("The application's callback stopped the function.", "Nothing: it was asked for."),
    ck.CKR_HOST_MEMORY: Meaning(
        "The host has too little memory for the call.",
        "See what uses up the memory; locked memory counts too (ulimit -l).",
    ),
    ck.CKR_SLOT_ID_INVALID: Meaning(
        "There is no slot of that number.",
        "Look for the slot by its token's label or serial: numbers may change with the configuration.",
    ),
    ck.CKR_GENERAL_ERROR: Meaning(
        "Something is badly wrong in library or token, and no other code says what.",
        "From C_Initialize of this module: the configuration or the installation; stderr and the HA log have the line,"
        " `p11ha check` and `p11ha doctor` find it. Else look at the member that the log names.",
    ),
    ck.CKR_FUNCTION_FAILED: Meaning(
        "The function could not be carried out; another call may well be.",
        "Look in the HA log and in the vendor's for the reason. Some libraries mean throttling by it.",
    ),
    ck.CKR_ARGUMENTS_BAD: Meaning("An argument is not usable, a NULL pointer for one.", _ARGUMENT),
    ck.CKR_NO_EVENT: Meaning("No slot has an event that was not reported yet.", "Nothing: ask again later."),
    ck.CKR_NEED_TO_CREATE_THREADS: Meaning(
        "The library cannot work where it must not make threads.",
        "Do not set CKF_LIBRARY_CANT_CREATE_OS_THREADS at C_Initialize.",
    ),
    ck.CKR_CANT_LOCK: Meaning(
        "The library cannot do the kind of locking that C_Initialize asks for.",
        "Set CKF_OS_LOCKING_OK at C_Initialize.",
    ),
    ck.CKR_ATTRIBUTE_READ_ONLY: Meaning(
        "The attribute cannot be set or changed by the application.", "Leave it out of the template."
    ),
    ck.CKR_ATTRIBUTE_SENSITIVE: Meaning(
        "The attribute is there and is not shown: the object is sensitive or not extractable.",
        "Nothing: wrap the key, if it may leave the token.",
    ),
    ck.CKR_ATTRIBUTE_TYPE_INVALID: Meaning(
        "The token does not know the attribute for such an object.",
        "Leave it out of the template; vendor attributes differ between members of several vendors.",
    ),
    ck.CKR_ATTRIBUTE_VALUE_INVALID: Meaning("The attribute cannot have that value.", _TEMPLATE),
    ck.CKR_ACTION_PROHIBITED: Meaning(
        "The object forbids it: CKA_COPYABLE, CKA_DESTROYABLE or CKA_MODIFIABLE is false.",
        "Nothing: whoever made the object wanted it so.",
    ),
    ck.CKR_DATA_INVALID: Meaning(
        "The data cannot be what this mechanism takes.",
        "Correct the data; padding and format of digests first.",
    ),
    ck.CKR_DATA_LEN_RANGE: Meaning(
        "The data is too long or too short for mechanism and key.", "Correct the length of the data."
    ),
    ck.CKR_DEVICE_ERROR: Meaning(
        "Something is wrong with token or slot.",
        "From this module: no member of the group could do it, or an operation died with its member. `p11ha status`"
        " shows the members, the HA log the reasons; begin the operation anew.",
    ),
    ck.CKR_DEVICE_MEMORY: Meaning(
        "The token has too little memory.",
        "Delete objects or close sessions on the member that the log names.",
    ),
    ck.CKR_DEVICE_REMOVED: Meaning(
        "The token was taken out of its slot during the call.",
        "Look at the device; `p11ha status` shows the members.",
    ),
    ck.CKR_ENCRYPTED_DATA_INVALID: Meaning(
        "What is to be decrypted is no ciphertext of this mechanism and key.",
        "See that it was not changed on its way, and that it belongs to this key.",
    ),
    ck.CKR_ENCRYPTED_DATA_LEN_RANGE: Meaning(
        "The ciphertext cannot have this length.", "See that it was not cut on its way."
    ),
    ck.CKR_AEAD_DECRYPT_FAILED: Meaning(
        "The tag does not fit ciphertext, additional data, nonce and key: somebody or something changed one of them.",
        "Do not use the data. See that nonce and additional data are those of the encryption.",
    ),
    ck.CKR_FUNCTION_CANCELED: Meaning(
        "The function was cancelled in the middle.", "Begin it anew if it is wanted."
    ),
    ck.CKR_FUNCTION_NOT_PARALLEL: Meaning(
        "No function runs beside the others in this session; a relic of version 1.",
        "Do not call that function.",
    ),
    ck.CKR_FUNCTION_NOT_SUPPORTED: Meaning(
        "The library does not have this function.",
        "Use another way, or see with `p11ha doctor --verbose` which member has what.",
    ),
    ck.CKR_KEY_HANDLE_INVALID: Meaning(
        "The handle is not one of a key that can be used here.",
        "Look for the key anew (C_FindObjects). If it is there and this stays: `p11ha diff GROUP`.",
    ),
    ck.CKR_KEY_SIZE_RANGE: Meaning(
        "The key is too large or too small for this mechanism, or by the token's policy.",
        "Use another size; `p11ha doctor --verbose` compares the members.",
    ),
    ck.CKR_KEY_TYPE_INCONSISTENT: Meaning(
        "The mechanism is for keys of another type.", "Use the key that fits, or the mechanism that does."
    ),
    ck.CKR_KEY_NOT_NEEDED: Meaning("A key was given where none is used.", _ARGUMENT),
    ck.CKR_KEY_CHANGED: Meaning(
        "The saved state belongs to another key than the one that was given.",
        "Give the key of that operation.",
    ),
    ck.CKR_KEY_NEEDED: Meaning("The saved state needs its key, and none was given.", "Give the key."),
    ck.CKR_KEY_INDIGESTIBLE: Meaning("This key's value may not be digested.", "Use another key or way."),
    ck.CKR_KEY_FUNCTION_NOT_PERMITTED: Meaning(
        "The key is not for this use: CKA_SIGN, CKA_DECRYPT, CKA_WRAP or the like is false.",
        "Use a key that was made for it.",
    ),
    ck.CKR_KEY_NOT_WRAPPABLE: Meaning(
        "The token cannot wrap this key, though it may leave.", "Use another mechanism for wrapping."
    ),
    ck.CKR_KEY_UNEXTRACTABLE: Meaning(
        "CKA_EXTRACTABLE is false: the key never leaves the token.",
        "Nothing: whoever made the key wanted it so. To have such keys on every member make them in a group with"
        ' `replication = "domain"`.',
    ),
    ck.CKR_MECHANISM_INVALID: Meaning(
        "The token does not have the mechanism, or not for this function.",
        "A group offers what all its members have: `p11ha doctor --verbose` says who lacks it.",
    ),
    ck.CKR_MECHANISM_PARAM_INVALID: Meaning(
        "The mechanism cannot have this parameter.",
        "Correct the parameter. Workers refuse layouts that they do not know: docs/mechanisms.md.",
    ),
    ck.CKR_OBJECT_HANDLE_INVALID: Meaning(
        "There is no such object, or not for this session.",
        "Look for it anew (C_FindObjects); it was destroyed, or its session ended.",
    ),
    ck.CKR_OPERATION_ACTIVE: Meaning(
        "The session has an operation under way that must end first.",
        "End it, or use one session for each thread.",
    ),
    ck.CKR_OPERATION_NOT_INITIALIZED: Meaning(
        "The session has no such operation under way: its Init was not called or failed, or it has ended.",
        "Begin with the Init; after an error, begin anew.",
    ),
    ck.CKR_PIN_INCORRECT: Meaning("The PIN is wrong.", _PIN),
    ck.CKR_PIN_INVALID: Meaning("The PIN has characters that it may not have.", _PIN),
    ck.CKR_PIN_LEN_RANGE: Meaning("The PIN is too long or too short.", _PIN),
    ck.CKR_PIN_EXPIRED: Meaning(
        "The PIN must be changed before it can be used.", "Change it with the vendor's tool."
    ),
    ck.CKR_PIN_LOCKED: Meaning(
        "The PIN is locked after too many wrong tries.",
        "The token's security officer unlocks it (C_InitPIN, or the vendor's tool) on every member where it is.",
    ),
    ck.CKR_SESSION_CLOSED: Meaning("The session was closed during the call.", _SESSION_GONE),
    ck.CKR_SESSION_COUNT: Meaning(
        "The token has no more sessions.", "Close sessions; raise the limit on the member that the log names."
    ),
    ck.CKR_SESSION_HANDLE_INVALID: Meaning("There is no session of that number (any more).", _SESSION_GONE),
    ck.CKR_SESSION_PARALLEL_NOT_SUPPORTED: Meaning(
        "CKF_SERIAL_SESSION is missing at C_OpenSession.", "Set the flag."
    ),
    ck.CKR_SESSION_READ_ONLY: Meaning(
        "A read-only session cannot do that.", "Open the session with CKF_RW_SESSION."
    ),
    ck.CKR_SESSION_EXISTS: Meaning(
        "A session is open that must not be.", "Close all sessions with the token first."
    ),
    ck.CKR_SESSION_READ_ONLY_EXISTS: Meaning(
        "The security officer cannot log in while a read-only session is open.", "Close it first."
    ),
    ck.CKR_SESSION_READ_WRITE_SO_EXISTS: Meaning(
        "No read-only session can be opened while the security officer is logged in.", "Set CKF_RW_SESSION."
    ),
    ck.CKR_SIGNATURE_INVALID: Meaning(
        "The signature is wrong for this data and key.",
        "Do not trust the data. It is an answer, not a fault.",
    ),
    ck.CKR_SIGNATURE_LEN_RANGE: Meaning(
        "The signature cannot have this length, so it is wrong.",
        "Do not trust the data; see that it was not cut.",
    ),
    ck.CKR_TEMPLATE_INCOMPLETE: Meaning(
        "An attribute is missing without which there is no such object.", _TEMPLATE
    ),
    ck.CKR_TEMPLATE_INCONSISTENT: Meaning("Attributes of the template contradict each other.", _TEMPLATE),
    ck.CKR_TOKEN_NOT_PRESENT: Meaning(
        "There is no token in the slot.",
        "From this module: every member of the group is lost. `p11ha status` says why; the next call after a member is"
        " back succeeds, without a restart.",
    ),
    ck.CKR_TOKEN_NOT_RECOGNIZED: Meaning(
        "The library does not know what is in the slot.",
        "Look at the device. In the log: several tokens fit the member's `token` URI; be more precise.",
    ),
    ck.CKR_TOKEN_WRITE_PROTECTED: Meaning("The token takes no writes.", "Take the write protection off."),
    ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID: Meaning(
        "The handle is not one of a key to unwrap with.", "Look for the key anew (C_FindObjects)."
    ),
    ck.CKR_UNWRAPPING_KEY_SIZE_RANGE: Meaning(
        "The key to unwrap with has the wrong size.", "Use another key."
    ),
    ck.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT: Meaning(
        "The key to unwrap with has the wrong type for the mechanism.", "Use the key that fits."
    ),
    ck.CKR_USER_ALREADY_LOGGED_IN: Meaning(
        "That user is logged in already: a login is the whole application's, not one session's.",
        "Nothing: go on as after CKR_OK.",
    ),
    ck.CKR_USER_NOT_LOGGED_IN: Meaning("Only who is logged in can do that.", "Call C_Login first."),
    ck.CKR_USER_PIN_NOT_INITIALIZED: Meaning(
        "The token has no user PIN yet.", "The security officer sets it (C_InitPIN), on every member."
    ),
    ck.CKR_USER_TYPE_INVALID: Meaning("There is no such type of user here.", _ARGUMENT),
    ck.CKR_USER_ANOTHER_ALREADY_LOGGED_IN: Meaning(
        "Another user is logged in, and only one can be.", "Call C_Logout first."
    ),
    ck.CKR_USER_TOO_MANY_TYPES: Meaning(
        "The token cannot have users of so many types logged in at once.", "Log one of them out."
    ),
    ck.CKR_WRAPPED_KEY_INVALID: Meaning(
        "What is to be unwrapped is no key that was wrapped so.",
        "See that it was not changed on its way, and that key and mechanism are those it was wrapped with.",
    ),
    ck.CKR_WRAPPED_KEY_LEN_RANGE: Meaning(
        "A wrapped key cannot have this length.", "See that it was not cut on its way."
    ),
    ck.CKR_WRAPPING_KEY_HANDLE_INVALID: Meaning(
        "The handle is not one of a key to wrap with.", "Look for the key anew (C_FindObjects)."
    ),
    ck.CKR_WRAPPING_KEY_SIZE_RANGE: Meaning("The key to wrap with has the wrong size.", "Use another key."),
    ck.CKR_WRAPPING_KEY_TYPE_INCONSISTENT: Meaning(
        "The key to wrap with has the wrong type for the mechanism.", "Use the key that fits."
    ),
    ck.CKR_RANDOM_SEED_NOT_SUPPORTED: Meaning(
        "The token's random numbers take no seed from outside.", "Nothing: go on without seeding."
    ),
    ck.CKR_RANDOM_NO_RNG: Meaning("The token makes no random numbers.", "Take them from elsewhere."),
    ck.CKR_DOMAIN_PARAMS_INVALID: Meaning(
        "The token does not take these domain parameters.", "Use a named group or curve that it has."
    ),
    ck.CKR_CURVE_NOT_SUPPORTED: Meaning(
        "The token does not have the curve.", "Use a curve that every member of the group has."
    ),
    ck.CKR_BUFFER_TOO_SMALL: Meaning(
        "The output does not fit; the length that is needed is told, and the operation goes on.",
        "Call again with a buffer of that length.",
    ),
    ck.CKR_SAVED_STATE_INVALID: Meaning(
        "The saved state is not one, or not of this library.", "Begin the operation anew."
    ),
    ck.CKR_INFORMATION_SENSITIVE: Meaning("The information is not given out.", "Nothing."),
    ck.CKR_STATE_UNSAVEABLE: Meaning(
        "The state of this operation cannot be saved.", "Carry the operation to its end instead."
    ),
    ck.CKR_CRYPTOKI_NOT_INITIALIZED: Meaning(
        "C_Initialize was not called, or C_Finalize was; or this is the child of a fork().",
        "Call C_Initialize; in the child of a fork() too.",
    ),
    ck.CKR_CRYPTOKI_ALREADY_INITIALIZED: Meaning(
        "C_Initialize was called before, perhaps by another part of the program.",
        "Go on, and leave C_Finalize to who called first.",
    ),
    ck.CKR_MUTEX_BAD: Meaning("The mutex is not one.", "Correct the application's mutex functions."),
    ck.CKR_MUTEX_NOT_LOCKED: Meaning(
        "A mutex was unlocked that was not locked.", "Correct the application's mutex functions."
    ),
    ck.CKR_NEW_PIN_MODE: Meaning(
        "The token wants a new PIN for its one-time passwords.", "Set it, then begin anew."
    ),
    ck.CKR_NEXT_OTP: Meaning("The token wants one more one-time password.", "Give the next one."),
    ck.CKR_EXCEEDED_MAX_ITERATIONS: Meaning(
        "No parameters were found in so many tries.", "Begin anew; it is a matter of chance."
    ),
    ck.CKR_FIPS_SELF_TEST_FAILED: Meaning(
        "The token found itself faulty and does nothing more.",
        "Restart the device; then the vendor's support.",
    ),
    ck.CKR_LIBRARY_LOAD_FAILED: Meaning(
        "The library needs another one that could not be loaded.", "Install what is missing: `ldd` shows it."
    ),
    ck.CKR_PIN_TOO_WEAK: Meaning(
        "The new PIN is too easy to guess, by the token's policy.", "Choose a better one."
    ),
    ck.CKR_PUBLIC_KEY_INVALID: Meaning(
        "The public key cannot be a right one.", "Do not use it; see where it comes from."
    ),
    ck.CKR_FUNCTION_REJECTED: Meaning(
        "Somebody was asked to agree, and did not; or the call is not allowed here.",
        "From this module: the HA log has the reason (a PIN cannot be changed where members have their own).",
    ),
    ck.CKR_TOKEN_RESOURCE_EXCEEDED: Meaning(
        "The token has run out of something.",
        "Close sessions or delete objects on the member that the log names.",
    ),
    ck.CKR_OPERATION_CANCEL_FAILED: Meaning(
        "The operation could not be cancelled.", "Carry it to its end, or close the session."
    ),
    ck.CKR_KEY_EXHAUSTED: Meaning(
        "The key was used as often as it may be (stateful signatures).", "Make a new key; this one is spent."
    ),
    ck.CKR_PENDING: Meaning("The call goes on by itself and has no result yet.", "Ask with C_AsyncComplete."),
    ck.CKR_SESSION_ASYNC_NOT_SUPPORTED: Meaning(
        "Sessions cannot be asynchronous here.",
        "Open the session without CKF_ASYNC_SESSION: this module has none.",
    ),
    ck.CKR_SEED_RANDOM_REQUIRED: Meaning("The token must be given a seed first.", "Call C_SeedRandom."),
    ck.CKR_OPERATION_NOT_VALIDATED: Meaning(
        "The last operation was not one of those the token is validated for.",
        "Nothing, unless policy wants it.",
    ),
    ck.CKR_TOKEN_NOT_INITIALIZED: Meaning(
        "The token has not been initialised.", "Initialise it with the vendor's tool (C_InitToken)."
    ),
    ck.CKR_PARAMETER_SET_NOT_SUPPORTED: Meaning(
        "The token does not have this parameter set.", "Use one that every member of the group has."
    ),
}

_VENDOR = Meaning(
    "The vendor's own code: PKCS#11 leaves everything from 0x80000000 on to vendors.",
    "Look it up in the documentation of the library that answered it; the HA log names the member.",
)
_UNKNOWN = Meaning(
    "PKCS#11 3.2 has no such code.", "Ask who made the library that answered it; the HA log names the member."
)


@dataclass(frozen=True)
class ReturnValue:
    """A return value explained; `kind` is the class of core.codes."""

    name: str
    number: int
    meaning: str
    kind: str
    here: str
    cure: str


def explain_rv(rv: int) -> ReturnValue:
    """What is known of a return value, also of one that no standard knows."""
    known = MEANINGS.get(rv, _VENDOR if rv >= ck.CKR_VENDOR_DEFINED else _UNKNOWN)
    kind = classify(rv)
    return ReturnValue(ck.rv_name(rv), rv, known.text, kind.value, FOLLOWS[kind], known.cure)


def meaning(rv: int) -> str:
    """What a return value means, in one line."""
    return explain_rv(rv).meaning


def number_of(text: str) -> int | None:
    """The return value that is meant: by its name, with or without CKR_, or as a number, in hex (0x…) or decimal."""
    name = text.strip().upper().replace("-", "_").replace(" ", "_")
    by_name = {known: rv for rv, known in ck.RV_NAMES.items()}
    for candidate in (name, f"CKR_{name}"):
        if candidate in by_name:
            return by_name[candidate]
    try:
        number = int(text, 16 if name.startswith("0X") else 10)
    except ValueError:
        return None
    return number if 0 <= number < 1 << 64 else None
