"""python-pkcs11's own test suite: the same outcome of each test on a group as on the bare SoftHSM module."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

from demo.members import SoftToken, scratch, softhsm
from tests.conftest import ROOT, GroupFactory

# The suite is in the source distribution alone. It is fetched once, by pip, and kept in build/.
VERSION = "0.10.1"
SHA256 = "e0d7ccede3b3145a678d7c8c59b3c64dcebeb77c9146ad3394a4b1309c4ab2a2"
SDIST = ROOT / "build" / "sdist" / f"python_pkcs11-{VERSION}.tar.gz"
FETCH = f"pip download --no-deps --no-binary python-pkcs11 --dest {SDIST.parent} python-pkcs11=={VERSION}"

PIN, SO_PIN = "1234", "5678"

Outcomes = dict[str, str]


def fetch() -> Path:
    if not SDIST.exists():
        command = [sys.executable, "-m", *FETCH.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not SDIST.exists():
            pytest.fail(f"the sdist of python-pkcs11 {VERSION} cannot be had: {FETCH}\n{done.stderr[-1000:]}")
    if (found := hashlib.sha256(SDIST.read_bytes()).hexdigest()) != SHA256:
        pytest.fail(f"{SDIST} is not the one that is known: SHA-256 {found}")
    return SDIST


@pytest.fixture(scope="module")
def suite() -> Iterator[Path]:
    """A directory with the suite in tests/."""
    assert version("python-pkcs11") == VERSION, "the suite and what it tests are of one version"
    with scratch() as path, tarfile.open(fetch()) as archive:
        prefix = f"python_pkcs11-{VERSION}/"
        members = [m for m in archive.getmembers() if m.name.startswith(f"{prefix}tests/")]
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian's 3.11 has no `filter`
        archive.extractall(path, members)
        yield Path(path, prefix)


def outcomes(suite: Path, library: Path, env: dict[str, str], directory: Path) -> Outcomes:
    """What becomes of each test, with the reason of those that do not pass."""
    report = directory / "report.xml"
    token = {"PKCS11_TOKEN_LABEL": "TEST", "PKCS11_TOKEN_PIN": PIN, "PKCS11_TOKEN_SO_PIN": SO_PIN}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull),
            *("--rootdir", str(suite), f"--junitxml={report}", "tests"),
        ],
        env=os.environ | token | {"PKCS11_MODULE": str(library)} | env,
        cwd=suite,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: some have failed
    assert "pkcs11-ha:" not in done.stderr
    return dict(outcome(case) for case in ElementTree.parse(report).iter("testcase"))


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    name = f"{case.get('classname')}::{case.get('name')}"
    what = [f"{child.tag}: {child.get('message')}" for child in case if child.tag != "system-out"]
    return name, what[0] if what else "passed"


@pytest.fixture(scope="module")
def of_softhsm(suite: Path) -> Outcomes:
    with scratch() as path:
        token = SoftToken(Path(path, "bare"), "TEST", PIN, SO_PIN)
        return outcomes(suite, softhsm(), token.env, token.directory)


def test_the_suite_works_with_softhsm(of_softhsm: Outcomes) -> None:
    """Else the same outcome would say nothing."""
    assert sum(what == "passed" for what in of_softhsm.values()) >= 140
    assert {what.partition(":")[0] for what in of_softhsm.values()} == {"passed", "skipped"}


@pytest.mark.parametrize("balance", ["least-busy", "round-robin"])
def test_each_test_ends_as_with_softhsm(
    balance: str, suite: Path, of_softhsm: Outcomes, module: Path, group: GroupFactory, directory: Path
) -> None:
    tokens = [SoftToken(directory / name, name, PIN, SO_PIN) for name in ("east", "west", "spare")]
    made = group(
        *(token.member() for token in tokens), label="TEST", balance=balance, members=["east", "west"]
    )
    # SoftHSM shows one slot more than there are tokens, and the suite counts: so there is one group more.
    with made.conf.open("a") as conf:
        conf.write('\n[[group]]\nlabel = "SPARE"\nserial = "1599447002"\nmembers = ["spare"]\n')
    library = directory / "libsofthsm2.so"  # some tests look for that name
    library.symlink_to(module)
    assert outcomes(suite, library, made.env, directory) == of_softhsm
