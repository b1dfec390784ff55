"""An edit of the configuration is whole or not at all: beside others, killed at any point, refused."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pkcs11_ha import config
from pkcs11_ha.cli import edit
from pkcs11_ha.cli.edit import EditError, edited, path_to_edit
from tests.cli.p11ha import good, refused, run

TIMES = 125
PROCESSES = 8

TEXT = """\
# our HSMs
[[member]]
name = "east"
module = "/bin/sh"  # any file
token = "pkcs11:token=east"
init_args = "0"  # counted

[[member]]
name = "west"
module = "/bin/sh"
token = "pkcs11:token=west"

# the only one
[[group]]
label = "prod"
serial = "1"
members = ["east", "west"]
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pkcs11-ha.toml"
    path.write_text(TEXT)
    monkeypatch.setenv("PKCS11_HA_CONF", str(path))
    return path


def editor(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cli.editors", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(600)
def test_a_thousand_edits_by_eight_processes(conf: Path) -> None:
    """Whoever reads meanwhile finds a whole file, each time; and every edit counts."""
    editors = [editor("count", conf, str(TIMES)) for _ in range(PROCESSES)]
    seen = set()
    while any(each.poll() is None for each in editors):
        seen.add(config.load(str(conf)).members[0].init_args)
    assert [each.communicate()[1] for each in editors] == [""] * PROCESSES
    assert len(seen) > 2  # we did look in between
    assert conf.read_text() == TEXT.replace('init_args = "0"', f'init_args = "{PROCESSES * TIMES}"')
    left = sorted(path.name for path in conf.parent.iterdir())
    assert left == [".pkcs11-ha.toml.lock", "pkcs11-ha.toml", "pkcs11-ha.toml~"]


@pytest.mark.timeout(300)
def test_killed_before_any_call_of_an_edit(conf: Path) -> None:
    """The old file is left or the new one, the backup is always whole, and the next edit goes on from there."""
    with editor("killed", conf) as killed:
        lines = [line.split() for line in killed.communicate()[1].splitlines()]
    assert all(len(line) == 5 for line in lines), lines
    befores = [line[2] for line in lines]
    assert set(befores) == {"0", "1"}
    assert befores == sorted(befores)  # it happens at one point
    assert {line[3] for line in lines} == {"0"}
    assert all(int(line[4]) == int(line[2]) + 1 for line in lines)
    assert lines[-1][1] == "True"
    assert len(lines) > 50


def test_what_is_written_is_shown_first_and_the_file_before_is_kept(conf: Path) -> None:
    shown = good("ha", "only", "off", "--dry-run")
    assert conf.read_text() == TEXT
    assert [path.name for path in conf.parent.iterdir()] == [conf.name]
    assert "+only = false" in shown
    assert shown.endswith("dry run: nothing was changed\n")

    done = good("ha", "only", "off")
    assert done.splitlines()[:-1] == shown.splitlines()[:-1]
    assert done.endswith(f"changed {conf}\n")
    assert "\x1b" not in done
    assert Path(f"{conf}~").read_text() == TEXT
    assert good("ha", "only", "off") == "nothing to change\n"
    assert Path(f"{conf}~").read_text() == TEXT


def test_mode_owner_and_attributes_stay(conf: Path) -> None:
    conf.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(conf, 12345, 23456)
    try:
        os.setxattr(conf, "user.who", b"ann")
        attribute = b"ann"
    except OSError:
        attribute = b""
    before = conf.stat()
    good("ha", "only", "off")
    for path in (conf, Path(f"{conf}~")):
        after = path.stat()
        assert stat.S_IMODE(after.st_mode) == 0o640
        assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
        assert not attribute or os.getxattr(path, "user.who") == attribute
    lock = (conf.parent / ".pkcs11-ha.toml.lock").stat()
    assert (lock.st_uid, stat.S_IMODE(lock.st_mode)) == (before.st_uid, 0o640)


def test_a_symbolic_link_stays_one(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "etc" / "pkcs11-ha.toml"
    link.parent.mkdir()
    link.symlink_to("../pkcs11-ha.toml")
    monkeypatch.setenv("PKCS11_HA_CONF", str(link))
    assert f"changed {link}" in good("ha", "only", "off")
    assert link.is_symlink()
    assert "only = false" in conf.read_text()
    assert Path(f"{conf}~").read_text() == TEXT
    assert [path.name for path in link.parent.iterdir()] == [link.name]


def test_a_missing_file_is_begun_where_the_library_looks(tmp_path: Path) -> None:
    wanted = tmp_path / "deep" / "er" / "ha.toml"
    home = tmp_path / "home"
    assert path_to_edit({"PKCS11_HA_CONF": str(wanted), "XDG_CONFIG_HOME": str(home)}) == str(wanted)
    assert path_to_edit({"XDG_CONFIG_HOME": str(home)}) == f"{home}/pkcs11-ha/pkcs11-ha.toml"
    assert path_to_edit({}) == config.SYSTEM_PATH

    wanted.parent.mkdir(parents=True)
    wanted.touch()
    assert f"changed {wanted}" in good("ha", "retry", "7", PKCS11_HA_CONF=str(wanted))
    shutil.rmtree(wanted.parent.parent)
    assert f"created {wanted}" in good("ha", "retry", "7", PKCS11_HA_CONF=str(wanted))
    assert config.parse(wanted.read_text(), "x", complete=False).recovery.attempts == 7
    assert not Path(f"{wanted}~").exists()
    # It is not complete, and the library says so; edits are what completes it.
    assert "at least one [[group]]" in refused("check", PKCS11_HA_CONF=str(wanted))


@pytest.mark.parametrize(
    "line",
    [
        ("group", "delete", "prod"),
        ("group", "add-member", "prod", "east"),
        ("member", "remove", "east"),
        ("member", "add", "east", "/no/such/library.so", "pkcs11:token=east"),
        ("luna", "ha", "rt", "-c", "3"),
    ],
)
def test_what_is_refused_begins_no_file(tmp_path: Path, line: tuple[str, ...]) -> None:
    for place in (tmp_path / "deep" / "ha.toml", tmp_path / "ha.toml"):
        done = run(*line, PKCS11_HA_CONF=str(place))
        assert (done.returncode, done.stdout) != (0, "")
        assert list(tmp_path.iterdir()) == []


def test_two_that_begin_a_file_at_once(conf: Path) -> None:
    new = conf.with_name("new.toml")
    late = edited(str(new))
    late.__enter__().document.set("ha", {"only": False})
    with edited(str(new)) as draft:
        draft.document.set("ha", {"log": "off"})
    with pytest.raises(EditError, match="meanwhile"):
        late.__exit__(None, None, None)
    assert 'log = "off"' in new.read_text()


def test_a_file_of_lunas_is_not_edited(tmp_path: Path) -> None:
    luna = tmp_path / "Chrystoki.conf"
    luna.write_text("Chrystoki2 = {\n  LibUNIX64 = /bin/sh;\n}\n")
    for line in (("ha", "retry", "3"), ("ha", "only", "off", "--dry-run"), ("group", "rename", "a", "b")):
        said = refused(*line, ChrystokiConfigurationPath=str(tmp_path), PKCS11_HA_CONF="")
        assert said == f"{luna} is Luna's own: p11ha import-luna {luna} makes a file that can be changed"
    assert list(tmp_path.iterdir()) == [luna]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("[ha", ":1: not valid TOML: Expected ']' at the end of a table declaration"),
        ("[ha]\nnonsense = 1\n", ":2: ha.nonsense: unknown key"),
    ],
)
def test_a_file_that_is_wrong_already_is_left_alone(conf: Path, spoil: str, why: str) -> None:
    conf.write_text(spoil)
    assert refused("ha", "only", "off").startswith(f"{conf}{why}")
    assert conf.read_text() == spoil


