/*
 * Many threads at the two ends of the module's life.
 *
 *   threads MODULE start   sixteen threads make their first call at once: one C_Initialize succeeds, all sign
 *   threads MODULE end     C_Finalize under eight threads at work, one waiting for an event: all calls come back
 *   threads MODULE churn   C_Initialize and C_Finalize over and over under eight threads that call whatever happens
 *   threads MODULE logins  eight threads open a session, log in, sign and close it, over and over: the last session
 *                          that is closed logs out, and never under one that was opened before
 *
 * A call that hangs ends the program (SIGALRM).
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "application.h"

enum { MANY = 16, WORKERS = 8, ROUNDS = 10, LIVES = 30, SIGNATURES = 10, LOGINS = 100, PATIENCE_S = 60 };

static CK_FUNCTION_LIST *p11;
static pthread_barrier_t barrier;
static _Atomic unsigned done, initialized, already;
static _Atomic bool over;
static unsigned slower = 1; /* so many times, under valgrind, where the eight take eight ninths of one processor */

static void *first_call(void *unused)
{
    (void)unused;
    pthread_barrier_wait(&barrier);
    CK_RV rv = p11->C_Initialize(NULL);
    if (rv == CKR_OK)
        initialized++;
    else if (rv == CKR_CRYPTOKI_ALREADY_INITIALIZED)
        already++;
    else
        must("C_Initialize", rv);
    sign_and_verify(p11, SIGNATURES);
    return NULL;
}

static void start(void)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        pthread_t threads[MANY];
        initialized = already = 0;
        pthread_barrier_init(&barrier, NULL, MANY);
        for (unsigned k = 0; k < MANY; k++) pthread_create(&threads[k], NULL, first_call, NULL);
        for (unsigned k = 0; k < MANY; k++) pthread_join(threads[k], NULL);
        if (initialized != 1 || already != MANY - 1) must("one of them alone starts it", CKR_GENERAL_ERROR);
        MUST(p11->C_Finalize(NULL));
    }
}

/* What a call may say while the module is taken down, or is up again with all handles dead. */
static CK_RV expected(const char *what, CK_RV rv)
{
    switch (rv) {
    case CKR_OK:
    case CKR_CRYPTOKI_NOT_INITIALIZED:
    case CKR_SESSION_HANDLE_INVALID:
    case CKR_KEY_HANDLE_INVALID:
    case CKR_OBJECT_HANDLE_INVALID:
    case CKR_OPERATION_NOT_INITIALIZED:
    case CKR_OPERATION_ACTIVE:
    case CKR_USER_NOT_LOGGED_IN:
    case CKR_USER_ALREADY_LOGGED_IN: return rv;
    default: must(what, rv); return rv;
    }
}

/* Whatever happens, on to the next call; CKR_CRYPTOKI_NOT_INITIALIZED when the module was down for one of them. */
static CK_RV work_once(void)
{
    CK_OBJECT_CLASS class = CKO_PRIVATE_KEY;
    CK_ATTRIBUTE template = {CKA_CLASS, &class, sizeof class};
    CK_MECHANISM ecdsa = {CKM_ECDSA, NULL, 0};
    CK_UTF8CHAR pin[] = "123456";
    CK_BYTE digest[32] = {0}, signature[64];
    CK_SLOT_ID slots[4];
    CK_ULONG count = 4, found = 0, size = sizeof signature;
    CK_SESSION_HANDLE session = 0;
    CK_OBJECT_HANDLE key = 0;
    CK_TOKEN_INFO info;
    CK_RV rv[10];
    unsigned n = 0;
    rv[n++] = expected("C_GetSlotList", p11->C_GetSlotList(CK_TRUE, slots, &count));
    rv[n++] = expected("C_GetTokenInfo", p11->C_GetTokenInfo(0, &info));
    rv[n++] = expected("C_OpenSession", p11->C_OpenSession(0, CKF_SERIAL_SESSION, NULL, NULL, &session));
    rv[n++] = expected("C_Login", p11->C_Login(session, CKU_USER, pin, 6));
    rv[n++] = expected("C_FindObjectsInit", p11->C_FindObjectsInit(session, &template, 1));
    rv[n++] = expected("C_FindObjects", p11->C_FindObjects(session, &key, 1, &found));
    rv[n++] = expected("C_FindObjectsFinal", p11->C_FindObjectsFinal(session));
    rv[n++] = expected("C_SignInit", p11->C_SignInit(session, &ecdsa, key));
    rv[n++] = expected("C_Sign", p11->C_Sign(session, digest, sizeof digest, signature, &size));
    rv[n++] = expected("C_CloseSession", p11->C_CloseSession(session));
    for (unsigned k = 0; k < n; k++)
        if (rv[k] == CKR_CRYPTOKI_NOT_INITIALIZED) return rv[k];
    if (rv[8] == CKR_OK) done++;
    return CKR_OK;
}

