"""The tokens of a library, looked at in a process of its own: a library that crashes or hangs is one line.

    python … pkcs11_ha.cli.tokens.main() DIRECTORY

It reads a `Question` from the directory, has the module load the library as it does in any application, and leaves an
`Answer`. Its output is thrown away: libraries print what they like.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pkcs11_ha import ck, config
from pkcs11_ha.cli import module, operator
from pkcs11_ha.cli.document import render
from pkcs11_ha.cli.operator import OperatorError
from pkcs11_ha.config import ConfigError
from pkcs11_ha.runtime import native
from pkcs11_ha.runtime.login import Pin
from pkcs11_ha.runtime.member import ConnectError, Member, MemberState

_FAREWELL_S = 10.0  # for C_Finalize, and the start of a Python
ANY = "pkcs11:"
"""The selector of a member that is asked for all tokens of its library."""

_TOKEN_FLAGS = """RNG WRITE_PROTECTED LOGIN_REQUIRED USER_PIN_INITIALIZED RESTORE_KEY_NOT_NEEDED CLOCK_ON_TOKEN
    PROTECTED_AUTHENTICATION_PATH DUAL_CRYPTO_OPERATIONS TOKEN_INITIALIZED SECONDARY_AUTHENTICATION
    USER_PIN_COUNT_LOW USER_PIN_FINAL_TRY USER_PIN_LOCKED USER_PIN_TO_BE_CHANGED SO_PIN_COUNT_LOW SO_PIN_FINAL_TRY
    SO_PIN_LOCKED SO_PIN_TO_BE_CHANGED ERROR_STATE SEED_RANDOM_REQUIRED ASYNC_SESSION_SUPPORTED""".split()


@dataclass(frozen=True)
class Question:
    """A member, as the keys of its [[member]]; a PIN to try; seconds that connecting may take."""

    member: dict[str, Any]
    pin_source: str
    connect_timeout_s: float


@dataclass(frozen=True)
class Token:
    """What a token and its slot say of themselves."""

    slot: int
    description: str
    label: str
    serial: str
    manufacturer: str
    model: str
    flags: tuple[str, ...]
    mechanisms: int

    @property
    def initialised(self) -> bool:
        return "TOKEN_INITIALIZED" in self.flags


@dataclass(frozen=True)
class Answer:
    """`tokens`: those that the member's selector means; `problem`: why it cannot be used, in one line.

    `library` and `login`, a code's name, are empty where it did not come to that.
    """

    library: str
    tokens: tuple[Token, ...]
    login: str
    problem: str

    @classmethod
    def from_json(cls, text: str) -> Answer:
        said = json.loads(text)
        tokens = tuple(Token(**{**token, "flags": tuple(token["flags"])}) for token in said.pop("tokens"))
        return cls(tokens=tokens, **said)


# ---- who asks


def ask(question: Question) -> Answer:
    """Asks a new process; raises OperatorError if the library took it along or never came back."""
    path = question.member["module"]
    limit_s = question.connect_timeout_s + _FAREWELL_S
    with tempfile.TemporaryDirectory(prefix="p11ha-") as name:
        directory = Path(name)
        (directory / "question").write_text(json.dumps(asdict(question)))
        start = f"import sys; sys.path[:] = {sys.path!r}; from pkcs11_ha.cli import tokens; tokens.main()"
        command = [sys.executable, "-E", "-P", "-c", start, name]
        ended = ""
        with (directory / "stderr").open("wb") as said:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=limit_s, check=False
                )
                if done.returncode < 0:
                    ended = f"crashed ({signal.Signals(-done.returncode).name})"
                elif done.returncode > 0:
                    ended = f"ended its process with status {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"did not come back within {limit_s:.0f} s"
        with suppress(OSError, ValueError):
            answer = Answer.from_json((directory / "answer").read_text())
            if ended and not answer.problem:
                return Answer(answer.library, answer.tokens, answer.login, f"{path}: {ended} in C_Finalize")
            return answer
        raise OperatorError(f"{path}: {ended or 'nothing was answered'}")


# ---- who answers


def main() -> None:
    """The program: one question, one answer."""
    directory = Path(sys.argv[1])
    question = Question(**json.loads((directory / "question").read_text()))
    try:
        with _loaded(question, directory) as member:
            _answer(directory, _look(member, question))
    except module.ModuleError as error:  # the module has said why
        said = (directory / "stderr").read_text(errors="replace").splitlines()
        _answer(directory, _none(said[-1] if said else str(error)))
    except ConfigError as error:
        _answer(directory, _none(f"{error.key}: {error.problem}"))
    except (ConnectError, OperatorError) as error:
        _answer(directory, _none(str(error)))


def _none(problem: str) -> Answer:
    return Answer("", (), "", problem)


def _answer(directory: Path, answer: Answer) -> None:
    (directory / "answer").write_text(json.dumps(asdict(answer)))


@contextmanager
def _loaded(question: Question, directory: Path) -> Iterator[Member]:
    """The member alone in a configuration of its own, which tries once and leaves no trace elsewhere."""
    name = question.member["name"]
    recovery = {"attempts": 0, "connect_timeout_s": question.connect_timeout_s}
    tables: list[tuple[str, Mapping[str, object]]] = [
        ("ha", {"log": "off"}),
        ("recovery", recovery),
        ("member", question.member),
        ("group", {"label": "p11ha", "serial": "1", "members": [name]}),
    ]
    file = directory / "pkcs11-ha.toml"
    file.write_text("\n".join(render(section, values) for section, values in tables))
    os.environ |= {"PKCS11_HA_CONF": str(file), "PKCS11_HA_STATE": str(directory)}
    config.load(str(file))  # to say what is wrong without the path of a file that nobody knows
    with module.initialised() as library:
        yield library.core.members[name]


def _look(member: Member, question: Question) -> Answer:
    if member.connecting or member.instance is None or not member.instance.initialised:
        return _none(member.why)
    found = list(member.tokens())
    tokens = tuple(
        _token(member, slot, slot_info, token_info)
        for slot, slot_info, token_info, library in found
        if member.config.token.matches(slot, slot_info, token_info, library)
    )
    info = native.ffi.new("CK_INFO *")
    member.call("C_GetInfo", info)
    words = (
        native.padded(info.libraryDescription) or native.padded(info.manufacturerID) or "no description",
        f"{info.libraryVersion.major}.{info.libraryVersion.minor}",
        f"(Cryptoki {info.cryptokiVersion.major}.{info.cryptokiVersion.minor})",
    )
    wants_all = not member.config.token.wanted
    problem = "" if member.state is MemberState.UP or wants_all else member.why
    tried = ""
    if question.pin_source and not problem:
        tried = _log_in(member, tokens[0], question.pin_source)
        problem = "" if tried == ck.rv_name(ck.CKR_OK) else f"C_Login answers {tried}"
    return Answer(" ".join(words), tokens, tried, problem)


def _token(member: Member, slot: int, slot_info: Mapping[str, Any], info: Mapping[str, Any]) -> Token:
    mechanisms = 0
    with suppress(ConnectError):
        mechanisms = len(
            member.mechanism_types(slot)
        )  # the list itself: what is said of its length may be more
    return Token(
        slot,
        slot_info["slotDescription"],
        info["label"],
        info["serialNumber"],
        info["manufacturerID"],
        info["model"],
        tuple(name for name in _TOKEN_FLAGS if info["flags"] & getattr(ck, f"CKF_{name}")),
        mechanisms,
    )


def _log_in(member: Member, token: Token, source: str) -> str:
    """One C_Login, if a wrong PIN would not be the last; the name of what it answers."""
    for flag in ("USER_PIN_LOCKED", "USER_PIN_FINAL_TRY"):
        if flag in token.flags:
            raise OperatorError(f"{member.name}: not logged in: the token says {flag}")
    with operator.pin(source) as secret:
        pin = Pin(native.lib.ha_secret_bytes(secret), native.lib.ha_secret_size(secret))
        rv = member.login(ck.CKU_USER, pin.pointer, pin.size)
    if rv == ck.CKR_OK:
        member.logout()
    return ck.rv_name(rv)


def table_of(text: str, path: str, name: str) -> dict[str, Any]:
    """The keys of a [[member]] as the file has them, which may be Luna's."""
    return next(table for table in config.tables(text, path)["member"] if table["name"] == name)
