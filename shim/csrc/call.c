/*
 * The loop of the data plane: gate, route, forward, judge, and up to the core for anything unusual.
 *
 * A generated entry point runs  begin; while (route) done(forward); end  with the session locked.  C carries: it
 * resolves handles, counts and forwards.  Which members may serve, what a fault means and what comes next is the
 * core's, asked through ha_core.
 */
#include <stdlib.h>
#include <time.h>

#include "ha.h"

CK_RV ha_unseal(uint64_t answer)
{
    return (answer & 0xFFFFFFFF00000000ULL) == HA_SEAL ? (CK_RV)(answer & 0xFFFFFFFFULL) : CKR_GENERAL_ERROR;
}

void ha_check_when_due(ha_slot *slot, uint64_t check_at)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now); /* some ms behind at most, and a fraction of the price */
    if ((uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec <= check_at) return;
    if (ha_enter_core() != CKR_OK) return; /* counted: C_Finalize waits for an attempt */
    ha_core.check(slot);
    ha_leave_core();
}

void ha_slot_gate(ha_slot *slot)
{
    ha_gate(slot);
}

static bool finish(ha_call *call, CK_RV rv)
{
    call->rv = rv;
    call->finished = 1;
    return false;
}

static RARE bool refuse(ha_call *call, CK_RV rv)
{
    if (call->session) ha_session_unlock(call->session);
    call->session = NULL;
    return finish(call, rv);
}

static RARE CK_RV check_objects(const ha_call *call, const struct ha_row *row)
{
    for (unsigned i = 0; i < call->objects; i++)
        if (!ha_object_valid(call->object[i], call->slot)) return row->bad_object[i];
    return CKR_OK;
}

/* An Init without a mechanism ends what is under way (PKCS#11 3.0, 5.8.1). */
static RARE CK_RV cancel_by_init(ha_session *session, uint32_t ops)
{
    return session->active & ops ? ha_session_cancel(session, ops) : CKR_ARGUMENTS_BAD;
}

/* Keeps an Init, so that it can be repeated on another member. Before the member sees it: it may write into it. */
static inline void keep(struct ha_operation *operation, const ha_call *call, const struct ha_row *row)
{
    operation->key = row->bad_object[0] ? call->object[0] : CK_INVALID_HANDLE;
    operation->mechanism = *call->mechanism;
    operation->kept = !operation->mechanism.pParameter || !operation->mechanism.ulParameterLen;
    /* Of a message's Init it may be of another layout than the mechanism's own: nobody knows. */
    if (!operation->kept && !(row->ops & HA_MESSAGE_OPS)) ha_mechanism_keep(operation);
}

static RARE bool takes_arguments(ha_call *call, const struct ha_row *row)
{
    CK_RV rv = call->objects ? check_objects(call, row) : CKR_OK;
    call->member_mechanism = call->mechanism;
    if (rv == CKR_OK && call->mechanism && call->mechanism->pParameter) rv = ha_mechanism_objects(call);
    if (rv != CKR_OK) return refuse(call, rv);
    if (row->keep) keep(&call->session->operation[__builtin_ctz(row->ops)], call, row);
    return true;
}

/* Locks the session and settles what needs no member. False: call->rv is the answer and no session is held. */
bool ha_call_begin(ha_call *call, CK_SESSION_HANDLE handle)
{
    const struct ha_row *row = &ha_rows[call->row];
    ha_session *session = ha_session_lock(handle);
    if (!session) return refuse(call, CKR_SESSION_HANDLE_INVALID);
    call->session = session;
    call->slot = session->slot;
    ha_gate(session->slot);

    const bool begins = row->phase == HA_PHASE_INIT;
    if (begins && !call->mechanism) return refuse(call, cancel_by_init(session, row->ops));
    if ((session->active & row->ops) != (begins ? 0 : row->ops))
        return refuse(call, begins ? CKR_OPERATION_ACTIVE : CKR_OPERATION_NOT_INITIALIZED);
    return call->objects || call->mechanism ? takes_arguments(call, row) : true;
}

static bool ask_core(ha_call *call, uint64_t (*question)(ha_call *))
{
    CK_RV rv = ha_unseal(question(call));
    if (rv == HA_AGAIN) return true;
    return finish(call, rv);
}

/* An operation binds its session's calls to its member, but for those that are meant for a certain one, and those on
 * other objects, which may not be there. */
static bool is_bound(const ha_call *call)
{
    return call->session->active && !call->alone && (ha_rows[call->row].ops || !call->objects);
}

