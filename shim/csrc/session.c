/*
 * Virtual sessions: the table the application's handles index, and the member sessions that stand behind them.
 *
 * A handle is generation << 20 | index, so it is never 0 and never given out twice.  The word of an entry holds
 * handle << 2 with a lock bit and a waiter bit: one compare-and-swap both proves the handle and locks the
 * session, and whoever holds every word holds off every call (that is how C_Finalize waits for calls in flight).
 */
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ha.h"

enum { SPINS = 200 };

#define WAITERS 2ULL
#define HANDLE(word) ((CK_SESSION_HANDLE)((word) >> 2))
#define GENERATION (1UL << HA_SESSION_BITS)

ha_session *_Atomic ha_session_chunks[(1 << HA_SESSION_BITS) / HA_SESSION_CHUNK];
static _Atomic uint32_t session_count; /* entries ever used; index 0 is not */
static uint32_t free_list;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

static ha_session *entry(uint32_t index)
{
    ha_session *chunk = atomic_load_explicit(&ha_session_chunks[index / HA_SESSION_CHUNK], memory_order_acquire);
    return chunk ? &chunk[index % HA_SESSION_CHUNK] : NULL;
}

/* The futex sleeps on the low half of the word, which holds the lock and waiter bits. */
static uint32_t *low_half(ha_session *session)
{
    uint32_t *half = (uint32_t *)(void *)&session->word;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    half++;
#endif
    return half;
}

/* Waits until the session is free and locks it. NULL: the handle is not (or no longer) this session's. */
RARE ha_session *ha_session_lock_slowly(ha_session *session, CK_SESSION_HANDLE handle)
{
    for (unsigned spin = 0;; spin++) {
        uint64_t word = atomic_load_explicit(&session->word, memory_order_relaxed);
        if (HANDLE(word) != handle) return NULL;
        if (!(word & HA_LOCKED)) {
            /* Others may still wait, so their bit stays; at worst an unlock wakes nobody. */
            if (atomic_compare_exchange_weak_explicit(&session->word, &word, word | HA_LOCKED, memory_order_acquire,
                                                      memory_order_relaxed))
                return session;
            continue;
        }
        if (spin < SPINS) continue;
        if (!(word & WAITERS) && !atomic_compare_exchange_weak(&session->word, &word, word | WAITERS)) continue;
        ha_wait_begin();
        syscall(SYS_futex, low_half(session), FUTEX_WAIT_PRIVATE, (uint32_t)(word | WAITERS), NULL, NULL, 0);
        ha_wait_end();
    }
}

