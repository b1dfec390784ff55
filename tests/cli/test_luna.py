"""Luna's files imported and read directly, and Luna's commands, on real tokens of one SoftHSM store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.members import Server, SoftToken, softhsm
from pkcs11_ha.cli.luna import verbs
from pkcs11_ha.cli.luna.grammar import UsageError
from pkcs11_ha.config import SYSTEM_PATH
from tests.cli.p11ha import good, refused, run
from tests.conftest import Group, GroupFactory, ServerFactory, SoftTokenFactory

P11HA = Path(sys.executable).parent / "p11ha"
FILES = Path(__file__).parent / "luna"
PIN = "123456"
LABELS = ("east", "west", "north")


@dataclass
class Site:
    """A host with three tokens, Luna's file, and room for a configuration of ours."""

    directory: Path
    serials: dict[str, str]
    env: dict[str, str]

    @property
    def conf(self) -> Path:
        return self.directory / "pkcs11-ha.toml"

    @property
    def pin(self) -> str:
        return f"--pin-source=file:{self.directory}/pin"

    def run(self, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in done.stderr
        return done

    def p11ha(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(P11HA, *words, PKCS11_HA_CONF=str(self.conf))

    def luna(self, line: str) -> str:
        """What one of Luna's commands prints; it must succeed."""
        done = self.p11ha("luna", *line.split())
        assert done.returncode == 0, done.stderr
        assert PIN not in done.stdout
        return done.stdout

    def refused(self, line: str, status: int) -> str:
        """The one line with which a command is refused; nothing is changed."""
        before = self.conf.read_bytes() if self.conf.exists() else b""
        done = self.p11ha("luna", *line.split())
        assert (done.returncode, done.stdout) == (status, "")
        assert (self.conf.read_bytes() if self.conf.exists() else b"") == before
        (said,) = done.stderr.splitlines()
        return said

    def tool(self, module: Path | str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """pkcs11-tool with a login."""
        command = ["pkcs11-tool", "--module", str(module), "--login", "--pin", PIN, *arguments]
        return self.run(*command, **env)

    def write(self, name: str, **serials: str) -> Path:
        """One of the sample files for these tokens, with SoftHSM as the library."""
        text = (FILES / name).read_text()
        text = re.sub(r"'?/usr/safenet/lunaclient/lib/libCryptoki2_64.so'?", str(softhsm()), text)
        for number, label in serials.items():
            serial = self.serials[label]
            # A group's serial has room for 16 characters, as many as SoftHSM's own have.
            text = text.replace(f"1{number[1:]}", f"1{serial}"[:16]).replace(number[1:], serial)
        file = self.directory / ("crystoki.ini" if name.endswith(".ini") else "Chrystoki.conf")
        file.write_text(text)
        return file


@pytest.fixture
def site(directory: Path, module: Path) -> Site:
    del module  # it must be there
    tokens = directory / "tokens"
    tokens.mkdir()
    (directory / "softhsm2.conf").write_text(f"directories.tokendir = {tokens}\nlog.level = ERROR\n")
    (directory / "pin").write_text(f"{PIN}\n")
    (directory / "pin").chmod(0o600)
    kept = ("PATH", "LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS", "PKCS11_HA_MODULE", "HOME")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env |= {"SOFTHSM2_CONF": str(directory / "softhsm2.conf"), "PKCS11_HA_STATE": str(directory / "state")}
    serials = {}
    for label in LABELS:
        command = [
            "softhsm2-util",
            "--init-token",
            "--free",
            "--label",
            label,
            "--pin",
            PIN,
            "--so-pin",
            "12345678",
        ]
        subprocess.run(command, env=env, check=True, capture_output=True)
    shown = subprocess.run(
        ["softhsm2-util", "--show-slots"], env=env, check=True, capture_output=True, text=True
    )
    for block in shown.stdout.split("Slot "):
        fields = dict(re.findall(r"^ *(Serial number|Label): +(\S+)", block, re.MULTILINE))
        if "Label" in fields:
            serials[fields["Label"]] = fields["Serial number"]
    return Site(directory, serials, env)


def keys_on(site: Site, label: str) -> str:
    """The private keys that the bare token has."""
    done = site.tool(softhsm(), "--token-label", label, "--list-objects", "--type", "privkey")
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the file


def test_an_imported_file_serves_an_application(site: Site, module: Path) -> None:
    file = site.write("appliances.conf", _100200300400="east", _200300400500="west")
    own = site.directory / "own"
    imported = site.p11ha("import-luna", str(file), "--client-config", str(own))
    assert imported.returncode == 0, imported.stderr
    assert f"wrote {site.conf}" in imported.stdout
    assert "hides the members" not in imported.stdout + site.conf.read_text()  # its library has its own file
    listing = imported.stdout.split("\n\n", 1)[1].splitlines()
    assert all(len(line) <= 80 for line in listing)
    assert "     HA Group Label:  grpA                      group        grpA" in listing
    assert "Standby Members:  <none>" in imported.stdout
    assert "HAOnly" not in (own / "Chrystoki.conf").read_text()
    assert "ServerName01 = hsm-west" in (own / "Chrystoki.conf").read_text()
    written = tomllib.loads(site.conf.read_text())
    assert {member["env"]["ChrystokiConfigurationPath"] for member in written["member"]} == {str(own)}
    assert "# line 36: HAConfiguration.reconnAtt" in site.conf.read_text()

    checked = site.p11ha("domain", "init", "grpA", "--shares", "none", site.pin)
    assert checked.returncode == 0, checked.stderr
    conf = str(site.conf)
    made = site.tool(
        module, *"--keypairgen --key-type EC:prime256v1 --label shop --id 01".split(), PKCS11_HA_CONF=conf
    )
    assert made.returncode == 0, made.stderr
    assert all("shop" in keys_on(site, label) for label in ("east", "west"))
    again = site.p11ha("import-luna", str(file))
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith(f"{site.conf} is there already: --force")


def test_the_module_reads_lunas_file(site: Site, module: Path) -> None:
    if Path(SYSTEM_PATH).exists():
        pytest.skip(f"{SYSTEM_PATH} comes first")
    file = site.write("standby.conf", _154438865287="east", _1238700701509="west", _1411876543210="north")
    for place in (file, file.parent):
        shown = site.tool(module, "--list-slots", ChrystokiConfigurationPath=str(place))
        assert "HA Virtual Card Slot" in shown.stdout, shown.stderr
        assert "payments" in shown.stdout
    made = site.tool(
        module,
        *"--token-label payments --keypairgen --key-type EC:prime256v1 --label shop".split(),
        ChrystokiConfigurationPath=str(file.parent),
    )
    assert made.returncode == 0, made.stderr
    assert sum("shop" in keys_on(site, label) for label in ("east", "west")) == 1
    assert "shop" not in keys_on(site, "north")  # it stands by

    file.write_text(file.read_text().replace("HARecovery = {", "HARecovery {"))
    refused = site.tool(module, "--list-slots", ChrystokiConfigurationPath=str(file.parent))
    assert refused.returncode != 0
    assert f"{file}:20: expected `Section = {{`, not `HARecovery …`" in refused.stderr


def test_commands_that_show_read_lunas_file(site: Site) -> None:
    file = site.write("appliances.conf", _100200300400="east", _200300400500="west")
    shown = site.p11ha("ha", "show", "--config", str(file))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\n[recovery]\ninterval_s          60" in shown.stdout
    tested = site.p11ha("member", "test", site.serials["east"], "--config", str(file))
    assert (tested.returncode, tested.stderr) == (0, "")
    assert f"token       'east', serial {site.serials['east']}\n" in tested.stdout


def test_bytes_that_are_not_utf_8(site: Site, module: Path) -> None:
    file = site.write("appliances.conf", _100200300400="east", _200300400500="west")
    plain = file.read_bytes()
    file.write_bytes(plain.replace(b"# Two", b"# Z\xfcrich, two"))
    own = site.directory / "own"
    imported = site.p11ha("import-luna", str(file), "--client-config", str(own))
    assert imported.returncode == 0, imported.stderr
    assert b"# Z\xfcrich, two" in (own / "Chrystoki.conf").read_bytes()
    site.conf.unlink()
    if not Path(SYSTEM_PATH).exists():
        shown = site.tool(module, "--list-slots", ChrystokiConfigurationPath=str(file))
        assert "grpA" in shown.stdout, shown.stderr

    file.write_bytes(plain.replace(b"hsm-east", b"Z\xfcrich"))
    line = f"{file}:19: LunaSA Client.ServerName00: not UTF-8: iconv -f ISO-8859-1 -t UTF-8"
    refused = site.p11ha("import-luna", str(file))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(line)
    assert line in site.tool(module, "--list-slots", PKCS11_HA_CONF=str(file)).stderr


def test_it_is_written_where_edits_begin_a_file(site: Site) -> None:
    """In a dry run: nothing may reach the host's own configuration."""
    if Path(SYSTEM_PATH).exists():
        pytest.skip(f"{SYSTEM_PATH} comes first")
    file = site.write("appliances.conf", _100200300400="east", _200300400500="west")
    home = site.directory / "xdg"
    for place in ("", str(file.parent)):
        env = {"XDG_CONFIG_HOME": str(home), "ChrystokiConfigurationPath": place}
        shown = site.run(P11HA, "import-luna", file, "--dry-run", **env)
        assert shown.stdout.endswith(f"would write {home}/pkcs11-ha/pkcs11-ha.toml\n"), shown.stderr


def test_the_mode_of_recovery_is_not_made_up(site: Site) -> None:
    file = site.write("appliances.conf", _100200300400="east", _200300400500="west")
    file.write_text(re.sub(r".*VirtualTokenActiveRecovery.*\n", "", file.read_text()))
    shown = site.p11ha("import-luna", str(file), "--dry-run").stdout
    assert "HA recovery mode:  not given " in shown
    assert " recovery     call mode\n" in shown
    assert "VirtualTokenActiveRecovery is not given: " in shown


def test_a_group_of_one_member_from_windows(site: Site, module: Path) -> None:
    file = site.write("windows.ini", _888800001="east", _888800002="west", _888800003="north")
    refused = site.p11ha("import-luna", str(file))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"{file}:3: Chrystoki2.LibNT: is a library for Windows")
    assert not site.conf.exists()
    imported = site.p11ha("import-luna", str(file.parent), "--module", str(softhsm()), "--json")
    assert imported.returncode == 0, imported.stderr
    said = json.loads(imported.stdout)
    assert [group["label"] for group in said["groups"]] == ["par1", "par2"]
    assert {
        "key": "recovery.attempts",
        "value": 500,
        "line": 17,
        "from": "HAConfiguration.reconnAtt",
    } in said["settings"]
    made = site.tool(
        module,
        *"--token-label par2 --keypairgen --key-type EC:prime256v1 --label alone".split(),
        PKCS11_HA_CONF=str(site.conf),
    )
    assert made.returncode == 0, made.stderr
    assert "alone" in keys_on(site, "north")


def test_what_cannot_be_imported_is_one_line_and_changes_nothing(site: Site) -> None:
    file = site.write("appliances.conf", _100200300400="east", _200300400500="west")
    file.write_text(file.read_text().replace(str(softhsm()), "/nowhere/lib.so"))
    for words, status, says in (
        ([str(file)], 1, f"{file}:4: Chrystoki2.LibUNIX64: /nowhere/lib.so: No such file"),
        ([str(file), "--module", "lib.so"], 2, "p11ha import-luna: --module 'lib.so': type an absolute path"),
        (
            [str(file), "--module", "/nowhere"],
            2,
            "p11ha import-luna: --module '/nowhere': there is no such file",
        ),
        ([str(file), "--output", "/tmp/x.conf"], 2, "p11ha import-luna: --output '/tmp/x.conf': type a name"),
        (
            [str(file), "--client-config", str(file.parent), "--module", str(softhsm())],
            1,
            f"{file.parent}: that is",
        ),
        (["/nowhere/Chrystoki.conf"], 1, "/nowhere/Chrystoki.conf: No such file"),
        (["/nowhere/luna"], 1, "/nowhere/luna: No such file or directory\n"),
    ):
        refused = site.p11ha("import-luna", *words)
        assert (refused.returncode, refused.stdout) == (status, ""), words
        assert refused.stderr.startswith(says)
        assert len(refused.stderr.splitlines()) == 1
        assert not site.conf.exists(), words
    dry = site.p11ha("import-luna", str(file), "--dry-run")
    assert dry.returncode == 0
    assert "[[group]]" in dry.stdout
    assert not site.conf.exists()


# ---- the commands


def test_a_group_in_lunas_words(site: Site) -> None:
    east, west, north = (site.serials[label] for label in LABELS)
    made = site.luna(
        f"-q hagroup createGroup -label grp -serialNumber {east} -password {PIN} -module {softhsm()}"
    )
    assert "HA Group Label:  grp" in made
    assert made.endswith("Command Result : No Error\n")
    assert "[recovery]" not in site.conf.read_text()
    site.luna(f"HA am -SE {west} -G grp -p {PIN}")
    site.luna(f"hagroup addMember -group grp -serialnumber {north}")
    listed = site.luna("hagroup LISTGROUPS")
    assert f"Group Members:  {east}, {west}, {north}\n" in listed
    assert f"------    {west}    west            alive\n" in listed
    assert "Maximum auto recovery retry:  -1\n" in listed
    site.luna(f"hagroup addStandby -g grp -se {north}")
    assert f"Standby Members:  {north}\n" in site.luna("hagroup listGroups")
    site.luna(f"hagroup removeStandby -g grp -se {north}")
    site.luna(f"hagroup removeMember -g grp -se {north}")
    (group,) = tomllib.loads(site.conf.read_text())["group"]
    assert (group["members"], group.get("standby", [])) == ([east, west], [])


def test_changes_are_shown_as_the_listing_shows_them(site: Site) -> None:
    """Also where the configuration names tokens by something else than their serial numbers."""
    east, west, north = (site.serials[label] for label in LABELS)
    members = "".join(
        f'[[member]]\nname = "{label}"\nmodule = "{softhsm()}"\ntoken = "pkcs11:token={label}"\n'
        for label in LABELS
    )
    site.conf.write_text(f'{members}[[group]]\nlabel = "grp"\nmembers = ["east", "west"]\n')
    number = f"1{east}"[:16]
    for line, listed in (
        (f"ha am -se {north} -g grp", (east, west, north)),
        (f"ha addStandby -se {north} -g {number}", (east, west, north)),
        (f"ha removeMember -se {north} -g grp", (east, west)),
    ):
        shown = site.luna(line)
        for text in (f"Group Members:  {', '.join(listed)}\n", f"HA Group Number:  {number}\n"):
            assert text in shown
            assert text in site.luna("ha lg")
        assert f"ember {north} " in shown


def test_settings_and_slots_in_lunas_words(site: Site) -> None:
    east, west, north = (site.serials[label] for label in LABELS)
    site.luna(f"hagroup createGroup -label grp -serialNumber {east} -module {softhsm()}")
    site.luna(f"hagroup addMember -group grp -serialnumber {west}")
    assert "HA Auto Recovery Count has been set to 3\n" in site.luna("ha rt -c 3")
    assert tomllib.loads(site.conf.read_text())["recovery"] == {"interval_s": 60, "attempts": 3}
    site.luna("hagroup interval -i 120")
    site.luna("hagroup recoveryMode -mode ACTIVEENHANCED")
    site.luna(f"hagroup halog -path {site.directory}")
    listed = site.luna("hagroup listGroups")
    assert "HA recovery mode:  activeEnhanced\n" in listed
    assert "Auto recovery poll interval:  120 seconds\n" in listed
    assert f"HA log file:  {site.directory}/haErrorLog.txt\n" in listed

    site.luna("hagroup haonly -disable")
    site.luna(f"hagroup creategroup -l spare -se {north}")
    slots = site.luna("listSlots")
    assert slots.count("LunaNet Slot") == 3
    assert slots.count("HA Virtual Card Slot") == 2
    site.luna("hagroup removeMember -g grp -slot 1")  # west's
    assert tomllib.loads(site.conf.read_text())["group"][0]["members"] == [east]
    site.luna("hagroup haonly -enable")
    site.luna("hagroup deleteGroup -label spare")
    assert site.refused("hagroup deleteGroup -label grp", 1).startswith("'grp' is the only group")
    assert site.refused(f"hagroup removeMember -g grp -se {east}", 1).startswith(
        "the last active member of 'grp'"
    )


def test_a_token_by_its_slot_in_the_vendors_library(site: Site) -> None:
    shown = site.run("pkcs11-tool", "--module", softhsm(), "--list-slots").stdout
    slots = {
        label: int(number, 16)
        for number, label in re.findall(r"\((0x[0-9a-f]+)\)[^\n]*\n +token label +: (\w+)", shown)
    }
    site.luna(f"hagroup createGroup -sl {slots['west']} -l grp -module {softhsm()}")
    site.luna(f"hagroup addMember -sl {slots['east']} -g grp")
    assert f"Group Members:  {site.serials['west']}, {site.serials['east']}\n" in site.luna(
        "hagroup listGroups"
    )
    assert "no token matches" in site.refused("hagroup addMember -sl 4711 -g grp", 1)


@pytest.fixture
def prod(
    soft_token: SoftTokenFactory, server: ServerFactory, group: GroupFactory, module: Path
) -> tuple[Group, Server, SoftToken]:
    """A group of two that are named by their labels, one of which can be killed."""
    assert module.exists()
    east, west = server(soft_token("east")), soft_token("west")
    return group(east.member(), west.member()), east, west


def luna(line: str) -> str:
    return good("luna", *line.split())


def test_a_member_that_died_keeps_its_serial(prod: tuple[Group, Server, SoftToken]) -> None:
    made, east, west = prod
    serial = east.token.serial
    luna("hagroup listGroups")  # it is seen once
    east.kill()
    listed = luna("hagroup listGroups")
    assert f"Group Members:  {serial}, {west.serial}\n" in listed
    assert f"------    {serial}    ------------    down\n" in listed
    shown = luna("haAdmin show")
    assert f"Group Members: {serial}, {west.serial}\n" in shown
    assert re.search(rf"------ {serial} +------------ +down\n", shown)
    (status,) = json.loads(good("status", "--json"))["groups"]
    assert [member["serial"] for member in status["members"]] == [serial, west.serial]
    luna(f"hagroup removeMember -g prod -se {serial}")
    assert tomllib.loads(made.conf.read_text())["group"][0]["members"] == ["west"]


def test_a_removed_member_is_added_as_it_was(prod: tuple[Group, Server, SoftToken]) -> None:
    """By its token, or, while that is away, by what its serial number was."""
    made, east, _ = prod
    before = tomllib.loads(made.conf.read_text())
    for _ in ("there", "away"):
        luna(f"hagroup removeMember -g prod -se {east.token.serial}")
        assert "successfully added" in luna(f"hagroup addMember -g prod -se {east.token.serial} -p {PIN}")
        after = tomllib.loads(made.conf.read_text())
        assert after["member"] == before["member"]
        assert after["group"][0]["members"] == ["west", "east"]
        east.kill()


def test_a_token_that_is_nowhere_is_not_added(prod: tuple[Group, Server, SoftToken]) -> None:
    made, east, west = prod
    before = made.conf.read_text()
    for line in ("hagroup addMember -g prod -se 4711", "haAdmin newGroup -l new -serialNum 4711"):
        said = refused("luna", *line.split())
        libraries = f"{east.member()['module']}, {west.member()['module']}"
        assert said == f"no token has the serial number '4711': looked for in {libraries}"
    assert made.conf.read_text() == before


def test_a_new_token_becomes_a_member_of_the_library_that_has_it(
    prod: tuple[Group, Server, SoftToken],
) -> None:
    """Of whichever member's that is; and what is written is laid out as `p11ha member add` does it."""
    made, _, west = prod
    util, env = ("softhsm2-util", "--show-slots"), os.environ | west.env
    command = "softhsm2-util --init-token --free --label spare --so-pin 12345678 --pin".split()
    subprocess.run([*command, PIN], env=env, check=True, capture_output=True)
    shown = subprocess.run(util, env=env, check=True, capture_output=True, text=True).stdout
    (serial,) = set(re.findall(r"Serial number: +([0-9a-f]+)", shown)) - {west.serial}
    luna(f"hagroup addMember -g prod -se {serial}")
    text = made.conf.read_text()
    member = tomllib.loads(text)["member"][-1]
    assert member == {**west.member(), "name": serial, "token": f"pkcs11:serial={serial}"}
    assert "\n\n[[member]]\nname = " + f'"{serial}"\n' in text


def test_a_group_in_the_words_of_vtl(site: Site) -> None:
    east, west, _ = (site.serials[label] for label in LABELS)
    site.luna(f"haAdmin newGroup -serialNum {east} -label grp -p {PIN} -module {softhsm()}")
    number = f"1{east}"[:16]
    site.luna(f"haAdmin -addMember -group {number} -serialNum {west} -password {PIN}")
    site.luna("haAdmin HAOnly enable")
    site.luna("haAdmin autorecovery -retry 500 -interval 90")
    shown = site.luna("haAdmin show")
    for line in (
        "Maximum Auto Recovery Retry: 500",
        "Auto Recovery Poll Interval: 90 seconds",
        f"HA Group Number: {number}",
    ):
        assert f"{line}\n" in shown
    assert f"Group Members: {east}, {west}\n" in shown
    assert json.loads(site.luna("haAdmin show -json"))["groups"][0]["members"] == [east, west]


def test_synchronising_takes_the_password_and_keeps_it(site: Site, module: Path) -> None:
    east, west, _ = (site.serials[label] for label in LABELS)
    site.luna(f"hagroup createGroup -l grp -se {east} -module {softhsm()}")
    site.luna(f"hagroup addMember -g grp -se {west}")
    site.luna("hagroup synchronize -g grp -enable")
    assert site.p11ha("domain", "init", "grp", "--shares", "none", site.pin).returncode == 0
    made = site.tool(
        module, *"--keypairgen --key-type EC:prime256v1 --label shop".split(), PKCS11_HA_CONF=str(site.conf)
    )
    assert made.returncode == 0, made.stderr
    assert "Needs sync:  unknown\n" in site.luna("hagroup listGroups")
    assert "Needs sync:  no\n" in site.luna(f"hagroup listGroups -password {PIN}")
    assert "Synchronization completed." in site.luna(f"hagroup synchronize -g grp -password {PIN}")
    wrong = site.p11ha("luna", *"hagroup synchronize -g grp -password 99wrong99".split())
    assert wrong.returncode == 1
    assert "CKR_PIN_INCORRECT" in wrong.stderr
    assert "99wrong99" not in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "type one of hagroup, haAdmin, listSlots"),
        ("lunash", "'lunash' is not known: type one of hagroup"),
        ("hagroup", "hagroup: type one of listGroups, createGroup"),
        ("hagroup rm -g x", "hagroup 'rm' may mean removeMember or recoveryMode: type one of them"),
        ("hagroup frobnicate", "hagroup 'frobnicate' is not known: type one of"),
        ("hagroup retry", "type hagroup retry -count COUNT"),
        ("hagroup retry -count", "-count wants COUNT: type hagroup retry -count COUNT"),
        ("hagroup retry -count many", "-count 'many': type a whole number"),
        ("hagroup retry -count -2", "-count: type -1 for no limit, 0 for none, or a number"),
        ("hagroup addMember -g x -s 3", "'-s' may mean -serialNumber or -slot: type hagroup addMember {"),
        ("hagroup addMember -g x -se 3 -sl 3", "type hagroup addMember {-serialNumber SERIAL | -slot SLOT}"),
        ("ha haLog -maxLength 5", "-maxLength 5: type a whole number of bytes: 0, or from 4096 to 1 TiB"),
        ("hagroup addMember hunter2", "a word is not known here: type hagroup addMember"),
        ("hagroup recoveryMode -mode fast", "-mode 'fast': type activeBasic, activeEnhanced, or passive"),
        ("hagroup haonly -enable -disable", "type hagroup haOnly {-enable | -disable | -show}"),
        ("haAdmin halog", "haAdmin 'halog' is not known: type one of show"),
        ("listSlots -all", "'-all' is not known here: type listSlots"),
    ],
)
def test_a_wrong_spelling_is_one_line_that_says_what_to_type(
    line: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKCS11_HA_CONF", "/nowhere.toml")
    with pytest.raises(UsageError) as refused:
        verbs.run(line.split())
    assert str(refused.value).startswith(says)
    assert len(str(refused.value).splitlines()) == 1


def test_without_a_command_it_prints_its_help() -> None:
    shown = [run("luna", *words) for words in ((), ("--help",))]
    assert [(done.returncode, done.stderr) for done in shown] == [(2, ""), (0, "")]
    assert shown[0].stdout == shown[1].stdout
    assert max(map(len, shown[0].stdout.splitlines())) <= 80


def test_lunas_own_file_is_not_edited(site: Site) -> None:
    file = site.write("appliances.conf", _100200300400="east", _200300400500="west")
    before = file.read_bytes()
    refused = site.p11ha("luna", "hagroup", "retry", "-count", "3", "-config", str(file))
    assert (refused.returncode, file.read_bytes()) == (1, before)
    assert (
        refused.stderr == f"{file} is Luna's own: p11ha import-luna {file} makes a file that can be changed\n"
    )
    recover = ("luna", "hagroup", "recover", "-g", "grpA", "-config", str(file))
    assert "no such state directory" in site.p11ha(*recover).stderr
    (site.directory / "state").mkdir()
    assert site.p11ha(*recover).returncode == 0
