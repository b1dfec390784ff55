"""Members of two vendors: SoftHSM, and NSS softokn, which keeps no data objects, so that SoftHSM keeps its ledger."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from demo.members import SoftToken, Table, library
from tests import p11
from tests.ha.app import bare, code
from tests.ha.conftest import clone
from tests.ha.keys import DATA, DIGEST
from tests.replication import contents, domain
from tests.replication.compare import CLASSES, ON_COPIES
from tests.replication.conftest import StartFactory, scratch
from tests.replication.contents import Contents, Held, Shown
from tests.replication.domain import P11HA, PIN, Domain
from tests.replication.kinds import BLOCK, KINDS, Keys, Template

SOFT, NSS = "soft", "nss"
INSTANCES = ("own", "shared")
KEYS = ("rsa", "p256", "aes-256")
MODULUS: dict[str, Template] = {"rsa": {p11.CKA_MODULUS_BITS: 2048}}

NOT_SHOWN = {
    *("CKA_COPYABLE", "CKA_DESTROYABLE", "CKA_ALWAYS_AUTHENTICATE", "CKA_WRAP_WITH_TRUSTED", "CKA_TRUSTED"),
    *(
        "CKA_MODULUS_BITS",
        "CKA_CERTIFICATE_CATEGORY",
        "CKA_NAME_HASH_ALGORITHM",
        "CKA_JAVA_MIDP_SECURITY_DOMAIN",
    ),
}
"""What NSS softokn does not have; likewise whatever is empty, or no, on SoftHSM."""
NO, YES = b"\0", b"\1"


@dataclass(frozen=True)
class Database:
    """An NSS database of its own: the token of libsoftokn3.so."""

    directory: Path

    @property
    def parameters(self) -> str:
        """What the library wants to be initialised with."""
        return f"configdir='sql:{self.directory}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="

    def member(self, instance: str = "own") -> Table:
        return {
            "name": NSS,
            "module": str(library("libsoftokn3.so")),
            "token": "pkcs11:token=NSS%20Certificate%20DB",
            "init_args": self.parameters,
            "instance": instance,
        }

    @contextmanager
    def bare(self) -> Iterator[p11.Session]:
        """The token itself, by the vendor's module without us."""
        module = p11.Module(library("libsoftokn3.so"))
        module.initialize(reserved=self.parameters)
        try:
            session = module.open(module.slot("NSS Certificate DB"), rw=True)
            session.login(PIN)
            yield session
        finally:
            module.finalize()