static void set_word(ha_session *session, uint64_t word)
{
    if (atomic_exchange_explicit(&session->word, word, memory_order_release) & WAITERS)
        syscall(SYS_futex, low_half(session), FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

RARE void ha_session_unlock_slowly(ha_session *session)
{
    set_word(session, atomic_load_explicit(&session->word, memory_order_relaxed) & ~(HA_LOCKED | WAITERS));
}

ha_session *ha_session_find(CK_SESSION_HANDLE handle)
{
    ha_session *session = entry((uint32_t)(handle & (GENERATION - 1)));
    return session && HANDLE(atomic_load(&session->word)) == handle ? session : NULL;
}

int ha_session_read_only(ha_session *session)
{
    return !(session->flags & CKF_RW_SESSION);
}

ha_slot *ha_session_slot(ha_session *session)
{
    return session->slot;
}

CK_SESSION_HANDLE ha_session_handle(ha_session *session)
{
    return HANDLE(atomic_load(&session->word));
}

int ha_session_member(ha_session *session)
{
    return session->active ? session->member : -1;
}

unsigned ha_session_active(ha_session *session)
{
    return session->active;
}

void ha_session_own(ha_session *session, int member)
{
    session->owns |= 1U << member;
    session->made |= 1U << member;
}

/* ---- member sessions ---- */

static struct ha_pool *pool_of(ha_session *session, int member)
{
    return &session->slot->pool[member][session->flags & CKF_RW_SESSION ? 1 : 0];
}

/* A member session of the same kind, from the pool or new. CKR_OK, the member's answer, or HA_AGAIN if the member has
 * changed meanwhile. */
CK_RV ha_session_open_member(ha_session *session, int member, uint32_t epoch)
{
    if (session->at[member].epoch == epoch) return CKR_OK;
    session->owns &= ~(1U << member);                    /* what it had there was of another life */
    if (session->member == member) session->member = -1; /* and so was what is under way: it begins again */
    struct ha_pool *pool = pool_of(session, member);
    pthread_mutex_lock(&pool->lock);
    if (pool->epoch == epoch && pool->count) {
        session->at[member].handle = pool->idle[--pool->count];
        session->at[member].epoch = epoch;
    }
    pthread_mutex_unlock(&pool->lock);
    if (session->at[member].epoch == epoch) return CKR_OK;

    ha_member *target = session->slot->member[member];
    ha_call call = {.row = FN_C_OpenSession};
    CK_SESSION_HANDLE handle = 0;
    CK_C_OpenSession open = (CK_C_OpenSession)target->functions[FN_C_OpenSession];
    if (!open) return CKR_FUNCTION_NOT_SUPPORTED;
    if (!ha_enter(target, epoch, &call)) return HA_AGAIN;
    CK_RV rv = open(target->slot_id, session->flags & (CKF_SERIAL_SESSION | CKF_RW_SESSION), NULL, NULL, &handle);
    ha_leave(target, &call);
    if (rv != CKR_OK) return rv < HA_AGAIN ? rv : CKR_GENERAL_ERROR;
    session->at[member].handle = handle;
    session->at[member].epoch = epoch;
    return CKR_OK;
}

static void close_on_member(ha_slot *slot, int member, uint32_t epoch, CK_SESSION_HANDLE handle)
{
    ha_member *target = slot->member[member];
    ha_call call = {.row = FN_C_CloseSession, .slot = slot, .target = target, .member = member, .epoch = epoch};
    CK_C_CloseSession close = (CK_C_CloseSession)target->functions[FN_C_CloseSession];
    if (!close || !ha_enter(target, epoch, &call)) return; /* the session died with its member */
    call.rv = close(handle);
    ha_leave(target, &call);
    ha_call_survived(&call); /* or not: the handle is given up either way */
}

/* Closes the member session for good: it has an operation or an object that must not reach another user. */
void ha_session_drop(ha_session *session, int member)
{
    uint32_t epoch = session->at[member].epoch;
    session->at[member].epoch = 0;
    if (session->owns >> member & 1) {
        session->owns &= ~(1U << member);
        ha_core.session_objects_lost(session, member);
    }
    if (epoch) close_on_member(session->slot, member, epoch, session->at[member].handle);
}

static void give_back(ha_session *session, int member)
{
    struct ha_pool *pool = pool_of(session, member);
    uint32_t epoch = session->at[member].epoch;
    if (!epoch) return;
    bool busy = session->owns >> member & 1 || (session->active && session->member == member);
    pthread_mutex_lock(&pool->lock);
    if (!busy && epoch == atomic_load(&session->slot->member[member]->epoch)) {
        if (pool->epoch != epoch) {
            pool->epoch = epoch;
            pool->count = 0;
        }
        if (pool->count < HA_POOL) {
            pool->idle[pool->count++] = session->at[member].handle;
            session->at[member].epoch = 0;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    ha_session_drop(session, member);
}

static void drain(ha_slot *slot, int member, int read_write)
{
    struct ha_pool *pool = &slot->pool[member][read_write ? 1 : 0];
    CK_SESSION_HANDLE idle[HA_POOL];
    pthread_mutex_lock(&pool->lock);
    unsigned count = pool->count;
    uint32_t epoch = pool->epoch;
    memcpy(idle, pool->idle, count * sizeof *idle);
    pool->count = 0;
    pthread_mutex_unlock(&pool->lock);
    for (unsigned k = 0; k < count; k++) close_on_member(slot, member, epoch, idle[k]);
}

/* Closes idle member sessions: read-only ones stand in the way of the SO's login. */
void ha_slot_drain_pools(ha_slot *slot, int read_write)
{
    for (unsigned m = 0; m < slot->count; m++) drain(slot, (int)m, read_write);
}

/* Those of a member that has lost a session: they may be gone, too. */
void ha_slot_drain_pools_of(ha_slot *slot, int member)
{
    drain(slot, member, 0);
    drain(slot, member, 1);
}

/* ---- the application's calls ---- */

/* Zeroed memory answers to no handle, so a chunk may be seen before it is used. */
static ha_session *new_entry(uint32_t index)
{
    ha_session *_Atomic *chunk = &ha_session_chunks[index / HA_SESSION_CHUNK];
    if (!atomic_load(chunk)) {
        ha_session *fresh = aligned_alloc(HA_CACHE_LINE, HA_SESSION_CHUNK * sizeof *fresh);
        if (!fresh) return NULL;
        memset(fresh, 0, HA_SESSION_CHUNK * sizeof *fresh);
        atomic_store_explicit(chunk, fresh, memory_order_release);
    }
    return entry(index);
}

CK_RV native_C_OpenSession(CK_SLOT_ID slotID, CK_FLAGS flags, CK_VOID_PTR pApplication, CK_NOTIFY Notify,
                           CK_SESSION_HANDLE_PTR phSession)
{
    (void)pApplication; /* for Notify alone, which no member of ours calls: nothing is surrendered */
    (void)Notify;
    ha_slot *slot = ha_slot_by_id(slotID);
    if (!slot) return CKR_SLOT_ID_INVALID;
    ha_gate(slot);
    if (!(flags & CKF_SERIAL_SESSION)) return CKR_SESSION_PARALLEL_NOT_SUPPORTED;
    if (flags & CKF_ASYNC_SESSION) return CKR_SESSION_ASYNC_NOT_SUPPORTED;
    if (!atomic_load(&slot->serving)) return CKR_TOKEN_NOT_PRESENT;
    if (!(flags & CKF_RW_SESSION) && atomic_load(&slot->login) == CKU_SO) return CKR_SESSION_READ_WRITE_SO_EXISTS;
    if (flags & CKF_RW_SESSION && atomic_load(&slot->write_protected)) return CKR_TOKEN_WRITE_PROTECTED;

    ha_session *session = NULL;
    CK_RV rv = CKR_OK;
    pthread_mutex_lock(&table_lock);
    if (!ha_running()) {
        rv = CKR_CRYPTOKI_NOT_INITIALIZED;
    } else if (free_list) {
        session = entry(free_list);
        free_list = session->next_free;
        atomic_store(&session->word, HA_WORD(session->next_handle) | HA_LOCKED);
    } else {
        uint32_t index = atomic_load(&session_count) + 1;
        if (index >= GENERATION) {
            rv = CKR_SESSION_COUNT;
        } else {
            session = new_entry(index);
            if (!session) {
                rv = CKR_HOST_MEMORY;
            } else {
                session->index = index;
                atomic_store_explicit(&session->word, HA_WORD(GENERATION | index) | HA_LOCKED, memory_order_relaxed);
                atomic_store_explicit(&session_count, index, memory_order_release);
            }
        }
    }
    if (session) {
        session->slot = slot;
        session->flags = flags;
        session->active = session->in_message = session->owns = session->made = 0;
        session->finding = false;
        session->member = session->last_member = -1;
        session->turn = atomic_fetch_add_explicit(&slot->turn, 1, memory_order_relaxed);
        session->trial = session->untimed = 0;
        session->chance = session->turn * 2654435761U;
        atomic_fetch_add(&slot->sessions, 1);
        if (flags & CKF_RW_SESSION) atomic_fetch_add(&slot->rw_sessions, 1);
        *phSession = HANDLE(atomic_load_explicit(&session->word, memory_order_relaxed));
        ha_session_unlock(session);
    }
    pthread_mutex_unlock(&table_lock);
    return rv;
}

/* Ends a locked session: its handle is dead when this returns. */
static void retire(ha_session *session)
{
    ha_slot *slot = session->slot;
    if (session->made) ha_core.session_closing(session); /* also what has died since */
    for (unsigned m = 0; m < slot->count; m++)
        if (session->at[m].epoch) give_back(session, (int)m);
    ha_session_end_operations(session, (1U << HA_OPS) - 1);
    if (session->trial) ha_trial_end(session);
    free(session->found);
    session->found = NULL;
    CK_SESSION_HANDLE handle = HANDLE(atomic_load(&session->word));
    if (session->flags & CKF_RW_SESSION) atomic_fetch_sub(&slot->rw_sessions, 1);
    bool last = atomic_fetch_sub(&slot->sessions, 1) == 1;
    if (last && atomic_load(&slot->login) != CK_UNAVAILABLE_INFORMATION) ha_core.last_session_closed(slot);

    pthread_mutex_lock(&table_lock);
    session->next_free = free_list;
    free_list = session->index;
    session->next_handle = handle + GENERATION;
    set_word(session, HA_LOCKED); /* a free entry answers to no handle */
    pthread_mutex_unlock(&table_lock);
}

CK_RV native_C_CloseSession(CK_SESSION_HANDLE hSession)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_gate(session->slot);
    retire(session);
    return CKR_OK;
}

/* NULL: the sessions of every slot. Waits for the calls in flight on each. */
void ha_sessions_close_all(ha_slot *slot)
{
    pthread_mutex_lock(&table_lock); /* at C_Finalize: whoever comes after us here sees that it is too late */
    uint32_t count = atomic_load(&session_count);
    pthread_mutex_unlock(&table_lock);
    for (uint32_t index = 1; index <= count; index++) {
        if (slot && entry(index)->slot != slot) continue; /* not to wait for a call that hangs elsewhere */
        ha_session *session = ha_session_lock(HANDLE(atomic_load(&entry(index)->word)));
        if (!session) continue;
        if (!slot || session->slot == slot)
            retire(session);
        else
            ha_session_unlock(session);
    }
}

CK_RV native_C_CloseAllSessions(CK_SLOT_ID slotID)
{
    ha_slot *slot = ha_slot_by_id(slotID);
    if (!slot) return CKR_SLOT_ID_INVALID;
    ha_gate(slot);
    ha_sessions_close_all(slot);
    return CKR_OK;
}

CK_RV native_C_GetSessionInfo(CK_SESSION_HANDLE hSession, CK_SESSION_INFO_PTR pInfo)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_slot *slot = session->slot;
    ha_gate(slot);
    CK_RV rv = CKR_OK;
    if (atomic_load_explicit(&slot->serving, memory_order_relaxed)) {
        bool rw = session->flags & CKF_RW_SESSION;
        CK_ULONG login = atomic_load_explicit(&slot->login, memory_order_relaxed);
        pInfo->slotID = slot->id;
        pInfo->flags = session->flags;
        pInfo->ulDeviceError = 0;
        pInfo->state = login == CKU_SO     ? CKS_RW_SO_FUNCTIONS
                       : login == CKU_USER ? (rw ? CKS_RW_USER_FUNCTIONS : CKS_RO_USER_FUNCTIONS)
                                           : (rw ? CKS_RW_PUBLIC_SESSION : CKS_RO_PUBLIC_SESSION);
    } else {
        rv = CKR_DEVICE_ERROR; /* no member is left */
    }
    ha_session_unlock(session);
    return rv;
}

/* Legacy of PKCS#11 1.x: there are no parallel functions (5.20). */
static CK_RV not_parallel(CK_SESSION_HANDLE hSession)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_session_unlock(session);
    return CKR_FUNCTION_NOT_PARALLEL;
}

CK_RV native_C_GetFunctionStatus(CK_SESSION_HANDLE hSession)
{
    return not_parallel(hSession);
}

CK_RV native_C_CancelFunction(CK_SESSION_HANDLE hSession)
{
    return not_parallel(hSession);
}

/* Sessions are never opened with CKF_ASYNC_SESSION, so there is nothing these could ask about. */
static CK_RV never_asynchronous(CK_SESSION_HANDLE hSession)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_session_unlock(session);
    return CKR_FUNCTION_NOT_SUPPORTED;
}

