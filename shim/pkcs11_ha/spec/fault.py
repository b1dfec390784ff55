"""Draws the fault module's wrappers (tests/fault) from THE TABLE: what of a call a fault can touch, and how it goes on.

A wrapper describes its call, asks the script (`fault_begin`), makes the wrapped call, and lets the script have the
answer (`fault_end`).  Outputs are told apart by the items of `wire`: there is one reading of the roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .emit import BAD_OBJECT, BANNER, Prototypes
from .functions import FUNCTIONS, Function, Op, Phase, Role
from .signature import Argument
from .wire import CARRIED, Item, items

# How a program finds a library's functions; these three are exported, and answered by the module itself.
FINDING = ("C_GetFunctionList", "C_GetInterfaceList", "C_GetInterface")


def _outputs(row: Function, arguments: Sequence[Argument]) -> tuple[list[str], dict[str, str]]:
    """(C statements that describe what the call puts out, name of an argument -> what is passed for it)."""
    statements: list[str] = []
    passed: dict[str, str] = {}
    if row not in CARRIED:
        return statements, passed
    place = 0
    for carried in items(row, arguments):
        names = carried.names
        match carried.item:
            case Item.ROOM:
                statements.append(f"fault_list(&call, {names[0]}, {names[1]}, 1);")
                passed[names[0]] = f"call.output[{place}].bytes"
                passed[names[1]] = f"call.output[{place}].length"
            case Item.LIST:
                statements.append(f"fault_list(&call, {names[0]}, {names[1]}, sizeof *{names[0]});")
            case Item.FOUND:
                statements.append(
                    f"fault_found(&call, {names[0]}, {names[1]}, {names[2]}, sizeof *{names[0]});"
                )
            case Item.FILL:
                statements.append(f"fault_whole(&call, {names[0]}, {names[1]});")
            case Item.RESULT:
                statements.append(f"fault_whole(&call, {names[0]}, sizeof *{names[0]});")
            case Item.ANSWERS:
                statements.append(f"fault_attributes(&call, {names[0]}, {names[1]});")
                continue
            case _:
                continue
        place += 1
    return statements, passed


def _has(row: Function, arguments: Sequence[Argument]) -> list[str]:
    """What a fault can touch of a call."""
    found = [
        name
        for role, name in (
            (Role.SESSION, "HAS_SESSION"),
            (Role.SLOT, "HAS_SLOT"),
            (Role.OBJECT, "HAS_OBJECT"),
        )
        if role in row.roles
    ]
    kinds = {carried.item for carried in items(row, arguments)} if row in CARRIED else set()
    if kinds & {Item.ROOM, Item.LIST}:
        found.append("HAS_ROOM")
    if kinds & {Item.ROOM, Item.LIST, Item.ANSWERS}:
        found.append("HAS_QUERY")
    if kinds & {Item.ROOM, Item.LIST, Item.FOUND, Item.ANSWERS}:
        found.append("HAS_LENGTH")
    if kinds & {Item.ROOM, Item.LIST, Item.FOUND, Item.ANSWERS, Item.FILL, Item.RESULT}:
        found.append("HAS_OUTPUT")
    # After an error none of these leaves its operation under way (PKCS#11 5.2), and so it must not with the library.
    if row.phase in (Phase.SINGLE, Phase.FINAL):
        found.append("ENDS_OPERATION")
    elif row.phase is Phase.UPDATE and row.ops is not Op.FIND:
        found.append("FEEDS_OPERATION")
    return found


def wrapper(row: Function, arguments: Sequence[Argument]) -> str:
    """The function that stands in the offered lists for the library's own."""
    statements, passed = _outputs(row, arguments)
    lines = [f"struct fault_call call = {{.row = FN_{row.name}}};"]
    objects = 0
    for role, argument in zip(row.roles, arguments, strict=True):
        match role:
            case Role.SESSION:
                lines.append(f"call.session = {argument.name};")
            case Role.SLOT:
                lines.append(f"call.slot = {argument.name};")
            case Role.OBJECT:
                lines.append(f"call.object[{objects}] = {argument.name};")
                passed[argument.name] = f"call.object[{objects}]"
                objects += 1
    if row.name == "C_GetSlotList":
        lines.append(f"call.present_only = {arguments[0].name};")
    given = ", ".join(passed.get(a.name, a.name) for a in arguments)
    lines += statements
    lines.append(f"if (fault_begin(&call)) call.rv = ((CK_{row.name})call.function)({given});")
    lines.append("return fault_end(&call);")
    declared = ", ".join(f"{a.type} {a.name}" for a in arguments)
    body = "\n".join(f"    {line}" for line in lines)
    return f"static CK_RV fault_{row.name}({declared})\n{{\n{body}\n}}\n"


