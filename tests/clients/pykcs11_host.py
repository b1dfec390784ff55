"""A Python program that signs with PyKCS11: for each line it reads, one signature of each key, in hexadecimal."""

import sys
from hashlib import sha256

import PyKCS11
from PyKCS11 import LowLevel as Low

module, label, pin, data = sys.argv[1:]

library = PyKCS11.PyKCS11Lib()
library.load(module)
slots = [
    slot
    for slot in library.getSlotList(tokenPresent=True)
    if library.getTokenInfo(slot).label.strip() == label
]
session = library.openSession(slots[0])
session.login(pin)
keys = {}
for key in session.findObjects([(Low.CKA_CLASS, Low.CKO_PRIVATE_KEY)]):
    (name,) = session.getAttributeValue(key, [Low.CKA_LABEL])
    (public,) = session.findObjects([(Low.CKA_CLASS, Low.CKO_PUBLIC_KEY), (Low.CKA_LABEL, name)])
    keys[name] = key, public
print(" ".join(sorted(keys)), flush=True)

for _ in sys.stdin:
    words = []
    for name, (key, public) in sorted(keys.items()):
        mechanism, message = PyKCS11.Mechanism(Low.CKM_SHA256_RSA_PKCS), data.encode()
        if name == "eckey":
            mechanism, message = PyKCS11.Mechanism(Low.CKM_ECDSA), sha256(message).digest()
        signature = session.sign(key, message, mechanism)
        if not session.verify(public, message, signature, mechanism):
            sys.exit(f"{name}: does not verify")
        words.append(f"{name}={bytes(signature).hex()}")
    print(" ".join(words), flush=True)

session.logout()
session.closeSession()
