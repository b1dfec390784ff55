"""Draws both ends of a call to a worker from THE TABLE: the stubs, and what the worker does with their requests.

Each argument is one item on the wire, or with its length one; what a role says is enough, but for the few
functions in `_SPELLED`.  The same items make the request, its reading, the answer and its reading, so the two ends
cannot disagree.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .emit import BANNER, Prototypes
from .functions import FUNCTIONS, Deadline, Function, Phase, Role, deadline_class
from .mechanisms import MECHANISMS, MESSAGE_PARAMETERS, MESSAGES, PARAMETERS
from .signature import Argument

REMOTES = 32
_FORMAT = 2  # of what wire.c, line.c, remote.c and serve.c do by hand


class Item(enum.Enum):
    """How arguments travel; in brackets how many of them."""

    NUMBER = "number"
    BYTES = "bytes"  # bytes and their length (2)
    ROOM = "room"  # an output and where its length goes (2)
    FILL = "fill"  # an output filled whole, and its length (2)
    RESULT = "result"  # a structure or a number that is answered
    LIST = "list"  # a list, and its count as capacity and answer (2)
    FOUND = "found"  # a list, its capacity, where the count goes (3)
    MECHANISM = "mechanism"
    MESSAGE_MECHANISM = "message_mechanism"  # of an operation on messages
    TEMPLATE = "template"  # attributes and their number (2)
    ANSWERS = "answers"  # the same, filled in (2)
    PARAMETER = "parameter"  # of a message, and its length (2)
    LABEL = "label"  # the 32 bytes of a token's
    INITIALIZE = "initialize"  # CK_C_INITIALIZE_ARGS
    NOTHING = "nothing"  # a pointer that means nothing to another process: NULL there


_WIDTH = {
    **dict.fromkeys(
        (Item.BYTES, Item.ROOM, Item.FILL, Item.LIST, Item.TEMPLATE, Item.ANSWERS, Item.PARAMETER), 2
    ),
    Item.FOUND: 3,
}

_ITEM = {
    **dict.fromkeys((Role.SESSION, Role.SLOT, Role.OBJECT, Role.VALUE), Item.NUMBER),
    Role.MECHANISM: Item.MECHANISM,
    Role.TEMPLATE: Item.TEMPLATE,
    Role.ANSWERS: Item.ANSWERS,
    Role.IN: Item.BYTES,
    Role.OUT: Item.ROOM,
    Role.LAST_OUT: Item.ROOM,
    Role.FILL: Item.FILL,
    Role.NEW_OBJECT: Item.RESULT,
    Role.NEW_OBJECT_OR_NULL: Item.RESULT,
    Role.PARAMETER: Item.PARAMETER,
    Role.RESULT: Item.RESULT,
    Role.RESULT_OR_NULL: Item.LIST,
}

_ON_MESSAGES = {row.ops for row in FUNCTIONS if row.phase is Phase.MESSAGE}

# Where the roles, which are there for the application's mistakes, do not tell how an argument travels.
_SPELLED = {
    "C_Initialize": "initialize",
    "C_Finalize": "nothing",
    "C_InitToken": "number bytes label",
    "C_OpenSession": "number number nothing nothing result",  # a callback does not cross
    "C_FindObjects": "number found",
    **{
        row.name: "number message_mechanism number"
        for row in FUNCTIONS
        if row.phase is Phase.INIT and row.ops in _ON_MESSAGES
    },
}

# Never asked of a worker: the worker takes the lists, sessions are not asynchronous, slots are not waited for.
_NOT_CARRIED = (
    "C_GetFunctionList",
    "C_GetInterfaceList",
    "C_GetInterface",
    "C_WaitForSlotEvent",
    "C_AsyncComplete",
    "C_AsyncGetID",
    "C_AsyncJoin",
)

CARRIED = tuple(row for row in FUNCTIONS if row.name not in _NOT_CARRIED)


@dataclass(frozen=True)
class Carried:
    """One item with its arguments."""

    item: Item
    arguments: tuple[Argument, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.arguments)


def items(row: Function, arguments: Sequence[Argument]) -> Iterator[Carried]:
    """The items of a function, in the order of its arguments; raises ValueError if they do not come out even."""
    spelled = iter(Item(word) for word in _SPELLED[row.name].split()) if row.name in _SPELLED else None
    at = 0
    while at < len(arguments):
        item = next(spelled) if spelled else _ITEM.get(row.roles[at])
        if item is None or at + _WIDTH.get(item, 1) > len(arguments):
            raise ValueError(f"{row.name}: how does {arguments[at].name} travel?")
        yield Carried(item, tuple(arguments[at : at + _WIDTH.get(item, 1)]))
        at += _WIDTH.get(item, 1)


def _pointee(argument: Argument) -> str:
    """CK_INFO of CK_INFO_PTR."""
    return argument.type.removesuffix("_PTR")


# ---- the stubs' end


def _ask(carried: Carried) -> str:
    """The C statement that puts an item into the request."""
    names = carried.names
    match carried.item:
        case Item.NOTHING:
            return ""
        case Item.LABEL:
            return f"ha_ask_bytes(&x, {names[0]}, {names[0]} ? 32 : 0);"
        case Item.RESULT:
            return f"ha_ask_result(&x, {names[0]}, sizeof *{names[0]});"
        case Item.LIST:
            list_, count = names
            return f"ha_ask_list(&x, {list_}, {count} ? *{count} : 0, sizeof *{list_});"
        case Item.FOUND:
            return f"ha_ask_list(&x, {names[0]}, {names[1]}, sizeof *{names[0]});"
        case _:
            return f"ha_ask_{carried.item.value}(&x, {', '.join(names)});"


def _take(carried: Carried) -> str:
    """The C statement that reads an item from the answer."""
    names = carried.names
    match carried.item:
        case Item.ROOM | Item.FILL | Item.MECHANISM | Item.ANSWERS:
            return f"ha_take_{carried.item.value}(&x, {', '.join(names)});"
        case Item.PARAMETER:
            return f"ha_take_parameter(&x, {names[0]});"
        case Item.RESULT:
            return f"ha_take_result(&x, {names[0]}, sizeof *{names[0]});"
        case Item.LIST:
            list_, count = names
            return f"ha_take_list(&x, {list_}, {count}, {count} ? *{count} : 0, sizeof *{list_});"
        case Item.FOUND:
            return f"ha_take_list(&x, {names[0]}, {names[2]}, {names[1]}, sizeof *{names[0]});"
        case _:
            return ""


def _parameters(arguments: Sequence[Argument]) -> str:
    return ", ".join(f"{a.type} {a.name}" for a in arguments)


# A PIN that is given waits for no person; without one the device asks for it.
_WITH_A_PIN = ("C_Login", "C_LoginUser", "C_InitPIN")


def stub(row: Function, arguments: Sequence[Argument]) -> str:
    """The function that all remotes' stubs of a row share."""
    carried = list(items(row, arguments))
    deadline = f"HA_DEADLINE_{deadline_class(row).name}"
    if row.name in _WITH_A_PIN:
        deadline = f"pPin ? HA_DEADLINE_{Deadline.CRYPTOGRAPHY.name} : {deadline}"
    asks = [f"        {line}\n" for line in map(_ask, carried) if line]
    takes = [f"            {line}\n" for line in map(_take, carried) if line]
    answer = (
        "        if (ha_answered(&x)) {\n" + "".join(takes) + "        }\n"
        if takes
        else "        ha_answered(&x);\n"
    )
    unused = [f"    (void){name};\n" for c in carried if c.item is Item.NOTHING for name in c.names]
    return (
        f"static RARE CK_RV ask_{row.name}(unsigned remote, {_parameters(arguments)})\n{{\n"
        "    struct ha_exchange x;\n" + "".join(unused)
        + f"    if (ha_ask(&x, remote, FN_{row.name}, {deadline})) {{\n"
        + "".join(asks) + answer + "    }\n    return ha_asked(&x);\n}\n"
    )  # fmt: skip


