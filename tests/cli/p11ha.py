"""The command as an operator runs it: in a process of its own, or, which is quicker, here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from pkcs11_ha.cli import main

P11HA = Path(sys.executable).parent / "p11ha"

Done = subprocess.CompletedProcess[str]


def run(*arguments: str | Path, **env: str) -> Done:
    return subprocess.run(
        [P11HA, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        stdin=subprocess.DEVNULL,
        env=os.environ | env,
    )


def run_here(*arguments: str | Path, **env: str) -> Done:
    """The same for commands that load no library."""
    line = ["p11ha", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", line),
        patch.dict(os.environ, env),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        status = main.main()
    return subprocess.CompletedProcess(line, status, out.getvalue(), err.getvalue())


def _loads_nothing(arguments: tuple[str | Path, ...]) -> bool:
    return arguments[0] in ("group", "ha") or arguments[:2] in (
        ("member", "add"),
        ("member", "remove"),
        ("member", "list"),
    )


def _run(arguments: tuple[str | Path, ...], env: dict[str, str]) -> Done:
    return (run_here if _loads_nothing(arguments) else run)(*arguments, **env)


def good(*arguments: str | Path, **env: str) -> str:
    """What a command that must succeed prints."""
    done = _run(arguments, env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def refused(*arguments: str | Path, status: int = 1, **env: str) -> str:
    """The one line of a command that must fail."""
    done = _run(arguments, env)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip()
