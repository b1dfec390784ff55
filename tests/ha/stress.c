/*
 * An application under stress: several threads sign with one key until enough is signed and its input ends.
 *
 *   stress MODULE PIN THREADS COUNT OUTPUT
 *
 * Nothing is repeated and nothing opened again because of an error: a call that does not answer CKR_OK is counted,
 * named on standard output (`failed CALL RV`) and the thread goes on with its next signature.  Every 64th signature
 * of a thread is made in a session of its own, with the key found anew.  OUTPUT gets a record of 96 bytes for each
 * signature: the digest and r, s.  Standard output says `signing` when the threads begin, `signed N` now and then,
 * and `done SIGNED FAILED` at the end.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pkcs11.h"

enum { DIGEST = 32, SIGNATURE = 64, RECORD = DIGEST + SIGNATURE, MAX_THREADS = 64, FRESH_EVERY = 64, TELL_EVERY = 50 };

static CK_FUNCTION_LIST_PTR p11;
static CK_SLOT_ID slot;
static uint64_t wanted;
static FILE *output;
static _Atomic uint64_t begun, made, failed;
static _Atomic bool stop;

static bool did(const char *call, CK_RV rv)
{
    if (rv == CKR_OK) return true;
    failed++;
    printf("failed %s 0x%lx\n", call, rv);
    return false;
}

static bool open_session(CK_SESSION_HANDLE *session)
{
    return did("C_OpenSession", p11->C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, session));
}

static bool find_key(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE *key)
{
    CK_OBJECT_CLASS class = CKO_PRIVATE_KEY;
    char label[] = "ec";
    CK_ATTRIBUTE template[] = {{CKA_CLASS, &class, sizeof class}, {CKA_LABEL, label, sizeof label - 1}};
    CK_ULONG count = 0;
    if (!did("C_FindObjectsInit", p11->C_FindObjectsInit(session, template, 2))) return false;
    bool good = did("C_FindObjects", p11->C_FindObjects(session, key, 1, &count));
    good = did("C_FindObjectsFinal", p11->C_FindObjectsFinal(session)) && good;
    return good && did("C_FindObjects finds the key", count == 1 ? CKR_OK : CKR_KEY_HANDLE_INVALID);
}

static void sign(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key, uint64_t number)
{
    CK_MECHANISM mechanism = {CKM_ECDSA, NULL, 0};
    uint8_t record[RECORD];
    CK_ULONG size = SIGNATURE;
    for (unsigned k = 0; k < DIGEST; k++) record[k] = (uint8_t)(number >> 8 * (k % 8) ^ k * 0x9D);
    if (!did("C_SignInit", p11->C_SignInit(session, &mechanism, key))) return;
    if (!did("C_Sign", p11->C_Sign(session, record, DIGEST, record + DIGEST, &size))) return;
    if (!did("C_Sign has 64 bytes", size == SIGNATURE ? CKR_OK : CKR_DATA_LEN_RANGE)) return;
    if (fwrite(record, RECORD, 1, output) != 1) abort();
    uint64_t now = ++made;
    if (now % TELL_EVERY == 0) printf("signed %llu\n", (unsigned long long)now);
}

static void *work(void *unused)
{
    CK_SESSION_HANDLE session = 0;
    CK_OBJECT_HANDLE key = 0;
    (void)unused;
    if (!open_session(&session) || !find_key(session, &key)) return NULL;
    for (uint64_t n = 1; !stop || made < wanted; n++) {
        uint64_t number = begun++;
        if (n % FRESH_EVERY == 0) {
            CK_SESSION_HANDLE fresh = 0;
            CK_OBJECT_HANDLE found = 0;
            if (!open_session(&fresh)) continue;
            if (find_key(fresh, &found)) sign(fresh, found, number);
            did("C_CloseSession", p11->C_CloseSession(fresh));
        } else {
            sign(session, key, number);
        }
    }
    did("C_CloseSession", p11->C_CloseSession(session));
    return NULL;
}

static int begin(const char *module, char *pin)
{
    CK_C_GetFunctionList get_list = NULL;
    CK_C_INITIALIZE_ARGS args = {.flags = CKF_OS_LOCKING_OK};
    CK_ULONG slots = 1;
    CK_SESSION_HANDLE session;
    void *library = dlopen(module, RTLD_NOW | RTLD_LOCAL);
    void *symbol = library ? dlsym(library, "C_GetFunctionList") : NULL;
    memcpy(&get_list, &symbol, sizeof symbol);
    if (!get_list || get_list(&p11) != CKR_OK) return 2;
    if (!did("C_Initialize", p11->C_Initialize(&args))) return 2;
    if (!did("C_GetSlotList", p11->C_GetSlotList(CK_TRUE, &slot, &slots))) return 2;
    if (!open_session(&session)) return 2; /* stays open, and so does the login */
    return did("C_Login", p11->C_Login(session, CKU_USER, (CK_UTF8CHAR_PTR)pin, strlen(pin))) ? 0 : 2;
}

int main(int argc, char **argv)
{
    pthread_t threads[MAX_THREADS];
    char ignored[64];
    if (argc != 6) return 2;
    unsigned count = (unsigned)atoi(argv[3]);
    wanted = strtoull(argv[4], NULL, 10);
    output = fopen(argv[5], "wb");
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!output || !count || count > MAX_THREADS || begin(argv[1], argv[2]) != 0) return 2;
    printf("signing\n");
    for (unsigned t = 0; t < count; t++)
        if (pthread_create(&threads[t], NULL, work, NULL) != 0) return 2;
    while (read(STDIN_FILENO, ignored, sizeof ignored) > 0) {
    }
    stop = true;
    for (unsigned t = 0; t < count; t++) pthread_join(threads[t], NULL);
    did("C_Finalize", p11->C_Finalize(NULL));
    if (fclose(output) != 0) abort();
    printf("done %llu %llu\n", (unsigned long long)made, (unsigned long long)failed);
    return failed ? 1 : 0;
}
