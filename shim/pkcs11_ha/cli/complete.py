"""What the shell may complete: names out of the configuration, codes and events. It never fails: then there is nothing.

For an argument or option of a command: `typer.Argument(autocompletion=complete.groups)`, and `members`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import typer

from pkcs11_ha import ck, config
from pkcs11_ha.log import EVENTS


def groups(context: typer.Context, incomplete: str) -> list[str]:
    """Labels of the groups."""
    return _names(context, "group", "label", incomplete)


def members(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the members."""
    return _names(context, "member", "name", incomplete)


def codes_and_events(incomplete: str) -> list[str]:
    """What `p11ha explain` knows by name."""
    return [name for name in (*ck.RV_NAMES.values(), *EVENTS) if name.startswith(incomplete)]


def events(incomplete: str) -> list[str]:
    """What `p11ha events --event` takes."""
    return [name for name in EVENTS if name.startswith(incomplete)]


def _names(context: typer.Context, section: str, key: str, incomplete: str) -> list[str]:
    """Of the file that --config names, else of that which the library uses, also while it has other mistakes."""
    path = context.params.get("path") or config.find_path(os.environ)
    with suppress(config.ConfigError, ValueError, RecursionError):
        tables: Any = config.tables(config.read(path), path).get(section)
        rows = tables if isinstance(tables, list) else []
        names = [row.get(key) for row in rows if isinstance(row, dict)]
        return [name for name in names if isinstance(name, str) and name.startswith(incomplete)]
    return []
