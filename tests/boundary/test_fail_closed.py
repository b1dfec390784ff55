"""What is broken answers an error and one line: never CKR_OK, never foreign code."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from pkcs11_ha.spec.functions import FUNCTIONS
from tests import p11
from tests.boundary.conftest import PIN, PRIVATE, Hosts, Installation, Pair, must_sign
from tests.boundary.hosts import Host
from tests.conftest import Group

# These have an answer of their own before C_Initialize.
ALWAYS = ("C_Initialize", "C_GetFunctionList", "C_GetInterfaceList", "C_GetInterface")

Spoil = Callable[[Installation], object]


def must_refuse(host: Host) -> str:
    """C_Initialize fails with one line, and whatever is called besides fails too; the line."""
    assert host.rv("C_Initialize", None) == "CKR_GENERAL_ERROR"
    said = host.lines()
    assert len(said) == 1, said
    assert said[0].startswith("pkcs11-ha: ")
    for row in FUNCTIONS:
        if row.name not in ALWAYS:
            assert (row.name, host.rv(row.name)) == (row.name, "CKR_CRYPTOKI_NOT_INITIALIZED")
    assert host.rv("CA_GetHAState") == "CKR_CRYPTOKI_NOT_INITIALIZED"
    assert host.lines() == said
    # and the next try is no better, nor worse
    assert host.rv("C_Initialize", None) == "CKR_GENERAL_ERROR"
    assert host.rv("C_GetInfo", host.room(128)) == "CKR_CRYPTOKI_NOT_INITIALIZED"
    assert host.exit() == 0
    return said[0]


def test_a_whole_installation_elsewhere_works(
    installation: Installation, signing: Group, pair: Pair, hosts: Hosts
) -> None:
    """So that the tests below fail for what they break and for nothing else."""
    host = hosts(module=installation.library, env=signing.env)
    host.ok("C_Initialize", None)
    must_sign(host, pair)
    host.ok("C_Finalize", None)
    assert host.lines() == []
    assert not list(installation.python.rglob("__pycache__"))  # nothing is written beside the sources


def no_stdlib(installation: Installation) -> None:
    installation.stdlib.unlink()


def half_a_stdlib(installation: Installation) -> None:
    """encodings, and nothing that it needs."""
    installation.stdlib.unlink()
    installation.stdlib.mkdir()
    shutil.copytree(Path(sysconfig.get_path("stdlib"), "encodings"), installation.stdlib / "encodings")


def no_core_modules(installation: Installation) -> None:
    """A standard library without what the core imports."""
    real = Path(sysconfig.get_path("stdlib"))
    installation.stdlib.unlink()
    installation.stdlib.mkdir()
    for entry in real.iterdir():
        if entry.name not in ("threading.py", "site-packages", "__pycache__"):
            (installation.stdlib / entry.name).symlink_to(entry)


def no_package(installation: Installation) -> None:
    shutil.rmtree(installation.package)


def no_backend(installation: Installation) -> None:
    shutil.rmtree(installation.runtime)


def broken_backend(installation: Installation) -> None:
    for file in installation.runtime.iterdir():
        file.write_bytes(b"no library")


def module_missing(installation: Installation) -> None:
    (installation.package / "runtime" / "native.py").unlink()


def module_cut_short(installation: Installation) -> None:
    (installation.package / "runtime" / "core.py").write_text("def start(\n")


def module_raises(installation: Installation) -> None:
    (installation.package / "log.py").write_text('raise RuntimeError("one\\nand another\\x1b[31m line")\n')


def module_exits(installation: Installation) -> None:
    (installation.package / "log.py").write_text("raise SystemExit(0)\n")


def constants_missing(installation: Installation) -> None:
    (installation.package / "ck.py").unlink()


def other_version(installation: Installation) -> None:
    installation.patch("ck.py", r'^STAMP = "[^"]*"$', 'STAMP = "0.0.1+000000000000"')


def other_version_with_other_functions(installation: Installation) -> None:
    """Another version is seldom only another number."""
    other_version(installation)
    installation.patch("ck.py", r'^UPCALLS = \("check", ', 'UPCALLS = ("look", ')
    installation.patch("entry/questions.py", r'^    "check": check,$', '    "look": check,')


def handler_missing(installation: Installation) -> None:
    installation.patch("entry/slots.py", r'^    "C_GetTokenInfo": _get_token_info,$', "")


def handler_too_many(installation: Installation) -> None:
    installation.patch(
        "entry/slots.py",
        r'^    "C_GetTokenInfo": _get_token_info,$',
        r'\g<0>\n    "C_Forge": _get_token_info,',
    )


def attach_raises(installation: Installation) -> None:
    installation.patch(
        "entry/__init__.py", r"^    native\.ffi, native\.lib = ffi, lib$", "    raise MemoryError"
    )


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_stdlib, "no Python library in "),
        (half_a_stdlib, "No module named '"),
        (no_core_modules, "No module named 'threading'"),
        (no_package, "No module named 'pkcs11_ha'"),
        (no_backend, "No module named '_cffi_backend'"),
        (broken_backend, "_cffi_backend"),
        (module_missing, "native"),
        (module_cut_short, "core.py, line 1"),
        (module_raises, "RuntimeError: one"),
        (module_exits, "SystemExit"),
        (constants_missing, "ck"),
        (other_version, "different versions"),
        (other_version_with_other_functions, "different versions"),
        (handler_missing, "C_GetTokenInfo"),
        (handler_too_many, "C_Forge"),
        (attach_raises, "MemoryError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_installation_is_refused_with_one_line(
    spoil: Spoil, says: str, installation: Installation, signing: Group, hosts: Hosts
) -> None:
    spoil(installation)
    line = must_refuse(hosts(module=installation.library, env=signing.env))
    assert says in line
    assert line.isprintable()


def test_an_interpreter_that_does_not_start_is_refused(
    installation: Installation, signing: Group, hosts: Hosts
) -> None:
    """Here CPython itself dumps its paths on stderr before it gives up; we add our line."""
    half_a_stdlib(installation)
    (installation.stdlib / "encodings" / "__init__.py").write_text("raise RuntimeError\n")
    host = hosts(module=installation.library, env=signing.env)
    for number in (1, 2):
        assert host.rv("C_Initialize", None) == "CKR_GENERAL_ERROR"
        ours = [line for line in host.lines() if line.startswith("pkcs11-ha: ")]
        assert len(ours) == number
        assert "Python does not start" in ours[-1]
        assert host.rv("C_GetInfo", host.room(128)) == "CKR_CRYPTOKI_NOT_INITIALIZED"
    assert host.exit() == 0


def test_a_library_without_its_libpython_cannot_be_loaded(
    module: Path, hosts: Hosts, directory: Path
) -> None:
    name = sysconfig.get_config_var("INSTSONAME").encode()
    content = module.read_bytes()
    assert content.count(name + b"\0") >= 1  # DT_NEEDED
    broken = directory / module.name
    broken.write_bytes(content.replace(name + b"\0", name[:-1] + b"X\0"))
    host = hosts(module=broken)
    assert host.greeting.startswith("cannot load: ")
    assert name[:-1].decode() + "X" in host.greeting


EXCEPTIONS = [
    "RuntimeError('x')",
    "SystemExit(0)",
    "KeyboardInterrupt",
    "MemoryError",
    "RecursionError",
    "GeneratorExit",
]


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_an_exception_inside_the_core_is_an_error_and_one_line_in_the_log(
    exception: str, installation: Installation, signing: Group, pair: Pair, hosts: Hosts
) -> None:
    installation.patch(
        "entry/slots.py", r"^def _get_info\(info: Any\) -> None:$", rf"\g<0>\n    raise {exception}"
    )
    host = hosts(module=installation.library, env=signing.env)
    host.ok("C_Initialize", None)
    assert host.rv("C_GetInfo", host.room(128)) == "CKR_GENERAL_ERROR"
    must_sign(host, pair)  # and it stays alone
    host.ok("C_Finalize", None)
    assert host.exit() == 0
    assert host.lines() == []
    (line,) = [line for line in signing.log.read_text().splitlines() if "core.failed" in line]
    assert exception.partition("(")[0] in line
    assert "call=C_GetInfo" in line


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_an_exception_in_the_start_of_the_core_is_an_error_and_one_line(
    exception: str, installation: Installation, signing: Group, hosts: Hosts
) -> None:
    installation.patch(
        "entry/life.py", r"^        _current = core\.start\(flags\)$", f"        raise {exception}"
    )
    assert exception.partition("(")[0] in must_refuse(hosts(module=installation.library, env=signing.env))


def _ask_locate(host: Host, session: int) -> str:
    (key,) = host.find(session, PRIVATE)
    return host.rv("C_SignInit", session, host.mechanism(p11.CKM_ECDSA), key)


def _ask_carry_out(host: Host, session: int) -> str:
    template = host.attributes({p11.CKA_VALUE_LEN: 16})
    return host.rv("C_GenerateKey", session, host.mechanism(p11.CKM_AES_KEY_GEN), *template, host.room(8))


def _ask_identify(host: Host, session: int) -> str:
    return host.rv("C_FindObjectsInit", session, *host.attributes(PRIVATE))


def _ask_decide(host: Host, session: int) -> str:
    return host.rv("C_DigestInit", session, host.mechanism(p11.CKM_VENDOR_DEFINED))


@pytest.mark.parametrize(
    ("question", "ask"),
    [
        ("locate", _ask_locate),
        ("carry_out", _ask_carry_out),
        ("identify", _ask_identify),
        ("decide", _ask_decide),
        ("no_member", _ask_decide),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_exception_in_the_middle_of_a_call_is_an_error(
    question: str, ask: Callable[[Host, int], str], installation: Installation, signing: Group, hosts: Hosts
) -> None:
    asked = "entry/making.py" if question == "carry_out" else "entry/questions.py"
    installation.patch(
        asked, rf"^def {question}\((.*)$", rf"def {question}(\1\n    raise KeyError('planted')"
    )
    if question == "locate":  # of which there is need only where the data plane has not been told
        installation.patch("runtime/objects.py", r"^    def _publish\(self, .*$", r"\g<0>\n        return")
    host = hosts(module=installation.library, env=signing.env)
    host.ok("C_Initialize", None)
    session = host.open()
    host.login(session, PIN)
    assert ask(host, session) in ("CKR_GENERAL_ERROR", "CKR_DEVICE_ERROR")
    host.ok("C_CloseSession", session)
    host.ok("C_Finalize", None)
    assert host.lines() == []
    assert "planted" in signing.log.read_text()


def test_a_function_that_is_not_attached_is_an_error(
    installation: Installation, signing: Group, pair: Pair, hosts: Hosts
) -> None:
    """cffi answers 0 for it, and 0 would be CKR_OK."""
    installation.patch(
        "entry/__init__.py",
        r"^    for name, handler in handlers\.items\(\):$",
        r"\g<0>\n        if name == 'C_GetInfo':\n            continue",
    )
    host = hosts(module=installation.library, env=signing.env)
    host.ok("C_Initialize", None)
    assert host.rv("C_GetInfo", host.room(128)) == "CKR_GENERAL_ERROR"
    must_sign(host, pair)


def test_an_exception_that_even_the_catch_all_lets_through_is_an_error(
    installation: Installation, signing: Group, pair: Pair, hosts: Hosts
) -> None:
    installation.patch(
        "entry/slots.py", r"^def _get_info\(info: Any\) -> None:$", r"\g<0>\n    raise ValueError"
    )
    installation.patch("entry/life.py", r"^    trace, place = error.*$", "    raise SystemExit(0)")
    host = hosts(module=installation.library, env=signing.env)
    host.ok("C_Initialize", None)
    assert host.rv("C_GetInfo", host.room(128)) == "CKR_GENERAL_ERROR"
    must_sign(host, pair)


@pytest.mark.parametrize(
    "answer", ["0", "None", "ck.CKR_OK", "True", "'CKR_OK'", "[]", "1 << 40", "-1", "_SEAL >> 1"]
)
def test_an_answer_without_the_seal_is_an_error(
    answer: str, installation: Installation, signing: Group, hosts: Hosts
) -> None:
    """Whatever Python makes of an answer: only one that the core has sealed counts."""
    installation.patch(
        "entry/__init__.py",
        r"^        return (_SEAL \| .*)$",
        rf"        return {answer} if name == 'C_GetInfo' else \1",
    )
    host = hosts(module=installation.library, env=signing.env)
    host.ok("C_Initialize", None)
    assert host.rv("C_GetInfo", host.room(128)) == "CKR_GENERAL_ERROR"
