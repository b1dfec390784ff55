"""The menu, the only list of it: each number of the reference page in its place there, and what it does here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pkcs11_ha.cli.menu import keys, objects, scripts, security, selftest, tokens
from pkcs11_ha.cli.menu.desk import Desk

Does = Callable[[Desk], None]


@dataclass(frozen=True)
class Entry:
    """One number.  `does` is None for one vendor's firmware; `asks` are the answers that a script gives, in order."""

    number: int
    title: str
    does: Does | None = None
    calls: str = ""
    asks: str = ""


@dataclass(frozen=True)
class Section:
    """Numbers under one head, so many in a row."""

    title: str
    entries: tuple[Entry, ...]
    columns: int = 3


_DATA = "data"
_KEPT = "file for the result"
_NEW = "label, on the token, may be wrapped"

SECTIONS: tuple[Section, ...] = (
    Section(
        "TOKEN FUNCTIONS",
        (
            Entry(1, "Open Session", tokens.open_session, "C_OpenSession", "slot, read-write"),
            Entry(2, "Close Session", tokens.close_session, "C_CloseSession"),
            Entry(3, "Login", tokens.log_in, "C_Login", "user or so, PIN"),
            Entry(4, "Logout", tokens.log_out, "C_Logout"),
            Entry(5, "Change PIN", tokens.change_pin, "C_SetPIN", "old PIN, new PIN"),
            Entry(6, "Init Token", tokens.init_token, "C_InitToken", "slot, label, PIN of the so"),
            Entry(7, "Init Pin", tokens.init_pin, "C_InitPIN", "new PIN of the user"),
            Entry(8, "Mechanism List", tokens.list_mechanisms, "C_GetMechanismList", "slot"),
            Entry(9, "Mechanism Info", tokens.show_mechanism, "C_GetMechanismInfo", "slot, mechanism"),
            Entry(10, "Get Info", tokens.show_info, "C_GetInfo"),
            Entry(11, "Slot Info", tokens.show_slot, "C_GetSlotInfo", "slot"),
            Entry(12, "Token Info", tokens.show_token, "C_GetTokenInfo", "slot"),
            Entry(13, "Session Info", tokens.show_session, "C_GetSessionInfo"),
            Entry(14, "Get Slot List", tokens.list_slots, "C_GetSlotList", "only with a token"),
            Entry(15, "Wait for Slot Event", tokens.wait_for_event, "C_WaitForSlotEvent", "seconds"),
            Entry(16, "InitToken(ind)"),
            Entry(17, "InitPin (ind)"),
            Entry(18, "Login (ind)"),
            Entry(19, "CloneMofN"),
        ),
    ),
    Section(
        "OBJECT MANAGEMENT FUNCTIONS",
        (
            Entry(
                *(20, "Create object", objects.create_object, "C_CreateObject"),
                "kind, label, on the token, content; other: attributes, then nothing",
            ),
            Entry(21, "Copy object", objects.copy_object, "C_CopyObject", "object, label, on the token"),
            Entry(22, "Destroy object", objects.destroy_object, "C_DestroyObject", "object"),
            Entry(23, "Object size", objects.show_size, "C_GetObjectSize", "object"),
            Entry(24, "Get attribute", objects.get_attribute, "C_GetAttributeValue", "object, attribute"),
            Entry(
                25, "Set attribute", objects.set_attribute, "C_SetAttributeValue", "object, attribute, value"
            ),
            Entry(
                *(26, "Find object", objects.find_objects, "C_FindObjects…"),
                "class, label, CKA_ID, attributes, then nothing",
            ),
            Entry(27, "Display Object", objects.display_object, "C_GetAttributeValue", "object"),
        ),
    ),
    Section(
        "SECURITY FUNCTIONS",
        (
            Entry(40, "Encrypt file", security.encrypt, "C_Encrypt…", f"key, mechanism, {_DATA}, {_KEPT}"),
            Entry(41, "Decrypt file", security.decrypt, "C_Decrypt…", f"key, mechanism, {_DATA}, {_KEPT}"),
            Entry(42, "Sign", security.sign, "C_Sign…", f"key, mechanism, {_DATA}, {_KEPT}"),
            Entry(43, "Verify", security.verify, "C_Verify…", f"key, mechanism, {_DATA}, signature"),
            Entry(44, "Hash file", security.digest, "C_Digest…", f"mechanism, {_DATA}, {_KEPT}"),
            Entry(
                45, "Simple Generate Key", keys.generate, "C_GenerateKey, C_GenerateKeyPair", f"kind, {_NEW}"
            ),
            Entry(46, "Digest Key", security.digest_key, "C_DigestKey", f"key, mechanism, {_KEPT}"),
        ),
    ),
    Section(
        "HIGH AVAILABILITY RECOVERY FUNCTIONS",
        (
            Entry(50, "HA Init"),
            Entry(51, "HA Login"),
            Entry(52, "HA Status", tokens.show_ha_status, "CA_GetHAState", "slot"),
        ),
    ),
    Section(
        "KEY FUNCTIONS",
        (
            Entry(60, "Wrap key", keys.wrap, "C_WrapKey", f"wrapping key, mechanism, key, {_KEPT}"),
            Entry(
                *(61, "Unwrap key", keys.unwrap, "C_UnwrapKey"),
                f"unwrapping key, mechanism, wrapped key, kind, {_NEW}",
            ),
            Entry(62, "Generate random number", keys.random, "C_GenerateRandom", f"bytes, {_KEPT}"),
            Entry(63, "Derive Key", keys.derive, "C_DeriveKey", f"base key, mechanism, kind, bytes, {_NEW}"),
            Entry(
                *(64, "PBE Key Gen", keys.generate_from_password, "C_GenerateKey (CKM_PKCS5_PBKD2)"),
                f"password, salt, rounds, hash, kind, bytes, {_NEW}",
            ),
            Entry(65, "Create known keys", keys.create_known, "C_CreateObject", "which, on the token"),
            Entry(66, "Seed RNG", keys.seed, "C_SeedRandom", "seed"),
            Entry(67, "EC User Defined Curves"),
        ),
    ),
    Section(
        "CA FUNCTIONS",
        (
            Entry(70, "Set Domain"),
            Entry(71, "Clone Key"),
            Entry(72, "Set MofN"),
            Entry(73, "Generate MofN"),
            Entry(74, "Activate MofN"),
            Entry(75, "Generate Token Keys"),
            Entry(76, "Get Token Cert"),
            Entry(77, "Sign Token Cert"),
            Entry(78, "Generate CertCo Cert"),
            Entry(79, "Modify MofN"),
            Entry(86, "Dup. MofN Keys"),
            Entry(87, "Deactivate MofN"),
        ),
    ),
    Section(
        "CCM FUNCTIONS",
        (
            Entry(80, "Module List"),
            Entry(81, "Module Info"),
            Entry(82, "Load Module"),
            Entry(83, "Load Enc Mod"),
            Entry(84, "Unload Module"),
            Entry(85, "Module function Call"),
        ),
    ),
    Section(
        "OTHERS",
        (
            Entry(90, "Self Test", selftest.self_test, "many, with known answers", "slot"),
            Entry(94, "Open Access"),
            Entry(95, "Close Access"),
            Entry(97, "Set App ID"),
            Entry(98, "Options", scripts.options, "", "which, value"),
        ),
    ),
    Section(
        "OFFBOARD KEY STORAGE:",
        (
            Entry(101, "Extract Masked Object"),
            Entry(102, "Insert Masked Object"),
            Entry(103, "Multisign With Value"),
            Entry(104, "Clone Object"),
            Entry(105, "SIMExtract"),
            Entry(106, "SIMInsert"),
            Entry(107, "SimMultiSign"),
        ),
        columns=2,
    ),
    Section(
        "SCRIPT EXECUTION:",
        (
            Entry(108, "Execute Script", scripts.execute, "", "file"),
            Entry(
                109,
                "Execute Asynchronous Script",
                scripts.execute_in_background,
                "",
                "file, file for its output",
            ),
            Entry(110, "Execute Single Part Script", scripts.execute_part, "", "file, part"),
        ),
        columns=1,
    ),
)

QUIT = 0
QUIT_TITLE = "Quit demo"
VENDOR_MARK = "*"
VENDOR_NOTE = f"{VENDOR_MARK} one vendor's firmware, not PKCS#11: answers CKR_FUNCTION_NOT_SUPPORTED"

ENTRIES: dict[int, Entry] = {entry.number: entry for section in SECTIONS for entry in section.entries}

_CELL = 26


def picture() -> str:
    """The menu as it is shown, in 80 columns."""
    lines = []
    for section in SECTIONS:
        lines.append(section.title)
        cells = [_cell(entry) for entry in section.entries]
        width = _CELL * 3 // section.columns
        rows = (cells[at : at + section.columns] for at in range(0, len(cells), section.columns))
        lines += ["".join(f"{cell:<{width}}" for cell in row).rstrip() for row in rows]
    return "\n".join((*lines, f"({QUIT}) {QUIT_TITLE}", VENDOR_NOTE))


def _cell(entry: Entry) -> str:
    return f"({entry.number:2}) {entry.title}" + (f" {VENDOR_MARK}" if entry.does is None else "")
