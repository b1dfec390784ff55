"""Builds keywrap.c for both ends of p11-kit: behind it keys can be wrapped for other tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.members import p11_kit_client, softhsm
from tests.chaos.crash import compiled


@dataclass(frozen=True)
class Ends:
    """The modules to use instead of p11-kit's client, and of SoftHSM in its server."""

    client: Path
    provider: Path


def build(directory: Path) -> Ends:
    """Build both ends in a directory."""
    wrap, carrier = "CKM_AES_KEY_WRAP_PAD", "CKM_KEY_WRAP_LYNKS"
    client = _build(directory / "keywrap-client.so", p11_kit_client(), said=wrap, meant=carrier)
    provider = _build(directory / "keywrap-softhsm.so", softhsm(), said=carrier, meant=wrap)
    return Ends(client, provider)


def _build(library: Path, behind: Path, said: str, meant: str) -> Path:
    return compiled("keywrap.c", library, f'BEHIND="{behind}"', f"SAID={said}", f"MEANT={meant}")
