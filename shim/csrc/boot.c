/*
 * From C_Initialize to C_Finalize: the state that every entry point looks at first, forks, function lists.
 *
 * Fails closed: unless the core has attached itself completely, with our version, nothing but an error leaves here.
 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "build.gen.h" /* HA_VERSION */
#include "ha.h"

enum state { DOWN, RUNNING, STOPPING };

static _Atomic int state = DOWN;
static pthread_mutex_t life = PTHREAD_MUTEX_INITIALIZER; /* held by C_Initialize and C_Finalize */
static _Atomic int core_calls;                           /* in the core, without a session */
static _Atomic bool attached;
static _Atomic uint32_t forks;
static pthread_once_t once = PTHREAD_ONCE_INIT;

bool ha_running(void)
{
    return atomic_load_explicit(&state, memory_order_relaxed) == RUNNING;
}

CK_RV ha_enter_core(void)
{
    atomic_fetch_add(&core_calls, 1);
    if (atomic_load(&state) == RUNNING) return CKR_OK;
    atomic_fetch_sub(&core_calls, 1);
    return CKR_CRYPTOKI_NOT_INITIALIZED;
}

void ha_leave_core(void)
{
    atomic_fetch_sub(&core_calls, 1);
}

/* One write, so that lines of several processes do not mix. */
void ha_say(char *line)
{
    char text[1024];
    int n = snprintf(text, sizeof text, "pkcs11-ha: %s\n", line);
    if (n < 0) return;
    size_t size = (size_t)n < sizeof text ? (size_t)n : sizeof text - 1;
    for (size_t k = 0; k < size; k++)
        if (iscntrl((unsigned char)text[k])) text[k] = ' '; /* one line, and nothing that steers a terminal */
    text[size - 1] = '\n';
    unsigned char guarded = ha_guard_enter();
    while (write(STDERR_FILENO, text, size) < 0 && errno == EINTR) {
    }
    ha_guard_leave(guarded);
}

int ha_is_version(char *version)
{
    if (strcmp(version, HA_VERSION) == 0) return 1;
    ha_say("the core and this library are of different versions; refusing to work");
    return 0;
}

void ha_attached(char *version)
{
    if (ha_is_version(version)) atomic_store(&attached, true);
}

unsigned ha_fork_generation(void)
{
    return atomic_load(&forks);
}

/* ---- fork ---- */

static void before_fork(void)
{
    ha_members_before_fork(); /* first: a call that ends may need the GIL to say so */
    ha_python_before_fork();
    ha_segments_before_fork(); /* last: who holds that lock waits for nobody */
}

static void after_fork_in_parent(void)
{
    ha_segments_after_fork(false);
    ha_python_after_fork(false);
    ha_members_after_fork(false);
}

static void after_fork_in_child(void)
{
    ha_segments_after_fork(true);
    ha_members_after_fork(true);
    atomic_store(&state, DOWN);
    atomic_store(&core_calls, 0);
    atomic_fetch_add(&forks, 1);
    pthread_mutex_init(&life, NULL);
    ha_slots_reset();
    ha_states_forget();
    ha_watch_after_fork();
    ha_sessions_after_fork();
    ha_objects_after_fork();
    ha_python_after_fork(true);
}

static void register_fork_handlers(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* ---- life ---- */

/* PKCS#11 5.4: mutex functions all or none; those of the application alone are more than our threads can heed. */
static CK_RV check_arguments(const CK_C_INITIALIZE_ARGS *args)
{
    if (!args) return CKR_OK;
    int given = (args->CreateMutex != NULL) + (args->DestroyMutex != NULL) + (args->LockMutex != NULL) +
                (args->UnlockMutex != NULL);
    if (args->pReserved || (given != 0 && given != 4)) return CKR_ARGUMENTS_BAD;
    return given == 4 && !(args->flags & CKF_OS_LOCKING_OK) ? CKR_CANT_LOCK : CKR_OK;
}

static void lock_life(void)
{
    if (pthread_mutex_trylock(&life) == 0) return;
    ha_wait_begin();
    pthread_mutex_lock(&life);
    ha_wait_end();
}

static CK_RV start(CK_FLAGS flags)
{
    char error[768] = "";
    if (!atomic_load(&attached) && !ha_python_start(error, sizeof error)) {
        ha_say(error);
        return CKR_GENERAL_ERROR;
    }
    if (!atomic_load(&attached)) return CKR_GENERAL_ERROR; /* the core has said why */
    return ha_unseal(ha_core.initialize(flags));
}

CK_RV native_C_Initialize(CK_VOID_PTR pInitArgs)
{
    CK_RV rv = check_arguments(pInitArgs);
    if (rv != CKR_OK) return rv;
    lock_life();
    if (ha_running()) {
        rv = CKR_CRYPTOKI_ALREADY_INITIALIZED;
    } else {
        pthread_once(&once, register_fork_handlers);
        rv = start(pInitArgs ? ((CK_C_INITIALIZE_ARGS *)pInitArgs)->flags : 0);
        if (rv == CKR_OK)
            atomic_store(&state, RUNNING);
        else
            ha_slots_reset();
    }
    pthread_mutex_unlock(&life);
    return rv;
}

CK_RV native_C_Finalize(CK_VOID_PTR pReserved)
{
    const struct timespec a_moment = {0, 500000};
    if (pReserved) return CKR_ARGUMENTS_BAD;
    lock_life();
    CK_RV rv = CKR_CRYPTOKI_NOT_INITIALIZED;
    if (ha_running()) {
        atomic_store(&state, STOPPING); /* new calls are turned away, those in flight are waited for */
        ha_core.stopping();             /* wakes a blocking C_WaitForSlotEvent */
        ha_wait_begin();
        while (atomic_load(&core_calls) > 0) nanosleep(&a_moment, NULL);
        ha_wait_end();
        ha_sessions_close_all(NULL);
        rv = ha_unseal(ha_core.finalize());
        ha_objects_reset();
        ha_slots_reset();
        ha_states_forget();
        atomic_store(&state, DOWN);
    }
    pthread_mutex_unlock(&life);
    return rv;
}

/* ---- lists and interfaces ---- */

CK_RV native_C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR ppFunctionList)
{
    if (!ppFunctionList) return CKR_ARGUMENTS_BAD;
    *ppFunctionList = &ha_list_2_40;
    return CKR_OK;
}