def _row(row: Function, arguments: Sequence[Argument]) -> str:
    fields = [f".has = {' | '.join(_has(row, arguments)) or '0'}", f".ops = {int(row.ops)}"]
    bad = [
        BAD_OBJECT.get(a.name, "CKR_KEY_HANDLE_INVALID")
        for role, a in zip(row.roles, arguments, strict=True)
        if role is Role.OBJECT
    ]
    if bad:
        fields += [f".objects = {len(bad)}", f".bad_object = {{{', '.join(bad)}}}"]
    return f'    [FN_{row.name}] = {{"{row.name}", {", ".join(fields)}}},'


def _endings() -> str:
    """How the wrapped library is made to end operations whose end it is not told of."""
    given = {
        (Role.SESSION,): "session",
        (Role.SESSION, Role.OUT, Role.OUT_LEN): "session, scratch, &size",
        (Role.SESSION, Role.IN, Role.IN_LEN): "session, scratch, 0",
    }
    fed = {row.ops for row in FUNCTIONS if row.phase is Phase.UPDATE}
    cases = []
    for row in FUNCTIONS:
        if row.phase is Phase.FINAL and row.ops in fed - {Op.FIND}:
            call = f"((CK_{row.name})fault_real[FN_{row.name}])({given[row.roles]})"
            cases.append(
                f"    size = FAULT_SCRATCH;\n"
                f"    if (ops & {int(row.ops)} && fault_real[FN_{row.name}]) {call};\n"
            )
    return (
        "void fault_end_operations(CK_SESSION_HANDLE session, unsigned ops, CK_BYTE *scratch)\n{\n"
        "    CK_ULONG size;\n" + "".join(cases) + "}\n"
    )


def _exported(row: Function, arguments: Sequence[Argument]) -> str:
    declared = ", ".join(f"{a.type} {a.name}" for a in arguments)
    names = ", ".join(a.name for a in arguments)
    return (
        f'__attribute__((visibility("default"))) CK_RV {row.name}({declared})\n'
        f"{{\n    return fault_{row.name}({names});\n}}\n"
    )


def wrappers(prototypes: Prototypes, constants: Mapping[str, int]) -> str:
    """fault.gen.c: a wrapper per function, what can be done to it, and the names of return values."""
    rows = "\n".join(_row(row, prototypes[row.name]) for row in FUNCTIONS)
    table = "\n".join(f"    [FN_{row.name}] = (void *)fault_{row.name}," for row in FUNCTIONS)
    codes = "\n".join(
        f'    {{"{name}", 0x{value:X}}},' for name, value in constants.items() if name.startswith("CKR_")
    )
    return (
        BANNER + '#include "fault.h"\n\n'
        + "\n".join(wrapper(row, prototypes[row.name]) for row in FUNCTIONS)
        + f"\nvoid *const fault_wrapper[HA_FUNCTIONS] = {{\n{table}\n}};\n"
        + f"\nconst struct fault_row fault_row[HA_FUNCTIONS] = {{\n{rows}\n}};\n"
        + f"\nconst struct fault_code fault_codes[] = {{\n{codes}\n    {{NULL, 0}},\n}};\n\n"
        + _endings() + "\n"
        + "\n".join(_exported(row, prototypes[row.name]) for row in FUNCTIONS if row.name in FINDING)
    )  # fmt: skip


def exports() -> str:
    """The linker's version script: what a program needs to find the lists, and nothing that could stand in for
    the symbols of another library."""
    names = "\n".join(f"        {name};" for name in FINDING)
    return f"{{\n    global:\n{names}\n    local:\n        *;\n}};\n"
