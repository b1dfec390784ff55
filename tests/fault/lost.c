/*
 * What was lost, and stays lost.
 *
 * Sessions and logins are lost in the wrapped library itself, so that all that hangs on them goes too: session
 * objects, the login with the last session, the handles of private objects.  A token that is gone and an object that
 * cannot be found are remembered here, until C_Initialize.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "fault.h"

struct set {
    CK_ULONG *at;
    size_t count, room;
};

static struct set absent;                                /* slots whose token is gone */
static struct set logged_out;                            /* slots that have forgotten who was logged in */
static struct set objects;                               /* handles that are no more */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the sets */

/* Calls of sessions are inside it, and a session is closed when nobody is: libraries free what others still use. */
#define GATE PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP
static pthread_rwlock_t gate = GATE;

/* ---- sets ---- */

static bool holds(const struct set *set, CK_ULONG item)
{
    for (size_t k = 0; k < set->count; k++)
        if (set->at[k] == item) return true;
    return false;
}

static void add(struct set *set, CK_ULONG item)
{
    if (holds(set, item)) return;
    if (set->count == set->room) {
        size_t room = set->room ? 2 * set->room : 16;
        CK_ULONG *at = realloc(set->at, room * sizeof *at);
        if (!at) abort(); /* a fault that is not injected is a lie */
        set->at = at;
        set->room = room;
    }
    set->at[set->count++] = item;
}

static void drop(struct set *set, CK_ULONG item)
{
    for (size_t k = 0; k < set->count; k++)
        if (set->at[k] == item) set->at[k--] = set->at[--set->count];
}

static bool lost(const struct set *set, CK_ULONG item)
{
    pthread_mutex_lock(&lock);
    bool is = holds(set, item);
    pthread_mutex_unlock(&lock);
    return is;
}

static bool any_lost(const struct set *set)
{
    pthread_mutex_lock(&lock);
    bool any = set->count != 0;
    pthread_mutex_unlock(&lock);
    return any;
}

/* ---- the gate ---- */

static bool uses_session(const struct fault_call *call)
{
    return fault_row[call->row].has & HAS_SESSION;
}

void fault_enter(struct fault_call *call)
{
    if (uses_session(call)) pthread_rwlock_rdlock(&gate);
}

void fault_leave(struct fault_call *call)
{
    if (uses_session(call)) pthread_rwlock_unlock(&gate);
}

void fault_lost_before_fork(void)
{
    pthread_mutex_lock(&lock);
}

void fault_lost_after_fork(bool in_child)
{
    static const pthread_rwlock_t open = GATE;
    pthread_mutex_unlock(&lock);
    if (in_child) memcpy(&gate, &open, sizeof gate); /* who was inside is not here */
}

/* ---- losing ---- */

static bool slot_of(const struct fault_call *call, CK_SLOT_ID *slot)
{
    CK_SESSION_INFO info;
    CK_C_GetSessionInfo get = (CK_C_GetSessionInfo)fault_real[FN_C_GetSessionInfo];
    if (!uses_session(call)) {
        *slot = call->slot;
        return fault_row[call->row].has & HAS_SLOT;
    }
    if (!get || get(call->session, &info) != CKR_OK) return false;
    *slot = info.slotID;
    return true;
}

static void close_session(CK_SESSION_HANDLE session)
{
    CK_C_CloseSession close = (CK_C_CloseSession)fault_real[FN_C_CloseSession];
    if (close) close(session);
}

static void close_sessions(CK_SLOT_ID slot)
{
    CK_C_CloseAllSessions close = (CK_C_CloseAllSessions)fault_real[FN_C_CloseAllSessions];
    if (close) close(slot);
}

static void log_out(CK_SESSION_HANDLE session)
{
    CK_C_Logout logout = (CK_C_Logout)fault_real[FN_C_Logout];
    if (logout) logout(session);
}

CK_RV fault_lose(const struct fault_call *call)
{
    CK_SLOT_ID slot;
    CK_RV rv = CKR_SESSION_HANDLE_INVALID;
    pthread_rwlock_wrlock(&gate);
    bool known = slot_of(call, &slot);
    pthread_mutex_lock(&lock);
    switch (call->fault.action) {
    case FAULT_SESSION_LOST: close_session(call->session); break;
    case FAULT_SESSIONS_LOST:
        if (known) close_sessions(slot);
        break;
    case FAULT_LOGIN_LOST:
        log_out(call->session);
        if (known) add(&logged_out, slot);
        rv = CKR_USER_NOT_LOGGED_IN;
        break;
    case FAULT_TOKEN_LOST:
        if (known) close_sessions(slot);
        if (known) add(&absent, slot);
        rv = uses_session(call) ? CKR_DEVICE_REMOVED : CKR_TOKEN_NOT_PRESENT;
        break;
    default: /* FAULT_OBJECT_LOST */
        for (unsigned k = 0; k < fault_row[call->row].objects; k++) add(&objects, call->object[k]);
        rv = fault_row[call->row].bad_object[0];
        break;
    }
    pthread_mutex_unlock(&lock);
    pthread_rwlock_unlock(&gate);
    return rv;
}

