"""Members that are killed again and again, and back within a moment: a listening worker forks for each client."""

from __future__ import annotations

import copy
import os
import select
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.members import SoftToken, Table, Toml, Worker, library, softhsm, write_config
from tests import p11
from tests.chaos.crash import CrashPlan
from tests.conftest import Group
from tests.ha.app import Application, environment, working_until
from tests.replay.scripts import Use

AT_ONCE = {"interval_s": 0.001}  # a member is tried again by the next call
NSS_TOKEN = "NSS Certificate DB"


class NssToken(SoftToken):
    """An NSS database; all of them have one label."""

    def __init__(self, directory: Path, label: str, pin: str = "123456") -> None:
        self.directory, self.label, self.pin, self.env = directory, label, pin, {}
        self.uri = "pkcs11:token=" + NSS_TOKEN.replace(" ", "%20")
        directory.mkdir()
        password = directory / "password"
        password.write_text(f"{pin}\n")
        database = ["-d", f"sql:{directory}", "-f", str(password)]
        subprocess.run(["certutil", "-N", *database], capture_output=True, check=True)

    @property
    def parameters(self) -> str:
        """What the library wants to be initialised with."""
        return f"configdir='sql:{self.directory}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="


class NssWorker(Worker):
    """A listening worker with an NSS database."""

    def __init__(self, token: NssToken) -> None:
        super().__init__(token, provider=library("libsoftokn3.so"))
        self.parameters = token.parameters

    def command(self) -> list[str]:
        return [*super().command(), "--init-args", self.parameters]


@contextmanager
def reference(token: SoftToken) -> Iterator[Use]:
    """The token itself, by the vendor's module without us: an undisturbed run."""
    is_nss = isinstance(token, NssToken)
    with environment(token.env), ExitStack() as stack:
        module = p11.Module(library("libsoftokn3.so") if is_nss else softhsm())
        module.initialize(reserved=token.parameters if isinstance(token, NssToken) else None)
        stack.callback(module.finalize)
        session = module.open(module.slot(NSS_TOKEN if is_nss else token.label), rw=True)
        session.login(token.pin)
        yield Use(session)


@dataclass
class Killable:
    """An application on members that can be killed."""

    app: Application
    workers: Mapping[str, Worker]
    pin: str

    def use(self) -> Use:
        """A new session; the first one logs in."""
        session = self.app.open()
        if session.info().state != p11.CKS_RW_USER_FUNCTIONS:
            session.login(self.pin)
        return Use(session)

    def kill(self, name: str) -> None:
        """SIGKILL the process that serves us; dead on return.  The listener stays and takes us in again."""
        for pid in self.processes(name):
            _kill(pid)

    def kill_serving(self, use: Use) -> str:
        """Kill whoever served the session's last call."""
        name = self.app.served(use.session)
        self.kill(name)
        return name

    def processes(self, name: str) -> list[int]:
        """Of its clients: the children of its only thread."""
        listener = self.workers[name].pid
        return [int(pid) for pid in Path(f"/proc/{listener}/task/{listener}/children").read_text().split()]

    def wait_for_all(self) -> None:
        """Work until everybody serves, also who died without anybody noticing."""
        session = self.app.open()
        working_until(lambda: session.random(1), self._all_serve, "all are back")
        session.close()

    def _all_serve(self) -> bool:
        return not self.app.away() and all(map(self.processes, self.workers))


def _kill(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        ended = select.poll()
        ended.register(process, select.POLLIN)
        ended.poll()
    finally:
        os.close(process)


@contextmanager
def application(
    module: Path, directory: Path, members: list[Table], recovery: Table = AT_ONCE, **options: Toml
) -> Iterator[Application]:
    """The module initialised with one group."""
    state, log = directory / "state", directory / "ha.log"
    state.mkdir(exist_ok=True)
    table: Table = {
        "label": "prod",
        "serial": "1599447001",
        "members": [member["name"] for member in members],
    } | dict(options)
    conf = write_config(directory / "pkcs11-ha.toml", members, [table], recovery, {"log": f"file:{log}"})
    env = {"PKCS11_HA_CONF": str(conf), "PKCS11_HA_STATE": str(state)}
    with environment(env):
        loaded = p11.Module(module)
        loaded.initialize()
        try:
            yield Application(loaded, Group("prod", conf, state, log, env))
        finally:
            loaded.finalize()


def behind(token: SoftToken) -> Worker:
    """A listening worker, not started yet."""
    return NssWorker(token) if isinstance(token, NssToken) else Worker(token)


def dying(token: SoftToken, crash_library: Path, plan: CrashPlan) -> Worker:
    """The same for a library whose process ends at a call that the plan names."""
    planned = copy.copy(token)
    planned.env = token.env | plan.env(softhsm())
    return Worker(planned, provider=crash_library)


@contextmanager
def killable(
    module: Path,
    directory: Path,
    workers: Iterable[Worker],
    recovery: Table = AT_ONCE,
    **options: Toml,
) -> Iterator[Killable]:
    """An application on tokens behind workers, which are started."""
    with ExitStack() as stack:
        started = {worker.token.label: stack.enter_context(worker) for worker in workers}
        members = [worker.member() for worker in started.values()]
        app = stack.enter_context(application(module, directory, members, recovery, **options))
        yield Killable(app, started, next(iter(started.values())).token.pin)