@dataclass
class Mixed(Domain):
    """An application on a SoftHSM token and an NSS database."""

    database: Database

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Some members are away, for this process and for all others; back in service at the end."""
        places = {SOFT: self.tokens[0].directory, NSS: self.database.directory}
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(gone(places[name]))
                self.lose(name)
            yield
        self.regain()

    @contextmanager
    def bare(self, name: str) -> Iterator[p11.Session]:
        with bare(self.tokens[0]) if name == SOFT else self.database.bare() as session:
            yield session

    def held(self) -> dict[str, Contents]:
        """What the members hold, once the application has ended."""
        return {name: self._held(name) for name in (SOFT, NSS)}

    def _held(self, name: str) -> Contents:
        with self.bare(name) as session:
            handles = session.find({p11.CKA_TOKEN: True})
            return Contents(name, tuple(Held(each, contents.everything(session, each)) for each in handles))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A p11ha command with the PIN."""
        pin = self.group.conf.with_name("pin")
        pin.touch(mode=0o600)
        pin.write_text(PIN)
        return subprocess.run(
            [str(P11HA), *arguments, "--pin-source", f"file:{pin}"],
            env=os.environ | {"COLUMNS": "500"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@contextmanager
def gone(directory: Path) -> Iterator[None]:
    """A directory is not there."""
    elsewhere = directory.with_suffix(".away")
    directory.rename(elsewhere)
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # whatever was put in its place meanwhile
        elsewhere.rename(directory)


@pytest.fixture(scope="module")
def initialised(module: Path) -> Iterator[tuple[SoftToken, Database]]:
    """Two tokens with one domain key, to be copied."""
    assert module.exists()
    with scratch() as path:
        token = SoftToken(Path(path, SOFT), SOFT, PIN)
        database = Database(Path(path, NSS))
        database.directory.mkdir()
        password = Path(path, "password")
        password.write_text(f"{PIN}\n")
        subprocess.run(
            ["certutil", "-N", "-d", f"sql:{database.directory}", "-f", str(password)],
            capture_output=True,
            check=True,
        )
        domain.initialise(Path(path, "init"), [token.member(), database.member()])
        yield token, database


StartMixed = Callable[..., Mixed]


@pytest.fixture
def mixed(initialised: tuple[SoftToken, Database], directory: Path, start: StartFactory) -> StartMixed:
    """Starts an application on both members; the first one makes the keys."""
    token = clone(initialised[0], directory / SOFT)
    database = Database(shutil.copytree(initialised[1].directory, directory / NSS))

    def make(first: str = SOFT, instance: str = "own") -> Mixed:
        members = [token.member(), database.member(instance)]
        if first == NSS:
            members.reverse()
        app = start(*members, balance="primary-first")
        return Mixed(app.module, app.group, [token], database)

    return make


@pytest.fixture(scope="module")
def certificate() -> Template:
    """A certificate that a token can read."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "replicas")])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(5)
        .public_key(key.public_key())
        .not_valid_before(today)
        .not_valid_after(today + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return {
        p11.CKA_CLASS: p11.CKO_CERTIFICATE,
        p11.CKA_CERTIFICATE_TYPE: p11.CKC_X_509,
        p11.CKA_TOKEN: True,
        p11.CKA_ID: b"certificate",
        p11.CKA_SUBJECT: name.public_bytes(),
        p11.CKA_ISSUER: name.public_bytes(),
        p11.CKA_SERIAL_NUMBER: b"\2\1\5",
        p11.CKA_VALUE: made.public_bytes(Encoding.DER),
    }


def generate(session: p11.Session, name: str, private: Template | None = None) -> Keys:
    return KINDS[name].generate(session, name, MODULUS.get(name), private, name.encode())


def handles(keys: Keys) -> list[int]:
    return list({keys.public, keys.private})


# ---- comparing


def unlike(held: Mapping[str, Contents]) -> dict[str, list[str]]:
    """Objects that the members do not both have, or in which they differ by more than what vendors differ in."""
    soft, nss = (by_name(held[name]) for name in (SOFT, NSS))
    found: dict[str, list[str]] = {}
    for name in sorted({*soft, *nss}):
        ours, theirs = soft.get(name, []), nss.get(name, [])
        if (len(ours), len(theirs)) != (1, 1):
            found[name] = [f"{len(ours)} on {SOFT}, {len(theirs)} on {NSS}"]
        elif wrong := differences(ours[0], theirs[0]):
            found[name] = wrong
    return found


def by_name(held: Contents) -> dict[str, list[Shown]]:
    kinds = {p11.value_bytes(number): name for name, number in CLASSES.items()}
    found: dict[str, list[Shown]] = {}
    for each in held.seen:
        name = f"{kinds[each.shown['CKA_CLASS']]} {each.label.decode()}"  # type: ignore[index]
        found.setdefault(name, []).append(each.shown)
    return found


def differences(soft: Shown, nss: Shown) -> list[str]:
    """Attributes in which a copy is otherwise, less what a copy or a copy of this vendor may have otherwise."""
    return [
        f"{name}: {value!r} became {nss.get(name)!r}"
        for name, value in sorted(soft.items())
        if name not in ON_COPIES and not _is_alike(name, value, nss.get(name))
    ]


def _is_alike(name: str, soft: object, nss: object) -> bool:
    if nss is None:
        return soft in ("", b"", (), NO) or name in NOT_SHOWN
    # NSS shows no secret of its database, whatever is asked for.
    return soft == nss or (name == "CKA_SENSITIVE" and (soft, nss) == (NO, YES)) or nss == contents.SECRET


def labels(held: Contents) -> list[str]:
    return sorted(each.label.decode() for each in held.seen)


def settled(app: Mixed) -> dict[str, Contents]:
    """Ends the application; its members hold the same, and nothing half done."""
    app.module.finalize()
    held = app.held()
    assert unlike(held) == {}
    assert [each.others for each in held.values()] == [[], []]
    assert set(held[SOFT].ledger) <= {"kept", f"kept of {NSS}"}
    assert held[NSS].ledger == []
    return held


# ---- what a key does, checked in software


def verify(session: p11.Session, name: str, keys: Keys, proof: bytes) -> None:
    if name == "rsa":
        modulus, exponent = (
            int.from_bytes(each, "big")
            for each in session.get(keys.public, p11.CKA_MODULUS, p11.CKA_PUBLIC_EXPONENT)
        )
        assert modulus.bit_length() == 2048
        public = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        public.verify(proof, DATA, padding.PKCS1v15(), hashes.SHA256())
    elif name == "p256":
        (point,) = session.get(keys.public, p11.CKA_EC_POINT)
        on_curve = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point[2:])
        half = len(proof) // 2
        numbers = (int.from_bytes(each, "big") for each in (proof[:half], proof[half:]))
        on_curve.verify(encode_dss_signature(*numbers), DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))
    else:
        assert session.decrypt(p11.CKM_AES_ECB, keys.private, proof) == BLOCK


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("first", [SOFT, NSS])
@pytest.mark.parametrize("name", KEYS)
def test_key_is_the_same_on_both(mixed: StartMixed, name: str, first: str, instance: str) -> None:
    """Each member in turn is the only one, and what it does is right for the other one and in software."""
    app = mixed(first, instance)
    session = app.login(PIN)
    keys, kind = generate(session, name), KINDS[name]
    proofs: dict[str, bytes] = {}
    for serves, away in ((SOFT, NSS), (NSS, SOFT)):
        with app.without(away):
            proofs[serves] = kind.prove(session, keys)
            assert app.served(session) == serves
            verify(session, name, keys, proofs[serves])
            for proof in proofs.values():
                kind.check(session, keys, proof)
    settled(app)
    for member in SOFT, NSS:
        with app.bare(member) as token:
            there = kind.found(token, name)
            for proof in proofs.values():
                kind.check(token, there, proof)
                verify(token, name, there, proof)


USAGE = {
    "rsa": (p11.CKA_SIGN, p11.CKA_DECRYPT, p11.CKA_UNWRAP),
    "p256": (p11.CKA_SIGN, p11.CKA_DERIVE),
    "aes-256": (p11.CKA_ENCRYPT, p11.CKA_DECRYPT, p11.CKA_WRAP, p11.CKA_UNWRAP, p11.CKA_DERIVE),
}


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("first", [SOFT, NSS])
@pytest.mark.parametrize("name", KEYS)
def test_usage_is_as_it_was_asked_for(mixed: StartMixed, name: str, first: str, said: bool) -> None:
    app = mixed(first)
    usage: Template = dict.fromkeys(USAGE[name], said)
    generate(app.login(PIN), name, usage)
    settled(app)


@pytest.mark.parametrize("name", KEYS)
def test_key_is_not_extractable_unless_it_was_asked_for(mixed: StartMixed, name: str) -> None:
    app = mixed()
    session = app.login(PIN)
    generate(session, name, {p11.CKA_SENSITIVE: True})
    held = settled(app)
    for each in held.values():
        (key,) = [h for h in each.seen if "CKA_EXTRACTABLE" in h.shown]
        assert (key.shown["CKA_EXTRACTABLE"], key.shown["CKA_SENSITIVE"]) == (NO, YES), each.token


# ---- a member is away


@dataclass(frozen=True)
class Before:
    """Handles of what both members have."""

    renamed: Sequence[int]
    destroyed: Sequence[int]
    stays: Sequence[int]


def make(session: p11.Session, name: str, label: str, certificate: Template) -> list[int]:
    if name == "certificate":
        serial = sum(label.encode())
        return [
            session.create(
                certificate
                | {p11.CKA_LABEL: label, p11.CKA_SERIAL_NUMBER: b"\2\2" + serial.to_bytes(2, "big")}
            )
        ]
    return handles(KINDS[name].generate(session, label, MODULUS.get(name), ident=label.encode()))


def provide(session: p11.Session, name: str, certificate: Template) -> Before:
    given = {label: make(session, name, label, certificate) for label in ("old", "doomed", "stays")}
    return Before(given["old"], given["doomed"], given["stays"])


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("name", [*KEYS, "certificate"])
def test_what_happened_without_nss_happens_to_it(
    mixed: StartMixed, name: str, anew: bool, instance: str, certificate: Template
) -> None:
    """When it returns, or for the next process."""
    app = mixed(instance=instance)
    session = app.login(PIN)
    before = provide(session, name, certificate)

    def work() -> None:
        for handle in before.renamed:
            session.set(handle, {p11.CKA_LABEL: "renamed"})
        for handle in before.destroyed:
            session.destroy(handle)
        for handle in make(session, name, "made", certificate):
            session.set(handle, {p11.CKA_LABEL: "made and renamed"})
        for handle in make(session, name, "in vain", certificate):
            session.destroy(handle)

    if anew:
        with gone(app.database.directory):
            app.lose(NSS)
            work()
            app.module.finalize()
        app.module.initialize()
        session = app.login(PIN)
        assert app.away() == set()
    else:
        with app.without(NSS):
            work()
    count = len(before.stays)
    wanted = sorted(["renamed", "stays", "made and renamed"] * count)
    assert sorted(session.get(each, p11.CKA_LABEL)[0].decode() for each in session.find({})) == wanted
    held = settled(app)
    assert {each: labels(of) for each, of in held.items()} == {SOFT: wanted, NSS: wanted}


@pytest.mark.parametrize("name", [*KEYS, "certificate"])
def test_key_made_without_nss_works_there(mixed: StartMixed, name: str, certificate: Template) -> None:
    app = mixed()
    session = app.login(PIN)
    with app.without(NSS):
        (handle, *_) = made = make(session, name, "made", certificate)
    with app.without(SOFT):
        if name == "certificate":
            assert session.get(handle, p11.CKA_VALUE) == (certificate[p11.CKA_VALUE],)
        else:
            kind = KINDS[name]
            keys = kind.found(session, "made")
            assert sorted(handles(keys)) == sorted(made)
            proof = kind.prove(session, keys)
            verify(session, name, keys, proof)
        assert app.served(session) == NSS
    settled(app)


@pytest.mark.parametrize("name", [*KEYS, "certificate"])
def test_nothing_is_written_where_nobody_keeps_the_ledger(
    mixed: StartMixed, name: str, certificate: Template
) -> None:
    """Without SoftHSM nobody could tell it later what it missed."""
    app = mixed()
    session = app.login(PIN)
    before = provide(session, name, certificate)
    app.module.finalize()
    then = {each: shown(of) for each, of in app.held().items()}
    app.module.initialize()
    session = app.login(PIN)
    before = Before(*(session.find({p11.CKA_LABEL: label}) for label in ("old", "doomed", "stays")))
    acts: dict[str, Callable[[], object]] = {
        "make": lambda: make(session, name, "made", certificate),
        "rename": lambda: session.set(before.renamed[0], {p11.CKA_LABEL: "renamed"}),
        "destroy": lambda: session.destroy(before.destroyed[0]),
        "copy": lambda: session.copy(before.stays[0], {p11.CKA_LABEL: "copy", p11.CKA_TOKEN: True}),
    }
    with app.without(SOFT):
        answers = {act: code(call) for act, call in acts.items()}
        seen = sorted(session.get(each, p11.CKA_LABEL)[0].decode() for each in session.find({}))
        assert app.served(session) == NSS
    assert answers == dict.fromkeys(acts, "CKR_DEVICE_ERROR")
    assert seen == sorted(["old", "doomed", "stays"] * len(before.stays))
    assert "nobody keeps the ledger" in app.events("replication.refused")[0]
    assert {each: shown(of) for each, of in settled(app).items()} == then


def shown(held: Contents) -> list[str]:
    """All attributes of all objects that applications see."""
    return sorted(repr(sorted(each.shown.items())) for each in held.seen)


def test_login_without_softhsm_finds_keys_and_writes_nothing(mixed: StartMixed) -> None:
    app = mixed()
    generate(app.login(PIN), "p256")
    app.module.finalize()
    with gone(app.tokens[0].directory):
        app.module.initialize()
        session = app.login(PIN)
        keys = KINDS["p256"].found(session, "p256")
        verify(session, "p256", keys, KINDS["p256"].prove(session, keys))
        assert code(lambda: session.destroy(keys.private)) == "CKR_DEVICE_ERROR"
        app.module.finalize()
    app.module.initialize()
    app.login(PIN)
    assert len(settled(app)[SOFT].seen) == 2


@pytest.mark.parametrize("private", [False, True])
def test_data_object_is_made_nowhere(mixed: StartMixed, private: bool) -> None:
    """As NSS does not take it; nor is its ledger what NSS is given."""
    app = mixed()
    session = app.login(PIN)
    note: Template = {p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True, p11.CKA_PRIVATE: private}
    assert code(lambda: session.create(note | {p11.CKA_LABEL: "note", p11.CKA_VALUE: b"v"})) != "CKR_OK"
    assert session.find({}) == []
    held = settled(app)
    assert [each.seen for each in held.values()] == [[], []]
    assert held[SOFT].ledger == []


# ---- commands


@pytest.mark.parametrize("instance", INSTANCES)
def test_check_says_who_keeps_no_data_objects(mixed: StartMixed, instance: str) -> None:
    app = mixed(instance=instance)
    session = app.login(PIN)
    for name in KEYS:
        generate(session, name)
    app.module.finalize()
    done = app.command("check")
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if "keeps no data objects" in line]
    assert [line.partition(":")[0] for line in lines] == [NSS]


VENDORS = NOT_SHOWN | {"CKA_DERIVE"}
"""What SoftHSM shows and NSS does not; CKA_DERIVE of a secret key that NSS made without being asked for it."""


@pytest.mark.parametrize("first", [SOFT, NSS])
def test_diff_finds_no_difference_but_what_nss_does_not_have(
    mixed: StartMixed, first: str, certificate: Template
) -> None:
    app = mixed(first)
    session = app.login(PIN)
    for name in (*KEYS, "certificate"):
        make(session, name, name, certificate)
    with app.without(NSS):
        for name in (*KEYS, "certificate"):
            make(session, name, f"{name} later", certificate)
    app.module.finalize()
    done = app.command("diff", "prod")
    rows = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()[1:] if "CKO_" in line]
    assert len(rows) == 2 * 6, done.stdout
    for name, one, other, proof, *different in rows:
        guarded = "PRIVATE" in name or "SECRET" in name
        assert (one, other, proof) == ("yes", "yes", "operation" if guarded else "attributes"), name
        assert set("".join(different).replace(" ", "").split(",")) - {""} <= VENDORS, name
        assert "not in the ledger" not in name
    dry = app.command("sync", "prod", "--dry-run")
    assert sorted(dry.stdout.splitlines()) == [f"{NSS}: 0 to do", f"{SOFT}: 0 to do"]