void fault_token_back(const struct fault_call *call)
{
    CK_SLOT_ID slot;
    bool known = slot_of(call, &slot);
    pthread_mutex_lock(&lock);
    if (known)
        drop(&absent, slot);
    else
        absent.count = 0; /* it is about no slot: all of them */
    pthread_mutex_unlock(&lock);
}

/* ---- what follows ---- */

/* The slots with a token, less those that we say have none. */
static CK_RV present_slots(struct fault_call *call)
{
    CK_C_GetSlotList get = (CK_C_GetSlotList)call->function;
    struct fault_output *out = &call->output[0];
    CK_SLOT_ID *slots = NULL;
    CK_ULONG count = 0, left = 0;
    if (!out->length) return CKR_ARGUMENTS_BAD;
    CK_RV rv = get(CK_TRUE, NULL, &count);
    if (rv == CKR_OK && !(slots = calloc(count + 1, sizeof *slots))) rv = CKR_HOST_MEMORY;
    if (rv == CKR_OK) rv = get(CK_TRUE, slots, &count);
    for (CK_ULONG k = 0; rv == CKR_OK && k < count; k++)
        if (!lost(&absent, slots[k])) slots[left++] = slots[k];
    if (rv == CKR_OK && out->bytes && out->capacity < left) rv = CKR_BUFFER_TOO_SMALL;
    if (rv == CKR_OK && out->bytes) memcpy(out->bytes, slots, left * sizeof *slots);
    if (rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL) *out->length = left;
    free(slots);
    return rv;
}

bool fault_is_lost(struct fault_call *call)
{
    const struct fault_row *row = &fault_row[call->row];
    if (call->row == FN_C_GetSlotList && call->present_only && any_lost(&absent)) {
        call->rv = present_slots(call);
        return true;
    }
    if (row->has & HAS_SLOT && call->row != FN_C_GetSlotInfo && lost(&absent, call->slot)) {
        call->rv = CKR_TOKEN_NOT_PRESENT;
        return true;
    }
    for (unsigned k = 0; k < row->objects; k++) {
        if (!lost(&objects, call->object[k])) continue;
        call->rv = row->bad_object[k];
        return true;
    }
    return false;
}

/* Takes lost objects out of what was found; if nothing is left the search goes on, as none means that it has ended. */
static void find_others(struct fault_call *call)
{
    CK_C_FindObjects find = (CK_C_FindObjects)call->function;
    struct fault_output *out = &call->output[0];
    CK_OBJECT_HANDLE *found = (void *)out->bytes;
    CK_ULONG left = 0;
    while (call->rv == CKR_OK && found && *out->length && *out->length <= out->capacity && !left) {
        for (CK_ULONG k = 0; k < *out->length; k++)
            if (!lost(&objects, found[k])) found[left++] = found[k];
        *out->length = left;
        if (!left) call->rv = find(call->session, found, out->capacity, out->length);
    }
}

static void forget(void)
{
    pthread_mutex_lock(&lock);
    absent.count = logged_out.count = objects.count = 0;
    pthread_mutex_unlock(&lock);
}

static void logged_in(const struct fault_call *call)
{
    CK_SLOT_ID slot;
    if (!slot_of(call, &slot)) return;
    pthread_mutex_lock(&lock);
    drop(&logged_out, slot);
    pthread_mutex_unlock(&lock);
}

/* Private objects' handles went with the login, and a token says why. */
static bool is_unknown_object(CK_RV rv)
{
    return rv == CKR_OBJECT_HANDLE_INVALID || rv == CKR_KEY_HANDLE_INVALID || rv == CKR_WRAPPING_KEY_HANDLE_INVALID ||
           rv == CKR_UNWRAPPING_KEY_HANDLE_INVALID;
}

void fault_was_lost(struct fault_call *call)
{
    CK_SLOT_ID slot;
    switch (call->row) {
    case FN_C_Initialize:
        if (call->rv == CKR_OK) forget();
        break;
    case FN_C_Login:
    case FN_C_LoginUser:
        if (call->rv == CKR_OK) logged_in(call);
        break;
    case FN_C_GetSlotInfo:
        if (call->rv == CKR_OK && lost(&absent, call->slot))
            ((CK_SLOT_INFO *)(void *)call->output[0].bytes)->flags &= ~(CK_FLAGS)CKF_TOKEN_PRESENT;
        break;
    case FN_C_FindObjects:
        if (any_lost(&objects)) find_others(call);
        break;
    default:
        if (is_unknown_object(call->rv) && any_lost(&logged_out) && slot_of(call, &slot) && lost(&logged_out, slot))
            call->rv = CKR_USER_NOT_LOGGED_IN;
        break;
    }
}
