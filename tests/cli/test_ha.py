"""`p11ha ha`: [recovery] comes into being with the first command that sets it, as Luna's section does."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pkcs11_ha.cli import ha
from pkcs11_ha.config import OPTIONS
from tests.cli.p11ha import good, refused

TEXT = """\
[[member]]
name = "east"
module = "/bin/sh"
token = "pkcs11:token=east"

[[group]]
label = "prod"
serial = "1"
members = ["east"]
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pkcs11-ha.toml"
    path.write_text(TEXT)
    monkeypatch.setenv("PKCS11_HA_CONF", str(path))
    return path


def said(conf: Path) -> dict[str, Any]:
    return tomllib.loads(conf.read_text())


@pytest.mark.parametrize(
    ("line", "section"),
    [
        (["retry", "-1"], {"interval_s": 60, "attempts": -1}),
        (["retry", "0"], {"interval_s": 60, "attempts": 0}),
        (["retry", "500"], {"interval_s": 60, "attempts": 500}),
        (["interval", "90"], {"interval_s": 90, "attempts": -1}),
        (["interval", "0.5"], {"interval_s": 0.5, "attempts": -1}),
        (["recovery-mode", "background"], {"interval_s": 60, "attempts": -1, "mode": "background"}),
    ],
)
def test_the_section_appears_with_both(conf: Path, line: list[str], section: dict[str, object]) -> None:
    assert "[recovery] is not in the file" in good("ha", "show")
    good("ha", *line)
    assert said(conf)["recovery"] == section
    assert "[recovery]\n" in good("ha", "show")
    assert conf.read_text().endswith(TEXT)


def test_a_section_that_is_there_is_not_filled(conf: Path) -> None:
    conf.write_text("[recovery]\nmode = 'call'  # as ever\n" + TEXT)
    good("ha", "retry", "3")
    good("ha", "recovery-mode", "background")
    assert said(conf)["recovery"] == {"mode": "background", "attempts": 3}
    assert "  # as ever\n" in conf.read_text()


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (["interval", "59"], "usual are 60 s and more"),
        (["interval", "1201"], "usual are 1200 s at most"),
        (["interval", "60"], ""),
        (["interval", "1200"], ""),
        (["retry", "0"], "recovery is off"),
        (["retry", "1"], ""),
        (["log", "file:/tmp"], "/tmp is a directory: no line can be written"),
        (["log", "file:/no/x.log"], "there is no directory /no: no line can be written"),
        (["log", "file:/tmp/x.log"], ""),
    ],
)
def test_what_is_unusual_is_done_and_said(conf: Path, line: list[str], note: str) -> None:
    assert conf.exists()
    notes = [text for text in good("ha", *line).splitlines() if text.startswith("note: ")]
    assert len(notes) == bool(note)
    assert not note or note in notes[0]


@pytest.mark.parametrize(
    "line",
    [
        *(
            ["interval", wrong]
            for wrong in (
                *("0", "-1", "-0.5", "nan", "inf", "1e10", "1e400", "1e-320", "1_000", "0x10", "sixty", ""),
                *("60 s", "0x", "[1]"),
            )
        ),
        *(["retry", wrong] for wrong in ("-2", "1.5", "many", "", "true", "99999999999", "--", "-x")),
        *(["recovery-mode", wrong] for wrong in ("activeBasic", "CALL", "")),
        *(["only", wrong] for wrong in ("true", "ON", "")),
        *(["log", wrong] for wrong in ("file:x", "printer", "", "file://host/x")),
    ],
)
def test_wrong_values(conf: Path, line: list[str]) -> None:
    assert refused("ha", *line, status=2).startswith(f"p11ha ha {line[0]}: ")
    assert conf.read_text() == TEXT


def test_other_settings(conf: Path) -> None:
    assert "the numbers of slots change" in good("ha", "only", "off")
    good("ha", "log", "stderr")
    assert said(conf)["ha"] == {"only": False, "log": "stderr"}
    shown = json.loads(good("ha", "show", "--json"))
    assert shown["configuration"] == str(conf)
    assert (shown["ha"]["log"], shown["recovery"]["attempts"]) == ("stderr", -1)
    good("ha", "only", "on")
    assert said(conf)["ha"] == {"only": True, "log": "stderr"}


def test_log_has_an_option_for_each_of_the_table() -> None:
    wanted = {option.name.removeprefix("log_") for option in OPTIONS if option.name.startswith("log_")}
    assert set(ha._log_signature().parameters) == {"target", "path", "dry_run", *wanted}
