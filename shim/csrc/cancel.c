/*
 * Cancelling: operations of a member's session end before their time, and its objects stay.
 *
 * Closing the session ends them too, and is what is done where it has no objects.  Where it has, C_SessionCancel of
 * PKCS#11 3.0 (5.6.9) is for that; a 2.40 member has none, but the last call of an operation always ends it (5.2),
 * whatever it says of the data.  What that gives out is thrown away.
 */
#include <stdlib.h>
#include <string.h>

#include "ha.h"

enum { ALL_OPS = (1 << HA_OPS) - 1, OUTPUT_ROOM = 1 << 16 };

static CK_FLAGS flags_of(uint32_t ops)
{
    CK_FLAGS flags = 0;
    for (; ops; ops &= ops - 1) flags |= ha_cancel_flags[__builtin_ctz(ops)];
    return flags;
}

/* Whether an operation that is finished like this is under way no more; what a member cannot end it cannot begin. */
static bool is_over(CK_RV rv)
{
    switch (rv) {
    case CKR_BUFFER_TOO_SMALL:
    case CKR_DEVICE_ERROR:
    case CKR_DEVICE_REMOVED:
    case CKR_GENERAL_ERROR:
    case CKR_FUNCTION_FAILED: return false;
    default: return true;
    }
}

/* The call's answer is that of the last. */
static bool finish_each(ha_call *call, uint32_t ops)
{
    unsigned char *out = malloc(OUTPUT_ROOM);
    bool over = out;
    for (; over && ops; ops &= ops - 1) {
        call->rv = ha_finish(call, (unsigned)__builtin_ctz(ops), out, OUTPUT_ROOM);
        over = is_over(call->rv);
    }
    if (out) explicit_bzero(out, OUTPUT_ROOM);
    free(out);
    return over;
}

/* Ends what may be under way in the session's counterpart on a member.  False: it may be still. */
static bool end_on_member(ha_session *session, int m, uint32_t ops)
{
    ha_member *member = session->slot->member[m];
    ha_call call = {.row = FN_C_SessionCancel, .slot = session->slot, .target = member, .member = m};
    call.member_session = session->at[m].handle;
    call.epoch = session->at[m].epoch;
    if (!ha_enter(member, call.epoch, &call)) return true; /* it died with its member */
    CK_C_SessionCancel end = (CK_C_SessionCancel)member->functions[FN_C_SessionCancel];
    call.rv = end ? end(call.member_session, flags_of(ops)) : CKR_FUNCTION_NOT_SUPPORTED;
    if (call.rv != CKR_OK) ha_remote_explain(&call);
    bool over = call.rv == CKR_OK || (!call.late && finish_each(&call, ops));
    ha_leave(member, &call);
    return !ha_call_survived(&call) || over;
}

static bool has_objects(const ha_session *session, int m)
{
    return session->owns >> m & 1 && session->at[m].epoch;
}

/* Ends these operations on a member with the session there, or, where that has objects, without it if that can be. */
void ha_session_leave(ha_session *session, int m, uint32_t ops)
{
    if (!has_objects(session, m) || !end_on_member(session, m, ops)) ha_session_drop(session, m);
}

/* As a call goes elsewhere.  Who has kept it waiting is not asked for more: what is left there ends with that life, or when
 * it stands in the way. */
void ha_call_leave(ha_call *call, int m)
{
    ha_session *session = call->session;
    if (!(call->late >> m & 1))
        ha_session_leave(session, m, session->active);
    else if (!(session->owns >> m & 1))
        session->at[m].epoch = 0;
}

/* Its counterpart on a member has something under way that it should not have, or the other way round: what the
 * session has under way begins again where its next call goes. */
void ha_session_renew(ha_session *session, int m)
{
    ha_session_leave(session, m, ALL_OPS);
    if (session->member == m) session->member = -1;
}

/* Ends operations as their application wishes. */
RARE CK_RV ha_session_cancel(ha_session *session, uint32_t ops)
{
    int m = session->member;
    uint32_t others = session->active & ~ops;
    if (!(session->active & ops)) return CKR_OK;
    if (m >= 0 && has_objects(session, m)) {
        if (!end_on_member(session, m, ops)) return CKR_OPERATION_CANCEL_FAILED;
    } else {
        session->active = others;
        bool may_move = ha_session_may_move(session);
        session->active |= ops;
        if (others && !may_move) return CKR_OPERATION_CANCEL_FAILED;
        if (m >= 0) ha_session_drop(session, m);
    }
    ha_session_end_operations(session, ops);
    return CKR_OK;
}

CK_RV native_C_SessionCancel(CK_SESSION_HANDLE hSession, CK_FLAGS flags)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_gate(session->slot);
    uint32_t ops = 0;
    for (unsigned k = 0; k < HA_OPS; k++)
        if (ha_cancel_flags[k] & flags) ops |= session->active & 1U << k;
    CK_RV rv = ha_session_cancel(session, ops);
    if (rv == CKR_OK && flags & CKF_FIND_OBJECTS) session->finding = false;
    ha_session_unlock(session);
    return rv;
}
