/* Virtual slots: which members may serve (the core's decision, published as a mask) and which of them is next. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ha.h"

enum { MAX_SLOTS = 512 };

static ha_slot *slots[MAX_SLOTS];
static _Atomic unsigned slot_count;

ha_slot *ha_slot_new(CK_SLOT_ID id, unsigned balance)
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

void ha_slot_serving(ha_slot *slot, unsigned mask)
{
    atomic_store(&slot->serving, mask);
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

/* The next of several members: see ha_slot_choose. */
int ha_slot_balance(ha_session *session, uint32_t candidates)
{
    ha_slot *slot = session->slot;
    int best = __builtin_ctz(candidates), least = -1;
    if (slot->balance == HA_BALANCE_PRIMARY_FIRST) return best;

    unsigned start = session->turn++ % slot->count;
    for (unsigned k = 0; k < slot->count; k++) {
        unsigned m = start + k < slot->count ? start + k : start + k - slot->count;
        if (!(candidates >> m & 1)) continue;
        if (slot->balance == HA_BALANCE_ROUND_ROBIN) return (int)m;
        int busy = ha_in_flight(slot->member[m]);
        if (least < 0 || busy < least) {
            least = busy;
            best = (int)m;
            if (busy == 0) break;
        }
    }
    return best;
}
