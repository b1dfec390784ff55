"""A client process: one application of the group, told what to do by lines of JSON, and answering by lines of JSON.

Started as `python -m tests.chaos.client MODULE PIN`.  A request is an object with the name of a command in `do` and its
arguments; the answer has `rv`, the name of the code of the call that ended it, and what the command yields in
`value`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tests import p11
from tests.chaos import objects
from tests.chaos.objects import DIGEST, Thing

ROUNDS = 6  # a call goes to the members in turn
Json = dict[str, Any]


class Ambiguous(Exception):
    """There is not exactly one object of that name."""


class Application:
    """A session, and the handles of the objects it has made or found."""

    def __init__(self, module: p11.Module, pin: str) -> None:
        self.module, self.pin = module, pin
        self.handles: dict[str, int] = {}
        self._session: p11.Session | None = None

    @property
    def session(self) -> p11.Session:
        if self._session is None:
            raise p11.CkError("C_Login", p11.CKR_USER_NOT_LOGGED_IN)
        return self._session

    @property
    def slot(self) -> int:
        return self.module.slots(present=False)[-1]

    # Commands

    def initialise(self) -> None:
        self.module.initialize()

    def login(self) -> None:
        session = self.module.open(self.slot, rw=True)
        session.login(self.pin)
        self._session = session

    def finalise(self) -> None:
        self._session = None
        self.handles.clear()
        self.module.finalize()

    def members(self) -> list[str]:
        """Serial numbers of those that are up and do serve this client: a death nobody has noticed does not count."""
        served = set()
        for _ in range(ROUNDS):
            self.session.random(8)
            served.add(self.module.session_member(self.session)[1])
        up = self.module.ha_status(self.slot).members
        return [serial for serial, status in up.items() if status == "CKR_OK" and serial in served]

    def make(self, things: list[Json]) -> None:
        asked = [Thing.from_json(thing) for thing in things]
        self._remember(asked, objects.make(self.session, asked))

    def copy(self, thing: Json, copy: Json) -> None:
        handle, new = self._handle(thing), Thing.from_json(copy)
        self._remember([new], [self.session.copy(handle, objects.changeable(new))])

    def change(self, thing: Json, new: Json) -> None:
        self.session.set(self._handle(thing), objects.changeable(Thing.from_json(new)))

    def destroy(self, thing: Json) -> None:
        self.session.destroy(self._handle(thing))
        del self.handles[thing["uid"]]

    def see(self) -> list[Json]:
        """All that is to be seen; what is not the application's is named for what it is."""
        seen = []
        for handle in self.session.find({p11.CKA_TOKEN: True}):
            if objects.is_hidden(self.session, handle):
                seen.append(Thing("hidden", repr(objects.read_hidden(self.session, handle))))
            else:
                seen.append(objects.read(self.session, handle))
        return [thing.as_json() for thing in seen]

    def use(self, thing: Json) -> str:
        """Its proof; of an EC key, which proves itself by a mechanism that p11-kit cannot carry, a signature."""
        handle = self._handle(thing)
        if thing["kind"] == "ec":
            return self.session.sign(p11.CKM_ECDSA, handle, DIGEST).hex()
        return objects.proof(self.session, handle, thing["kind"]).hex()

    # Handles

    def _handle(self, thing: Json) -> int:
        if thing["uid"] not in self.handles:
            found = self.session.find(objects.search(Thing.from_json(thing)))
            if len(found) != 1:
                raise Ambiguous(f"found {len(found)}")
            self.handles[thing["uid"]] = found[0]
        return self.handles[thing["uid"]]

    def _remember(self, things: Sequence[Thing], handles: Sequence[int]) -> None:
        self.handles |= {thing.uid: handle for thing, handle in zip(things, handles, strict=True)}


def answer(command: Callable[..., Any], arguments: Json) -> Json:
    try:
        return {"rv": "CKR_OK", "value": command(**arguments)}
    except p11.CkError as error:
        return {"rv": error.name, "value": error.call}
    except Ambiguous as why:
        return {"rv": str(why), "value": "C_FindObjects"}


def main() -> None:
    application = Application(p11.Module(sys.argv[1]), sys.argv[2])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(getattr(application, request.pop("do")), request)), flush=True)


if __name__ == "__main__":
    main()