static bool bound_to_lost_member(const ha_call *call)
{
    const ha_session *session = call->session;
    int m = session->member;
    if (!is_bound(call)) return false;
    return m < 0 || call->tried >> m & 1 || session->at[m].epoch != atomic_load(&session->slot->member[m]->epoch);
}

/* Handles of this call on its member. False: not known there, the core must look. */
static RARE bool resolve_objects(ha_call *call)
{
    for (unsigned i = 0; i < call->objects; i++) {
        call->member_object[i] = ha_object_at(call->object[i], call->member, call->epoch);
        if (!call->member_object[i]) return false;
    }
    return true;
}

static RARE uint32_t without_absent(const ha_call *call, uint32_t candidates)
{
    for (unsigned i = 0; i < call->objects; i++) candidates &= ~ha_object_absent_mask(call->object[i]);
    return candidates;
}

/* What is made stands together, for a call can use only what one member has: a session's objects beside each other (and
 * beside the digest that may take such a key), those of the token on the first member. */
static RARE int choose(const ha_call *call, uint32_t may)
{
    const struct ha_row *row = &ha_rows[call->row];
    if (row->primary && call->objects == 1) {
        int preferred = ha_object_preferred(call->object[0]);
        if (preferred >= 0 && may >> preferred & 1) return preferred;
    }
    if (row->gathers && !call->creates_token && may & call->session->made) may &= call->session->made;
    return ha_slot_choose(call->session, may, row->primary || call->creates_token);
}

/* The usual way: a first choice, every handle known, the session open there. False: nothing was done, and after a repair
 * nothing is chosen anew: it is the repaired member that is to show whether it is cured. */
static inline bool route_at_once(ha_call *call)
{
    const ha_session *session = call->session;
    const ha_slot *slot = call->slot;
    if (call->tried || call->repairs || call->translate) return false;
    const bool bound = is_bound(call);
    if (bound) {
        call->member = session->member;
        if (call->member < 0) return false; /* its state was set, and it has not begun again yet */
    } else {
        if (__builtin_expect(atomic_load_explicit(&slot->limited, memory_order_relaxed) != 0, 0)) return false;
        uint32_t may = atomic_load_explicit(&slot->serving, memory_order_acquire);
        if (call->objects) may = without_absent(call, may);
        if (!may) return false;
        call->member = may & (may - 1) ? choose(call, may) : __builtin_ctz(may);
    }
    ha_member *target = slot->member[call->member];
    call->epoch = atomic_load(&target->epoch);
    /* A member that is lost leaves `serving` before its epoch changes: seen in this order, the epoch is one it serves in. */
    if (!bound && !(atomic_load(&slot->serving) >> call->member & 1)) return false;
    if (session->at[call->member].epoch != call->epoch || (call->objects && !resolve_objects(call))) return false;
    call->target = target;
    call->member_session = session->at[call->member].handle;
    call->function = target->functions[call->row];
    call->sent = 1;
    return call->function && ha_enter(target, call->epoch, call);
}

/* Everything else: a member lost under an operation, an object not met there, no session yet, nobody left. */
static RARE bool route_with_care(ha_call *call)
{
    ha_session *session = call->session;
    ha_slot *slot = call->slot;
    call->sent = 0;
    while (!call->finished) {
        bool move = bound_to_lost_member(call);
        if (move && !ha_session_may_move(session)) {
            ha_operations_lost(call);
            return false;
        }
        if (is_bound(call) && !move) {
            call->member = session->member;
            if (call->objects && !without_absent(call, 1U << call->member)) {
                if (!ha_session_may_move(session)) return finish(call, CKR_KEY_HANDLE_INVALID);
                if (!(session->owns >> call->member & 1)) ha_session_drop(session, call->member);
                call->tried |= 1U << call->member; /* the operation goes where its key is */
                continue;
            }
        } else {
            uint32_t may = atomic_load(call->alone ? &slot->up : &slot->serving) & ~call->tried;
            if (call->objects) may = without_absent(call, may);
            if (move) may = ha_without_operation_keys(session, may);
            /* The first choice holds while it can: to choose again for each look would always pass over a member
             * whose session is yet to be opened. */
            if (call->member < 0 || !(may >> call->member & 1))
                call->member = may ? choose(call, ha_slot_limit(call, may)) : -1;
            if (call->member < 0) {
                if (ask_core(call, ha_core.no_member)) continue;
                return false;
            }
        }
        call->target = slot->member[call->member];
        call->epoch = atomic_load(&call->target->epoch);
        if (!is_bound(call) && !(atomic_load(call->alone ? &slot->up : &slot->serving) >> call->member & 1)) continue;
        if (call->objects && !resolve_objects(call)) {
            if (ask_core(call, ha_core.locate)) continue;
            return false;
        }
        if (call->translate) {
            CK_RV rv = ha_mechanism_translate(call);
            if (rv != CKR_OK) return finish(call, rv);
        }
        if (session->at[call->member].epoch != call->epoch) {
            CK_RV rv = ha_session_open_member(session, call->member, call->epoch);
            if (rv == HA_AGAIN) continue; /* the member has changed meanwhile */
            if (rv != CKR_OK) {
                call->rv = rv;
                if (ask_core(call, ha_core.decide)) continue;
                return false;
            }
        }
        call->member_session = session->at[call->member].handle;
        if (move) {
            ha_repeat_operations(call);
            continue;
        }
        call->function = call->target->functions[call->row];
        if (!call->function) {
            call->rv = CKR_FUNCTION_NOT_SUPPORTED;
            if (ask_core(call, ha_core.decide)) continue;
            return false;
        }
        if (ha_enter(call->target, call->epoch, call)) {
            call->sent = 1;
            return true;
        }
    }
    return false;
}