def stubs(prototypes: Prototypes) -> str:
    """remote.gen.c: a stub per row and remote, each with the remote's number in it."""
    one, rows = [], []
    for row in CARRIED:
        arguments = prototypes[row.name]
        names = ", ".join(a.name for a in arguments)
        one.append(
            f"    static CK_RV {row.name}_##n({_parameters(arguments)}) {{ return ask_{row.name}(n, {names}); }}"
        )
        rows.append(f"[FN_{row.name}] = (void *){row.name}_##n")
    numbers = range(REMOTES)
    return (
        BANNER + '#include "wire.h"\n\n'
        + "\n".join(stub(row, prototypes[row.name]) for row in CARRIED)
        + "\n#define STUBS(n) \\\n" + " \\\n".join(one) + "\n\n"
        + "\n".join(f"STUBS({n})" for n in numbers)
        + "\n\n#define ROWS(n) {" + ", ".join(rows) + "}\n\n"
        "void *const ha_remote_stubs[HA_MAX_REMOTES][HA_FUNCTIONS] = {\n"
        + "\n".join(f"    ROWS({n})," for n in numbers)
        + f"\n}};\n\n_Static_assert(HA_MAX_REMOTES == {REMOTES}, \"as many stubs as remotes\");\n"
    )  # fmt: skip


# ---- the worker's end


