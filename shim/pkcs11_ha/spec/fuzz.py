"""Draws the fuzzers' ends from THE TABLE: callers that make arguments of a fuzzer's bytes, and a vendor that reads all.

A caller knows each argument by its item (`wire.items`) and role, so that handles are handles and buffers have exactly
the size that is said; after the call it looks at what may not be.  A vendor's function reads every byte that it is
given and fills what there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .emit import BANNER, Prototypes, null_checks
from .functions import FUNCTIONS, Function, Role
from .mechanisms import KEY_DERIVATION_ARRAYS, MECHANISMS
from .signature import Argument
from .wire import CARRIED, Carried, Item, items

# What a call that worked has done to handles.
_AFTER = {
    "C_OpenSession": "if (phSession) fuzz_opened(f, *phSession);",
    "C_CloseSession": "fuzz_closed(f, hSession);",
    "C_CloseAllSessions": "fuzz_closed_all(f, slotID);",
    "C_DestroyObject": "fuzz_destroyed(f, hObject);",
}
# These must be so, or the call would never end.
_SET = {"C_WaitForSlotEvent": "flags |= CKF_DONT_BLOCK;"}


def _items(row: Function, arguments: Sequence[Argument]) -> Iterator[tuple[Carried, Role]]:
    """The items of a function, each with the role of its first argument; pointers of calls that never travel too."""
    if row in CARRIED or Role.POINTER not in row.roles:
        at = 0
        for carried in items(row, arguments):
            yield carried, row.roles[at]
            at += len(carried.arguments)
        return
    for argument, role in zip(arguments, row.roles, strict=True):
        item = {Role.POINTER: Item.NOTHING, Role.RESULT: Item.RESULT}.get(role, Item.NUMBER)
        yield Carried(item, (argument,)), role


def _pointee(argument: Argument) -> str:
    return argument.type.removesuffix("_PTR")


_NUMBERS = {Role.SESSION: "session", Role.SLOT: "slot", Role.OBJECT: "object"}


def _pointer(argument: Argument) -> str:
    """A pointer that may be anything the function's page allows."""
    if argument.type == "CK_NOTIFY":
        return "NULL"
    if argument.type in ("CK_VOID_PTR", "CK_UTF8CHAR_PTR", "CK_BYTE_PTR"):
        return "fuzz_text(f)"
    return f"fuzz_structure(f, sizeof({_pointee(argument)}))"


def _make(carried: Carried, role: Role) -> list[str]:  # noqa: C901 (a case per item)
    """C statements that declare an item's arguments."""
    first, *rest = carried.arguments
    name, kind = first.name, first.type
    match carried.item:
        case Item.NUMBER:
            return [f"{kind} {name} = ({kind})fuzz_{_NUMBERS.get(role, 'number')}(f);"]
        case Item.BYTES | Item.PARAMETER:
            secret = "pin" if name.startswith(("pPin", "pOldPin", "pNewPin")) else "bytes"
            return [f"CK_ULONG {rest[0].name};", f"{kind} {name} = fuzz_{secret}(f, &{rest[0].name});"]
        case Item.LABEL:
            return [f"{kind} {name} = fuzz_structure(f, 32);"]
        case Item.ROOM:
            return [
                f"struct fuzz_room room_{name} = fuzz_room(f, 1);",
                f"{kind} {name} = room_{name}.bytes;",
                f"CK_ULONG *{rest[0].name} = room_{name}.length;",
            ]
        case Item.FILL:
            return [
                f"struct fuzz_room room_{name} = fuzz_room(f, 1);",
                f"{kind} {name} = room_{name}.bytes;",
                f"CK_ULONG {rest[0].name} = room_{name}.capacity;",
            ]
        case Item.LIST:
            return [
                f"struct fuzz_room room_{name} = fuzz_room(f, sizeof *({kind})NULL);",
                f"{kind} {name} = (void *)room_{name}.bytes;",
                f"CK_ULONG *{rest[0].name} = room_{name}.length;",
            ]
        case Item.FOUND:
            return [
                f"struct fuzz_room room_{name} = fuzz_room(f, sizeof *({kind})NULL);",
                f"{kind} {name} = (void *)room_{name}.bytes;",
                f"CK_ULONG {rest[0].name} = room_{name}.capacity;",
                f"CK_ULONG *{rest[1].name} = room_{name}.length;",
            ]
        case Item.RESULT:
            return [f"{kind} {name} = fuzz_result(f, sizeof({_pointee(first)}));"]
        case Item.MECHANISM | Item.MESSAGE_MECHANISM:
            return [f"CK_MECHANISM *{name} = fuzz_mechanism(f);"]
        case Item.TEMPLATE | Item.ANSWERS:
            answers = str(carried.item is Item.ANSWERS).lower()
            return [
                f"CK_ULONG {rest[0].name};",
                f"{kind} {name} = fuzz_template(f, &{rest[0].name}, {answers});",
            ]
        case Item.INITIALIZE:
            return [f"CK_C_INITIALIZE_ARGS *{name} = fuzz_initialize(f);"]
        case Item.NOTHING:
            return [f"{kind} {name} = {_pointer(first)};"]


