"""What must hold of every row of the function table."""

from __future__ import annotations

import pytest

from pkcs11_ha.spec import emit
from pkcs11_ha.spec.functions import (
    FUNCTIONS,
    INDEX,
    Deadline,
    Effect,
    Function,
    Op,
    Phase,
    Role,
    Route,
    deadline_class,
)
from pkcs11_ha.spec.wire import CARRIED
from tests.spec import golden

each_row = pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row.name)

# Types that leave no choice.
ROLES = {
    "CK_SESSION_HANDLE": {Role.SESSION},
    "CK_SLOT_ID": {Role.SLOT},
    "CK_OBJECT_HANDLE": {Role.OBJECT},
    "CK_MECHANISM_PTR": {Role.MECHANISM},
    "CK_ATTRIBUTE_PTR": {Role.TEMPLATE, Role.ANSWERS},
    "CK_SESSION_HANDLE_PTR": {Role.RESULT},
    "CK_OBJECT_HANDLE_PTR": {Role.NEW_OBJECT, Role.NEW_OBJECT_OR_NULL, Role.RESULT},
}
FOLLOWED_BY = {
    Role.IN: Role.IN_LEN,
    Role.FILL: Role.IN_LEN,
    Role.OUT: Role.OUT_LEN,
    Role.LAST_OUT: Role.LAST_OUT_LEN,
    Role.TEMPLATE: Role.COUNT,
    Role.ANSWERS: Role.COUNT,
}
# NULL is allowed there: a function that never has anything to say.
NULL_ALLOWED = ("C_AsyncGetID",)


def arguments(row: Function) -> list[tuple[Role, str, str]]:
    """Role, type and name."""
    return [(role, a.type, a.name) for role, a in zip(row.roles, golden.prototypes()[row.name], strict=True)]


def test_the_table_fits_the_header() -> None:
    emit.verify(golden.prototypes())


def test_the_rows_stand_in_the_order_of_the_function_lists() -> None:
    assert [row.name for row in FUNCTIONS] == list(golden.prototypes())
    assert [row.since for row in FUNCTIONS] == ["2.40"] * 68 + ["3.0"] * 24 + ["3.2"] * 12
    assert list(INDEX.items()) == [(row.name, index) for index, row in enumerate(FUNCTIONS)]


@each_row
def test_the_type_of_an_argument_decides_its_role_where_it_can(row: Function) -> None:
    for role, kind, name in arguments(row):
        if row.name == "C_SetOperationState" and kind == "CK_OBJECT_HANDLE":
            assert role is Role.VALUE  # no state that was saved is ever taken back
        elif kind in ROLES:
            assert role in ROLES[kind], name
        else:
            assert role not in {Role.SESSION, Role.SLOT, Role.OBJECT, Role.MECHANISM}, name
        if role is Role.VALUE:
            assert not kind.endswith("_PTR"), name


@each_row
def test_what_is_written_through_a_pointer_is_checked_for_null(row: Function) -> None:
    for role, kind, name in arguments(row):
        if kind in ("CK_ULONG_PTR", "CK_OBJECT_HANDLE_PTR") and row.name not in NULL_ALLOWED:
            assert role is not Role.POINTER, name


@each_row
def test_a_buffer_stands_before_its_length(row: Function) -> None:
    lengths = set(FOLLOWED_BY.values())
    for before, role, after in zip((None, *row.roles), row.roles, (*row.roles[1:], None), strict=False):
        if role in FOLLOWED_BY:
            assert after is FOLLOWED_BY[role]
        if role in lengths:
            assert before in {buffer for buffer, length in FOLLOWED_BY.items() if length is role}


@each_row
def test_a_session_comes_first_and_says_who_locks_it(row: Function) -> None:
    assert Role.SESSION not in row.roles[1:]
    has_session = row.roles[:1] == (Role.SESSION,)
    if row.route in (Route.MEMBER, Route.CORE_SESSION):
        assert has_session
    if row.route is Route.CORE:
        assert not has_session


@each_row
def test_an_operation_has_a_phase(row: Function) -> None:
    assert bool(row.ops) is (row.phase is not Phase.NONE)
    if row.phase is Phase.INIT:
        assert row.ops.bit_count() == 1
        assert (Role.MECHANISM in row.roles) is (row.ops is not Op.FIND)
    elif row.phase is not Phase.UPDATE:
        assert row.ops.bit_count() <= 1


@pytest.mark.parametrize("op", [op for op in Op if op], ids=lambda op: op.name)
def test_an_operation_begins_in_one_way_and_ends(op: Op) -> None:
    rows = [row for row in FUNCTIONS if row.ops == op]
    assert [row.phase for row in rows].count(Phase.INIT) == 1
    assert rows[0].phase is Phase.INIT
    assert any(row.phase in (Phase.SINGLE, Phase.FINAL) for row in rows)
    assert (op in emit.OPERATIONS) is (op is not Op.FIND)


@each_row
def test_what_makes_objects_says_so(row: Function) -> None:
    makes = Role.NEW_OBJECT in row.roles or Role.NEW_OBJECT_OR_NULL in row.roles
    assert makes is (row.effect is Effect.CREATE)


def test_what_is_never_repeated() -> None:
    """The rows whose effect forbids it, by hand: a mistake here writes twice, or locks a token."""

    def names(effect: Effect) -> list[str]:
        return [row.name for row in FUNCTIONS if row.effect is effect]

    assert names(Effect.WRITE) == ["C_DestroyObject", "C_SetAttributeValue"]
    assert names(Effect.CREDENTIAL) == ["C_InitToken", "C_InitPIN", "C_SetPIN", "C_Login", "C_LoginUser"]
    for row in FUNCTIONS:
        if row.effect in (Effect.WRITE, Effect.CREDENTIAL):
            assert row.route in (Route.CORE, Route.CORE_SESSION), row.name


def test_how_long_a_member_may_take() -> None:
    """By hand: of the two classes that are short lists, and of what no operation is."""

    def names(deadline: Deadline) -> list[str]:
        return [row.name.removeprefix("C_") for row in CARRIED if deadline_class(row) is deadline]

    assert names(Deadline.CONNECT) == ["Initialize"]
    assert names(Deadline.GENERATION) == (
        "InitToken InitPIN SetPIN Login GenerateKey GenerateKeyPair LoginUser".split()
    )
    assert names(Deadline.INFORMATION) == (
        "Finalize GetInfo GetSlotList GetSlotInfo GetTokenInfo GetMechanismList GetMechanismInfo OpenSession"
        " CloseSession CloseAllSessions GetSessionInfo GetOperationState SetOperationState Logout GetObjectSize"
        " GetAttributeValue FindObjectsInit FindObjects FindObjectsFinal GetFunctionStatus CancelFunction"
        " SessionCancel GetSessionValidationFlags".split()
    )
    assert all(deadline_class(row) is Deadline.CRYPTOGRAPHY for row in FUNCTIONS if row.ops & ~Op.FIND)


@each_row
def test_what_the_core_carries_out_is_attached(row: Function) -> None:
    asked = row.name in emit.upcall_names(golden.prototypes())
    makes = row.route is Route.MEMBER and row.effect is Effect.CREATE  # in a group, the core does
    assert asked is (row.route in (Route.CORE, Route.CORE_SESSION) or makes)
