"""What of a changed configuration can be done while the application runs, and what waits for its next start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pkcs11_ha.config import Config, GroupConfig, MemberConfig

_NEXT = "the application's next start"
_RESTART = f"at {_NEXT}"
# What applications have seen, or what was laid out at the start: it stays as it is.
_FIXED_GROUP = ("serial", "manufacturer", "model", "replication", "replay_limit_bytes")
_FIXED_HA = ("only",)
_MEMBERSHIP = ("members", "standby")


@dataclass(frozen=True)
class Plan:
    """`settings` is what is to be now; the rest says in a line each what that changes, and what it leaves as it is."""

    settings: Config
    done: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def plan(now: Config, new: Config) -> Plan:
    """From what is in force to a new configuration, as far as that can be gone."""
    done: list[str] = []
    restart: list[str] = []
    warnings: list[str] = []
    ha = replace(new.ha, **{name: getattr(now.ha, name) for name in _FIXED_HA})
    done += _news("[ha]", now.ha, ha)
    restart += [
        f"[ha] {name}: {_RESTART}" for name in _FIXED_HA if getattr(now.ha, name) != getattr(new.ha, name)
    ]
    done += _news("[recovery]", now.recovery, new.recovery)

    wanted = {group.label: group for group in new.groups}
    known = {group.label for group in now.groups}
    restart += [f"group {label}: it is new, and shown {_RESTART}" for label in wanted if label not in known]
    restart += [f"group {g.label}: removed {_RESTART}" for g in now.groups if g.label not in wanted]
    bound = {name for g in now.groups if g.label not in wanted for name in names_of(g)}
    groups = tuple(
        _group(group, wanted[group.label], bound, done, restart, warnings) if group.label in wanted else group
        for group in now.groups
    )
    members = _members(now, new, groups, bound, done, restart)
    if not now.ha.only:
        restart += _own_slots(now, new, groups)
    settings = Config(new.path, ha, new.recovery, members, groups)
    return Plan(settings, tuple(done), tuple(restart), tuple(warnings))


def _own_slots(now: Config, new: Config, groups: Iterable[GroupConfig]) -> list[str]:
    """Members' own slots are laid out at the start; who comes to a group or leaves it changes the one it has."""
    before, after = ({member.name: member for member in c.members} for c in (now, new))
    was, used = _used(now.groups), _used(groups)
    alone = [name for name in before if name not in was | used]
    return [
        *(f"member {name}: its own slot appears {_RESTART}" for name in after if name not in before),
        *(
            f"member {name}: its own slot changes {_RESTART}"
            for name in alone
            if after.get(name) != before[name]
        ),
        *(f"member {name}: its own slot is empty until {_NEXT}" for name in sorted(was - used)),
    ]


def names_of(group: GroupConfig) -> tuple[str, ...]:
    """Its members, the primary first and standbys last."""
    return (*group.members, *group.standby)


def _group(
    now: GroupConfig,
    new: GroupConfig,
    bound: Iterable[str],
    done: list[str],
    restart: list[str],
    warnings: list[str],
) -> GroupConfig:
    """`bound` are members that a group keeps which is only removed at the next start."""
    where = f"group {now.label}"
    restart += [f"{where}: {name} changes {_RESTART}" for name in _changed(now, new) if name in _FIXED_GROUP]
    restart += [f"{where}: {name} joins {_RESTART}" for name in names_of(new) if name in bound]
    members, standby = ([n for n in names if n not in bound] for names in (new.members, new.standby))
    if not members:
        members, standby = list(now.members), list(now.standby)
    kept = {name: getattr(now, name) for name in _FIXED_GROUP}
    becomes = replace(new, members=tuple(members), standby=tuple(standby), **kept)
    done += [f"{where}: {name} joins" for name in names_of(becomes) if name not in names_of(now)]
    done += [f"{where}: {name} leaves" for name in names_of(now) if name not in names_of(becomes)]
    stay = set(names_of(now)) & set(names_of(becomes))
    before, after = ([(n, n in g.standby) for n in names_of(g) if n in stay] for g in (now, becomes))
    if before != after:
        done.append(
            f"{where}: members {', '.join(becomes.members)}; standby {', '.join(becomes.standby) or 'none'}"
        )
    done += _news(where, now, becomes, skip=_MEMBERSHIP)
    if new.serial is None and now.members[0] != becomes.members[0]:
        warnings.append(
            f"the group has no serial of its own: {_RESTART} it follows {becomes.members[0]}, unless one is set"
        )
    return becomes


def _members(
    now: Config,
    new: Config,
    groups: Iterable[GroupConfig],
    bound: Iterable[str],
    done: list[str],
    restart: list[str],
) -> tuple[MemberConfig, ...]:
    """What is said of each member that is used, or may be."""
    before = {member.name: member for member in now.members}
    after = {member.name: member for member in new.members}
    held = (
        {name for name in bound if name in before}
        if now.ha.only
        else set(before) - _used(groups) | set(bound)
    )
    restart += [f"member {n}: changes {_RESTART}" for n in bound if n in after and after[n] != before[n]]
    for name in (n for n in after if n in before and n not in held and n in _used(groups)):
        changed = _changed(before[name], after[name])
        if changed:
            done.append(f"member {name}: connected anew for its {', '.join(changed)}")
    # Also of those whom a group keeps, as all who are to take their place are still bound.
    kept = held | {name for name in _used(groups) if name not in after}
    result: Mapping[str, MemberConfig] = after | {n: before[n] for n in kept if n in before}
    return tuple(result.values())


def _used(groups: Iterable[GroupConfig]) -> set[str]:
    return {name for group in groups for name in names_of(group)}


def _changed(before: Any, after: Any) -> list[str]:
    return [f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)]


def _news(where: str, before: Any, after: Any, skip: Iterable[str] = ()) -> list[str]:
    return [f"{where}: {n} = {getattr(after, n)}" for n in _changed(before, after) if n not in skip]