/* Readies the next member for the call. False: call->rv is the answer. */
bool ha_call_route(ha_call *call)
{
    if (!route_at_once(call) && !route_with_care(call)) return false;
    if (__builtin_expect(atomic_load_explicit(&call->slot->look_at, memory_order_relaxed) != UINT64_MAX, 0))
        ha_latency_begin(call);
    return true;
}

/* Whether another member could do the same. */
bool ha_call_has_choice(const ha_call *call)
{
    uint32_t may = atomic_load_explicit(&call->slot->serving, memory_order_relaxed);
    if (call->objects) may = without_absent(call, may);
    if (is_bound(call)) may = ha_without_operation_keys(call->session, may);
    return may & (may - 1);
}

CK_RV ha_call_takes(ha_call *call, CK_MECHANISM *mechanism)
{
    call->mechanism = call->member_mechanism = mechanism;
    return mechanism->pParameter ? ha_mechanism_objects(call) : CKR_OK;
}

void ha_call_free(ha_call *call)
{
    free(call->mechanism_copy);
    call->mechanism_copy = NULL;
}

/* Whether what the call makes is to be on every member. Not the keys of a TLS key block: they come in a structure. */
bool ha_call_replicates(const ha_call *call)
{
    return atomic_load_explicit(&call->slot->replicates, memory_order_relaxed) && !call->query &&
           !(call->mechanism->pParameter && ha_mechanism_makes(call->mechanism));
}

int ha_call_next(ha_call *call)
{
    return !call->finished && (route_at_once(call) || route_with_care(call)); /* not timed: Python takes its own */
}

void ha_call_answer(ha_call *call, CK_RV rv)
{
    ha_call_done(call, rv);
}

/* A part that a member took or not before it failed must not reach it twice: what comes next begins at the Init.  The
 * objects of the session stay if the operation can be ended without it, as the answer may be the request's own fault;
 * with them the operation is left where it is if the call goes elsewhere, for who is suspected of hanging is not asked for more. */
static RARE void forget_half_taken(ha_call *call)
{
    ha_session *session = call->session;
    int m = call->member;
    bool there = session->active && session->member == m && session->at[m].epoch == call->epoch;
    if (!there || ha_rows[call->row].phase <= HA_PHASE_INIT || !ha_session_may_move(session)) return;
    if (!(session->owns >> m & 1))
        ha_call_leave(call, m);
    else if (!(call->tried >> m & 1))
        ha_session_renew(session, m);
}

/* Judges an answer that is not simply CKR_OK. */
void ha_call_judge(ha_call *call)
{
    const uint8_t *clean = atomic_load_explicit(&call->target->clean, memory_order_relaxed);
    if (call->rv == CKR_OK || (call->rv < HA_CODES && clean[call->rv])) {
        call->finished = 1;
        if (call->answered) ha_core.settled(call);
        return;
    }
    ha_remote_explain(call);
    if (ask_core(call, ha_core.decide)) forget_half_taken(call);
}

/* After the answer to a call that the data plane has made for itself, to end something: a dead answer loses a member as
 * any other does.  False: it is lost, and what was to be ended has ended. */
bool ha_call_survived(ha_call *call)
{
    const uint8_t *clean = atomic_load_explicit(&call->target->clean, memory_order_relaxed);
    if (call->rv >= HA_CODES || !clean[call->rv]) {
        ha_remote_explain(call);
        ha_core.failed(call);
    }
    return atomic_load(&call->target->epoch) == call->epoch;
}

