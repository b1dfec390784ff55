"""A Python program that signs with python-pkcs11: for each line it reads, one signature of each key, in hexadecimal."""

import sys
from hashlib import sha256

import pkcs11
from pkcs11 import Attribute, Mechanism, ObjectClass
from pkcs11.types import SignMixin, VerifyMixin

module, token_label, pin, data = sys.argv[1:]

with pkcs11.lib(module).get_token(token_label=token_label).open(user_pin=pin) as session:
    keys: dict[str, tuple[SignMixin, VerifyMixin]] = {}
    for key in list(session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY})):
        label = key[Attribute.LABEL]
        public = session.get_key(object_class=ObjectClass.PUBLIC_KEY, label=label)
        assert isinstance(key, SignMixin)
        assert isinstance(public, VerifyMixin)
        keys[label] = key, public
    print(" ".join(sorted(keys)), flush=True)
    for _ in sys.stdin:
        words = []
        for name, (private, verifier) in sorted(keys.items()):
            mechanism, message = Mechanism.SHA256_RSA_PKCS, data.encode()
            if name == "eckey":
                mechanism, message = Mechanism.ECDSA, sha256(message).digest()
            signature = private.sign(message, mechanism=mechanism)
            if not verifier.verify(message, signature, mechanism=mechanism):
                sys.exit(f"{name}: does not verify")
            words.append(f"{name}={signature.hex()}")
        print(" ".join(words), flush=True)