CK_RV native_C_AsyncComplete(CK_SESSION_HANDLE hSession, CK_UTF8CHAR_PTR pFunctionName, CK_ASYNC_DATA_PTR pResult)
{
    (void)pFunctionName, (void)pResult;
    return never_asynchronous(hSession);
}

CK_RV native_C_AsyncGetID(CK_SESSION_HANDLE hSession, CK_UTF8CHAR_PTR pFunctionName, CK_ULONG_PTR pulID)
{
    (void)pFunctionName, (void)pulID;
    return never_asynchronous(hSession);
}

CK_RV native_C_AsyncJoin(CK_SESSION_HANDLE hSession, CK_UTF8CHAR_PTR pFunctionName, CK_ULONG ulID, CK_BYTE_PTR pData,
                         CK_ULONG ulData)
{
    (void)pFunctionName, (void)ulID, (void)pData, (void)ulData;
    return never_asynchronous(hSession);
}

/* In the child of a fork: words that threads of the parent held are free, all handles are dead. */
void ha_sessions_after_fork(void)
{
    pthread_mutex_init(&table_lock, NULL);
    uint32_t count = atomic_load(&session_count);
    free_list = 0;
    for (uint32_t index = 1; index <= count; index++) {
        ha_session *session = entry(index);
        CK_SESSION_HANDLE handle = HANDLE(atomic_load(&session->word));
        if (handle) session->next_handle = handle + GENERATION;
        memset(session->at, 0, sizeof session->at);
        memset(session->operation, 0, sizeof session->operation); /* left to the parent: its memory may be in use */
        session->found = NULL;
        session->next_free = free_list;
        free_list = index;
        atomic_store(&session->word, HA_LOCKED);
    }
}