def _look(carried: Carried, role: Role) -> list[str]:
    """C statements that look at an item after the call."""
    name = carried.arguments[0].name
    match carried.item, role:
        case (Item.ROOM, _):
            return [f"fuzz_wrote(f, rv, &room_{name}, true);"]
        case (Item.LIST | Item.FOUND, _):
            found = [f"fuzz_found(f, rv, {name}, &room_{name});"] if carried.item is Item.FOUND else []
            return [f"fuzz_wrote(f, rv, &room_{name}, false);", *found]
        case (Item.NUMBER, Role.SESSION | Role.OBJECT):
            return [f"fuzz_used_{role.value}(f, rv, {name});"]
        case (Item.RESULT, Role.NEW_OBJECT | Role.NEW_OBJECT_OR_NULL):
            return [f"if (rv == CKR_OK && {name}{_unless_asked(role)}) fuzz_made(f, *{name});"]
        case (Item.ANSWERS, _):
            return ["fuzz_answered(f, rv);"]
    return []


def _unless_asked(role: Role) -> str:
    """C_EncapsulateKey with no room for its output asks for a length, and makes nothing."""
    return "" if role is Role.NEW_OBJECT_OR_NULL else " && !f->query"


def caller(row: Function, arguments: Sequence[Argument]) -> str:
    """The function that calls a row's function with what the fuzzer says."""
    lines = []
    looks = []
    for carried, role in _items(row, arguments):
        lines += _make(carried, role)
        looks += _look(carried, role)
    if row.name in _SET:
        lines.append(_SET[row.name])
    names = ", ".join(argument.name for argument in arguments)
    lines.append(f"CK_RV rv = ((CK_{row.name})function)({names});")
    impossible = " || ".join(null_checks(row, arguments)) or "false"
    lines.append(f"fuzz_said(f, rv, {impossible});")
    lines += looks
    if row.name in _AFTER:
        lines.append(f"if (rv == CKR_OK) {{ {_AFTER[row.name]} }}")
    lines.append("return rv;")
    body = "\n".join(f"    {line}" for line in lines)
    return f"static CK_RV call_{row.name}(struct fuzz *f, void *function)\n{{\n{body}\n}}\n"


def _numbers(name: str, kind: str, values: Sequence[str]) -> str:
    return (
        f"const {kind} {name}[] = {{{', '.join(values)}}};\n"
        f"const size_t {name}_count = sizeof {name} / sizeof *{name};\n\n"
    )


def _named(constants: Mapping[str, int], prefix: str) -> list[str]:
    """A name for each number of a kind, by number."""
    names: dict[int, str] = {}
    for name, value in constants.items():
        if name.startswith(prefix):
            names.setdefault(value, name)
    return [names[value] for value in sorted(names)]


def callers(prototypes: Prototypes, constants: Mapping[str, int]) -> str:
    """callers.gen.c: a caller per row, and the numbers that PKCS#11 knows."""
    mechanisms = [*MECHANISMS, *KEY_DERIVATION_ARRAYS]
    codes = [n for n in _named(constants, "CKR_") if n != "CKR_VENDOR_DEFINED"]
    attributes = _named(constants, "CKA_")
    return (
        BANNER + '#include "fuzz.h"\n\n'
        + _numbers("fuzz_mechanism_types", "CK_MECHANISM_TYPE", mechanisms)
        + _numbers("fuzz_attribute_types", "CK_ATTRIBUTE_TYPE", attributes)
        + _numbers("fuzz_codes", "CK_RV", codes)
        + "\n".join(caller(row, prototypes[row.name]) for row in FUNCTIONS)
        + "\nfuzz_call *const fuzz_calls[HA_FUNCTIONS] = {\n"
        + "\n".join(f"    [FN_{row.name}] = call_{row.name}," for row in FUNCTIONS)
        + "\n};\n"
    )  # fmt: skip


