"""Applications that start and log in at once on the same tokens, whose files each login writes: none sees that.

SoftHSM reads a token's file also while another process writes it, and goes on with what it read.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from demo.members import SoftToken
from tests.conftest import ROOT, GroupFactory

PROCESSES, LIVES = 6, 80
PATIENCE_S = 90.0

LIVE = """
import sys
from tests import p11

module = p11.Module(sys.argv[1])
for life in range(int(sys.argv[2])):
    try:
        module.initialize()
        session = module.open(module.slots()[0])
        session.login(sys.argv[3])
        key = session.find_one({p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_LABEL: "ec"})
        assert session.sign(p11.CKM_ECDSA, key, bytes(32))
    except Exception as error:
        print(life, repr(error))
    module.finalize()
"""


def test_applications_that_start_at_once_all_get_to_sign(
    module: Path, tokens: tuple[SoftToken, SoftToken], group: GroupFactory
) -> None:
    group(*(token.member() for token in tokens), recovery={"interval_s": 0.05})
    command = [sys.executable, "-c", LIVE, str(module), str(LIVES), tokens[0].pin]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert said == [""] * PROCESSES
    assert [process.returncode for process in started] == [0] * PROCESSES
