"""A client process: one application of the group, told what to do by lines of JSON, and answering by lines of JSON.

Started as `python -m tests.replication.client MODULE PIN`.  A request is a list, a command and its arguments; the
answer is [name of the code of the call that ended it, value].  "hanging" comes unasked, once it holds a lease.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from tests import p11
from tests.ha.app import code
from tests.replication.kinds import BLOCK, KINDS, Template

NOTE: Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_VALUE: b"what it says"}


class Application:
    """A session, and handles that were found once."""

    def __init__(self, module: p11.Module, pin: str) -> None:
        self.module, self.pin = module, pin
        self.known: dict[str, list[int]] = {}
        self._session: p11.Session | None = None

    @property
    def session(self) -> p11.Session:
        assert self._session
        return self._session

    @property
    def slot(self) -> int:
        return self.module.slots(present=False)[-1]

    # Commands

    def initialise(self) -> None:
        self.module.initialize()

    def login(self) -> None:
        self._session = self.module.open(self.slot, rw=True)
        self._session.login(self.pin)

    def finalise(self) -> None:
        self.module.finalize()

    def away(self) -> list[str]:
        """Serial numbers of members that do not serve."""
        self.session.random(1)
        members = self.module.ha_status(self.slot).members
        return [serial for serial, status in members.items() if status != "CKR_OK"]

    def make(self, kind: str, label: str) -> None:
        if kind == "note":
            self.session.create(NOTE | {p11.CKA_LABEL: label})
        else:
            KINDS[kind].generate(self.session, label, ident=label.encode())

    def rename(self, label: str, new: str) -> None:
        for handle in self._find(label):
            self.session.set(handle, {p11.CKA_LABEL: new})

    def destroy(self, label: str) -> None:
        for handle in self._find(label):
            self.session.destroy(handle)

    def labels(self) -> list[str]:
        return sorted(self.session.get(handle, p11.CKA_LABEL)[0].decode() for handle in self.session.find({}))

    def remember(self) -> int:
        """Finds what there is, by its label; how many objects."""
        self.known = {label: self._find(label) for label in self.labels()}
        return sum(map(len, self.known.values()))

    def encrypt(self, label: str) -> str:
        """Once per member, with the handle remembered."""
        (key,) = self.known[label]
        texts = {self.session.encrypt(p11.CKM_AES_ECB, key, BLOCK) for _ in range(4)}
        return " ".join(sorted(text.hex() for text in texts))

    def work(self, acts: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
        """(act, label, new label) on what is remembered; the same with the code."""
        done = []
        for act, label, new in acts:
            (handle,) = self.known[label]
            answer = code(lambda: self._act(act, handle, new))  # noqa: B023
            done.append((act, label, answer))
        return done

    def login_and_hang(self, steps: int) -> None:
        """The login brings a member up, and stays for ever in the middle of that, holding its lease."""
        from pkcs11_ha.runtime.settling import Settling

        bring, left = Settling._bring, [steps]

        def slow(*arguments: Any) -> None:
            if left[0] == 0:
                answer("hanging")
                time.sleep(3600)
            left[0] -= 1
            bring(*arguments)

        setattr(Settling, "_bring", slow)  # noqa: B010 (of any signature)
        self.login()

    def _act(self, act: str, handle: int, new: str) -> None:
        if act == "rename":
            self.session.set(handle, {p11.CKA_LABEL: new})
        elif act == "copy":
            self.session.copy(handle, {p11.CKA_LABEL: new})
        else:
            self.session.destroy(handle)

    def _find(self, label: str) -> list[int]:
        return self.session.find({p11.CKA_LABEL: label})


def answer(what: object) -> None:
    print(json.dumps(what), flush=True)


def main(module: str, pin: str) -> None:
    application = Application(p11.Module(module), pin)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        command: Callable[..., object] = getattr(application, name)
        try:
            answer(["CKR_OK", command(*arguments)])
        except p11.CkError as error:
            answer([error.name, None])


if __name__ == "__main__":
    main(*sys.argv[1:])