# ---- a vendor that reads all


def _read(carried: Carried) -> str:
    names = [argument.name for argument in carried.arguments]
    match carried.item:
        case Item.NUMBER:
            return f"(void){names[0]};"
        case Item.BYTES | Item.PARAMETER:
            return f"vendor_read(&v, {names[0]}, {names[1]});"
        case Item.LABEL:
            return f"vendor_read(&v, {names[0]}, {names[0]} ? 32 : 0);"
        case Item.MECHANISM | Item.MESSAGE_MECHANISM:
            return f"vendor_mechanism(&v, {names[0]});"
        case Item.TEMPLATE:
            return f"vendor_template(&v, {names[0]}, {names[1]}, false);"
        case Item.ANSWERS:
            return f"vendor_template(&v, {names[0]}, {names[1]}, true);"
        case Item.INITIALIZE:
            return f"vendor_initialize(&v, {names[0]});"
        case _:
            return ""


def _write(carried: Carried) -> str:
    names = [argument.name for argument in carried.arguments]
    match carried.item:
        case Item.ROOM | Item.LIST:
            return (
                f"vendor_room(&v, {names[0]}, {names[1]}, {names[1]} ? *{names[1]} : 0, sizeof *{names[0]});"
            )
        case Item.FOUND:
            return f"vendor_room(&v, {names[0]}, {names[2]}, {names[1]}, sizeof *{names[0]});"
        case Item.FILL:
            return f"vendor_fill(&v, {names[0]}, {names[1]});"
        case Item.RESULT:
            return f"vendor_fill(&v, {names[0]}, {names[0]} ? sizeof({_pointee(carried.arguments[0])}) : 0);"
        case Item.MECHANISM | Item.MESSAGE_MECHANISM:
            return f"vendor_fill_mechanism(&v, {names[0]});"
        case Item.ANSWERS:
            return f"vendor_answers(&v, {names[0]}, {names[1]});"
        case _:
            return ""


def vendor_function(row: Function, arguments: Sequence[Argument]) -> str:
    """One function of that vendor."""
    made = [
        item for item, role in _items(row, arguments) if role in (Role.NEW_OBJECT, Role.NEW_OBJECT_OR_NULL)
    ]
    templates = [item for item, _ in _items(row, arguments) if item.item is Item.TEMPLATE]
    reads, writes = [], []
    for carried, _ in _items(row, arguments):
        reads.append(_read(carried))
        if carried not in made:
            writes.append(_write(carried))
    for place, template in zip(made, templates, strict=False):  # none where objects are looked for
        names = [argument.name for argument in template.arguments]
        writes.append(
            f"vendor_object(&v, {arguments[0].name}, {names[0]}, {names[1]}, {place.arguments[0].name});"
        )
    unused = [f"(void){c.arguments[0].name};" for c, _ in _items(row, arguments) if c.item is Item.NOTHING]
    session = arguments[0].name if row.roles[0] is Role.SESSION else "CK_INVALID_HANDLE"
    lines = ["struct vendor v = vendor_begin();", *unused, *filter(None, reads)]
    lines.append(f"vendor_decide(&v, {session});")
    lines += [*filter(None, writes), "return v.rv;"]
    body = "\n".join(f"    {line}" for line in lines)
    parameters = ", ".join(f"{a.type} {a.name}" for a in arguments)
    return f"static CK_RV vendor_{row.name}({parameters})\n{{\n{body}\n}}\n"


def vendor(prototypes: Prototypes) -> str:
    """vendor.gen.c: all of its functions that a worker carries."""
    return (
        BANNER + '#include "vendor.h"\n\n'
        + "\n".join(vendor_function(row, prototypes[row.name]) for row in CARRIED)
        + "\nvoid *const vendor_functions[HA_FUNCTIONS] = {\n"
        + "\n".join(f"    [FN_{row.name}] = (void *)vendor_{row.name}," for row in CARRIED)
        + "\n};\n"
    )  # fmt: skip
