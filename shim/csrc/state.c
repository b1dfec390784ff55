/*
 * C_GetOperationState and C_SetOperationState: a saved state is what replay knows of the operations, in the
 * application's hands (PKCS#11 5.6.5).
 *
 * So it means the same to every member, and the operation goes on on whichever is next.  It names keys by virtual
 * handles, and is worth something in this process and between this C_Initialize and its C_Finalize alone: a check value
 * under a number drawn at random says whether it is one of ours, unchanged.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "ha.h"

struct state {
    uint64_t check; /* of all that follows */
    CK_SLOT_ID slot;
    uint32_t ops;
    uint32_t padding;
};

struct saved { /* of one operation; behind it its parameter, then its journal */
    CK_OBJECT_HANDLE key;
    CK_MECHANISM_TYPE mechanism;
    CK_ULONG parameter_len, parameter_size, journal_size;
};

static _Atomic uint64_t nonce; /* 0: none was drawn yet */

/* At the end of a run, and in the child of a fork. */
void ha_states_forget(void)
{
    atomic_store(&nonce, 0);
}

static uint64_t current_nonce(void)
{
    uint64_t drawn = 0, none = 0;
    if (atomic_load(&nonce)) return atomic_load(&nonce);
    if (getrandom(&drawn, sizeof drawn, 0) != sizeof drawn || !drawn) return 0;
    return atomic_compare_exchange_strong(&nonce, &none, drawn) ? drawn : none;
}

/* FNV-1a: against mistakes, not against the application, whose own data it is. */
static uint64_t check_of(const unsigned char *bytes, size_t size)
{
    uint64_t hash = UINT64_C(0xCBF29CE484222325) ^ current_nonce();
    for (size_t k = 0; k < size; k++) hash = (hash ^ bytes[k]) * UINT64_C(0x100000001B3);
    return hash;
}

#define OPS(name) ha_rows[FN_C_##name##Init].ops

/* Those whose state may be saved; a message's or a recovery's may not. */
static bool is_saveable(const ha_session *session)
{
    const uint32_t saveable = OPS(Digest) | OPS(Encrypt) | OPS(Decrypt) | OPS(Sign) | OPS(Verify);
    return !(session->active & ~saveable) && ha_session_may_move((ha_session *)(uintptr_t)session);
}

static size_t saved_size(const ha_session *session)
{
    size_t size = sizeof(struct state);
    for (uint32_t left = session->active; left; left &= left - 1) {
        const struct ha_operation *operation = &session->operation[__builtin_ctz(left)];
        size += sizeof(struct saved) + operation->journal_end;
        if (operation->parameter) size += operation->parameter_size;
    }
    return size;
}

static unsigned char *put(unsigned char *at, const void *bytes, size_t size)
{
    if (size) memcpy(at, bytes, size);
    return at + size;
}

static void save(const ha_session *session, unsigned char *bytes, size_t size)
{
    struct state state = {.slot = session->slot->id, .ops = session->active};
    unsigned char *at = put(bytes, &state, sizeof state);
    for (uint32_t left = session->active; left; left &= left - 1) {
        const struct ha_operation *operation = &session->operation[__builtin_ctz(left)];
        const struct saved saved = {.key = operation->key,
                                    .mechanism = operation->mechanism.mechanism,
                                    .parameter_len = operation->parameter ? operation->mechanism.ulParameterLen : 0,
                                    .parameter_size = operation->parameter ? operation->parameter_size : 0,
                                    .journal_size = operation->journal_end};
        at = put(at, &saved, sizeof saved);
        at = put(at, operation->parameter, saved.parameter_size);
        at = put(at, operation->journal, saved.journal_size);
    }
    state.check = check_of(bytes + sizeof state.check, size - sizeof state.check);
    memcpy(bytes, &state.check, sizeof state.check);
}

CK_RV native_C_GetOperationState(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pOperationState,
                                 CK_ULONG_PTR pulOperationStateLen)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_gate(session->slot);
    CK_RV rv = CKR_OK;
    if (!session->active)
        rv = CKR_OPERATION_NOT_INITIALIZED;
    else if (!is_saveable(session))
        rv = CKR_STATE_UNSAVEABLE;
    else if (!current_nonce())
        rv = CKR_FUNCTION_FAILED;
    const size_t size = rv == CKR_OK ? saved_size(session) : 0;
    if (rv == CKR_OK && pOperationState && *pulOperationStateLen < size) rv = CKR_BUFFER_TOO_SMALL;
    if (rv == CKR_OK && pOperationState) save(session, pOperationState, size);
    if (rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL) *pulOperationStateLen = size;
    ha_session_unlock(session);
    return rv;
}