def serve(row: Function, arguments: Sequence[Argument]) -> str:  # noqa: C901 (a case per item)
    """What the worker does with a request of a row."""
    take, pass_, answer = [], [], []
    for carried in items(row, arguments):
        names = carried.names
        kind = carried.arguments[0].type
        match carried.item:
            case Item.NUMBER:
                take.append(f"{kind} {names[0]} = ({kind})serve_number(s);")
                pass_.append(names[0])
            case Item.BYTES | Item.PARAMETER:
                take.append(f"CK_ULONG {names[1]};")
                take.append(f"CK_BYTE *{names[0]} = serve_{carried.item.value}(s, &{names[1]});")
                pass_ += names
                if carried.item is Item.PARAMETER:
                    answer.append("answer_parameter(s, rv);")
            case Item.LABEL:
                take.append(f"CK_ULONG size_{names[0]};")
                take.append(f"CK_BYTE *{names[0]} = serve_bytes(s, &size_{names[0]});")
                take.append(f"if ({names[0]} && size_{names[0]} != 32) return false;")
                pass_.append(names[0])
            case Item.ROOM:
                take.append(f"struct serve_room {names[0]} = serve_room(s);")
                pass_ += [f"{names[0]}.bytes", f"{names[0]}.has_length ? &{names[0]}.length : NULL"]
                answer.append(f"answer_room(s, rv, &{names[0]});")
            case Item.FILL:
                take.append(f"struct serve_room {names[0]} = serve_fill(s);")
                pass_ += [f"{names[0]}.bytes", f"{names[0]}.capacity"]
                answer.append(f"answer_fill(s, rv, &{names[0]});")
            case Item.RESULT:
                pointee = _pointee(carried.arguments[0])
                take.append(f"{pointee} *{names[0]} = serve_result(s, sizeof *{names[0]});")
                pass_.append(names[0])
                answer.append(f"answer_result(s, rv, {names[0]}, sizeof *{names[0]});")
            case Item.LIST | Item.FOUND:
                element = f"sizeof({_pointee(carried.arguments[0])})"
                take.append(f"struct serve_room {names[0]} = serve_list(s, {element});")
                capacity = [f"{names[0]}.capacity"] if carried.item is Item.FOUND else []
                pass_ += [f"(void *){names[0]}.bytes", *capacity, f"&{names[0]}.length"]
                answer.append(f"answer_list(s, rv, &{names[0]}, {element});")
            case Item.MECHANISM | Item.MESSAGE_MECHANISM:
                take.append(f"CK_MECHANISM *{names[0]} = serve_mechanism(s);")
                pass_.append(names[0])
                if carried.item is Item.MECHANISM:
                    answer.append("answer_mechanism(s, rv);")
            case Item.TEMPLATE | Item.ANSWERS:
                take.append(f"CK_ULONG {names[1]};")
                take.append(f"CK_ATTRIBUTE *{names[0]} = serve_{carried.item.value}(s, &{names[1]});")
                pass_ += names
                if carried.item is Item.ANSWERS:
                    answer.append(f"answer_answers(s, rv, {names[0]}, {names[1]});")
            case Item.INITIALIZE:
                take.append(f"CK_C_INITIALIZE_ARGS *{names[0]} = serve_initialize(s);")
                pass_.append(names[0])
            case Item.NOTHING:
                pass_.append("NULL")
    lines = [*take, "if (!serve_is_read(s)) return false;"]
    lines.append(f"CK_RV rv = ((CK_{row.name})function)({', '.join(pass_)});")
    lines += ["answer_rv(s, rv);", *answer, "return true;"]
    body = "\n".join(f"    {line}" for line in lines)
    return f"static bool serve_{row.name}(struct serve *s, void *function)\n{{\n{body}\n}}\n"


def served(prototypes: Prototypes) -> str:
    """serve.gen.c: the worker's end."""
    rows = "\n".join(f"    [FN_{row.name}] = serve_{row.name}," for row in CARRIED)
    return (
        BANNER + '#include "serve.h"\n\n'
        + "\n".join(serve(row, prototypes[row.name]) for row in CARRIED)
        + f"\nserve_call *const serve_rows[HA_FUNCTIONS] = {{\n{rows}\n}};\n"
    )  # fmt: skip


# ---- what both ends know


@dataclass(frozen=True)
class Written:
    """What a member writes through a parameter besides the handles it makes.

    `buffers`: by their pointers.  `ivs`: (pointers in the structure that `made` points to, field with their bits).
    """

    buffers: tuple[str, ...] = ()
    ivs: tuple[tuple[str, ...], str] | None = None


_SSL3_IVS = Written(ivs=(("pIVClient", "pIVServer"), "ulIVSizeInBits"))

