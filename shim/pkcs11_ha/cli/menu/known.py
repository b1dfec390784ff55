"""Keys and answers that everybody knows, from RFCs and NIST: to be tried, never to be used.

- RSA-2048: RFC 9500, testRSA2048.  P-256: RFC 6979, A.2.5, with its signature of "sample"; RFC 5903, 8.1, for ECDH.
- Ed25519: RFC 8032, 7.1, test 2.  AES: NIST SP 800-38A, F.1, F.2 and F.5; RFC 4493 (CMAC); RFC 3394, 4.1 (key wrap).
- AES-GCM: test case 2 of its specification (McGrew and Viega).  HMAC: the key of RFC 4231, test case 6.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkcs11_ha import ck
from pkcs11_ha.cli.menu.client import Template

_hex = bytes.fromhex

P256 = _hex("06082a8648ce3d030107")
ED25519 = _hex("130c656477617264733235353139")  # PrintableString "edwards25519"

_MODULUS = _hex(
    "b0f9e81943a7ae9892aade17ca7c40f8744fed2f8148e6c8eaa27b7d001548fb5192ab28b56c5060b118ccd131e59487"
    "4c6ca989b56c27296f09fb93a034df32e97c6ff0998cfd8e6f42dda58acd1fa97986f144f3d154d67650175e6854b3a9"
    "52003bc06887b8455ac2b19f7b2f76504ebc98ec945571b07892150ddc6a74ca0fbcd35497ce81534daf9418844b13ae"
    "a31f9d5a6b9557bbdf619efd4e887f2d42b8dd8bc987eae1bf89cab85ee21e356305df6c07a8838e3ef41c595dcce43d"
    "afc49123ef4d8abba93d3905e4028d7ba91484a27596e07b4b6ed992f077b524d3dcfe7ddd5549be7cce8da035cfa0b3"
    "fb8f9e46f732b2a86b460165c08f5313"
)
_PRIVATE_EXPONENT = _hex(
    "41188b20cfdbdbc2cf1ffe752dcbaa723906352e2615d49dce80597fcf0a05403bef00fa065182f72decfb596f4b0ce8"
    "ff5970baf07a89a519ecc816b2f4ffac5069af1b06bfef7bf6bcd79e4e81c8c5a3a7d9130dc3cfbadae5f6d288f9aee3"
    "f6ff92fae0f81af597bec96ae9fab9402cd5fe41f705bebdb47bb736d3fe6c5a51e0e20732a97b5e46c1cbdb26d74854"
    "c6b6604aed463735ff9076046557caf949bf448895c20432c1e09c014ea75660434f1a0f3be294babc5d530e6a10213f"
    "53b60375fc84a7573f2af1215584f5b4bda6d4e8f9e17a78d97e77b86da4a1846475318a7a10a561014effa23a81ec56"
    "e9e4109def8cb3f797223f7d8d0d4351"
)
_PRIME_1 = _hex(
    "dd105702382f232b3681f53791e22617c7bf4e9acb81ed48daf6d6995da3eab642839aff012d2ea628b90af279fd3e6f"
    "7c93cd80f072f01ff2443b3ee8f24ed469a79613a41bd24020f92fd11059bd1d0f301b5ba7a9d3637ca8d65c1a981541"
    "7d8eab734b0b4f3a2c661d9a1a82f3ac734c40530669ab8e473045a58e65539d"
)
_PRIME_2 = _hex(
    "ccf1e5bb90c8e9781ea75bebf10bc252e11eb023a0260f1887552a56863f4a6421e8c600bf523d6cb1b0adbdd65bfee4"
    "a88a037e3d1a415e5bb95648da5a0ca26b54f4a63948522c3d5f89b94a72efff95134d5940ce45758f30898090895658"
    "8eef575b3e4bc4c368cfe813ee9c252c2b02e0df91f1aa01938d38685d60ba6f"
)
_PUBLIC_EXPONENT = _hex("010001")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _half(value: int) -> bytes:
    return value.to_bytes(len(_PRIME_1), "big")


def rsa_signature(padded: bytes) -> bytes:
    """What the known RSA key makes of a padded block."""
    return pow(_integer(padded), _integer(_PRIVATE_EXPONENT), _integer(_MODULUS)).to_bytes(
        len(_MODULUS), "big"
    )


def pkcs1(digest_info: bytes) -> bytes:
    """EMSA-PKCS1-v1_5 (RFC 8017, 9.2) for the known RSA key."""
    return b"\0\1" + b"\xff" * (len(_MODULUS) - 3 - len(digest_info)) + b"\0" + digest_info


_P256_VALUE = _hex("c9afa9d845ba75166b5c215767b1d6934e50c3db36e89b127b8a622b120f6721")
_P256_POINT = _hex(
    "0460fed4ba255a9d31c961eb74c6356d68c049b8923b61fa6ce669622e60f29fb6"
    "7903fe1008b8bc99a41ae9e95628bc64f2f1b20c2d7e9f5177a3c294d4462299"
)
P256_MESSAGE = b"sample"
P256_SIGNATURE = _hex(
    "efd48b2aacb6a8fd1140dd9cd45e81d69d2c877b56aaf991c34d0ea84eaf3716"
    "f7cb1c942d657c41d436c7a1b6e29f65f3e900dbb9aff4064dc4ab2f843acda8"
)

ECDH_VALUE = _hex("c88f01f510d9ac3f70a292daa2316de544e9aab8afe84049c62a9c57862d1433")
ECDH_POINT = _hex(
    "04d12dfb5289c8d4f81208b70270398c342296970a0bccb74c736fc7554494bf63"
    "56fbf3ca366cc23e8157854c13c58d6aac23f046ada30f8353e74f33039872ab"
)
ECDH_SECRET = _hex("d6840f6b42f6edafd13116e0e12565202fef8e9ece7dce03812464d04b9442de")

_ED25519_VALUE = _hex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
_ED25519_POINT = _hex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
ED25519_MESSAGE = b"\x72"
ED25519_SIGNATURE = _hex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)

AES_KEY = _hex("2b7e151628aed2a6abf7158809cf4f3c")
_AES_256_KEY = _hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
AES_TEXT = _hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
AES_ECB = _hex("3ad77bb40d7a3660a89ecaf32466ef97f5d3d58503b9699de785895a96fdbaaf")
AES_IV = _hex("000102030405060708090a0b0c0d0e0f")
AES_CBC = _hex("7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2")
AES_COUNTER = _hex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
AES_CTR = _hex("874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff")
AES_CMAC = _hex("070a16b46b4d4144f79bdd9dd04a287c")  # of the first block
GCM_KEY, GCM_IV, GCM_TEXT = bytes(16), bytes(12), bytes(16)
GCM_SEALED = _hex("0388dace60b6a392f328c2b971b2fe78ab6e47d42cec13bdf53a67b21257bddf")
WRAP_KEY = _hex("000102030405060708090a0b0c0d0e0f")
WRAP_CONTENT = _hex("00112233445566778899aabbccddeeff")
WRAPPED = _hex("1fa68b0a8112b447aef34bd8fb5a7b829d3e862371d2cfe5")
HMAC_KEY = b"\xaa" * 131
HMAC_TEXT = b"Test Using Larger Than Block-Size Key - Hash Key First"


@dataclass(frozen=True)
class KnownKey:
    """A known key, of one object or of two."""

    source: str
    objects: tuple[Template, ...]


def _secret(key_type: int, value: bytes, uses: tuple[int, ...]) -> Template:
    head = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: key_type}
    return {**head, ck.CKA_VALUE: value, **_OPEN, **dict.fromkeys(uses, True)}


_OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
AES_USES = (
    *(ck.CKA_ENCRYPT, ck.CKA_DECRYPT, ck.CKA_SIGN, ck.CKA_VERIFY, ck.CKA_WRAP, ck.CKA_UNWRAP),
    ck.CKA_DERIVE,
)


def aes(value: bytes) -> Template:
    """An AES key for everything."""
    return _secret(ck.CKK_AES, value, AES_USES)


def generic(value: bytes) -> Template:
    """A generic secret."""
    return _secret(ck.CKK_GENERIC_SECRET, value, (ck.CKA_SIGN, ck.CKA_VERIFY, ck.CKA_DERIVE))


def _private(key_type: int, made: Template, uses: tuple[int, ...]) -> Template:
    head = {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: key_type}
    return {**head, **made, **_OPEN, **dict.fromkeys(uses, True)}


def _public(key_type: int, made: Template, uses: tuple[int, ...]) -> Template:
    head = {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_KEY_TYPE: key_type}
    return {**head, **made, **dict.fromkeys(uses, True)}


def ec_private(value: bytes) -> Template:
    """A private key on P-256."""
    made: Template = {ck.CKA_EC_PARAMS: P256, ck.CKA_VALUE: value}
    return _private(ck.CKK_EC, made, (ck.CKA_SIGN, ck.CKA_DERIVE))


def _octets(point: bytes) -> bytes:
    """An OCTET STRING, as CKA_EC_POINT is."""
    return b"\x04" + bytes([len(point)]) + point


_P, _Q, _D = _integer(_PRIME_1), _integer(_PRIME_2), _integer(_PRIVATE_EXPONENT)
RSA = (
    _public(
        ck.CKK_RSA,
        {ck.CKA_MODULUS: _MODULUS, ck.CKA_PUBLIC_EXPONENT: _PUBLIC_EXPONENT},
        (ck.CKA_VERIFY, ck.CKA_ENCRYPT, ck.CKA_WRAP),
    ),
    _private(
        ck.CKK_RSA,
        {
            ck.CKA_MODULUS: _MODULUS,
            ck.CKA_PUBLIC_EXPONENT: _PUBLIC_EXPONENT,
            ck.CKA_PRIVATE_EXPONENT: _PRIVATE_EXPONENT,
            ck.CKA_PRIME_1: _PRIME_1,
            ck.CKA_PRIME_2: _PRIME_2,
            ck.CKA_EXPONENT_1: _half(_D % (_P - 1)),
            ck.CKA_EXPONENT_2: _half(_D % (_Q - 1)),
            ck.CKA_COEFFICIENT: _half(pow(_Q, -1, _P)),
        },
        (ck.CKA_SIGN, ck.CKA_DECRYPT, ck.CKA_UNWRAP),
    ),
)
EC = (
    _public(ck.CKK_EC, {ck.CKA_EC_PARAMS: P256, ck.CKA_EC_POINT: _octets(_P256_POINT)}, (ck.CKA_VERIFY,)),
    ec_private(_P256_VALUE),
)
EDWARDS = (
    _public(
        ck.CKK_EC_EDWARDS,
        {ck.CKA_EC_PARAMS: ED25519, ck.CKA_EC_POINT: _octets(_ED25519_POINT)},
        (ck.CKA_VERIFY,),
    ),
    _private(ck.CKK_EC_EDWARDS, {ck.CKA_EC_PARAMS: ED25519, ck.CKA_VALUE: _ED25519_VALUE}, (ck.CKA_SIGN,)),
)

KEYS: dict[str, KnownKey] = {
    "aes128": KnownKey("NIST SP 800-38A", (aes(AES_KEY),)),
    "aes256": KnownKey("NIST SP 800-38A", (aes(_AES_256_KEY),)),
    "secret": KnownKey("RFC 4231", (generic(HMAC_KEY),)),
    "rsa2048": KnownKey("RFC 9500", RSA),
    "p256": KnownKey("RFC 6979", EC),
    "ed25519": KnownKey("RFC 8032", EDWARDS),
}
