/*
 * A program that forks: children get CKR_CRYPTOKI_NOT_INITIALIZED until they start the module themselves, then it
 * works for them as it goes on working for the parent.
 *
 *   forks MODULE WORKERS CHILDREN HOW
 *
 *   WORKERS threads of the parent sign all the while.  HOW:  use: a child signs and ends by exit();  leave: it ends by
 *   exit() and has done nothing;  close: it closes all descriptors as daemons do, and signs;  deep: it signs, forks and
 *   its child signs;  exec: it runs this program anew, without workers
 *
 * A hang ends the process that hangs (SIGALRM).
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/wait.h>

#include "application.h"

enum { SIGNATURES = 3, PATIENCE_S = 60, CHILD_PATIENCE_S = 20, MAX_WORKERS = 16 };

static CK_FUNCTION_LIST *p11;
static CK_SESSION_HANDLE session;
static CK_OBJECT_HANDLE key;
static _Atomic bool over;
static _Atomic unsigned long signatures;

static void *work(void *unused)
{
    CK_BYTE signature[64];
    CK_SESSION_HANDLE own = open_session(p11);
    (void)unused;
    while (!over) {
        MUST(sign(p11, own, key, signature));
        signatures++;
    }
    return NULL;
}

static void must_say(const char *what, CK_RV rv, CK_RV expected)
{
    if (rv != expected) must(what, rv == CKR_OK ? CKR_GENERAL_ERROR : rv);
}

static void child_uses_it(void)
{
    CK_INFO info;
    CK_BYTE signature[64];
    CK_SESSION_HANDLE opened;
    must_say("C_GetInfo", p11->C_GetInfo(&info), CKR_CRYPTOKI_NOT_INITIALIZED);
    must_say("C_OpenSession", p11->C_OpenSession(0, CKF_SERIAL_SESSION, NULL, NULL, &opened),
             CKR_CRYPTOKI_NOT_INITIALIZED);
    must_say("C_SignInit", sign(p11, session, key, signature), CKR_CRYPTOKI_NOT_INITIALIZED);
    must_say("C_CloseSession", p11->C_CloseSession(session), CKR_CRYPTOKI_NOT_INITIALIZED);
    must_say("C_Finalize", p11->C_Finalize(NULL), CKR_CRYPTOKI_NOT_INITIALIZED);
    MUST(p11->C_Initialize(NULL));
    must_say("C_SignInit of the parent's session", sign(p11, session, key, signature), CKR_SESSION_HANDLE_INVALID);
    opened = open_session(p11);
    if (look_for_key(p11, opened, CKO_PRIVATE_KEY)) must("nobody is logged in", CKR_USER_ALREADY_LOGGED_IN);
    MUST(p11->C_CloseSession(opened));
    sign_and_verify(p11, SIGNATURES);
    MUST(p11->C_Finalize(NULL));
    MUST(p11->C_Initialize(NULL));
    sign_and_verify(p11, SIGNATURES);
}

static void wait_for(pid_t child)
{
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child) must("fork", CKR_GENERAL_ERROR);
    if (status == 0) return;
    fprintf(stderr, "child %d: status 0x%x%s\n", (int)child, (unsigned)status,
            WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? " (hangs)" : "");
    _exit(1);
}

static void child(char **argv)
{
    const char *how = argv[4];
    alarm(CHILD_PATIENCE_S);
    if (strcmp(how, "close") == 0)
        for (int fd = 3; fd < 1024; fd++) close(fd);
    if (strcmp(how, "exec") == 0) {
        execl(argv[0], argv[0], argv[1], "0", "1", "leave", (char *)NULL);
        _exit(1);
    }
    if (strcmp(how, "leave") != 0) child_uses_it();
    if (strcmp(how, "deep") == 0) {
        pid_t grandchild = fork();
        if (grandchild == 0) {
            alarm(CHILD_PATIENCE_S);
            child_uses_it();
            exit(0);
        }
        wait_for(grandchild);
        sign_and_verify(p11, SIGNATURES);
    }
    exit(0);
}

int main(int argc, char **argv)
{
    void *module = argc == 5 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    void *symbol = module ? dlsym(module, "C_GetFunctionList") : NULL;
    CK_C_GetFunctionList get;
    pthread_t threads[MAX_WORKERS];
    if (!symbol) return 2;
    unsigned workers = (unsigned)atoi(argv[2]), children = (unsigned)atoi(argv[3]);
    memcpy(&get, &symbol, sizeof get);
    MUST(get(&p11));
    alarm(PATIENCE_S);
    MUST(p11->C_Initialize(NULL));
    session = open_session(p11);
    log_in(p11, session);
    key = find_key(p11, session, CKO_PRIVATE_KEY);
    for (unsigned k = 0; k < workers; k++) pthread_create(&threads[k], NULL, work, NULL);
    for (unsigned n = 0; n < children; n++) {
        CK_BYTE signature[64];
        unsigned long before = signatures;
        while (workers && signatures < before + workers) sched_yield(); /* they are at it */
        pid_t pid = fork();
        if (pid == 0) child(argv);
        MUST(sign(p11, session, key, signature)); /* the parent goes on meanwhile */
        wait_for(pid);
        MUST(sign(p11, session, key, signature));
    }
    over = true;
    for (unsigned k = 0; k < workers; k++) pthread_join(threads[k], NULL);
    sign_and_verify(p11, SIGNATURES);
    MUST(p11->C_Finalize(NULL));
    puts("ok");
    return 0;
}
