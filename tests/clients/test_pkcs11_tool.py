"""pkcs11-tool does with a group what it does with the bare SoftHSM module: the same answers, the same files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.clients.conftest import DATA, Keys, KillableFactory
from tests.clients.programs import Done, Token

IV = "000102030405060708090a0b0c0d0e0f"

Outcome = tuple[int, list[str], list[str]]


def tool(token: Token, *arguments: str, ok: bool = True) -> Done:
    login = () if "--pin" in arguments else ("--pin", token.pin)
    return token.run(
        *("pkcs11-tool", "--module", token.module, "--token-label", token.label, "--login", *login),
        *arguments,
        ok=ok,
    )


def normal(text: str) -> list[str]:
    """What it says, without what differs from key to key and run to run; objects in a fixed order."""
    text = re.sub(
        r"((?:EC_POINT|VALUE): +)([0-9a-f]+)$", lambda m: f"{m[1]}{len(m[2])}", text, flags=re.MULTILINE
    )
    text = re.sub(r"^(Data object) \d+$", r"\1", text, flags=re.MULTILINE)
    return sorted(re.split(r"\n(?=\S)", text.strip()))


@dataclass(frozen=True)
class Both:
    """The bare token and the group, side by side."""

    bare: Token
    prod: Token

    def file(self, name: str, content: bytes) -> None:
        for token in (self.bare, self.prod):
            token.write(name, content)

    def __call__(self, line: str) -> Outcome:
        """Does the same with both and gives the one outcome they have."""
        bare, prod = (
            (done.returncode, normal(done.stdout), normal(done.stderr))
            for done in (tool(token, *line.split(), ok=False) for token in (self.bare, self.prod))
        )
        assert prod == bare, line
        return bare

    def must(self, line: str) -> str:
        code, out, error = self(line)
        assert code == 0, (line, out, error)
        return "\n".join(out)

    def same(self, name: str) -> bytes:
        """Both have made the same file."""
        content = self.prod.read(name)
        assert content == self.bare.read(name), name
        return content


@pytest.fixture
def both(bare: Token, prod: Token) -> Both:
    made = Both(bare, prod)
    made.file("data", DATA)
    made.file("block", bytes(range(64)))
    made.file("secret", bytes(range(100, 132)))
    return made


def test_mechanisms_and_objects_are_listed(both: Both, keys: Keys) -> None:
    assert both.must("--list-mechanisms").count("\n") > 50
    objects = both.must("--list-objects")
    for key in keys:
        assert objects.count(f"label:      {key.label}") == 3
    assert "Private" not in both.must("--list-objects --type pubkey")


@pytest.mark.parametrize(
    ("kind", "key_type", "mechanism"),
    [
        ("pair", "rsa:2048", "SHA256-RSA-PKCS"),
        ("pair", "rsa:2048", "SHA256-RSA-PKCS-PSS"),
        ("pair", "EC:prime256v1", "ECDSA"),
        ("pair", "EC:secp384r1", "ECDSA"),
        ("pair", "EC:edwards25519", "EDDSA"),
        ("", "GENERIC:32", "SHA256-HMAC"),
    ],
)
def test_a_generated_key_signs(both: Both, kind: str, key_type: str, mechanism: str) -> None:
    both.file("input", sha256(DATA).digest())
    both.must(f"--key{kind}gen --key-type {key_type} --label new --id 0b --extractable")
    assert both.must("--list-objects").count("label:      new") == (2 if kind else 1)
    both.must(f"--sign --mechanism {mechanism} --id 0b --input-file input --output-file signature")
    valid = f"--verify --mechanism {mechanism} --id 0b --input-file input --signature-file signature"
    assert "Signature is valid" in both.must(valid)
    both.file("input", sha256(b"other").digest())
    assert "Signature is valid" not in "".join(both(valid)[1])


@pytest.mark.parametrize("size", [16, 24, 32])
def test_a_generated_aes_key_encrypts(both: Both, size: int) -> None:
    both.must(f"--keygen --key-type AES:{size} --label new --id 0b")
    both.must(f"--encrypt --mechanism AES-CBC-PAD --iv {IV} --id 0b --input-file data --output-file secret")
    assert both.prod.read("secret") != both.bare.read("secret")  # two keys
    both.must(f"--decrypt --mechanism AES-CBC-PAD --iv {IV} --id 0b --input-file secret --output-file plain")
    assert both.same("plain") == DATA


def test_imported_keys_sign_and_verify(both: Both, keys: Keys) -> None:
    sign = "--sign --input-file {input} --output-file signature --mechanism {mechanism} --id {id}"
    both.must(sign.format(input="data", mechanism="SHA256-RSA-PKCS", id=keys.rsa.id))
    keys.rsa.verify(both.same("signature"))
    both.file("digest", sha256(DATA).digest())
    both.must(sign.format(input="digest", mechanism="ECDSA", id=keys.ec.id))
    for token in (both.bare, both.prod):
        keys.ec.verify(token.read("signature"))
    both.must(sign.format(input="digest", mechanism="ECDSA", id=keys.ec.id) + " --signature-format openssl")
    keys.ec.verify(both.prod.read("signature"))
    code, _, error = both(sign.format(input="digest", mechanism="ECDSA", id="ff"))
    assert code == 1
    assert "not found" in "".join(error)


def test_decryption_with_an_imported_rsa_key(both: Both, keys: Keys) -> None:
    both.file("public.pem", keys.rsa.public_pem)
    encrypt = "openssl pkeyutl -encrypt -pubin -inkey public.pem -in data -out sealed".split()
    oaep = "--hash-algorithm SHA-1 --mechanism RSA-PKCS-OAEP"
    for padding, mechanism in (("pkcs1", "--mechanism RSA-PKCS"), ("oaep", oaep)):
        both.bare.run(*encrypt, "-pkeyopt", f"rsa_padding_mode:{padding}")
        both.prod.write("sealed", both.bare.read("sealed"))
        both.must(f"--decrypt {mechanism} --id {keys.rsa.id} --input-file sealed --output-file opened")
        assert both.same("opened") == DATA


def test_written_secret_key_encrypts_alike(both: Both) -> None:
    both.must("--write-object secret --type secrkey --key-type AES:32 --label own --id 0c")
    for mode in (f"AES-CBC --iv {IV}", f"AES-CBC-PAD --iv {IV}", "AES-ECB"):
        both.must(f"--encrypt --mechanism {mode} --id 0c --input-file block --output-file sealed")
        sealed = both.same("sealed")
        assert sealed != bytes(range(64))
        both.must(f"--decrypt --mechanism {mode} --id 0c --input-file sealed --output-file opened")
        assert both.same("opened") == bytes(range(64))


def test_a_key_is_wrapped_and_unwrapped_alike(both: Both) -> None:
    both.file("other", bytes(range(32)))
    secret = "--type secrkey --key-type AES:32 --extractable"
    both.must(f"--write-object secret {secret} --label wrapping --id 0c")
    both.must(f"--write-object other {secret} --label wrapped --id 0d")
    both.must("--wrap --mechanism AES-KEY-WRAP --id 0c --application-id 0d --output-file blob")
    assert len(both.same("blob")) == 40
    both.must(
        "--unwrap --mechanism AES-KEY-WRAP --id 0c --input-file blob --key-type AES:"
        " --application-id 0e --application-label again --extractable"
    )
    for key in ("0d", "0e"):
        both.must(f"--encrypt --mechanism AES-ECB --id {key} --input-file block --output-file sealed-{key}")
    assert both.same("sealed-0d") == both.same("sealed-0e")


def test_generated_keys_wrap_each_other(both: Both, keys: Keys) -> None:
    both.must("--keygen --key-type AES:32 --label one --id 0c --extractable")
    both.must("--keygen --key-type AES:32 --label two --id 0d --extractable")
    both.must("--wrap --mechanism AES-KEY-WRAP --id 0c --application-id 0d --output-file blob")
    both.must(f"--wrap --mechanism RSA-PKCS --id {keys.rsa.id} --application-id 0d --output-file sealed")
    assert len(both.prod.read("blob")) == 40
    assert len(both.prod.read("sealed")) == 256


def test_a_shared_secret_is_derived(both: Both, keys: Keys) -> None:
    """ECDH of a key generated on the token with one of ours."""
    both.must("--keypairgen --key-type EC:prime256v1 --label new --id 0b --usage-derive")
    both.file("peer.pem", keys.ec.public_pem)
    for token in (both.bare, both.prod):
        token.run(*"openssl pkey -pubin -in peer.pem -outform DER -out peer.der".split())
    both.must("--derive --mechanism ECDH1-DERIVE --id 0b --input-file peer.der --output-file shared")
    # Not by --read-object: pkcs11-tool 0.23 uses freed memory for EC keys (OpenSC issue 3200).
    listed = tool(both.prod, "--list-objects", "--type", "pubkey").stdout
    shown = re.search(r"EC_POINT: +0441([0-9a-f]+)\n.*\n +label: +new\n", listed)
    assert shown, listed
    own = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(shown[1]))
    assert isinstance(keys.ec.private, ec.EllipticCurvePrivateKey)
    assert both.prod.read("shared") == keys.ec.private.exchange(ec.ECDH(), own)


def test_objects_of_each_type_are_written_read_changed_and_deleted(both: Both, keys: Keys) -> None:
    traditional = PrivateFormat.TraditionalOpenSSL
    both.file("key", keys.rsa.private.private_bytes(Encoding.DER, traditional, NoEncryption()))
    both.file("cert", keys.rsa.certificate.public_bytes(Encoding.DER))
    for token in (both.bare, both.prod):
        token.run(
            "openssl", "rsa", "-in", "key", "-inform", "DER", "-pubout", "-outform", "DER", "-out", "pub"
        )
    both.must("--write-object cert --type cert --label own --id 0c")
    both.must("--write-object key --type privkey --label own --id 0c --usage-sign")
    both.must("--write-object pub --type pubkey --label own --id 0c")
    both.must("--write-object data --type data --label own --application-label app")
    both.must("--write-object secret --type secrkey --key-type AES:32 --label own --id 0c")
    assert both.must("--list-objects").count("'own'") == 1
    assert both.must("--list-objects").count(" own") == 4

    both.must("--read-object --type cert --id 0c --output-file read")
    assert both.same("read") == both.prod.read("cert")
    both.must("--read-object --type data --label own --output-file read")
    assert both.same("read") == DATA
    both.must("--read-object --type pubkey --id 0c --output-file read")
    both.same("read")

    both.must("--set-id 0d --type privkey --id 0c")
    both.must("--sign --mechanism SHA256-RSA-PKCS --id 0d --input-file data --output-file signature")
    keys.rsa.verify(both.same("signature"))

    for which in ("cert --id 0c", "privkey --id 0d", "pubkey --id 0c", "secrkey --id 0c", "data --label own"):
        both.must(f"--delete-object --type {which}")
        assert both(f"--delete-object --type {which}")[0] == 1  # it is gone
    assert "own" not in both.must("--list-objects")


def test_the_pin_is_changed(both: Both, keys: Keys) -> None:
    both.must("--change-pin --new-pin 654321")
    assert both("--list-objects")[0] == 1  # with the old one
    assert keys.rsa.label in both.must("--pin 654321 --list-objects")


def test_random_bytes_and_digests(both: Both) -> None:
    both.must("--generate-random 32 --output-file random")
    assert both.prod.read("random") != both.bare.read("random")
    assert len(both.prod.read("random")) == 32
    both.must("--hash --mechanism SHA256 --input-file data --output-file digest")
    assert both.same("digest") == sha256(DATA).digest()


@pytest.mark.parametrize("dead", ["east", "west"])
def test_with_a_dead_member_it_works_on(killable: KillableFactory, keys: Keys, dead: str) -> None:
    made = killable()
    made[dead].kill()
    made.token.write("data", DATA)
    assert tool(made.token, "--list-objects").stdout.count("label:") == 6
    mechanism = ("--mechanism", "SHA256-RSA-PKCS", "--id", keys.rsa.id, "--input-file", "data")
    tool(made.token, "--sign", *mechanism, "--output-file", "signature")
    keys.rsa.verify(made.token.read("signature"))
    valid = tool(made.token, "--verify", *mechanism, "--signature-file", "signature")
    assert "Signature is valid" in valid.stdout
