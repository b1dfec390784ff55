"""Host programs, two tokens with one signing key, and an installation that may be broken."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import build
from demo.members import SoftToken, scratch
from tests import p11
from tests.boundary.hosts import Host
from tests.conftest import ROOT, SANITIZERS, Group, GroupFactory, is_sanitized

HERE = Path(__file__).parent

PIN = "123456"
LABEL = "signing"
PRIVATE: p11.Template = {p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: LABEL}
DIGEST = bytes(range(32))

NO_DEEPBIND = "sanitizers replace malloc, and what is bound deeply would miss it"

Program = Callable[[str], Path]


class Hosts(Protocol):
    def __call__(
        self,
        how: str = ...,
        *,
        module: Path | None = ...,
        env: Mapping[str, str] | None = ...,
        cwd: Path | None = ...,
        preload: Sequence[Path] = ...,
        deaf: bool = ...,
    ) -> Host: ...


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Compiles tests/boundary/NAME.c, a program, or a library if the name begins with `lib`."""
    made: dict[str, Path] = {}
    directory = tmp_path_factory.mktemp("programs")

    def make(name: str) -> Path:
        if name not in made:
            made[name] = directory / (f"{name}.so" if name.startswith("lib") else name)
            compile_c(HERE / f"{name}.c", made[name], shared=name.startswith("lib"))
        return made[name]

    return make


def compile_c(source: Path, output: Path, *flags: str, shared: bool = False) -> None:
    """Warnings are errors, as everywhere."""
    kind = ["-shared", "-fPIC", "-fvisibility=hidden"] if shared else []
    command = [
        *("cc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-pthread", *kind),
        *("-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{ROOT / 'include'}"),
        *("-o", str(output), str(source), *flags, "-ldl"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Pair:
    """Two tokens that hold the same EC key, `signing`."""

    east: SoftToken
    west: SoftToken
    public: ec.EllipticCurvePublicKey

    def verify(self, signature: bytes) -> None:
        """Raises InvalidSignature unless it is one over DIGEST."""
        r, s = (int.from_bytes(half) for half in (signature[:32], signature[32:]))
        self.public.verify(encode_dss_signature(r, s), DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with scratch() as path:
        east, west = (SoftToken(Path(path, label), label, PIN) for label in ("east", "west"))
        for token in (east, west):
            token.import_key(pem, LABEL, "a1")
        yield Pair(east, west, key.public_key())


@pytest.fixture
def signing(pair: Pair, group: GroupFactory) -> Group:
    """A group of the pair, both in the host's process."""
    return group(pair.east.member(), pair.west.member())


@pytest.fixture
def hosts(program: Program, module: Path) -> Iterator[Hosts]:
    """Starts host programs; none outlives the test."""
    default = module
    with ExitStack() as running:

        def start(
            how: str = "local",
            *,
            module: Path | None = None,
            env: Mapping[str, str] | None = None,
            cwd: Path | None = None,
            preload: Sequence[Path] = (),
            deaf: bool = False,
        ) -> Host:
            if how == "deepbind" and is_sanitized(default):
                pytest.skip(NO_DEEPBIND)
            host = Host(program("host"), module or default, how, env, cwd, preload, deaf)
            return running.enter_context(host)

        yield start


def must_sign(host: Host, pair: Pair) -> None:
    """What an ordinary application does, from the slot list to a signature that verifies."""
    (slot,) = host.slots()
    session = host.open(slot)
    host.login(session, PIN)
    (key,) = host.find(session, PRIVATE)
    pair.verify(host.sign(session, key, DIGEST))


@dataclass(frozen=True)
class Installation:
    """A copy of everything that the library needs at run time, in places of its own that a test may spoil."""

    library: Path
    python: Path  # holds pkcs11_ha
    runtime: Path  # holds _cffi_backend
    stdlib: Path  # a link to the real one

    @property
    def package(self) -> Path:
        return self.python / "pkcs11_ha"

    def patch(self, name: str, pattern: str, replacement: str) -> None:
        """Changes a module of the package, at exactly one place."""
        file = self.package / name
        text, count = re.subn(pattern, replacement, file.read_text(), flags=re.MULTILINE)
        assert count == 1, f"{name}: {count} places look like {pattern}"
        file.write_text(text)

    def append(self, name: str, code: str) -> None:
        with (self.package / name).open("a") as file:
            file.write(f"\n{code}\n")


@pytest.fixture(scope="session")
def relocated(module: Path) -> Iterator[Installation]:
    """The module linked once more, with other paths compiled in."""
    with scratch() as path:
        root = Path(path)
        installation = Installation(
            root / "libpkcs11-ha.so", root / "python", root / "runtime", root / "stdlib"
        )
        generated = module.parent / "gen"
        header = (generated / "build.gen.h").read_text()
        for name, value in (
            ("HA_PATHS", f'"{installation.python}", "{installation.runtime}"'),
            ("HA_PYTHON_STDLIB", f'"{installation.stdlib}"'),
        ):
            header, count = re.subn(
                rf"^#define {name} .*$", f"#define {name} {value}", header, flags=re.MULTILINE
            )
            assert count == 1, name
        (root / "gen").mkdir()
        (root / "gen" / "build.gen.h").write_text(header)
        shutil.copy2(generated / "exports.map", root / "gen")
        include = [root / "gen", build.CSRC, ROOT / "include", generated, sysconfig.get_path("include")]
        target = root / "gen" / "python.o"
        subprocess.run(
            [
                *("cc", *build.COMMON, "-O2", *(f"-I{each}" for each in include)),
                *("-c", build.CSRC / "python.c", "-o", target),
            ],
            check=True,
        )
        sources = [each for each in build.library_sources(generated) if each.stem != "python"]
        objects = [generated / f"{each.stem}.o" for each in sources]
        sanitize = SANITIZERS.get(module.parent.name, "")
        build.link(root / "gen", [*objects, target], installation.library, sanitize)
        yield installation


@pytest.fixture
def installation(relocated: Installation, module: Path) -> Iterator[Installation]:
    """A whole installation, for the test to spoil."""
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(build.SHIM / "pkcs11_ha", relocated.package, ignore=ignore)
    shutil.copytree(module.parent / "runtime", relocated.runtime)
    relocated.stdlib.symlink_to(sysconfig.get_path("stdlib"))
    yield relocated
    shutil.rmtree(relocated.python)
    shutil.rmtree(relocated.runtime, ignore_errors=True)
    if relocated.stdlib.is_symlink():
        relocated.stdlib.unlink()
    else:
        shutil.rmtree(relocated.stdlib, ignore_errors=True)
