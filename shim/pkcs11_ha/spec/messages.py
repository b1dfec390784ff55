"""Why each event of the HA log happens and what to do about it, and what follows of a member's answer: the words of
docs/messages.md, docs/return-codes.md and `p11ha explain`.

What an event means stands where it is written, in `pkcs11_ha.log.EVENTS`. This part is for people, and no application
loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pkcs11_ha.core.codes import Code


class Message(NamedTuple):
    """Why an event happens, and what to do; `cure` begins with "Nothing" where nothing needs to be done."""

    cause: str
    cure: str


MESSAGES: Mapping[str, Message] = {
    "call.failed_over": Message(
        "The member that had the call answered with `code`, and another member did the same work.",
        "Nothing for the application. The `member.lost` that stands before it names the member to look at.",
    ),
    "config.refused": Message(
        "The configuration file was changed while the application ran, and what it says now cannot be used, or not"
        " without a restart; `why` names file, line and key. The application goes on with what it had.",
        "Correct the file (`p11ha check` says the same), or restart the application where `why` asks for it.",
    ),
    "config.reloaded": Message(
        "The configuration file was changed while the application ran; the details say which members and groups were"
        " added and removed, and what waits for a restart or for a member that is away.",
        "Nothing, but for what waits: restart the application, or bring the member back.",
    ),
    "config.warned": Message(
        "Something is configured that works today and will surprise later; `why` says what.",
        "Do what `why` says, then `p11ha check`.",
    ),
    "core.failed": Message(
        "With `where`: a fault of this library, caught; the call answered CKR_GENERAL_ERROR. Without: the"
        " configuration cannot be used, or the installation is not whole, and C_Initialize failed.",
        "Without `where`: correct what `why` names; `p11ha doctor` looks at the installation. With it: report it.",
    ),
    "core.started": Message("An application called C_Initialize.", "Nothing."),
    "core.stopped": Message(
        "An application called C_Finalize. A process that is killed leaves no such line.", "Nothing."
    ),
    "domain.refused": Message(
        "The member is new, was replaced or emptied, or was away when the domain key was rotated.",
        "`p11ha domain show GROUP` compares the members; `p11ha domain admit MEMBER` brings the key by its custodians'"
        " words.",
    ),
    "group.returned": Message(
        "A member of the group was recovered. Sessions and objects of applications work again as they are.",
        "Nothing.",
    ),
    "group.vanished": Message(
        "Every member of the group is lost: the network between this host and all of them, or what they have in common"
        " (power, one library in one process, a PIN that was changed). Session calls answer CKR_DEVICE_ERROR, slot and"
        " token calls CKR_TOKEN_NOT_PRESENT.",
        "See the `member.lost` lines before it; repair one member. It is taken in by the next call, or at once by"
        " `p11ha recover GROUP`. Applications need no restart.",
    ),
    "login.member_refused": Message(
        "The PIN is right for the members before, and this one answered `code`: its PIN is another, locked, expired or"
        " not set. It is left out, and not tried again with that PIN.",
        "Give the member the group's PIN, or its own by `pin_source`; unlock it there; then restart the"
        " applications: no process tries a PIN again that was refused.",
    ),
    "login.refused": Message(
        "The first member that was asked answered `code`: the application's PIN is wrong, or locked there. Or `why`:"
        " the call would change PINs and cannot reach every member; or the application uses the members' libraries"
        " beside the group, or is the child of a fork that has the parent's, and is logged in there: a token that is"
        " logged in looks at no PIN, and one that nobody has looked at is not believed.",
        "Correct the application's PIN. Each wrong one costs one try on one token: see that it does not try again by"
        " itself. With `why`: bring the member back, or change the PINs with the vendor's tools; or give a member a"
        ' login of its own: `host = "worker"`, in one process `instance = "own"` too.',
    ),
    "login.succeeded": Message("The PIN was right on every member that is there.", "Nothing."),
    "member.admitted": Message(
        "The trial went well: the member answered as its peers do. Its share of load grows over `slow_start_s`.",
        "Nothing.",
    ),
    "member.drained": Message(
        "An operator asked for it (`p11ha drain MEMBER`): no new work goes there, what was begun ends there.",
        "Do the maintenance, then `p11ha enable MEMBER`.",
    ),
    "member.ejected": Message(
        "Of its `calls`, so much larger a share than of its peers' was slow or failed (`slow`, `faulty`): a link that"
        " loses packets, a device under another's load, a disk that fails.",
        "Look at the member and the way to it. It is tried again by itself after `for_s` seconds. If it always is the"
        ' slower one by its nature, raise `outlier_latency_factor`, or set `outlier = "off"`.',
    ),
    "member.enabled": Message(
        "An operator asked for it (`p11ha enable MEMBER`) after a drain: new work goes to the member again.",
        "Nothing.",
    ),
    "member.lost": Message(
        "A `call` on the member answered `code`, and another member could do the same; or the member did not answer in"
        " time; or it was not there at the start (`why`). Its calls go to the other members.",
        "Look at the device, its server or service, and the network; `p11ha explain` the code. It is tried again by the"
        " rule of [recovery], or at once by `p11ha recover GROUP MEMBER`.",
    ),
    "member.recovered": Message(
        "The recovery check found it again, in the attempt of that number.",
        "Nothing. It takes new work from now on.",
    ),
    "member.trial": Message("The time of its ejection is over.", "Nothing."),
    "object.ambiguous": Message(
        "The member has several keys of one class, CKA_ID and CKA_LABEL, and neither attributes nor an operation tell"
        " which is meant. The object is not used on that member, so that no wrong key ever is.",
        "Give them different CKA_IDs, or delete the double with the vendor's tools.",
    ),
    "object.pinned": Message(
        'The object is on this member alone: it was made there without `replication = "domain"`, or cannot be wrapped.'
        " When the member is away, so is the object.",
        'Copy it by the vendor\'s means, or make keys in a group with `replication = "domain"`; `p11ha diff GROUP`'
        " compares the members.",
    ),
    "object.settled": Message(
        "The object was made, changed or destroyed (`done`) while this member was away, or a process ended in the"
        " middle of it; the ledger knew.",
        "Nothing.",
    ),
    "operation.lost": Message(
        "The member died in the middle of an operation of several parts that could not be repeated elsewhere: more than"
        " `replay_limit_bytes`, parameters of unknown layout, or output that is random. The application got"
        " CKR_DEVICE_ERROR, once.",
        "The application begins the operation anew. If that happens often, raise `replay_limit_bytes`.",
    ),
    "recovery.asked": Message(
        "An operator asked for it (`p11ha recover`): the member is tried at once, and its attempts count from 0 again.",
        "Nothing.",
    ),
    "recovery.exhausted": Message(
        "`attempts` attempts failed. The member stays out until C_Initialize, or until somebody asks.",
        "Repair it, then `p11ha recover GROUP MEMBER`; `attempts = -1` in [recovery] sets no limit.",
    ),
    "recovery.failed": Message(
        "The member was tried and is still away (`why`).",
        "As for `member.lost`. Nothing, if it is known to be down.",
    ),
    "recovery.stopped": Message(
        "The PIN was changed on the member, or is locked or expired there. Another attempt could lock the token.",
        "Set the PIN there to the group's (or `pin_source` to its new one), then restart the applications.",
    ),
    "replication.owed": Message(
        "The member refuses the object (`why`): no room, a mechanism or a key size that it lacks, a policy.",
        "Make room or change the policy there, then `p11ha sync GROUP`.",
    ),
    "replication.refused": Message(
        "A member of the group cannot take the object, no domain key is there, or fewer than `min_copies` members are;"
        " `why` says which. The application got an error, and nothing was left behind.",
        "Do what `why` says; `p11ha domain show GROUP` and `p11ha check` show the state of the members.",
    ),
    "request.refused": Message(
        "A file in the state directory asks for something that is not known, or names what is not there (`why`). It did"
        " not come from this version of `p11ha`.",
        "Remove the file; see who may write to the state directory (`p11ha doctor`).",
    ),
    "standby.promoted": Message("Every active member is lost.", "Repair an active member."),
    "standby.released": Message("An active member was recovered.", "Nothing."),
    "status.unavailable": Message(
        "The state directory is not there and cannot be made, or is not safe to write to (`why`). The application works"
        " as it does with one.",
        "Make it, or correct its owner and mode: `p11ha doctor --user NAME` says how. The next start uses it.",
    ),
    "write.partial": Message(
        "One member answered `code` to a write that others had done (`call`): policies or firmware differ.",
        '`p11ha diff GROUP` shows the object; with `replication = "domain"`, `p11ha sync GROUP` settles it.',
    ),
}

WORDS: Mapping[str, str] = {
    "attempt": "the number of the attempt, of how many are allowed",
    "call": "the PKCS#11 function in which it happened",
    "calls": "calls of the member that were judged; `timed`, those whose time was",
    "code": "what the member answered: `p11ha explain CODE`",
    "configuration": "the file in use",
    "done": "made, changed or destroyed",
    "ejections": "ejections in a row",
    "faulty": "by how much its share of failing calls is larger than its peers'",
    "for_s": "seconds of the ejection",
    "id": "CKA_ID in hex; `class` and `label` beside it",
    "slow": "by how much its share of slow calls is larger than its peers'",
    "slow_start_s": "seconds in which the share of load grows to the whole",
    "version": "of this library",
    "where": "the place in this library's own code",
    "why": "the reason in words",
}
"""What the details of an event are called."""

FOLLOWS: Mapping[Code, str] = {
    Code.CLEAN: "it is the application's answer, passed through unchanged, and no matter of health",
    Code.DEAD: "the member is lost; the call goes on elsewhere if it may be repeated",
    Code.SUSPECT: "the same is done on another member: if that succeeds the first is lost, if it fails alike the"
    " answer is the application's (after a probe)",
    Code.BUSY: "another member is asked; nobody is lost",
    Code.SESSION: "the member session is replaced and the call repeated; a second time the member is lost",
    Code.LOGIN: "the member is logged in again, once, if the application is",
    Code.HANDLE: "the object is looked for again; not found, another member is asked",
    Code.OPERATION: "the member session is replaced where it disagrees with the virtual one",
    Code.LIBRARY: "the member is lost and its library initialised again at once",
    Code.CAPABILITY: "another member is asked; nobody is lost",
}
"""What this library does about a member's answer, by its class."""
