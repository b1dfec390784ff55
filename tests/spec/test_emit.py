"""The generator: what it writes, and that it writes the same each time."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import subprocess
import sys

import pytest

from pkcs11_ha.spec import emit, functions
from pkcs11_ha.spec.functions import FUNCTIONS, INDEX, Effect, Role, Route
from tests.spec import golden

EVERYTHING = """
import hashlib
from pkcs11_ha.spec import emit, pages, signature
from tests.spec import golden
header = str(golden.ROOT / "include" / "pkcs11.h")
types = signature.preprocess(header, str(golden.ROOT / "include" / "pkcs11_ha.h"))
prototypes = signature.prototypes(types)
with open("shim/csrc/core_abi.h") as file:
    core_abi = file.read()
for text in (emit.entries(prototypes), emit.functions_header(prototypes), emit.upcalls_header(prototypes),
             emit.native_source(prototypes), emit.cdef(types, core_abi, prototypes), emit.parameters(), emit.exports(),
             emit.constants_module(signature.constants(header)), pages.functions()):
    print(hashlib.sha256(text.encode()).hexdigest(), len(text))
"""


def test_the_entry_points_are_as_they_were_looked_at() -> None:
    """A difference is to be read; if it is meant, `python -m tests.spec.golden` makes it the rule."""
    assert golden.text() == golden.FILE.read_text()


def test_the_golden_text_takes_every_way() -> None:
    rows = [FUNCTIONS[INDEX[name]] for name in golden.NAMES]
    assert {row.route for row in rows} == set(Route)
    assert {role for row in rows for role in row.roles} == set(Role)


def test_the_same_tables_give_the_same_bytes() -> None:
    """In two processes that hash differently."""

    def emitted(seed: str) -> list[str]:
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(golden.ROOT / "shim")}
        done = subprocess.run(
            [sys.executable, "-c", EVERYTHING],
            env=env,
            cwd=golden.ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.splitlines()

    first = emitted("1")
    assert len(first) == 9
    assert first == emitted("2")


def test_every_function_is_exported_and_nothing_else() -> None:
    names = re.findall(r"^        (\w+);$", emit.exports(), flags=re.MULTILINE)
    assert names == [row.name for row in FUNCTIONS] + ["CA_GetHAState"]
    assert emit.exports().endswith("    local:\n        *;\n};\n")


def test_every_function_has_an_entry_point_that_is_closed_before_c_initialize() -> None:
    text = emit.entries(golden.prototypes())
    bodies = dict(
        re.findall(r"^HA_EXPORT CK_RV (\w+)\([^{]*\)\n\{\n(.*?)^\}$", text, flags=re.MULTILINE | re.DOTALL)
    )
    assert list(bodies) == [row.name for row in FUNCTIONS]
    gate = "    if (!ha_running()) return CKR_CRYPTOKI_NOT_INITIALIZED;\n"
    without = [name for name, body in bodies.items() if not body.startswith(gate)]
    assert without == [
        *("C_Initialize", "C_Finalize", "C_GetFunctionList", "C_GetInterfaceList", "C_GetInterface")
    ]


def test_what_the_core_answers_is_unsealed_everywhere() -> None:
    """cffi answers 0 where Python could not: 0 is CKR_OK."""
    text = emit.entries(golden.prototypes())
    calls = re.findall(r".*ha_core\.C_\w+\(.*", text)
    carried = [row for row in FUNCTIONS if row.route in (Route.CORE, Route.CORE_SESSION)]
    making = [row for row in FUNCTIONS if row.route is Route.MEMBER and row.effect is Effect.CREATE]
    assert len(calls) == len(carried) + len(making)
    assert [call for call in calls if "ha_unseal(ha_core." not in call] == []


def without_a_function(rows: tuple[functions.Function, ...]) -> tuple[functions.Function, ...]:
    return rows[:-1]


def with_two_functions_exchanged(rows: tuple[functions.Function, ...]) -> tuple[functions.Function, ...]:
    return (rows[1], rows[0], *rows[2:])


def with_a_role_too_few(rows: tuple[functions.Function, ...]) -> tuple[functions.Function, ...]:
    return tuple(
        dataclasses.replace(row, roles=row.roles[:-1]) if row.name == "C_Sign" else row for row in rows
    )


def with_two_roles_exchanged(rows: tuple[functions.Function, ...]) -> tuple[functions.Function, ...]:
    session, buffer, length, *rest = rows[INDEX["C_Sign"]].roles
    roles = (session, length, buffer, *rest)
    return tuple(dataclasses.replace(row, roles=roles) if row.name == "C_Sign" else row for row in rows)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_a_function, "C_UnwrapKeyAuthenticated"),
        (with_two_functions_exchanged, "functions differ from the header"),
        (with_a_role_too_few, "C_Sign: 4 roles for 5 arguments"),
        (with_two_roles_exchanged, "C_Sign: pData is CK_BYTE_PTR, not IN_LEN"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_table_that_does_not_fit_the_header_is_refused(
    spoil: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit.verify(golden.prototypes())
    assert callable(spoil)
    monkeypatch.setattr(emit, "FUNCTIONS", spoil(FUNCTIONS))
    with pytest.raises(ValueError, match=says):
        emit.verify(golden.prototypes())


def test_the_module_was_built_from_these_tables() -> None:
    """Else all other tests speak of something else."""
    built = golden.ROOT / "build" / "gen" / "entry.gen.c"
    expected = emit.entries(golden.prototypes())
    assert hashlib.sha256(built.read_bytes()).digest() == hashlib.sha256(expected.encode()).digest()
