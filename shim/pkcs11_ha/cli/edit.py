"""One edit of pkcs11-ha.toml: under a lock, refused if it would break the configuration, and whole or not at all.

Beside the file lie `pkcs11-ha.toml~`, the file before the last edit, `.pkcs11-ha.toml.lock`, and during an edit
`.pkcs11-ha.toml.new`.  Where the configuration is a symbolic link, they lie beside the file that it leads to.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import typer
from tomlkit.exceptions import TOMLKitError

from pkcs11_ha import config
from pkcs11_ha.cli.document import Document, DocumentError
from pkcs11_ha.config import Config, ConfigError

_PATIENCE_S = 60.0
_STEP_S = 0.01
_HEAD = "# pkcs11-ha's configuration.  p11ha group, p11ha member and p11ha ha edit it, and keep comments.\n"


class EditError(Exception):
    """The edit was refused, or failed; `str` is one line, and nothing was changed."""


@dataclass
class Draft:
    """A configuration about to be changed: `settings` is what it says now, `document` what it is to be."""

    path: str
    settings: Config
    document: Document
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """A line about what the change means, shown below it."""
        self.notes.append(text)


def path_to_edit(environ: Mapping[str, str]) -> str:
    """Where the library looks; while nothing is there, a user with $XDG_CONFIG_HOME begins in it."""
    path = config.find_path(environ)
    home = environ.get("XDG_CONFIG_HOME", "")
    if path == config.SYSTEM_PATH and home.startswith("/") and not Path(path).exists():
        return f"{home}/pkcs11-ha/pkcs11-ha.toml"
    return path


@contextmanager
def edited(path: str = "", dry_run: bool = False) -> Iterator[Draft]:
    """Changes the configuration at `path`, else the host's, as the body changes the draft's document.

    At its end the difference is shown, and written unless this is a `dry_run`.  Raises EditError, also for a result
    that cannot be loaded; whatever the body raises leaves the file as it is.
    """
    path = path or path_to_edit(os.environ)
    _must_be_ours(path)
    target = Path(os.path.realpath(path))
    try:
        if dry_run:
            yield from _edit(path, target, None)
            return
        with replacing(path) as replace:
            yield from _edit(path, target, replace)
    except BrokenPipeError:
        raise  # of who reads what we say
    except OSError as error:
        raise EditError(f"{error.filename or path}: {error.strerror}") from None


@contextmanager
def replacing(path: str) -> Iterator[Callable[[str], None]]:
    """The lock of an edit, and what puts a new text in the file's place and keeps a backup; raises EditError.

    Where there is no file yet, the directory and the lock come into being with it, so that a refusal leaves nothing.
    """
    _must_be_ours(path)
    target = Path(os.path.realpath(path))
    try:
        if target.exists():
            with _locked(target) as replace:
                yield replace
        else:
            _must_be_writable(target)
            yield lambda text: _begin(path, target, text)
    except BrokenPipeError:
        raise  # of who reads what we say
    except OSError as error:
        raise EditError(f"{error.filename or path}: {error.strerror}") from None


def _begin(path: str, target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as replace:
        if target.exists():
            raise EditError(f"{path}: another edit has made it meanwhile: try again")
        replace(text)


def _must_be_ours(path: str) -> None:
    if config.is_luna(path):
        raise EditError(f"{path} is Luna's own: p11ha import-luna {path} makes a file that can be changed")


def _must_be_writable(target: Path) -> None:
    """Raises OSError where no file can be made, before anything is shown of it."""
    directory = next(parent for parent in target.parents if parent.exists())
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


def _edit(path: str, target: Path, replace: Callable[[str], None] | None) -> Iterator[Draft]:
    before = _read(path, target)
    try:
        settings = config.parse(before, path, complete=False)
        draft = Draft(path, settings, Document(before or _HEAD))
        yield draft
    except (DocumentError, TOMLKitError) as error:
        raise EditError(f"{path}: {error}") from None
    after = draft.document.text
    if after == before:
        typer.echo("nothing to change")
        return
    _must_load(settings, before, after)
    lines = [*_difference(path, before, after), *(f"note: {note}" for note in draft.notes)]
    if replace is None:
        _show([*lines, "dry run: nothing was changed"])
        return
    existed = target.exists()
    _show(lines)  # all of it first: who stops reading does not stop the edit
    replace(after)
    with suppress(OSError):
        typer.echo(f"changed {path}" if existed else f"created {path}")


def _show(lines: list[str]) -> None:
    """Raises EditError where the output takes no more: that is no fault of the configuration."""
    try:
        typer.echo("\n".join(lines))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise EditError(f"standard output: {error.strerror}") from None


def _read(path: str, target: Path) -> str:
    try:
        if not stat.S_ISREG(target.stat().st_mode):
            raise EditError(f"{path}: not a regular file")
    except FileNotFoundError:
        return ""
    if not os.access(target, os.W_OK):
        raise EditError(f"{path}: not writable: edit it as its owner")
    return config.read(path)


# ---- whether it may be written


def _must_load(settings: Config, before: str, after: str) -> None:
    """Raises EditError for what the product's own loader would refuse."""
    path = settings.path
    try:
        # Until there is a group, nothing can be used and nothing be broken.
        result = config.parse(after, path, complete=bool(settings.groups))
    except ConfigError as error:
        raise _refusal(path, error) from None
    # A file that was missing before is no fault of this edit, which may well take its member away.
    known = {missing.problem for missing in config.unusable(settings, before)}
    for missing in config.unusable(result, after):
        if missing.problem not in known:
            raise _refusal(path, missing)


