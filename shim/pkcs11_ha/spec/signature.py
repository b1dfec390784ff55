"""Prototypes and constants, read from include/pkcs11.h: signatures are never typed by hand."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pycparser import c_ast, c_generator, c_parser


@dataclass(frozen=True)
class Argument:
    """One argument of a prototype: its type and name as the header spells them."""

    type: str
    name: str


def preprocess(*headers: str) -> str:
    """The headers, one after the other, with their macros expanded, as pycparser and cffi take them."""
    includes = "".join(f'#include "{header}"\n' for header in headers)
    command = ["cc", "-E", "-P", "-"]
    return subprocess.run(command, check=True, capture_output=True, text=True, input=includes).stdout


def prototypes(text: str) -> dict[str, tuple[Argument, ...]]:
    """Name of each C_* function -> its arguments, in the order of the header."""
    generator = c_generator.CGenerator()
    found: dict[str, tuple[Argument, ...]] = {}
    for node in c_parser.CParser().parse(text).ext:
        if not isinstance(node, c_ast.Decl) or not isinstance(node.type, c_ast.FuncDecl):
            continue
        if not node.name.startswith("C_"):
            continue  # ours, not the standard's
        arguments = []
        for parameter in node.type.args.params:
            name, parameter.type.declname = parameter.name, None
            arguments.append(Argument(generator.visit(parameter.type), name))
        found[node.name] = tuple(arguments)
    return found


_CONSTANT = re.compile(r"^#define (CK[A-Z]?_\w+)\s+(?:0x([0-9A-Fa-f]+)UL|(\d+))", re.MULTILINE)


def constants(header: str) -> dict[str, int]:
    """Every numeric constant of the header, in its order; the first name of a number is its main one."""
    return {
        name: int(hexadecimal, 16) if hexadecimal else int(decimal)
        for name, hexadecimal, decimal in _CONSTANT.findall(Path(header).read_text(encoding="ascii"))
    }
