"""The menu at work: a number is read and done, and its status said; from a person or from a script."""

from __future__ import annotations

import textwrap

from pkcs11_ha import ck
from pkcs11_ha.cli.meanings import meaning
from pkcs11_ha.cli.menu.client import CallError, Client
from pkcs11_ha.cli.menu.desk import Desk, Options
from pkcs11_ha.cli.menu.dialogue import WIDTH, Dialogue, EndOfInput, NotDone, Script, Source
from pkcs11_ha.cli.menu.table import ENTRIES, QUIT, picture

_NESTED_AT_MOST = 8
_GREAT = "Doing great, no errors (CKR_OK)"
_SESSION_GONE = (ck.CKR_SESSION_HANDLE_INVALID, ck.CKR_SESSION_CLOSED)


class Menu:
    """Numbers in, statuses out."""

    def __init__(
        self, client: Client, dialogue: Dialogue, options: Options, command: tuple[str, ...]
    ) -> None:
        self.desk = Desk(client, dialogue, options, self._run_within, command)
        self._depth = 0
        client.trace = self._trace

    def run(self, source: Source) -> int:
        """Until the end of input, 0, or the first error of a script; returns how many numbers failed."""
        self.desk.dialogue.source = source
        failed = 0
        show = True
        while True:
            self._say_of_background()
            if source.interactive and show:
                self.desk.say(picture())
            try:
                problem = self._next(source)
                show = self.desk.options.show_menu or problem is None
            except KeyboardInterrupt:
                if not source.interactive:
                    raise
                self.desk.say("")
                show = self.desk.options.show_menu
                continue
            except EndOfInput:
                return failed
            if problem:
                failed += 1
                if not self._goes_on(source):
                    return failed

    def _next(self, source: Source) -> bool | None:
        """Whether the next number has failed; None for no number.  Raises EndOfInput where it is time to go."""
        try:
            text = source.choice("Enter your choice : ")
        except NotDone as error:
            self._status(f"not done : {error}")
            return True
        if text is None or text == str(QUIT):
            raise EndOfInput
        if not text:
            return None
        failed, status = self._do(text, source)
        self._status(status)
        return failed

    def _do(self, text: str, source: Source) -> tuple[bool, str]:
        """Carries out one number: whether it has failed, and its status."""
        try:
            entry = ENTRIES.get(int(text)) if text.isascii() and text.isdigit() and len(text) < 4 else None
            if entry is None:
                raise NotDone(f"{text[:20]!r} is not in the menu: type one of its numbers, {QUIT} to quit")
            if entry.does is None:
                unsupported = ck.rv_name(ck.CKR_FUNCTION_NOT_SUPPORTED)
                return True, f"{entry.title} answers {unsupported} : one vendor's firmware, not PKCS#11"
            entry.does(self.desk)
        except CallError as error:
            if error.rv in _SESSION_GONE:
                self._forget_gone()
            return True, f"{error} : {meaning(error.rv)}"
        except NotDone as error:
            return True, f"not done : {error}"
        except BrokenPipeError:
            raise  # nobody reads on
        except OSError as error:
            return True, f"not done : {error}"
        except MemoryError:
            return True, "not done : no memory is left"
        except EndOfInput:
            if source.interactive:
                raise
            return True, "not done : the script ends where an answer is asked for"
        return False, _GREAT

    def _status(self, text: str) -> None:
        self.desk.say(
            textwrap.fill(f"Status: {text}", WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False)
        )

    def _goes_on(self, source: Source) -> bool:
        if not isinstance(source, Script):
            return True
        if self.desk.options.keep_going:
            source.skips = True
            return True
        self.desk.say(f"{source.where}: stopped at the first error")
        return False

    def _run_within(self, script: Script) -> int:
        """A script that was asked for by number."""
        if self._depth == _NESTED_AT_MOST:
            raise NotDone(f"scripts call each other more than {_NESTED_AT_MOST} deep")
        before = self.desk.dialogue.source
        self._depth += 1
        try:
            return self.run(script)
        finally:
            self._depth -= 1
            self.desk.dialogue.source = before

    def _forget_gone(self) -> None:
        """Sessions that the module does not know any more."""
        for session in tuple(self.desk.sessions):
            try:
                self.desk.client.session_info(session.handle)
            except CallError as error:
                if error.rv in _SESSION_GONE:
                    self.desk.sessions.remove(session)
                    self.desk.say(f"Session {session.number} is gone")

    def _trace(self, name: str, rv: int, seconds: float) -> None:
        if self.desk.options.verbose:
            self.desk.say(f"  {name} {ck.rv_name(rv)} {seconds * 1000:.1f} ms")

    # ---- scripts in the background

    def _say_of_background(self) -> int:
        """Says which have ended; returns how many of those failed."""
        failed = 0
        for each in tuple(self.desk.background):
            status = each.process.poll()
            if status is not None:
                self.desk.background.remove(each)
                self.desk.say(
                    f"{each.script} in process {each.process.pid} has ended with {status}: {each.output}"
                )
                failed += status != 0
        return failed

    def wait_for_background(self) -> int:
        """Until all have ended, or a Ctrl-C ends them; returns how many failed."""
        if self.desk.background:
            self.desk.say(
                f"Waiting for {len(self.desk.background)} scripts in the background; Ctrl-C ends them"
            )
        try:
            for each in self.desk.background:
                each.process.wait()
        except KeyboardInterrupt:
            for each in self.desk.background:
                each.process.terminate()
            for each in self.desk.background:
                each.process.wait()
        return self._say_of_background()