/* A member would not repeat what another has done: it is passed over, unless its answer says more than that. */
void ha_call_refused(ha_call *call)
{
    const uint8_t *clean = atomic_load_explicit(&call->target->clean, memory_order_relaxed);
    if (call->rv < HA_CODES && clean[call->rv])
        call->tried |= 1U << call->member;
    else
        ask_core(call, ha_core.decide);
}

/* What the session has under way can be finished nowhere: it is told once. */
void ha_operations_lost(ha_call *call)
{
    ha_session *session = call->session;
    int m = session->member >= 0 ? session->member : call->member;
    call->member = m;
    if (m >= 0 && !(session->owns >> m & 1)) ha_session_drop(session, m);
    ha_session_end_operations(session, session->active);
    ha_core.operation_lost(call);
    finish(call, CKR_DEVICE_ERROR);
}

/* The virtual handle of an object that the call made on its member. */
CK_RV ha_call_adopt(ha_call *call, const CK_OBJECT_HANDLE *made, CK_OBJECT_HANDLE *object)
{
    *object = CK_INVALID_HANDLE;
    call->session->made |= 1U << call->member;
    return *made == CK_INVALID_HANDLE ? CKR_OK : ha_unseal(ha_core.adopt(call, *made, object));
}

ha_lengths ha_lengths_save(const CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    ha_lengths lengths = {.count = count, .length = NULL};
    CK_ULONG *length = lengths.few;
    if (count > sizeof lengths.few / sizeof *lengths.few) {
        length = lengths.length = calloc(count, sizeof *length); /* which knows what is too much */
        lengths.failed = !length;
    }
    for (CK_ULONG k = 0; length && k < count; k++) length[k] = attributes[k].ulValueLen;
    return lengths;
}

void ha_lengths_restore(const ha_lengths *lengths, CK_ATTRIBUTE *attributes)
{
    const CK_ULONG *length = lengths->length ? lengths->length : lengths->few;
    for (CK_ULONG k = 0; k < lengths->count; k++) attributes[k].ulValueLen = length[k];
}

/* What ha_bounded says of one output, of each of them; where there was too little room some tell how much they want. */
CK_RV ha_lengths_bounded(const ha_lengths *lengths, const CK_ATTRIBUTE *attributes, CK_RV rv)
{
    const CK_ULONG *capacity = lengths->length ? lengths->length : lengths->few;
    for (CK_ULONG k = 0; rv != CKR_BUFFER_TOO_SMALL && k < lengths->count; k++)
        if (attributes[k].pValue && attributes[k].ulValueLen > capacity[k] &&
            attributes[k].ulValueLen != CK_UNAVAILABLE_INFORMATION)
            return CKR_DEVICE_ERROR;
    return rv;
}

void ha_lengths_free(ha_lengths *lengths)
{
    free(lengths->length);
}

void ha_call_template(ha_call *call, const CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    for (CK_ULONG i = 0; i < count; i++)
        if (attributes[i].type == CKA_TOKEN && attributes[i].pValue && attributes[i].ulValueLen >= sizeof(CK_BBOOL) &&
            *(CK_BBOOL *)attributes[i].pValue)
            call->creates_token = 1;
}

static inline void begun(const ha_call *call, const struct ha_row *row)
{
    ha_session *session = call->session;
    struct ha_operation *operation = &session->operation[__builtin_ctz(row->ops)];
    if (call->rv != CKR_OK) {
        ha_operation_forget(operation);
        return;
    }
    if (!session->active) session->member = call->member;
    session->active |= row->ops;
    /* What the member has written into the parameter (an IV of its own) no other would write. */
    if (operation->parameter && !ha_mechanism_is(operation, call->mechanism)) operation->kept = false;
}

/* What the answer does to the session's operations (PKCS#11 5.2), then unlocks it. */
CK_RV ha_call_end(ha_call *call)
{
    const struct ha_row *row = &ha_rows[call->row];
    ha_session *session = call->session;
    CK_RV rv = call->rv;
    if (row->ops) {
        bool ends = false;
        switch (row->phase) {
        case HA_PHASE_INIT: begun(call, row); break;
        case HA_PHASE_UPDATE: ends = rv != CKR_OK && rv != CKR_BUFFER_TOO_SMALL; break;
        case HA_PHASE_SINGLE:
        case HA_PHASE_FINAL: ends = !(rv == CKR_OK && call->query) && rv != CKR_BUFFER_TOO_SMALL; break;
        default: break;
        }
        if (ends) ha_session_end_operations(session, row->ops);
    }
    if (call->mechanism_copy) free(call->mechanism_copy);
    if (call->input) ha_call_wipe_input(call);
    if (__builtin_expect(session->trial != 0, 0)) ha_trial_end(session);
    ha_session_unlock(session);
    return rv;
}
