"""What the tokens hold in the end, read by the vendor's own module, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from demo.members import SoftToken
from tests import p11
from tests.chaos import objects
from tests.chaos.model import Model
from tests.chaos.objects import DIGEST, HIDDEN, Hidden, Thing
from tests.ha.app import bare

# Label of ledger objects of writes that nobody has ended.  A lease that a dead process has left behind is none: who
# wants the lease next clears it away.
_UNDER_WAY = HIDDEN.decode() + "announced"


@dataclass
class Store:
    """What one token holds."""

    name: str
    things: list[Thing] = field(default_factory=list)
    proofs: dict[Thing, bytes] = field(default_factory=dict)
    signatures: dict[Thing, bytes] = field(default_factory=dict)  # of EC keys
    hidden: list[Hidden] = field(default_factory=list)


def read(token: SoftToken) -> Store:
    store = Store(token.label)
    with bare(token) as session:
        for handle in session.find({p11.CKA_TOKEN: True}):
            if objects.is_hidden(session, handle):
                store.hidden.append(objects.read_hidden(session, handle))
                continue
            thing = objects.read(session, handle)
            store.things.append(thing)
            store.proofs[thing] = objects.proof(session, handle, thing.kind)
            if thing.kind == "ec":
                store.signatures[thing] = session.sign(p11.CKM_ECDSA, handle, DIGEST)
    return store


def stir(token: SoftToken) -> None:
    """Write something, so that everybody looks again.

    Of two processes that write to one store at once, SoftHSM lets one miss what the other has written until somebody
    writes the next time (half of the times when both create an object).
    """
    with bare(token) as session:
        session.destroy(session.create({p11.CKA_CLASS: p11.CKO_DATA, p11.CKA_TOKEN: True}))


def complaints(
    model: Model, stores: Sequence[Store], proofs: Mapping[str, str], signatures: Mapping[str, Sequence[str]]
) -> list[str]:
    """`proofs` and `signatures`, by material, are what clients have seen; the model settles on what is held."""
    wrong = [f"{store.name}: {each}" for store in stores for each in half_done(store)]
    wrong += _differences(stores)
    wrong += [f"{stores[0].name}: {each}" for each in model.settle(stores[0].things)]
    materials = {thing: thing.material for thing in model.possible()}
    return wrong + _false_keys(model, stores, proofs) + _false_pairs(materials, stores, signatures)


def half_done(store: Store) -> list[str]:
    """Objects that are there twice, and what a write has left under way."""
    wrong = [f"{count} of {thing}" for thing, count in Counter(store.things).items() if count > 1]
    for hidden in store.hidden:
        if hidden.object_class == p11.CKO_DATA:
            under_way = hidden.label.startswith(_UNDER_WAY)
        else:
            under_way = not hidden.ident.startswith(HIDDEN + b"domain key")
        wrong += [f"left over: {hidden}"] if under_way else []
    return wrong


def _differences(stores: Sequence[Store]) -> list[str]:
    first = stores[0]
    wrong = []
    for other in stores[1:]:
        for have, lack in ((first, other), (other, first)):
            missing = set(have.things) - set(lack.things)
            wrong += [f"{lack.name} has not what {have.name} has: {thing}" for thing in missing]
    return wrong


def _false_keys(model: Model, stores: Sequence[Store], seen: Mapping[str, str]) -> list[str]:
    """Objects whose proof is not the one that their content or key always has."""
    proofs, wrong = {bytes.fromhex(proof): material for material, proof in seen.items()}, []
    known = {material: bytes.fromhex(proof) for material, proof in seen.items()}
    for thing in model.possible():
        for store in stores:
            if thing not in store.proofs:
                continue
            proof = store.proofs[thing]
            if thing.content and thing.kind in ("data", "certificate"):
                known[thing.material] = bytes.fromhex(thing.content)
            if known.setdefault(thing.material, proof) != proof:
                wrong.append(f"{store.name}: another key or content: {thing}")
            if proofs.setdefault(proof, thing.material) != thing.material:
                wrong.append(f"{store.name}: the key or content of another object: {thing}")
    return wrong


def _false_pairs(
    materials: Mapping[Thing, str], stores: Sequence[Store], seen: Mapping[str, Sequence[str]]
) -> list[str]:
    """EC keys whose signatures, and those that clients have seen, the public key of another member refuses."""
    points: dict[str, bytes] = {}
    for store in stores:
        for thing, proof in store.proofs.items():
            if thing.kind == "ec public" and thing in materials:
                points[_pair(materials[thing])] = proof
    wrong = []
    for store in stores:
        for thing, signature in store.signatures.items():
            pair = _pair(materials.get(thing, ""))
            made = [signature, *map(bytes.fromhex, seen.get(pair, ()))]
            if pair in points and not all(_fits(points[pair], each) for each in made):
                wrong.append(f"{store.name}: not of its pair: {thing}")
    return wrong


def _pair(material: str) -> str:
    """Both keys of a pair have their pair's name for material, and their part in it."""
    return material.partition("/")[0]


def _fits(point: bytes, signature: bytes) -> bool:
    half = len(signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point[2:])  # within an OCTET STRING
    with suppress(InvalidSignature):
        key.verify(encode_dss_signature(r, s), DIGEST, ec.ECDSA(Prehashed(SHA256())))
        return True
    return False