/* ---- back again ---- */

/* The key of a state against what the application gives with it, 0: nothing. */
static CK_RV judge_key(const ha_slot *slot, CK_OBJECT_HANDLE saved, CK_OBJECT_HANDLE given)
{
    if (given && given != saved) return CKR_KEY_CHANGED;
    return !saved || ha_object_valid(saved, (ha_slot *)(uintptr_t)slot) ? CKR_OK : CKR_KEY_NEEDED;
}

/* One operation from `*at` on. */
static CK_RV restore(struct ha_operation *operation, unsigned op, const unsigned char **at, size_t *left, size_t limit)
{
    struct saved saved;
    if (*left < sizeof saved) return CKR_SAVED_STATE_INVALID;
    memcpy(&saved, *at, sizeof saved);
    *at += sizeof saved;
    *left -= sizeof saved;
    if (saved.parameter_size > *left || saved.journal_size > *left - saved.parameter_size)
        return CKR_SAVED_STATE_INVALID;
    operation->key = saved.key;
    operation->mechanism = (CK_MECHANISM){saved.mechanism, NULL, saved.parameter_len};
    if (saved.parameter_size) {
        operation->parameter = malloc(saved.parameter_size);
        if (!operation->parameter) return CKR_HOST_MEMORY;
        memcpy(operation->parameter, *at, saved.parameter_size);
        operation->parameter_size = saved.parameter_size;
        if (!ha_mechanism_restore(operation)) return CKR_SAVED_STATE_INVALID;
    }
    *at += saved.parameter_size;
    if (!ha_journal_restore(operation, op, *at, saved.journal_size) || operation->taken > limit)
        return CKR_SAVED_STATE_INVALID;
    *at += saved.journal_size;
    *left -= saved.parameter_size + saved.journal_size;
    operation->kept = true;
    return CKR_OK;
}

static CK_RV set_state(ha_session *session, const unsigned char *bytes, size_t size, CK_OBJECT_HANDLE encryption_key,
                       CK_OBJECT_HANDLE authentication_key)
{
    struct state state;
    struct ha_operation operation[HA_OPS] = {0};
    if (size < sizeof state) return CKR_SAVED_STATE_INVALID;
    memcpy(&state, bytes, sizeof state);
    if (!current_nonce() || state.check != check_of(bytes + sizeof state.check, size - sizeof state.check) ||
        state.slot != session->slot->id || !state.ops || state.ops >> HA_OPS)
        return CKR_SAVED_STATE_INVALID;

    const unsigned char *at = bytes + sizeof state;
    size_t left = size - sizeof state;
    CK_RV rv = CKR_OK;
    for (uint32_t ops = state.ops; ops && rv == CKR_OK; ops &= ops - 1) {
        unsigned op = (unsigned)__builtin_ctz(ops);
        bool encrypts = 1U << op & (OPS(Encrypt) | OPS(Decrypt));
        rv = restore(&operation[op], op, &at, &left, session->slot->replay_limit);
        CK_OBJECT_HANDLE key = operation[op].key, given = encrypts ? encryption_key : authentication_key;
        if (rv == CKR_OK && key) rv = judge_key(session->slot, key, given);
        if (key && encrypts) encryption_key = CK_INVALID_HANDLE;
        if (key && !encrypts) authentication_key = CK_INVALID_HANDLE;
    }
    if (rv == CKR_OK && left) rv = CKR_SAVED_STATE_INVALID;
    if (rv == CKR_OK && (encryption_key || authentication_key)) rv = CKR_KEY_NOT_NEEDED;
    if (rv != CKR_OK) {
        for (unsigned op = 0; op < HA_OPS; op++) ha_operation_forget(&operation[op]);
        return rv;
    }
    if (session->active && session->member >= 0) ha_session_leave(session, session->member, session->active);
    ha_session_end_operations(session, session->active);
    for (uint32_t ops = state.ops; ops; ops &= ops - 1)
        session->operation[__builtin_ctz(ops)] = operation[__builtin_ctz(ops)];
    session->active = state.ops;
    session->member = -1; /* it begins again where the next call goes */
    return CKR_OK;
}

CK_RV native_C_SetOperationState(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pOperationState, CK_ULONG ulOperationStateLen,
                                 CK_OBJECT_HANDLE hEncryptionKey, CK_OBJECT_HANDLE hAuthenticationKey)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_gate(session->slot);
    CK_RV rv = set_state(session, pOperationState, ulOperationStateLen, hEncryptionKey, hAuthenticationKey);
    ha_session_unlock(session);
    return rv;
}
