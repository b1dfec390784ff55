"""`python3 -m demo.practice DIRECTORY`: three HSMs to practise with, which a shell starts and kills by name.

Each is a SoftHSM token behind a `p11-kit server`; all have one key, `signing`. What a shell needs is in
DIRECTORY/env.sh: the module, a configuration that does not exist yet, and the function `hsm start|kill NAME`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from demo.members import MemberError, SoftToken, p11_kit_client, softhsm

ROOT = Path(__file__).parent.parent
NAMES = ("east", "west", "north")
PIN = "123456"

_ENV = """\
export PKCS11_HA_CONF={directory}/pkcs11-ha.toml PKCS11_HA_STATE={directory}/state
export CLIENT={client} PATH={bin}:$PATH
cd {directory}

# hsm start NAME, hsm kill NAME: a server of its own process group, with all its connections
hsm() {{
    local here={directory}/$2
    case $1 in
    start)
        rm -f "$here/p11.sock"
        SOFTHSM2_CONF="$here/softhsm2.conf" setsid sh -c 'echo $$ >"$0/pid"; exec "$@"' "$here" \\
            p11-kit server -f -n "$here/p11.sock" --provider {provider} "pkcs11:token=$2" \\
            >"$here/server.log" 2>&1 & disown
        until [ -S "$here/p11.sock" ]; do sleep 0.05; done
        echo "$2 runs" ;;
    kill)
        kill -9 -- "-$(cat "$here/pid")" && echo "$2 is dead" ;;
    *)
        echo "hsm start NAME, hsm kill NAME" ;;
    esac
}}
"""


def prepare(directory: Path) -> None:
    """Makes the tokens and env.sh; raises MemberError."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for name in NAMES:
        SoftToken(directory / name, name, PIN).import_key(pem, "signing", "01")
    (directory / "pin").write_text(f"{PIN}\n")
    (directory / "pin").chmod(0o600)
    (directory / "state").mkdir(mode=0o700)
    (directory / "env.sh").write_text(
        _ENV.format(
            directory=shlex.quote(str(directory)),
            client=shlex.quote(str(p11_kit_client())),
            provider=shlex.quote(str(softhsm())),
            bin=shlex.quote(str(ROOT / ".venv" / "bin")),
        )
    )


def main() -> None:
    """The entry point."""
    if len(sys.argv) != 2:
        sys.exit("type: python3 -m demo.practice DIRECTORY")
    directory = Path(sys.argv[1]).absolute()
    try:
        prepare(directory)
    except (MemberError, FileExistsError) as error:
        sys.exit(str(error))
    print(f"three HSMs: . {directory}/env.sh")


if __name__ == "__main__":
    main()
