"""Luna's client configuration is read as it is meant, or refused with its line; nothing is lost in silence."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkcs11_ha import config, luna
from pkcs11_ha.config import ConfigError
from pkcs11_ha.luna import LunaError

FILES = Path(__file__).parents[1] / "cli" / "luna"
SMALL = """\
Chrystoki2 = {
  LibUNIX64 = /usr/lib/m.so;
}
VirtualToken = {
  VirtualToken00Label = grp;
  VirtualToken00Members = 1, 2;
}
HAConfiguration = {
  reconnAtt = 5;
}
"""


def text(name: str) -> str:
    return (FILES / name).read_text()


def refusal(content: str, path: str = "/x/Chrystoki.conf") -> str:
    with pytest.raises(ConfigError) as refused:
        config.parse(content, path)
    return str(refused.value)


def remarks(translation: luna.Translation) -> dict[int | None, str]:
    return {remark.line: remark.text for remark in translation.remarks}


def test_two_appliances() -> None:
    read = config.parse(text("appliances.conf"), "/x/Chrystoki.conf")
    assert (read.ha.only, read.ha.log) == (True, "stderr")
    assert (read.recovery.interval_s, read.recovery.attempts) == (60, -1)
    assert (read.recovery.mode, read.recovery.connect_timeout_s) == ("background", 20)
    assert [(m.name, m.module, str(m.token)) for m in read.members] == [
        (serial, "/usr/safenet/lunaclient/lib/libCryptoki2_64.so", f"pkcs11:serial={serial}")
        for serial in ("100200300400", "200300400500")
    ]
    (group,) = read.groups
    assert (group.label, group.serial, group.replication) == ("grpA", "1100200300400", "domain")
    assert (group.members, group.standby) == (("100200300400", "200300400500"), ())


def test_windows_wants_a_library_for_this_system() -> None:
    with pytest.raises(LunaError, match=r"3: Chrystoki2.LibNT: is a library for Windows"):
        luna.translate(text("windows.ini"))
    translation = luna.translate(text("windows.ini").replace("\n", "\r\n"), "/usr/lib/m.so")
    tables = translation.tables()
    assert tables["recovery"] == {"connect_timeout_s": 4.5, "attempts": 500, "interval_s": 120}
    assert tables["ha"] == {"only": True}
    assert {member["module"] for member in tables["member"]} == {"/usr/lib/m.so"}
    assert [(g["label"], g["members"], g["replication"]) for g in tables["group"]] == [
        ("par1", ["888800001", "888800002"], "domain"),
        ("par2", ["888800003"], "none"),  # nobody to be synchronised with
    ]
    assert "no absolute path" in remarks(translation)[20]
    assert "one member" in remarks(translation)[14]


def test_utf_16_is_called_by_its_name() -> None:
    for encoding in ("utf-16", "utf-16-be", "utf-16-le"):
        data = text("windows.ini").encode(encoding)
        with pytest.raises(LunaError, match="UTF-16: iconv -f UTF-16 -t UTF-8"):
            luna.translate(data.decode("utf-8", "surrogateescape"))


def test_standby_and_all_that_has_no_counterpart() -> None:
    translation = luna.translate(text("standby.conf"))
    tables = translation.tables()
    (group,) = tables["group"]
    assert (group["members"], group["standby"]) == (["154438865287", "1238700701509"], ["1411876543210"])
    assert (group["replication"], tables["ha"]["only"]) == ("none", False)
    assert tables["ha"]["log"] == "file:/var/log/luna/haErrorLog.txt"
    assert {member["call_timeout_s"] for member in tables["member"]} == {30}
    said = remarks(translation)
    words = {
        6: "activeEnhanced",
        10: "no such group",
        16: "login",
        17: "30 s",
        18: "not known",
        21: "p11ha recover",
    }
    assert {line: word for line, word in words.items() if word in said[line]} == words
    assert "reconnAtt is not given" in said[None]
    without = luna.translate(text("standby.conf").replace("VirtualTokenActiveRecovery", "# "))
    assert any("VirtualTokenActiveRecovery is not given" in str(remark) for remark in without.remarks)


def test_who_stands_by_is_said_to_be_unknown() -> None:
    assert "nothing says who stands by" in str(luna.translate(SMALL).remarks[-1])
    odd = SMALL.replace("reconnAtt = 5;", "reconnAtt = 5;\n  grpHotStandbys = 2;")
    assert "not known who stands by" in remarks(luna.translate(odd))[10]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("reconnAtt = 5;", "reconnAtt = 5", "9: reconnAtt: its value must end with `;`"),
        ("reconnAtt = 5;", "reconnAtt 5;", "9: expected `Key = value;` or `}`, not `reconnAtt …`"),
        ("reconnAtt = 5;", "reconnAtt = five;", "9: HAConfiguration.reconnAtt: expected a whole number"),
        (
            "reconnAtt = 5;",
            "reconnAtt = -7;",
            "9: HAConfiguration.reconnAtt: expected a whole number from -1 to 2147483647",
        ),
        ("reconnAtt = 5;", "HAOnly = yes;", "9: HAConfiguration.HAOnly: expected 1 or 0"),
        (
            "reconnAtt = 5;",
            "haLogStatus = on;",
            "9: HAConfiguration.haLogStatus: expected enabled or disabled",
        ),
        (
            "reconnAtt = 5;",
            "reconnAtt = 5;\n  RECONNATT = 6;",
            "10: HAConfiguration.RECONNATT: given twice: line 9 has it already",
        ),
        ("reconnAtt = 5;\n}\n", "reconnAtt = 5;\n", "8: HAConfiguration: is not closed by `}`"),
        (
            "reconnAtt = 5;\n}\n",
            "reconnAtt = 5;\nLuna = {\n  A = 1;\n}\n",
            "8: HAConfiguration: is not closed by `}` before Luna on line 10",
        ),
        ("reconnAtt = 5;", "reconnAtt = \udcfc;", "9: HAConfiguration.reconnAtt: not UTF-8: iconv"),
        ("reconnAtt = 5;", "\udcfc", "9: not UTF-8: iconv"),
        ("= 1, 2;", "= ;", "6: VirtualToken.VirtualToken00Members: expected serial numbers with commas"),
        ("= 1, 2;", "= 1, a/b;", "6: VirtualToken.VirtualToken00Members: 'a/b' is no serial number"),
        ("= 1, 2;", "= 1, 2;\n  VirtualToken01Label = b;\n  VirtualToken01Members = 2;", "8: VirtualToken."),
        (
            "  VirtualToken00Label = grp;\n",
            "",
            "5: VirtualToken.VirtualToken00Members: VirtualToken00Label is lacking",
        ),
        (
            "reconnAtt = 5;",
            "grpStandbyMembers = 1,2;",
            "9: HAConfiguration.grpStandbyMembers: all members stand by",
        ),
        ("/usr/lib/m.so", "m.so", "2: Chrystoki2.LibUNIX64: expected an absolute path"),
        ("LibUNIX64", "Nothing", "1: Chrystoki2: names no library"),
        ("VirtualToken0", "Other0", "1: VirtualToken: names no group"),
    ],
)
def test_a_wrong_line_is_named(old: str, new: str, says: str) -> None:
    assert old in SMALL
    assert refusal(SMALL.replace(old, new)).startswith(f"/x/Chrystoki.conf:{says}")


def test_a_wrong_line_of_windows_is_named_and_its_value_is_not_shown() -> None:
    wrong = text("windows.ini").replace("[VirtualToken]", "VirtualToken")
    assert refusal(wrong, "/x/crystoki.ini").startswith(
        "/x/crystoki.ini:22: expected `[Section]` or `Key=value`"
    )
    for secret in ("AuthTokenClientSecret = hunter2", "AuthTokenClientSecret hunter2"):
        assert "hunter2" not in refusal(SMALL.replace("reconnAtt = 5;", secret))
        assert "hunter2" not in refusal(f"{SMALL}{secret};\n")


def test_a_missing_library_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "Chrystoki.conf"
    file.write_text(SMALL.replace("/usr/lib/m.so", f"{tmp_path}/none.so"))
    with pytest.raises(ConfigError, match=r"Chrystoki.conf:2: Chrystoki2.LibUNIX64: .*none.so: No such file"):
        config.load(str(file))


@pytest.mark.parametrize("name", [path.name for path in sorted(FILES.iterdir())])
def test_what_is_left_for_lunas_library_is_all_but_the_groups(name: str) -> None:
    left = luna.parse(luna.without_ha(text(name)))
    kept = [(e.section, e.key, e.value) for e in luna.parse(text(name)) if e.section not in luna.HA_SECTIONS]
    assert [(e.section, e.key, e.value) for e in left] == kept


@given(st.text(st.sampled_from("aB01={};[]#\n\t '\"\\,é"), max_size=60))
def test_any_text_is_read_or_refused(content: str) -> None:
    for wrapped in (content, f"[{content}", SMALL + content, SMALL.replace("reconnAtt", content)):
        for path in ("/x/Chrystoki.conf", "/x/crystoki.ini"):
            with suppress(ConfigError):
                config.parse(wrapped, path)


def test_lunas_directory_is_the_last_place_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, system = tmp_path / "pkcs11-ha" / "pkcs11-ha.toml", tmp_path / "system.toml"
    monkeypatch.setattr(config, "SYSTEM_PATH", str(system))
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "ChrystokiConfigurationPath": str(tmp_path)}

    def found(**more: str) -> str:
        return config.find_path(environ | more, secure=False)

    assert found() == str(tmp_path / "Chrystoki.conf")
    (tmp_path / "crystoki.ini").touch()
    assert found() == str(tmp_path / "crystoki.ini")
    assert found(ChrystokiConfigurationPath="/a/other.conf") == "/a/other.conf"
    assert config.find_path(environ, secure=True) == str(system)
    system.touch()
    assert found() == str(system)
    ours.parent.mkdir()
    ours.touch()
    assert found() == str(ours)
    assert found(PKCS11_HA_CONF="/my.toml") == "/my.toml"
