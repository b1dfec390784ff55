"""docs/luna.md has the keys and the commands as the tables in the code have them."""

from __future__ import annotations

from pathlib import Path

from pkcs11_ha import luna
from pkcs11_ha.cli.luna import grammar

PAGE = Path(__file__).parents[2] / "docs" / "luna.md"


def table(heads: list[str], rows: list[list[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def test_the_page_has_every_key_and_every_command() -> None:
    page = PAGE.read_text()
    keys = [
        [key.section, f"`{key.name}`", f"`{key.ours}`" if key.ours else "-", key.meaning] for key in luna.KEYS
    ]
    commands = [[f"`{verb.syntax}`", f"`{verb.ours}`"] for verb in grammar.VERBS]
    assert table(["section", "key", "ours", "what becomes of it"], keys) in page
    assert table(["Luna's", "ours"], commands) in page
