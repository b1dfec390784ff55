/* Virtual slots: which members may serve (the core's decision, published as a mask) and which of them is next. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ha.h"

enum { MAX_SLOTS = 512 };

#define BEING_TRIED(members) ((uint64_t)(members) << 32)

static ha_slot *slots[MAX_SLOTS];
static _Atomic unsigned slot_count;

ha_slot *ha_slot_new(CK_SLOT_ID id, unsigned balance, CK_ULONG replay_limit)
{
    unsigned n = atomic_load(&slot_count);
    if (n == MAX_SLOTS) return NULL;
    if (!slots[n]) {
        slots[n] = aligned_alloc(HA_CACHE_LINE, sizeof(ha_slot));
        if (slots[n]) atomic_init(&slots[n]->count, 0);
    }
    ha_slot *slot = slots[n];
    if (!slot) return NULL;
    for (unsigned m = 0; slot->count && m < HA_MAX_MEMBERS; m++) free(slot->map[m].entries);
    memset(slot, 0, sizeof *slot);
    slot->id = id;
    slot->balance = balance;
    slot->replay_limit = replay_limit;
    atomic_store(&slot->check_at, UINT64_MAX);
    atomic_store(&slot->look_at, UINT64_MAX);
    /* Programs that live for one call each must not all begin with the same member. */
    atomic_store(&slot->turn, (uint32_t)getpid());
    atomic_store(&slot->login, CK_UNAVAILABLE_INFORMATION);
    for (unsigned m = 0; m < HA_MAX_MEMBERS; m++) {
        pthread_mutex_init(&slot->map[m].lock, NULL);
        for (unsigned rw = 0; rw < 2; rw++) pthread_mutex_init(&slot->pool[m][rw].lock, NULL);
    }
    atomic_store(&slot_count, n + 1);
    return slot;
}

void ha_slot_add(ha_slot *slot, ha_member *member)
{
    unsigned n = atomic_load(&slot->count);
    if (n == HA_MAX_MEMBERS) return;
    slot->member[n] = member;
    atomic_store(&slot->count, n + 1);
}

void ha_slot_order(ha_slot *slot, unsigned char *order, unsigned count)
{
    bool moved = false;
    for (unsigned k = 0; k < count && k < HA_MAX_MEMBERS; k++) {
        atomic_store(&slot->order[k], order[k]);
        moved = moved || order[k] != k;
    }
    atomic_store(&slot->ordered, moved ? count : 0);
}

/* While the order changes a call may see some of both: whom it finds may serve, at least. */
RARE int ha_slot_first_in_order(ha_slot *slot, uint32_t candidates)
{
    unsigned n = atomic_load(&slot->ordered);
    for (unsigned k = 0; k < n; k++) {
        uint8_t member = atomic_load(&slot->order[k]);
        if (candidates >> member & 1) return member;
    }
    return __builtin_ctz(candidates);
}

void ha_slot_balance_by(ha_slot *slot, unsigned balance)
{
    atomic_store(&slot->balance, balance);
}

/* Slots of an ended run stay where they are for the next: a thread that came too late may still look at one. */
void ha_slots_reset(void)
{
    atomic_store(&slot_count, 0);
}

ha_slot *ha_slot_by_id(CK_SLOT_ID id)
{
    unsigned n = atomic_load(&slot_count);
    for (unsigned i = 0; i < n; i++)
        if (slots[i]->id == id) return slots[i];
    return NULL;
}

CK_SLOT_ID ha_slot_id(ha_slot *slot)
{
    return slot->id;
}

void ha_slot_serving(ha_slot *slot, unsigned serving, unsigned up)
{
    atomic_store(&slot->up, up);
    atomic_store(&slot->serving, serving);
}

void ha_slot_replicates(ha_slot *slot)
{
    atomic_store(&slot->replicates, true);
}

void ha_slot_check_at(ha_slot *slot, unsigned long long monotonic_ns)
{
    atomic_store(&slot->check_at, monotonic_ns);
}

void ha_slot_look_at(ha_slot *slot, unsigned long long monotonic_ns)
{
    atomic_store(&slot->look_at, monotonic_ns);
}

void ha_slot_share(ha_slot *slot, int member, unsigned share)
{
    uint32_t bit = 1U << member;
    if (share) atomic_fetch_and(&slot->trials, ~(uint64_t)bit);
    atomic_store(&slot->share[member], (uint8_t)share);
    if (share < HA_WHOLE)
        atomic_fetch_or(&slot->limited, bit);
    else
        atomic_fetch_and(&slot->limited, ~bit);
}

