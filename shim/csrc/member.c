/* Members: the vendor's functions behind one row index each, the epoch that dates every handle, calls in flight. */
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ha.h"

enum { MAX_MEMBERS = 1024, FORK_PATIENCE_MS = 250 };

static ha_member *members[MAX_MEMBERS]; /* a fork waits for their calls */
static pthread_mutex_t members_lock = PTHREAD_MUTEX_INITIALIZER;
_Atomic bool ha_forking;

ha_member *ha_member_new(void)
{
    ha_member *member = aligned_alloc(HA_CACHE_LINE, sizeof *member);
    if (!member) return NULL;
    memset(member, 0, sizeof *member);
    member->counters = ha_counters_take();
    if (!member->counters) {
        free(member);
        return NULL;
    }
    pthread_mutex_init(&member->one_call, NULL);
    atomic_store(&member->epoch, 1);
    pthread_mutex_lock(&members_lock);
    for (unsigned m = 0; m < MAX_MEMBERS; m++)
        if (!members[m]) {
            members[m] = member;
            break;
        }
    pthread_mutex_unlock(&members_lock);
    return member;
}

/* For a member in which no call can be any more. */
void ha_member_free(ha_member *member)
{
    pthread_mutex_lock(&members_lock);
    for (unsigned m = 0; m < MAX_MEMBERS; m++)
        if (members[m] == member) members[m] = NULL;
    pthread_mutex_unlock(&members_lock);
    pthread_mutex_destroy(&member->one_call);
    ha_counters_give_back(member->counters);
    free(member);
}

void ha_member_function(ha_member *member, unsigned row, void *function)
{
    if (row < HA_FUNCTIONS) member->functions[row] = function;
}

void *ha_member_pointer(ha_member *member, unsigned row)
{
    return row < HA_FUNCTIONS ? member->functions[row] : NULL;
}

void ha_member_slot(ha_member *member, CK_SLOT_ID slot)
{
    member->slot_id = slot;
}

CK_SLOT_ID ha_member_slot_id(ha_member *member)
{
    return member->slot_id;
}

void ha_member_names(ha_member *member, char *name, char *serial)
{
    strncpy(member->name, name, sizeof member->name - 1);
    memset(member->serial, 0, sizeof member->serial);
    strncpy(member->serial, serial, sizeof member->serial - 1);
}

void ha_member_traits(ha_member *member, int guard_sigpipe, int one_call_at_a_time)
{
    member->guard_sigpipe = guard_sigpipe != 0;
    member->one_call_at_a_time = one_call_at_a_time != 0;
    member->special = member->guard_sigpipe || member->one_call_at_a_time;
}

void ha_member_clean(ha_member *member, unsigned char *clean)
{
    atomic_store(&member->clean, clean);
}

unsigned ha_member_epoch(ha_member *member)
{
    return atomic_load(&member->epoch);
}

unsigned ha_member_new_epoch(ha_member *member)
{
    unsigned epoch = atomic_fetch_add(&member->epoch, 1) + 1;
    return epoch ? epoch : atomic_fetch_add(&member->epoch, 1) + 1; /* 0 means "none" in every table */
}

int ha_member_in_flight(ha_member *member)
{
    return (int)(atomic_load(&member->counters->load) & ((1UL << HA_LOAD_BITS) - 1));
}

unsigned long long ha_member_calls(ha_member *member)
{
    return atomic_load_explicit(&member->counters->load, memory_order_relaxed) >> HA_LOAD_BITS;
}

/*
 * A library that writes to a socket whose peer died would raise SIGPIPE, and its default action ends the
 * application.  The signal is blocked for this thread and a pending one is taken off afterwards; the
 * application's disposition is never touched.  0 as it was, 1 to unblock, 2 pending before us.
 */
unsigned char ha_guard_enter(void)
{
    sigset_t pipe, before, pending;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, &before);
    if (!sigismember(&before, SIGPIPE)) return 1;
    sigpending(&pending);
    return sigismember(&pending, SIGPIPE) ? 2 : 0;
}

void ha_guard_leave(unsigned char guarded)
{
    sigset_t pipe;
    const struct timespec now = {0, 0};
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    if (guarded != 2) {
        sigset_t pending;
        sigpending(&pending);
        if (sigismember(&pending, SIGPIPE)) sigtimedwait(&pipe, NULL, &now);
    }
    if (guarded == 1) pthread_sigmask(SIG_UNBLOCK, &pipe, NULL);
}

RARE void ha_wait_for_fork(void)
{
    while (atomic_load_explicit(&ha_forking, memory_order_acquire)) sched_yield();
}

RARE bool ha_member_enter_specially(ha_member *member, uint32_t epoch, ha_call *call)
{
    if (member->one_call_at_a_time) {
        if (pthread_mutex_trylock(&member->one_call) != 0) { /* its holder may need the GIL to let go */
            ha_wait_begin();
            pthread_mutex_lock(&member->one_call);
            ha_wait_end();
        }
        if (atomic_load(&member->epoch) != epoch) { /* lost while this call waited its turn */
            pthread_mutex_unlock(&member->one_call);
            atomic_fetch_sub(&member->counters->load, 1);
            return false;
        }
    }
    if (member->guard_sigpipe) call->guarded = ha_guard_enter();
    return true;
}

RARE void ha_member_leave_specially(ha_member *member, ha_call *call)
{
    if (member->guard_sigpipe) ha_guard_leave(call->guarded);
    if (member->one_call_at_a_time) pthread_mutex_unlock(&member->one_call);
}

int ha_member_enter(ha_member *member, unsigned epoch, ha_call *call)
{
    return ha_enter(member, epoch, call);
}

void ha_member_leave(ha_member *member, ha_call *call)
{
    ha_leave(member, call);
}

/*
 * A child inherits the locks inside vendor libraries as they are, held by threads it does not have.  So a fork
 * waits a moment until no call is inside one.  Only a moment: the fork may itself come from inside a call.
 */
void ha_members_before_fork(void)
{
    const struct timespec a_moment = {0, 1000000};
    pthread_mutex_lock(&members_lock);
    atomic_store(&ha_forking, true);
    for (unsigned waited = 0; waited < FORK_PATIENCE_MS; waited++) {
        int in_flight = 0;
        for (unsigned m = 0; m < MAX_MEMBERS; m++)
            if (members[m]) in_flight += ha_in_flight(members[m]);
        if (!in_flight) break;
        nanosleep(&a_moment, NULL);
    }
}

void ha_members_after_fork(bool child)
{
    if (child) memset(members, 0, sizeof members); /* calls in them are the parent's: no fork of ours waits for those */
    atomic_store(&ha_forking, false);
    pthread_mutex_unlock(&members_lock);
}
