"""Parameters of mechanisms: which structure each takes, and where buffers and object handles are inside it.

The data plane needs it to repeat an Init on another member (a deep copy) and to give a member its own handles.
A mechanism that is not here passes through as it is; an operation begun with a parameter of its own is then
never repeated.  Sources: PKCS#11 2.40 to 3.2, mechanism chapters ("current mechanisms", "historical mechanisms").
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """A parameter structure.

    `buffers`: (pointer, length in bytes) pairs of fields.  `handles`: fields with an object handle.
    `made`: (pointer field, structure it points to, handle fields there) that the member fills with new objects.
    `kept`: False where the member writes into the structure's buffers, or where a buffer's length is not a field.
    """

    buffers: tuple[tuple[str, str], ...] = ()
    handles: tuple[str, ...] = ()
    made: tuple[str, str, tuple[str, ...]] | None = None
    kept: bool = True


_RANDOM = (
    ("RandomInfo.pClientRandom", "RandomInfo.ulClientRandomLen"),
    ("RandomInfo.pServerRandom", "RandomInfo.ulServerRandomLen"),
)
_DH2 = (
    ("pOtherInfo", "ulOtherInfoLen"),
    ("pPublicData", "ulPublicDataLen"),
    ("pPublicData2", "ulPublicDataLen2"),
)
_ECDH2 = (
    ("pSharedData", "ulSharedDataLen"),
    ("pPublicData", "ulPublicDataLen"),
    ("pPublicData2", "ulPublicDataLen2"),
)
_KEY_MAT = (
    "pReturnedKeyMaterial",
    "CK_SSL3_KEY_MAT_OUT",
    ("hClientMacSecret", "hServerMacSecret", "hClientKey", "hServerKey"),
)

PARAMETERS: dict[str, Parameter] = {
    # Flat: a copy of the bytes is a copy of the whole.
    "CK_OBJECT_HANDLE": Parameter(handles=("",)),
    "CK_RSA_PKCS_PSS_PARAMS": Parameter(),
    "CK_AES_CTR_PARAMS": Parameter(),
    "CK_CAMELLIA_CTR_PARAMS": Parameter(),
    "CK_RC2_CBC_PARAMS": Parameter(),
    "CK_RC2_MAC_GENERAL_PARAMS": Parameter(),
    "CK_RC5_PARAMS": Parameter(),
    "CK_RC5_MAC_GENERAL_PARAMS": Parameter(),
    "CK_TLS_MAC_PARAMS": Parameter(),
    "CK_XEDDSA_PARAMS": Parameter(),
    # With buffers.
    "CK_RSA_PKCS_OAEP_PARAMS": Parameter((("pSourceData", "ulSourceDataLen"),)),
    "CK_EDDSA_PARAMS": Parameter((("pContextData", "ulContextDataLen"),)),
    "CK_SIGN_ADDITIONAL_CONTEXT": Parameter((("pContext", "ulContextLen"),)),
    "CK_HASH_SIGN_ADDITIONAL_CONTEXT": Parameter((("pContext", "ulContextLen"),)),
    "CK_GCM_PARAMS": Parameter((("pIv", "ulIvLen"), ("pAAD", "ulAADLen"))),
    "CK_CCM_PARAMS": Parameter((("pNonce", "ulNonceLen"), ("pAAD", "ulAADLen"))),
    "CK_SALSA20_CHACHA20_POLY1305_PARAMS": Parameter((("pNonce", "ulNonceLen"), ("pAAD", "ulAADLen"))),
    "CK_RC5_CBC_PARAMS": Parameter((("pIv", "ulIvLen"),)),
    "CK_KEY_DERIVATION_STRING_DATA": Parameter((("pData", "ulLen"),)),
    "CK_DES_CBC_ENCRYPT_DATA_PARAMS": Parameter((("pData", "length"),)),
    "CK_AES_CBC_ENCRYPT_DATA_PARAMS": Parameter((("pData", "length"),)),
    "CK_CAMELLIA_CBC_ENCRYPT_DATA_PARAMS": Parameter((("pData", "length"),)),
    "CK_ARIA_CBC_ENCRYPT_DATA_PARAMS": Parameter((("pData", "length"),)),
    "CK_SEED_CBC_ENCRYPT_DATA_PARAMS": Parameter((("pData", "length"),)),
    "CK_ECDH1_DERIVE_PARAMS": Parameter(
        (("pSharedData", "ulSharedDataLen"), ("pPublicData", "ulPublicDataLen"))
    ),
    "CK_ECDH_AES_KEY_WRAP_PARAMS": Parameter((("pSharedData", "ulSharedDataLen"),)),
    "CK_X9_42_DH1_DERIVE_PARAMS": Parameter(
        (("pOtherInfo", "ulOtherInfoLen"), ("pPublicData", "ulPublicDataLen"))
    ),
    "CK_GOSTR3410_DERIVE_PARAMS": Parameter((("pPublicData", "ulPublicDataLen"), ("pUKM", "ulUKMLen"))),
    # With handles.
    "CK_ECMQV_DERIVE_PARAMS": Parameter(_ECDH2, ("hPrivateData", "publicKey")),
    "CK_X9_42_DH2_DERIVE_PARAMS": Parameter(_DH2, ("hPrivateData",)),
    "CK_X9_42_MQV_DERIVE_PARAMS": Parameter(_DH2, ("hPrivateData", "publicKey")),
    "CK_GOSTR3410_KEY_WRAP_PARAMS": Parameter(
        (("pWrapOID", "ulWrapOIDLen"), ("pUKM", "ulUKMLen")), ("hKey",)
    ),
    "CK_HKDF_PARAMS": Parameter((("pSalt", "ulSaltLen"), ("pInfo", "ulInfoLen")), ("hSaltKey",)),
    "CK_KIP_PARAMS": Parameter((("pSeed", "ulSeedLen"),), ("hKey",), kept=False),
    "CK_CMS_SIG_PARAMS": Parameter(
        (
            ("pRequestedAttributes", "ulRequestedAttributesLen"),
            ("pRequiredAttributes", "ulRequiredAttributesLen"),
        ),
        ("certificateHandle",),
        kept=False,
    ),
    "CK_IKE2_PRF_PLUS_DERIVE_PARAMS": Parameter((("pSeedData", "ulSeedDataLen"),), ("hSeedKey",)),
    "CK_IKE_PRF_DERIVE_PARAMS": Parameter((("pNi", "ulNiLen"), ("pNr", "ulNrLen")), ("hNewKey",)),
    "CK_IKE1_PRF_DERIVE_PARAMS": Parameter(
        (("pCKYi", "ulCKYiLen"), ("pCKYr", "ulCKYrLen")), ("hKeygxy", "hPrevKey")
    ),
    "CK_IKE1_EXTENDED_DERIVE_PARAMS": Parameter((("pExtraData", "ulExtraDataLen"),), ("hKeygxy",)),
    "CK_X3DH_INITIATE_PARAMS": Parameter(
        handles=("pPeer_identity", "pPeer_prekey", "pOwn_identity", "pOwn_ephemeral"), kept=False
    ),
    "CK_X3DH_RESPOND_PARAMS": Parameter(handles=("pInitiator_identity",), kept=False),
    "CK_X2RATCHET_INITIALIZE_PARAMS": Parameter(
        handles=("peer_public_prekey", "peer_public_identity", "own_public_identity"), kept=False
    ),
    "CK_X2RATCHET_RESPOND_PARAMS": Parameter(
        handles=("own_prekey", "initiator_identity", "own_public_identity"), kept=False
    ),
    # Filled in by the member.
    "CK_SSL3_KEY_MAT_PARAMS": Parameter(_RANDOM, made=_KEY_MAT, kept=False),
    "CK_TLS12_KEY_MAT_PARAMS": Parameter(_RANDOM, made=_KEY_MAT, kept=False),
    "CK_WTLS_KEY_MAT_PARAMS": Parameter(
        _RANDOM, made=("pReturnedKeyMaterial", "CK_WTLS_KEY_MAT_OUT", ("hMacSecret", "hKey")), kept=False
    ),
}

# A parameter that is plain bytes (an IV, a length) has no structure: the empty name.
BYTES = ""


def _each(structure: str, names: str) -> dict[str, str]:
    return {f"CKM_{name}": structure for name in names.split()}


MECHANISMS: dict[str, str] = {
    **_each(
        BYTES,
        "DES_CBC DES_CBC_PAD DES_OFB64 DES_OFB8 DES_CFB64 DES_CFB8 DES_MAC_GENERAL DES3_CBC DES3_CBC_PAD"
        " DES3_MAC_GENERAL DES3_CMAC_GENERAL AES_CBC AES_CBC_PAD AES_CTS AES_OFB AES_CFB1 AES_CFB8 AES_CFB64"
        " AES_CFB128 AES_XTS AES_MAC_GENERAL AES_CMAC_GENERAL AES_KEY_WRAP AES_KEY_WRAP_PAD AES_KEY_WRAP_KWP"
        " AES_KEY_WRAP_PKCS7 AES_GMAC CAMELLIA_CBC CAMELLIA_CBC_PAD CAMELLIA_MAC_GENERAL ARIA_CBC ARIA_CBC_PAD"
        " ARIA_MAC_GENERAL SEED_CBC SEED_CBC_PAD SEED_MAC_GENERAL BLOWFISH_CBC BLOWFISH_CBC_PAD TWOFISH_CBC"
        " TWOFISH_CBC_PAD MD5_HMAC_GENERAL SHA_1_HMAC_GENERAL SHA224_HMAC_GENERAL SHA256_HMAC_GENERAL"
        " SHA384_HMAC_GENERAL SHA512_HMAC_GENERAL SHA512_224_HMAC_GENERAL SHA512_256_HMAC_GENERAL"
        " SHA3_224_HMAC_GENERAL SHA3_256_HMAC_GENERAL SHA3_384_HMAC_GENERAL SHA3_512_HMAC_GENERAL DH_PKCS_DERIVE"
        " EXTRACT_KEY_FROM_KEY GOST28147 GOSTR3410_WITH_GOSTR3411 GOSTR3411_HMAC",
    ),
    **_each("CK_OBJECT_HANDLE", "CONCATENATE_BASE_AND_KEY"),
    **_each(
        "CK_KEY_DERIVATION_STRING_DATA",
        "CONCATENATE_BASE_AND_DATA CONCATENATE_DATA_AND_BASE XOR_BASE_AND_DATA DES_ECB_ENCRYPT_DATA"
        " DES3_ECB_ENCRYPT_DATA AES_ECB_ENCRYPT_DATA CAMELLIA_ECB_ENCRYPT_DATA ARIA_ECB_ENCRYPT_DATA"
        " SEED_ECB_ENCRYPT_DATA",
    ),
    **_each(
        "CK_RSA_PKCS_PSS_PARAMS",
        "RSA_PKCS_PSS SHA1_RSA_PKCS_PSS SHA224_RSA_PKCS_PSS SHA256_RSA_PKCS_PSS SHA384_RSA_PKCS_PSS"
        " SHA512_RSA_PKCS_PSS SHA3_224_RSA_PKCS_PSS SHA3_256_RSA_PKCS_PSS SHA3_384_RSA_PKCS_PSS"
        " SHA3_512_RSA_PKCS_PSS",
    ),
    **_each("CK_RSA_PKCS_OAEP_PARAMS", "RSA_PKCS_OAEP RSA_PKCS_OAEP_TPM_1_1"),
    **_each("CK_EDDSA_PARAMS", "EDDSA"),
    **_each("CK_XEDDSA_PARAMS", "XEDDSA"),
    **_each(
        "CK_SIGN_ADDITIONAL_CONTEXT",
        "ML_DSA SLH_DSA HASH_ML_DSA_SHA224 HASH_ML_DSA_SHA256 HASH_ML_DSA_SHA384 HASH_ML_DSA_SHA512"
        " HASH_ML_DSA_SHA3_224 HASH_ML_DSA_SHA3_256 HASH_ML_DSA_SHA3_384 HASH_ML_DSA_SHA3_512"
        " HASH_ML_DSA_SHAKE128 HASH_ML_DSA_SHAKE256 HASH_SLH_DSA_SHA224 HASH_SLH_DSA_SHA256 HASH_SLH_DSA_SHA384"
        " HASH_SLH_DSA_SHA512 HASH_SLH_DSA_SHA3_224 HASH_SLH_DSA_SHA3_256 HASH_SLH_DSA_SHA3_384"
        " HASH_SLH_DSA_SHA3_512 HASH_SLH_DSA_SHAKE128 HASH_SLH_DSA_SHAKE256",
    ),
    **_each("CK_HASH_SIGN_ADDITIONAL_CONTEXT", "HASH_ML_DSA HASH_SLH_DSA"),
    **_each("CK_AES_CTR_PARAMS", "AES_CTR"),
    **_each("CK_CAMELLIA_CTR_PARAMS", "CAMELLIA_CTR"),
    **_each("CK_GCM_PARAMS", "AES_GCM"),
    **_each("CK_CCM_PARAMS", "AES_CCM"),
    **_each("CK_SALSA20_CHACHA20_POLY1305_PARAMS", "CHACHA20_POLY1305 SALSA20_POLY1305"),
    **_each("CK_RC2_CBC_PARAMS", "RC2_CBC RC2_CBC_PAD"),
    **_each("CK_RC2_MAC_GENERAL_PARAMS", "RC2_MAC_GENERAL"),
    **_each("CK_RC5_PARAMS", "RC5_ECB RC5_MAC"),
    **_each("CK_RC5_CBC_PARAMS", "RC5_CBC RC5_CBC_PAD"),
    **_each("CK_RC5_MAC_GENERAL_PARAMS", "RC5_MAC_GENERAL"),
    **_each("CK_TLS_MAC_PARAMS", "TLS_MAC TLS12_MAC"),
    **_each("CK_DES_CBC_ENCRYPT_DATA_PARAMS", "DES_CBC_ENCRYPT_DATA DES3_CBC_ENCRYPT_DATA"),
    **_each("CK_AES_CBC_ENCRYPT_DATA_PARAMS", "AES_CBC_ENCRYPT_DATA"),
    **_each("CK_CAMELLIA_CBC_ENCRYPT_DATA_PARAMS", "CAMELLIA_CBC_ENCRYPT_DATA"),
    **_each("CK_ARIA_CBC_ENCRYPT_DATA_PARAMS", "ARIA_CBC_ENCRYPT_DATA"),
    **_each("CK_SEED_CBC_ENCRYPT_DATA_PARAMS", "SEED_CBC_ENCRYPT_DATA"),
    **_each("CK_ECDH1_DERIVE_PARAMS", "ECDH1_DERIVE ECDH1_COFACTOR_DERIVE"),
    **_each("CK_ECDH_AES_KEY_WRAP_PARAMS", "ECDH_AES_KEY_WRAP ECDH_X_AES_KEY_WRAP ECDH_COF_AES_KEY_WRAP"),
    **_each("CK_ECMQV_DERIVE_PARAMS", "ECMQV_DERIVE"),
    **_each("CK_X9_42_DH1_DERIVE_PARAMS", "X9_42_DH_DERIVE"),
    **_each("CK_X9_42_DH2_DERIVE_PARAMS", "X9_42_DH_HYBRID_DERIVE"),
    **_each("CK_X9_42_MQV_DERIVE_PARAMS", "X9_42_MQV_DERIVE"),
    **_each("CK_GOSTR3410_DERIVE_PARAMS", "GOSTR3410_DERIVE"),
    **_each("CK_GOSTR3410_KEY_WRAP_PARAMS", "GOSTR3410_KEY_WRAP"),
    **_each("CK_HKDF_PARAMS", "HKDF_DERIVE HKDF_DATA"),
    **_each("CK_KIP_PARAMS", "KIP_DERIVE KIP_WRAP KIP_MAC"),
    **_each("CK_CMS_SIG_PARAMS", "CMS_SIG"),
    **_each("CK_IKE2_PRF_PLUS_DERIVE_PARAMS", "IKE2_PRF_PLUS_DERIVE"),
    **_each("CK_IKE_PRF_DERIVE_PARAMS", "IKE_PRF_DERIVE"),
    **_each("CK_IKE1_PRF_DERIVE_PARAMS", "IKE1_PRF_DERIVE"),
    **_each("CK_IKE1_EXTENDED_DERIVE_PARAMS", "IKE1_EXTENDED_DERIVE"),
    **_each("CK_X3DH_INITIATE_PARAMS", "X3DH_INITIALIZE"),
    **_each("CK_X3DH_RESPOND_PARAMS", "X3DH_RESPOND"),
    **_each("CK_X2RATCHET_INITIALIZE_PARAMS", "X2RATCHET_INITIALIZE"),
    **_each("CK_X2RATCHET_RESPOND_PARAMS", "X2RATCHET_RESPOND"),
    **_each("CK_SSL3_KEY_MAT_PARAMS", "SSL3_KEY_AND_MAC_DERIVE TLS_KEY_AND_MAC_DERIVE"),
    **_each("CK_TLS12_KEY_MAT_PARAMS", "TLS12_KEY_AND_MAC_DERIVE TLS12_KEY_SAFE_DERIVE"),
    **_each("CK_WTLS_KEY_MAT_PARAMS", "WTLS_SERVER_KEY_AND_MAC_DERIVE WTLS_CLIENT_KEY_AND_MAC_DERIVE"),
}

# Their parameter holds arrays that may hold handles: the data plane looks, and refuses what it cannot translate.
KEY_DERIVATION_ARRAYS: dict[str, str] = {
    "CKM_SP800_108_COUNTER_KDF": "CK_SP800_108_KDF_PARAMS",
    "CKM_SP800_108_DOUBLE_PIPELINE_KDF": "CK_SP800_108_KDF_PARAMS",
    "CKM_SP800_108_FEEDBACK_KDF": "CK_SP800_108_FEEDBACK_KDF_PARAMS",
}


class Unit(enum.Enum):
    """What a length counts."""

    BYTES = "bytes"
    BITS = "bits"
    NONCE = "nonce"  # bytes or, above 24, bits: the standard says these, vendors count those, and no nonce is as long


@dataclass(frozen=True)
class Message:
    """The parameter of a single message (PKCS#11 3.0).

    `buffers`: (pointer, field with its length or the length, unit), which a member reads and writes.
    `generator`: field with the generator of the IV.  `tag`: the pointer to what comes with the last part.
    """

    buffers: tuple[tuple[str, str | int, Unit], ...]
    generator: str | None = None
    tag: str = "pTag"


MESSAGE_PARAMETERS: dict[str, Message] = {
    "CK_GCM_MESSAGE_PARAMS": Message(
        (("pIv", "ulIvLen", Unit.BYTES), ("pTag", "ulTagBits", Unit.BITS)), "ivGenerator"
    ),
    "CK_CCM_MESSAGE_PARAMS": Message(
        (("pNonce", "ulNonceLen", Unit.BYTES), ("pMAC", "ulMACLen", Unit.BYTES)), "nonceGenerator", "pMAC"
    ),
    "CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS": Message(
        (("pNonce", "ulNonceLen", Unit.NONCE), ("pTag", 16, Unit.BYTES))
    ),
}

# By the mechanism of the operation.
MESSAGES: dict[str, str] = {
    "CKM_AES_GCM": "CK_GCM_MESSAGE_PARAMS",
    "CKM_AES_CCM": "CK_CCM_MESSAGE_PARAMS",
    "CKM_CHACHA20_POLY1305": "CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS",
    "CKM_SALSA20_POLY1305": "CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS",
}
