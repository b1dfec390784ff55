"""Eight threads with operations of many parts, while members are killed and come back: no call fails."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable
from hashlib import sha256
from hmac import digest as hmac

from tests import p11
from tests.ha.app import until
from tests.replay.cases import IV, TEXT
from tests.replay.conftest import Start
from tests.replay.keys import Keys
from tests.replay.scripts import Use, Work, decrypt_parts, digest_parts, encrypt_parts, run, sign_parts

THREADS, DEATHS = 8, 20
PARTS = [TEXT] * 6
CBC: p11.Mechanism = p11.CKM_AES_CBC_PAD, IV


def test_no_call_fails(start: Start, every_key: Keys, undisturbed: Use) -> None:
    data = b"".join(PARTS)
    encrypted = run(encrypt_parts(undisturbed, Work(CBC, "secret aes", PARTS)))
    signed = hmac(every_key.value("generic"), data, "sha256")
    works: list[tuple[Callable[[Use], bytes], bytes]] = [
        (lambda use: run(digest_parts(use, Work(p11.CKM_SHA256, "", PARTS))), sha256(data).digest()),
        (lambda use: run(sign_parts(use, Work(p11.CKM_SHA256_HMAC, "secret generic", PARTS))), signed),
        (lambda use: run(encrypt_parts(use, Work(CBC, "secret aes", PARTS))), encrypted),
        (
            lambda use: run(decrypt_parts(use, Work(CBC, "secret aes", (encrypted[:50], encrypted[50:])))),
            data,
        ),
    ]
    mortal = start()
    mortal.use()
    wrong: list[object] = []
    rounds = [0] * THREADS
    stop = threading.Event()

    def work(number: int) -> None:
        try:
            use = mortal.use()
            for do, right in itertools.cycle(works[number % 4 :] + works[: number % 4]):
                out = do(use)
                if out != right:
                    wrong.append((number, rounds[number], out))
                rounds[number] += 1
                if stop.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 (told below)
            wrong.append(error)

    def go_on() -> None:
        already = list(rounds)
        until(lambda: wrong or all(map(operator.gt, rounds, already)), "each has gone on")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        go_on()
        for death in range(DEATHS):
            name = list(mortal.workers)[death % len(mortal.workers)]
            mortal.kill(name)
            mortal.app.wait_for_event("member.recovered", name, death // len(mortal.workers) + 1)
            go_on()
            assert wrong == []
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
