"""Parameters of mechanisms, asked for one field after the other."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from ctypes import c_ubyte, c_ulong, c_void_p

from pkcs11_ha import ck
from pkcs11_ha.cli.menu.attributes import ValueForm, mechanism_name, octets
from pkcs11_ha.cli.menu.client import Mechanism, buffer, value_bytes
from pkcs11_ha.cli.menu.desk import Desk, Session, number
from pkcs11_ha.cli.menu.dialogue import NotDone
from pkcs11_ha.core import der
from pkcs11_ha.spec.mechanisms import BYTES, MECHANISMS

Made = bytes | ctypes.Structure | None

_BLOCK_BYTES = 16
_OCTET_STRING = 0x04
_P_BYTES = ctypes.POINTER(ctypes.c_char)


class _Ctr(ctypes.Structure):
    _fields_ = (("bits", c_ulong), ("block", c_ubyte * 16))


class _Gcm(ctypes.Structure):
    _fields_ = (
        *(("iv", _P_BYTES), ("iv_size", c_ulong), ("iv_bits", c_ulong)),
        *(("aad", _P_BYTES), ("aad_size", c_ulong), ("tag_bits", c_ulong)),
    )


class _Ccm(ctypes.Structure):
    _fields_ = (
        *(("data_size", c_ulong), ("nonce", _P_BYTES), ("nonce_size", c_ulong)),
        *(("aad", _P_BYTES), ("aad_size", c_ulong), ("mac_size", c_ulong)),
    )


class _Pss(ctypes.Structure):
    _fields_ = (("hash", c_ulong), ("mgf", c_ulong), ("salt", c_ulong))


class _Oaep(ctypes.Structure):
    _fields_ = (
        *(("hash", c_ulong), ("mgf", c_ulong), ("source", c_ulong)),
        *(("label", _P_BYTES), ("label_size", c_ulong)),
    )


class _Ecdh(ctypes.Structure):
    _fields_ = (
        *(("kdf", c_ulong), ("shared_size", c_ulong), ("shared", _P_BYTES)),
        *(("point_size", c_ulong), ("point", _P_BYTES)),
    )


class _String(ctypes.Structure):
    _fields_ = (("data", _P_BYTES), ("size", c_ulong))


class _AesCbcData(ctypes.Structure):
    _fields_ = (("iv", c_ubyte * 16), ("data", _P_BYTES), ("size", c_ulong))


class _DesCbcData(ctypes.Structure):
    _fields_ = (("iv", c_ubyte * 8), ("data", _P_BYTES), ("size", c_ulong))


class _Hkdf(ctypes.Structure):
    _fields_ = (
        *(("extract", c_ubyte), ("expand", c_ubyte), ("hash", c_ulong)),
        *(("salt_type", c_ulong), ("salt", _P_BYTES), ("salt_size", c_ulong), ("salt_key", c_ulong)),
        *(("info", _P_BYTES), ("info_size", c_ulong)),
    )


class Pbkd2(ctypes.Structure):
    """CK_PKCS5_PBKD2_PARAMS2"""

    _fields_ = (
        *(("salt_source", c_ulong), ("salt", _P_BYTES), ("salt_size", c_ulong), ("iterations", c_ulong)),
        *(("prf", c_ulong), ("prf_data", c_void_p), ("prf_data_size", c_ulong)),
        *(("password", _P_BYTES), ("password_size", c_ulong)),
    )


# Hash, CKM of it, CKG of its mask generation function, its size.
_HASHES: dict[str, tuple[int, int, int]] = {
    "SHA1": (ck.CKM_SHA_1, ck.CKG_MGF1_SHA1, 20),
    "SHA224": (ck.CKM_SHA224, ck.CKG_MGF1_SHA224, 28),
    "SHA256": (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, 32),
    "SHA384": (ck.CKM_SHA384, ck.CKG_MGF1_SHA384, 48),
    "SHA512": (ck.CKM_SHA512, ck.CKG_MGF1_SHA512, 64),
    "SHA3_224": (ck.CKM_SHA3_224, ck.CKG_MGF1_SHA3_224, 28),
    "SHA3_256": (ck.CKM_SHA3_256, ck.CKG_MGF1_SHA3_256, 32),
    "SHA3_384": (ck.CKM_SHA3_384, ck.CKG_MGF1_SHA3_384, 48),
    "SHA3_512": (ck.CKM_SHA3_512, ck.CKG_MGF1_SHA3_512, 64),
}


def gcm(iv: bytes, aad: bytes, tag_bits: int) -> ctypes.Structure:
    """CK_GCM_PARAMS"""
    return _Gcm(buffer(iv), len(iv), len(iv) * 8, buffer(aad), len(aad), tag_bits)


def ctr(block: bytes) -> ctypes.Structure:
    """CK_AES_CTR_PARAMS, all of the block counting."""
    return _Ctr(128, (c_ubyte * 16)(*block))


def ecdh(point: bytes) -> ctypes.Structure:
    """CK_ECDH1_DERIVE_PARAMS without a key derivation function."""
    return _Ecdh(ck.CKD_NULL, 0, None, len(point), buffer(point))


def pss(name: str, salt: int | None = None) -> ctypes.Structure:
    """CK_RSA_PKCS_PSS_PARAMS; the salt is as long as the hash unless it is said."""
    algorithm, mgf, size = _HASHES[name]
    return _Pss(algorithm, mgf, size if salt is None else salt)


def oaep(name: str, label: bytes) -> ctypes.Structure:
    """CK_RSA_PKCS_OAEP_PARAMS"""
    algorithm, mgf, _ = _HASHES[name]
    return _Oaep(algorithm, mgf, ck.CKZ_DATA_SPECIFIED, buffer(label) if label else None, len(label))


class Asking:
    """Asks for the parameter of one mechanism; `fresh` is a use that begins something, as an encryption does."""

    def __init__(self, desk: Desk, session: Session, mechanism: int, *, fresh: bool) -> None:
        self._desk, self._session, self._fresh = desk, session, fresh
        self._number, self._name = mechanism, mechanism_name(mechanism)
        self._used = desk.used.setdefault(mechanism, {})

    def mechanism(self) -> Mechanism:
        """The mechanism with its parameter; raises NotDone for one that is not asked for here."""
        structure = MECHANISMS.get(self._name)
        if structure is None:
            return Mechanism(self._number)
        form = _FORMS.get(structure)
        if form is None:
            raise NotDone(f"{self._name} wants a {structure}, which this menu cannot ask for")
        return Mechanism(self._number, form(self))

    def _bytes(self, what: str, size: int | None, default: bytes | None) -> bytes:
        """A field in hexadecimal; what was used last time is the default where something is undone or checked."""

        def read(text: str) -> bytes:
            data = os.urandom(size) if text == "random" and size else octets(text)
            if size is not None and len(data) != size:
                raise ValueForm(f"{len(data)} bytes, not {size}")
            return data

        known = self._used.get(what)
        if known is not None and not self._fresh:
            shown = known.hex()
        elif default is None:
            shown = "random"
        else:
            shown = default.hex()
        data = self._desk.dialogue.ask(f"{what} (hexadecimal)", read, shown)
        if shown == "random":
            self._desk.say(f"  {what}: {data.hex()}")
        self._used[what] = data
        return data

    def _size(self, what: str, default: int) -> int:
        return self._desk.dialogue.ask(what, number, str(default))

    def _hash(self, default: str) -> str:
        named = re.search(r"(SHA3_\d+|SHA\d+)_RSA", self._name)
        if named:
            return named[1]

        def read(text: str) -> str:
            word = text.upper().replace("-", "_").replace("SHA_1", "SHA1")
            if word not in _HASHES:
                raise ValueForm(f"{text!r} is none of {', '.join(_HASHES)}")
            return word

        return self._desk.dialogue.ask("Hash", read, default)

    # ---- one for each structure

    def plain(self) -> Made:
        """A length, an IV or a public value."""
        if self._name.endswith("_GENERAL"):
            return value_bytes(self._size("Length of the MAC in bytes", 8))
        if self._name == "CKM_EXTRACT_KEY_FROM_KEY":
            return value_bytes(self._size("First bit", 0))
        if self._name == "CKM_DH_PKCS_DERIVE":
            return self._bytes("Public value of the other", None, b"")
        if "KEY_WRAP" in self._name:
            return self._bytes("IV, or nothing for the standard's", None, b"") or None
        small = re.search(r"_DES|BLOWFISH|GOST", self._name)
        return self._bytes("IV", 8 if small else _BLOCK_BYTES, None)

    def counter(self) -> Made:
        """CK_AES_CTR_PARAMS and its kin"""
        return ctr(self._bytes("Counter block", _BLOCK_BYTES, None))

    def gcm(self) -> Made:
        """CK_GCM_PARAMS"""
        iv = self._bytes("IV", 12, None)
        aad = self._bytes("Additional data, or nothing", None, b"")
        return gcm(iv, aad, self._size("Bits of the tag", 128))

    def ccm(self) -> Made:
        """CK_CCM_PARAMS"""
        size = self._size("Bytes of the plaintext", len(self._desk.result))
        nonce = self._bytes("Nonce", 12, None)
        aad = self._bytes("Additional data, or nothing", None, b"")
        mac = self._size("Bytes of the MAC", 16)
        return _Ccm(size, buffer(nonce), len(nonce), buffer(aad), len(aad), mac)

    def pss(self) -> Made:
        """CK_RSA_PKCS_PSS_PARAMS"""
        name = self._hash("SHA256")
        return pss(name, self._size("Bytes of the salt", _HASHES[name][2]))

    def oaep(self) -> Made:
        """CK_RSA_PKCS_OAEP_PARAMS"""
        return oaep(self._hash("SHA1"), self._bytes("OAEP label, or nothing", None, b""))

    def eddsa(self) -> Made:
        """CK_EDDSA_PARAMS: none, which is Ed25519 or Ed448 as the key is."""
        return None

    def ecdh(self) -> Made:
        """CK_ECDH1_DERIVE_PARAMS"""

        def read(text: str) -> bytes:
            if text.startswith("0x"):
                return octets(text)
            key = self._desk.object_of(self._session, text, {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY})
            point = self._desk.client.attribute(self._session.handle, key, ck.CKA_EC_POINT)
            return der.element(point, _OCTET_STRING) or point

        return ecdh(
            self._desk.dialogue.ask("Public key of the other (handle, label, or its point as 0xHEX)", read)
        )

    def string(self) -> Made:
        """CK_KEY_DERIVATION_STRING_DATA"""
        data = self._desk.data("Data")
        return _String(buffer(data), len(data))

    def other_key(self) -> Made:
        """CK_OBJECT_HANDLE"""
        return value_bytes(self._desk.object(self._session, "Other key"))

    def aes_data(self) -> Made:
        """CK_AES_CBC_ENCRYPT_DATA_PARAMS"""
        iv, data = self._bytes("IV", 16, None), self._desk.data("Data")
        return _AesCbcData((c_ubyte * 16)(*iv), buffer(data), len(data))

    def des_data(self) -> Made:
        """CK_DES_CBC_ENCRYPT_DATA_PARAMS"""
        iv, data = self._bytes("IV", 8, None), self._desk.data("Data")
        return _DesCbcData((c_ubyte * 8)(*iv), buffer(data), len(data))

    def hkdf(self) -> Made:
        """CK_HKDF_PARAMS"""
        algorithm = _HASHES[self._hash("SHA256")][0]
        salt = self._bytes("Salt, or nothing", None, b"")
        info = self._bytes("Info, or nothing", None, b"")
        kind = ck.CKF_HKDF_SALT_DATA if salt else ck.CKF_HKDF_SALT_NULL
        return _Hkdf(1, 1, algorithm, kind, buffer(salt), len(salt), 0, buffer(info), len(info))


_FORMS: dict[str, Callable[[Asking], Made]] = {
    BYTES: Asking.plain,
    "CK_AES_CTR_PARAMS": Asking.counter,
    "CK_CAMELLIA_CTR_PARAMS": Asking.counter,
    "CK_GCM_PARAMS": Asking.gcm,
    "CK_CCM_PARAMS": Asking.ccm,
    "CK_RSA_PKCS_PSS_PARAMS": Asking.pss,
    "CK_RSA_PKCS_OAEP_PARAMS": Asking.oaep,
    "CK_EDDSA_PARAMS": Asking.eddsa,
    "CK_SIGN_ADDITIONAL_CONTEXT": Asking.eddsa,
    "CK_ECDH1_DERIVE_PARAMS": Asking.ecdh,
    "CK_KEY_DERIVATION_STRING_DATA": Asking.string,
    "CK_OBJECT_HANDLE": Asking.other_key,
    "CK_AES_CBC_ENCRYPT_DATA_PARAMS": Asking.aes_data,
    "CK_DES_CBC_ENCRYPT_DATA_PARAMS": Asking.des_data,
    "CK_HKDF_PARAMS": Asking.hkdf,
}
