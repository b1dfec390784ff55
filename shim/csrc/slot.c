/* Virtual slots: which members may serve (the core's decision, published as a mask) and which of them is next. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ha.h"

enum { MAX_SLOTS = 512 };

static ha_slot *slots[MAX_SLOTS];
static _Atomic unsigned slot_count;

ha_slot *ha_slot_new(CK_SLOT_ID id, unsigned balance, CK_ULONG replay_limit)
{
    unsigned n = atomic_load(&slot_count);
    if (n == MAX_SLOTS) return NULL;
    if (!slots[n]) {
        slots[n] = aligned_alloc(HA_CACHE_LINE, sizeof(ha_slot));
        if (slots[n]) slots[n]->count = 0;
    }
    ha_slot *slot = slots[n];
    if (!slot) return NULL;
    for (unsigned m = 0; slot->count && m < HA_MAX_MEMBERS; m++) free(slot->map[m].entries);
    memset(slot, 0, sizeof *slot);
    slot->id = id;
    slot->balance = balance;
    slot->replay_limit = replay_limit;
    atomic_store(&slot->check_at, UINT64_MAX);
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
    if (slot->count < HA_MAX_MEMBERS) slot->member[slot->count++] = member;
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

/* The next of several members: see ha_slot_choose.  Turns are counted among the candidates and go on behind the one
 * that was chosen, so that who is passed over does not leave its share to its neighbour alone. */
int ha_slot_balance(ha_session *session, uint32_t candidates)
{
    ha_slot *slot = session->slot;
    if (slot->balance == HA_BALANCE_PRIMARY_FIRST) return __builtin_ctz(candidates);

    unsigned many = (unsigned)__builtin_popcount(candidates), start = session->turn % many, best = start;
    int least = -1;
    for (unsigned k = 0; k < many && least != 0 && slot->balance == HA_BALANCE_LEAST_BUSY; k++) {
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
