/* What an ordinary application does, for the host programs that do it many times: find the key, sign, verify. */
#ifndef TESTS_APPLICATION_H
#define TESTS_APPLICATION_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pkcs11.h"

#define MUST(call) must(#call, call)

/* Ends the program, or the child of a fork, with one line; _exit, for a child must not run its parent's exit. */
static inline void must(const char *what, CK_RV rv)
{
    if (rv == CKR_OK) return;
    fprintf(stderr, "[%d] %s: 0x%lx\n", (int)getpid(), what, rv);
    _exit(1);
}

static inline CK_SESSION_HANDLE open_session(CK_FUNCTION_LIST *p11)
{
    CK_SLOT_ID slots[8];
    CK_ULONG count = 8;
    CK_SESSION_HANDLE session = 0;
    MUST(p11->C_GetSlotList(CK_TRUE, slots, &count));
    if (count == 0) must("a slot with a token", CKR_TOKEN_NOT_PRESENT);
    MUST(p11->C_OpenSession(slots[0], CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session));
    return session;
}

static inline void log_in(CK_FUNCTION_LIST *p11, CK_SESSION_HANDLE session)
{
    CK_UTF8CHAR pin[] = "123456";
    CK_RV rv = p11->C_Login(session, CKU_USER, pin, sizeof pin - 1);
    if (rv != CKR_USER_ALREADY_LOGGED_IN) must("C_Login", rv);
}

/* The handle, CK_INVALID_HANDLE if there is none. */
static inline CK_OBJECT_HANDLE look_for_key(CK_FUNCTION_LIST *p11, CK_SESSION_HANDLE session, CK_OBJECT_CLASS class)
{
    char label[] = "signing";
    CK_ATTRIBUTE template[] = {{CKA_CLASS, &class, sizeof class}, {CKA_LABEL, label, sizeof label - 1}};
    CK_OBJECT_HANDLE key = CK_INVALID_HANDLE;
    CK_ULONG count = 0;
    MUST(p11->C_FindObjectsInit(session, template, 2));
    MUST(p11->C_FindObjects(session, &key, 1, &count));
    MUST(p11->C_FindObjectsFinal(session));
    return count ? key : CK_INVALID_HANDLE;
}

static inline CK_OBJECT_HANDLE find_key(CK_FUNCTION_LIST *p11, CK_SESSION_HANDLE session, CK_OBJECT_CLASS class)
{
    CK_OBJECT_HANDLE key = look_for_key(p11, session, class);
    if (key == CK_INVALID_HANDLE) must("the key", CKR_KEY_HANDLE_INVALID);
    return key;
}

/* One signature; the answer of the first call that fails. */
static inline CK_RV sign(CK_FUNCTION_LIST *p11, CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key, CK_BYTE signature[64])
{
    CK_MECHANISM ecdsa = {CKM_ECDSA, NULL, 0};
    CK_BYTE digest[32];
    CK_ULONG size = 64;
    for (unsigned k = 0; k < sizeof digest; k++) digest[k] = (CK_BYTE)k;
    CK_RV rv = p11->C_SignInit(session, &ecdsa, key);
    if (rv == CKR_OK) rv = p11->C_Sign(session, digest, sizeof digest, signature, &size);
    return rv == CKR_OK && size != 64 ? CKR_SIGNATURE_LEN_RANGE : rv;
}

static inline CK_RV verify(CK_FUNCTION_LIST *p11, CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key,
                           CK_BYTE signature[64])
{
    CK_MECHANISM ecdsa = {CKM_ECDSA, NULL, 0};
    CK_BYTE digest[32];
    for (unsigned k = 0; k < sizeof digest; k++) digest[k] = (CK_BYTE)k;
    CK_RV rv = p11->C_VerifyInit(session, &ecdsa, key);
    return rv == CKR_OK ? p11->C_Verify(session, digest, sizeof digest, signature, 64) : rv;
}

/* All of it in a session of its own: `count` signatures that verify. */
static inline void sign_and_verify(CK_FUNCTION_LIST *p11, unsigned count)
{
    CK_BYTE signature[64];
    CK_SESSION_HANDLE session = open_session(p11);
    log_in(p11, session);
    CK_OBJECT_HANDLE private_key = find_key(p11, session, CKO_PRIVATE_KEY);
    CK_OBJECT_HANDLE public_key = find_key(p11, session, CKO_PUBLIC_KEY);
    for (unsigned k = 0; k < count; k++) {
        MUST(sign(p11, session, private_key, signature));
        MUST(verify(p11, session, public_key, signature));
    }
    MUST(p11->C_CloseSession(session));
}

#endif