static CK_RV get_session_member(CK_SESSION_HANDLE hSession, CK_CHAR memberName[64], CK_CHAR memberSerial[20])
{
    if (!ha_running()) return CKR_CRYPTOKI_NOT_INITIALIZED;
    if (!memberName || !memberSerial) return CKR_ARGUMENTS_BAD;
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    memset(memberName, 0, 64);
    memset(memberSerial, 0, 20);
    if (session->last_member >= 0) {
        const ha_member *member = session->slot->member[session->last_member];
        memcpy(memberName, member->name, sizeof member->name);
        memcpy(memberSerial, member->serial, sizeof member->serial);
    }
    ha_session_unlock(session);
    return CKR_OK;
}

HA_EXPORT CK_RV CA_GetHAState(CK_SLOT_ID slotId, CK_HA_STATE_PTR pState)
{
    if (!ha_running()) return CKR_CRYPTOKI_NOT_INITIALIZED;
    if (!pState) return CKR_ARGUMENTS_BAD;
    CK_RV rv = ha_enter_core();
    if (rv != CKR_OK) return rv;
    rv = ha_unseal(ha_core.ha_state(slotId, pState));
    ha_leave_core();
    return rv;
}

static CK_HA_FUNCTION_LIST ha_vendor_list = {{1, 0}, CA_GetHAState, get_session_member};
static char standard_name[] = "PKCS 11", vendor_name[] = "Vendor pkcs11-ha";

/* The first of a name is the one for callers who do not care about the version. */
static CK_INTERFACE interfaces[] = {
    {(CK_UTF8CHAR *)standard_name, &ha_list_3_2, 0},
    {(CK_UTF8CHAR *)standard_name, &ha_list_3_0, 0},
    {(CK_UTF8CHAR *)standard_name, &ha_list_2_40, 0},
    {(CK_UTF8CHAR *)vendor_name, &ha_vendor_list, 0},
};
enum { INTERFACES = sizeof interfaces / sizeof *interfaces };

CK_RV native_C_GetInterfaceList(CK_INTERFACE_PTR pInterfacesList, CK_ULONG_PTR pulCount)
{
    if (!pulCount) return CKR_ARGUMENTS_BAD;
    CK_ULONG room = *pulCount;
    *pulCount = INTERFACES;
    if (!pInterfacesList) return CKR_OK;
    if (room < INTERFACES) return CKR_BUFFER_TOO_SMALL;
    memcpy(pInterfacesList, interfaces, sizeof interfaces);
    return CKR_OK;
}

CK_RV native_C_GetInterface(CK_UTF8CHAR_PTR pInterfaceName, CK_VERSION_PTR pVersion, CK_INTERFACE_PTR_PTR ppInterface,
                            CK_FLAGS flags)
{
    if (!ppInterface) return CKR_ARGUMENTS_BAD;
    for (unsigned k = 0; k < INTERFACES; k++) {
        const CK_VERSION *version = interfaces[k].pFunctionList; /* every list begins with it */
        if (pInterfaceName && strcmp((char *)pInterfaceName, (char *)interfaces[k].pInterfaceName) != 0) continue;
        if (pVersion && (pVersion->major != version->major || pVersion->minor != version->minor)) continue;
        if (flags & ~interfaces[k].flags) continue;
        *ppInterface = &interfaces[k];
        return CKR_OK;
    }
    return CKR_FUNCTION_FAILED;
}