static void *work_until_the_end(void *unused)
{
    (void)unused;
    while (work_once() != CKR_CRYPTOKI_NOT_INITIALIZED) {
    }
    return NULL;
}

static void *wait_for_event(void *unused)
{
    CK_SLOT_ID slot;
    CK_RV rv = p11->C_WaitForSlotEvent(0, &slot, NULL);
    (void)unused;
    if (rv != CKR_CRYPTOKI_NOT_INITIALIZED) must("C_WaitForSlotEvent", rv == CKR_OK ? CKR_GENERAL_ERROR : rv);
    return NULL;
}

static void end(void)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        pthread_t threads[WORKERS + 1];
        done = 0;
        MUST(p11->C_Initialize(NULL));
        pthread_create(&threads[WORKERS], NULL, wait_for_event, NULL);
        for (unsigned k = 0; k < WORKERS; k++) pthread_create(&threads[k], NULL, work_until_the_end, NULL);
        while (done < WORKERS * SIGNATURES) sched_yield();
        MUST(p11->C_Finalize(NULL));
        for (unsigned k = 0; k <= WORKERS; k++) pthread_join(threads[k], NULL);
    }
}

static void *work_whatever_happens(void *unused)
{
    (void)unused;
    while (!over) work_once();
    return NULL;
}

static void churn(void)
{
    pthread_t threads[WORKERS];
    for (unsigned k = 0; k < WORKERS; k++) pthread_create(&threads[k], NULL, work_whatever_happens, NULL);
    for (unsigned life = 0; life < LIVES / slower; life++) {
        unsigned before = done;
        MUST(p11->C_Initialize(NULL));
        while (done < before + 2) sched_yield();
        MUST(p11->C_Finalize(NULL));
    }
    over = true;
    for (unsigned k = 0; k < WORKERS; k++) pthread_join(threads[k], NULL);
    MUST(p11->C_Initialize(NULL));
    CK_TOKEN_INFO info;
    MUST(p11->C_GetTokenInfo(0, &info));
    if (info.ulSessionCount || info.ulRwSessionCount) must("no session is left over", CKR_SESSION_EXISTS);
    sign_and_verify(p11, SIGNATURES);
    MUST(p11->C_Finalize(NULL));
}

static void *log_in_again_and_again(void *unused)
{
    (void)unused;
    for (unsigned k = 0; k < LOGINS; k++) sign_and_verify(p11, 1);
    return NULL;
}

static void logins(void)
{
    pthread_t threads[WORKERS];
    MUST(p11->C_Initialize(NULL));
    for (unsigned k = 0; k < WORKERS; k++) pthread_create(&threads[k], NULL, log_in_again_and_again, NULL);
    for (unsigned k = 0; k < WORKERS; k++) pthread_join(threads[k], NULL);
    MUST(p11->C_Finalize(NULL));
}

int main(int argc, char **argv)
{
    void *module = argc == 3 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    void *symbol = module ? dlsym(module, "C_GetFunctionList") : NULL;
    CK_C_GetFunctionList get;
    if (!symbol) return 2;
    memcpy(&get, &symbol, sizeof get);
    MUST(get(&p11));
    const char *said = getenv("SLOWER");
    if (said) slower = (unsigned)atoi(said);
    alarm(PATIENCE_S * slower);
    if (strcmp(argv[2], "start") == 0) start();
    if (strcmp(argv[2], "end") == 0) end();
    if (strcmp(argv[2], "churn") == 0) churn();
    if (strcmp(argv[2], "logins") == 0) logins();
    puts("ok");
    return 0;
}