def test_a_result_that_could_not_be_loaded_is_refused(conf: Path) -> None:
    line = refused("member", "add", "north", "/no/such/library.so", "pkcs11:token=north")
    assert "refused" in line
    assert "member.module: /no/such/library.so: No such file or directory" in line
    with pytest.raises(EditError, match="expected at least one"), edited(str(conf)) as draft:
        draft.document.remove("group", 0)
    with pytest.raises(EditError, match="enough"):
        _change_and_raise(conf)
    assert conf.read_text() == TEXT


def _change_and_raise(conf: Path) -> None:
    with edited(str(conf)) as draft:
        draft.document.set("ha", {"only": False})
        raise EditError("enough")


def test_what_was_missing_before_is_no_hindrance(conf: Path) -> None:
    """Libraries of members that are gone: one member after the other can be taken out."""
    conf.write_text(TEXT.replace("/bin/sh", "/bin/no-such-shell").replace('"east", "west"', '"east"'))
    good("member", "remove", "west")
    assert "west" not in conf.read_text()


def test_an_edit_waits_for_another(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit, "_PATIENCE_S", 0.1)
    with (conf.parent / ".pkcs11-ha.toml.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EditError, match="held by another edit"), edited(str(conf)) as draft:
            draft.document.set("ha", {"only": False})
        assert conf.read_text() == TEXT
        assert "+only = false" in good("ha", "only", "off", "--dry-run")  # that needs no lock
    with edited(str(conf)) as draft:
        draft.document.set("ha", {"only": False})
    assert "only = false" in conf.read_text()


def test_where_no_file_can_be(conf: Path, tmp_path: Path) -> None:
    assert "not a regular file" in refused("ha", "only", "off", "--config", tmp_path)
    assert "not a regular file" in refused("ha", "only", "off", "--config", "/dev/null")
    refused("ha", "only", "off", "--config", conf / "below")
    refused("ha", "only", "off", "--config", "/proc/none/pkcs11-ha.toml")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused("ha", "only", "off", "--config", loop)
    refused("ha", "only", "off", "--dry-run", "--config", loop)
    assert conf.read_text() == TEXT


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user")
@pytest.mark.parametrize("only_the_file", [True, False])
def test_who_may_not_write_is_told(conf: Path, only_the_file: bool) -> None:
    conf.chmod(0o644)
    conf.parent.chmod(0o777 if only_the_file else 0o755)
    program = f"""
import os
from pkcs11_ha.cli.edit import EditError, edited
os.setgid(65534), os.setuid(65534)
try:
    with edited({str(conf)!r}) as draft:
        draft.document.set("ha", {{"only": False}})
except EditError as error:
    print(error)
"""
    for parent in conf.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.startswith(str(conf.parent))
    assert "not writable" in said or "Permission denied" in said
    assert conf.read_text() == TEXT