def _refusal(path: str, error: ConfigError) -> EditError:
    why = ": ".join(part for part in (error.key, error.problem) if part)
    return EditError(f"{path}: refused, as it could not be loaded any more: {why}")


# ---- what it changes, for eyes


def _difference(path: str, before: str, after: str) -> Iterator[str]:
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), path, f"{path} (new)", n=2, lineterm=""
    )
    for line in lines:
        yield _coloured(line)


def _coloured(line: str) -> str:
    """typer.echo takes colours off again where no terminal is."""
    colours = {"+": typer.colors.GREEN, "-": typer.colors.RED, "@": typer.colors.CYAN}
    if "NO_COLOR" in os.environ or line.startswith(("+++", "---")) or line[:1] not in colours:
        return line
    return typer.style(line, fg=colours[line[0]])


# ---- how it is written


class _Replace:
    """Puts a new text in a file's place; only under its lock."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __call__(self, text: str) -> None:
        target = self._target
        backup = target.with_name(f"{target.name}~")
        with suppress(FileNotFoundError):
            self._put(backup, target.read_bytes())
        self._put(target, text.encode())

    def _put(self, path: Path, data: bytes) -> None:
        """The file is whole and on the disk before it has the name; mode, owner and attributes are the old one's."""
        new = self._target.with_name(f".{self._target.name}.new")
        new.unlink(missing_ok=True)  # of an edit that was killed
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if self._target.exists():
                _liken(descriptor, self._target)
            os.fsync(descriptor)
        new.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _liken(descriptor: int, old: Path) -> None:
    """Raises OSError where the owner cannot be kept: another one might be unable to read the file, or to edit it."""
    was, now = old.stat(), os.fstat(descriptor)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        os.fchown(descriptor, was.st_uid, was.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(was.st_mode))
    with suppress(OSError):  # a file system without
        for name in os.listxattr(old):  # access lists, SELinux's label
            with suppress(OSError):
                os.setxattr(descriptor, name, os.getxattr(old, name))


@contextmanager
def _locked(target: Path) -> Iterator[_Replace]:
    """The lock is a file of its own, as the configuration is replaced; it stays, as removing it would let two in."""
    path = target.with_name(f".{target.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with suppress(OSError):  # whoever may edit the one may lock the other, and nobody else
            was = target.stat()
            os.fchown(descriptor, was.st_uid, was.st_gid)
            os.fchmod(descriptor, was.st_mode & 0o660)
        _wait(descriptor, path)
        yield _Replace(target)
    finally:
        os.close(descriptor)


def _wait(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                raise
        if time.monotonic() > deadline:
            raise EditError(f"{path}: held by another edit for {_PATIENCE_S:.0f} s")
        time.sleep(_STEP_S)