WRITTEN: dict[str, Written] = {
    "CK_GCM_PARAMS": Written(buffers=("pIv",)),  # tokens that make their own
    "CK_SSL3_KEY_MAT_PARAMS": _SSL3_IVS,
    "CK_TLS12_KEY_MAT_PARAMS": _SSL3_IVS,
    "CK_WTLS_KEY_MAT_PARAMS": Written(ivs=(("pIV",), "ulIVSizeInBits")),
}


def _written(name: str) -> str:
    """The fields of a `struct ha_written`; empty if there is nothing to say."""
    parameter, written = PARAMETERS[name], WRITTEN.get(name)
    if not written:
        # Not kept and making nothing: it has pointers that its row does not tell of.
        return "" if parameter.kept else ".refused = true"
    fields = []
    if written.buffers:
        pointers = [pointer for pointer, _ in parameter.buffers]
        fields.append(f".buffers = {sum(1 << pointers.index(name) for name in written.buffers)}")
    if written.ivs:
        assert parameter.made
        made, (pointers_, bits) = parameter.made[1], written.ivs
        ivs = ", ".join(f"offsetof({made}, {pointer})" for pointer in pointers_)
        fields += [f".made_size = sizeof({made})", f".ivs = {len(pointers_)}", f".iv = {{{ivs}}}"]
        fields.append(f".iv_bits = offsetof({name}, {bits})")
    return ", ".join(fields)


def _message_parameters() -> str:
    cases = []
    for name, message in MESSAGE_PARAMETERS.items():
        buffers = []
        for pointer, length, unit in message.buffers:
            size = (
                f".bytes = {length}" if isinstance(length, int) else f".length = offsetof({name}, {length})"
            )
            tag = ", .is_tag = true" if pointer == message.tag else ""
            buffers.append(
                f"{{.pointer = offsetof({name}, {pointer}), {size}, .unit = HA_UNIT_{unit.name}{tag}}}"
            )
        labels = "\n".join(f"    case {m}:" for m, structure in MESSAGES.items() if structure == name)
        generator = f"offsetof({name}, {message.generator})" if message.generator else "0"
        cases.append(
            f"{labels} {{\n        static const struct ha_message_parameter parameter = {{sizeof({name}), {generator},"
            f" {len(buffers)}, {{{', '.join(buffers)}}}}};\n        return &parameter;\n    }}"
        )
    return (
        "const struct ha_message_parameter *ha_message_parameter_of(CK_MECHANISM_TYPE type)\n{\n    switch (type) {\n"
        + "\n".join(cases)
        + "\n    default: return NULL;\n    }\n}\n\n"
    )


def common(prototypes: Prototypes, constants: Mapping[str, int]) -> str:
    """wire.gen.c: what is written through parameters, which attributes hold others, and the version of it all."""
    cases = []
    for name in PARAMETERS:
        fields = _written(name)
        if fields:
            labels = "\n".join(f"    case {m}:" for m, structure in MECHANISMS.items() if structure == name)
            written = f"static const struct ha_written written = {{{fields}}};"
            cases.append(f"{labels} {{\n        {written}\n        return &written;\n    }}")
    array = constants["CKF_ARRAY_ATTRIBUTE"]
    names = {value: name for name, value in constants.items() if name.startswith("CKA_")}
    # Those of 3.2 have not got the flag.
    templates = [name for name in names.values() if name.endswith("_TEMPLATE")]
    plain = [n for v, n in names.items() if v & array and not v >> 31 and n not in templates]
    text = (
        "const struct ha_written *ha_written_by(CK_MECHANISM_TYPE type)\n{\n    switch (type) {\n"
        + "\n".join(cases) + "\n    default: return NULL;\n    }\n}\n\n"
        + _message_parameters()
        + "bool ha_attribute_has_parts(CK_ATTRIBUTE_TYPE type)\n{\n    switch (type) {\n"
        + "\n".join(f"    case {name}:" for name in templates)
        + "\n        return true;\n    default: return false;\n    }\n}\n\n"
        "bool ha_attribute_is_carried(CK_ATTRIBUTE_TYPE type)\n{\n    switch (type) {\n"
        + "\n".join(f"    case {name}:" for name in plain)
        + "\n        return true;\n    default: return !(type & CKF_ARRAY_ATTRIBUTE) || ha_attribute_has_parts(type);\n"
        "    }\n}\n"
    )  # fmt: skip
    everything = [stub(row, prototypes[row.name]) + serve(row, prototypes[row.name]) for row in CARRIED]
    digest = hashlib.sha256("".join([text, str(PARAMETERS), *everything]).encode()).hexdigest()[:12]
    return (
        BANNER + '#include "wire.h"\n\n' + f'const char ha_wire_version[] = "{_FORMAT}-{digest}";\n\n' + text
    )
