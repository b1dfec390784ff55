"""The group's domain key is made, and told without its secret: `p11ha domain init` and what of its answer is shown."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from demo.audit import Broken

SHARES = "2of3"
PATIENCE_S = 60.0
_SHARE = re.compile(r"((?:[a-z]+ ){2})(?:[a-z]+ ){30}[a-z]+")  # 33 words of SLIP-39


def init(p11ha: Path, group: str, pin_file: Path, env: dict[str, str]) -> list[str]:
    """Give each member of the group the domain key, and return what the command says, its shares shortened.

    Whoever knows two shares has the domain key, and with it can read every key that ever travelled between the
    members. So a share is for its custodian's eyes, not for the screen and the logs of a demonstration. Its first two
    words are the same in all shares of a set and say nothing of the key.
    """
    command = [str(p11ha), "domain", "init", group, "--shares", SHARES, "--pin-source", f"file:{pin_file}"]
    try:
        done = subprocess.run(
            command,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise Broken(f"p11ha domain init did not end within {PATIENCE_S:.0f} s") from None
    if done.returncode != 0:
        raise Broken(f"p11ha domain init ended with {done.returncode}: {done.stderr.strip()}")
    return shortened(done.stdout)


def shortened(output: str) -> list[str]:
    """The lines with two words of each share; raises Broken if not all is there."""
    text, shares = _SHARE.subn(r"\1…", output)
    if shares != 3:
        raise Broken(f"p11ha domain init showed {shares} shares of 33 words instead of 3")
    lines = [line for line in text.splitlines() if line]
    if not re.search(r"\bgeneration 1\b.*\bcheck value [0-9a-f]+", lines[-1]):
        raise Broken(f"p11ha domain init ended with: {lines[-1]}")
    return lines