void ha_slot_try(ha_slot *slot, int member)
{
    atomic_fetch_and(&slot->trials, ~BEING_TRIED(1U << member));
    atomic_fetch_or(&slot->trials, 1U << member);
}

int ha_slot_trial(ha_slot *slot, int member)
{
    uint64_t trials = atomic_load(&slot->trials);
    return trials >> member & 1 ? 0 : trials & BEING_TRIED(1U << member) ? 1 : 2;
}

void ha_slot_login(ha_slot *slot, CK_ULONG user, int write_protected)
{
    atomic_store(&slot->login, user);
    atomic_store(&slot->write_protected, write_protected != 0);
}

CK_ULONG ha_slot_sessions(ha_slot *slot, int read_write)
{
    return read_write ? atomic_load(&slot->rw_sessions) : atomic_load(&slot->sessions);
}

static int nth(uint32_t mask, unsigned n)
{
    while (n--) mask &= mask - 1;
    return __builtin_ctz(mask);
}

/* An operation that begins here, and that another member can begin anew should this one fail. */
static bool may_be_trial(const ha_call *call)
{
    const struct ha_row *row = &ha_rows[call->row];
    return row->phase == HA_PHASE_INIT && !call->session->active && !call->tried;
}

/* One of the members' trials, for one call alone; 0: there is none. */
static uint32_t take_trial(ha_slot *slot, uint32_t members)
{
    uint64_t trials = atomic_load(&slot->trials);
    while (trials & members) {
        uint32_t open = (uint32_t)trials & members, one = open & -open;
        if (atomic_compare_exchange_weak(&slot->trials, &trials, (trials & ~(uint64_t)one) | BEING_TRIED(one)))
            return one;
    }
    return 0;
}

/*
 * Of the members that can do it, those that take it: an ejected one only what no other can, its trial, or what it has
 * the rest of; one that has been tried its share, by chance.  What is made goes where it would go, however slow that
 * is: it must not be scattered.
 */
RARE uint32_t ha_slot_limit(const ha_call *call, uint32_t may)
{
    ha_slot *slot = call->slot;
    ha_session *session = call->session;
    const struct ha_row *row = &ha_rows[call->row];
    uint32_t limited = atomic_load(&slot->limited) & may, ejected = 0, passed = 0;
    if (!limited || call->alone || call->creates_token || (row->gathers && may & session->made)) return may;
    for (uint32_t left = limited; left; left &= left - 1) {
        unsigned share = atomic_load(&slot->share[__builtin_ctz(left)]);
        if (!share)
            ejected |= left & -left;
        else if (ha_session_chance(session) % HA_WHOLE >= share)
            passed |= left & -left;
    }
    if (ejected && may_be_trial(call) && (session->trial = take_trial(slot, ejected))) return session->trial;
    if (may & ~ejected) may &= ~ejected;
    return may & ~passed && !row->primary ? may & ~passed : may;
}

/* Not before the last call of its operation. */
void ha_trial_end(ha_session *session)
{
    if (session->active) return;
    atomic_fetch_and(&session->slot->trials, ~BEING_TRIED(session->trial));
    session->trial = 0;
}

/* The next of several members: see ha_slot_choose.  Turns are counted among the candidates and go on behind the one
 * that was chosen, so that who is passed over does not leave its share to its neighbour alone. */
int ha_slot_balance(ha_session *session, uint32_t candidates)
{
    ha_slot *slot = session->slot;
    unsigned balance = atomic_load_explicit(&slot->balance, memory_order_relaxed);
    if (balance == HA_BALANCE_PRIMARY_FIRST) return ha_slot_first(slot, candidates);

    unsigned many = (unsigned)__builtin_popcount(candidates), start = session->turn % many, best = start;
    int least = -1;
    for (unsigned k = 0; k < many && least != 0 && balance == HA_BALANCE_LEAST_BUSY; k++) {
        unsigned turn = (start + k) % many;
        int busy = ha_in_flight(slot->member[nth(candidates, turn)]);
        if (least < 0 || busy < least) {
            least = busy;
            best = turn;
        }
    }
    session->turn = best + 1;
    return nth(candidates, best);
}
