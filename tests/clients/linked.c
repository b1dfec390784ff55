/* A program of old: linked directly against the vendor's library.  For each line it reads it signs and verifies
 * eight times, from two threads, and says how often. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pkcs11.h"

enum { SIGNATURES = 4 };

static CK_SLOT_ID slot;
static CK_BYTE digest[32];

static void must(const char *call, CK_RV rv)
{
    if (rv == CKR_OK) return;
    fprintf(stderr, "%s: 0x%lx\n", call, rv);
    exit(1);
}

static CK_OBJECT_HANDLE find(CK_SESSION_HANDLE session, CK_OBJECT_CLASS class)
{
    char label[] = "eckey";
    CK_ATTRIBUTE template[] = {{CKA_CLASS, &class, sizeof class}, {CKA_LABEL, label, sizeof label - 1}};
    CK_OBJECT_HANDLE found[2];
    CK_ULONG count = 0;
    must("C_FindObjectsInit", C_FindObjectsInit(session, template, 2));
    must("C_FindObjects", C_FindObjects(session, found, 2, &count));
    must("C_FindObjectsFinal", C_FindObjectsFinal(session));
    if (count != 1) must("one object of each class", CKR_GENERAL_ERROR);
    return found[0];
}

static void *work(void *unused)
{
    (void)unused;
    CK_SESSION_HANDLE session;
    CK_MECHANISM mechanism = {CKM_ECDSA, NULL, 0};
    must("C_OpenSession", C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, &session));
    CK_OBJECT_HANDLE private = find(session, CKO_PRIVATE_KEY), public = find(session, CKO_PUBLIC_KEY);
    for (unsigned k = 0; k < SIGNATURES; k++) {
        CK_BYTE signature[64];
        CK_ULONG size = sizeof signature;
        must("C_SignInit", C_SignInit(session, &mechanism, private));
        must("C_Sign", C_Sign(session, digest, sizeof digest, signature, &size));
        must("C_VerifyInit", C_VerifyInit(session, &mechanism, public));
        must("C_Verify", C_Verify(session, digest, sizeof digest, signature, size));
    }
    must("C_CloseSession", C_CloseSession(session));
    return NULL;
}

int main(int argc, char **argv)
{
    char line[64];
    CK_INFO info;
    CK_SLOT_ID slots[8];
    CK_ULONG count = 8;
    CK_SESSION_HANDLE session;
    if (argc != 2) return 2;
    must("C_Initialize", C_Initialize(&(CK_C_INITIALIZE_ARGS){.flags = CKF_OS_LOCKING_OK}));
    must("C_GetInfo", C_GetInfo(&info));
    printf("%.9s\n", info.libraryDescription);
    fflush(stdout);
    must("C_GetSlotList", C_GetSlotList(CK_TRUE, slots, &count));
    slot = slots[0]; /* SoftHSM shows one more, without a token */
    must("C_OpenSession", C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, &session));
    must("C_Login", C_Login(session, CKU_USER, (CK_BYTE *)argv[1], strlen(argv[1])));
    while (fgets(line, sizeof line, stdin)) {
        pthread_t threads[2];
        for (unsigned t = 0; t < 2; t++)
            if (pthread_create(&threads[t], NULL, work, NULL)) return 1;
        for (unsigned t = 0; t < 2; t++) pthread_join(threads[t], NULL);
        printf("%d\n", 2 * SIGNATURES);
        fflush(stdout);
    }
    must("C_Finalize", C_Finalize(NULL));
    return 0;
}
