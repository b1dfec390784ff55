/*
 * The data plane's own declarations: tables with atomics, the row of a function, and who may call what.
 *
 * Lock order: session word, then the session table's mutex, then a member's pool or map mutex.  No lock is held
 * over a call into a vendor library but the word of the session whose call it is (and, for a library that
 * answered CKR_CANT_LOCK, that member's `one_call`).
 */
#ifndef PKCS11_HA_HA_H
#define PKCS11_HA_HA_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pkcs11.h"
#include "pkcs11_ha.h"

#include "core_abi.h"

#include "functions.gen.h" /* FN_C_*, HA_FUNCTIONS, struct ha_row, HA_OP_*, HA_PHASE_* */
#include "segment.gen.h"   /* struct ha_counters, HA_LOAD_BITS */

#define RARE __attribute__((noinline)) /* kept out of the usual path, which then needs fewer registers */
#define HA_EXPORT __attribute__((visibility("default")))

enum { HA_MAX_MEMBERS = 32, HA_CACHE_LINE = 64, HA_POOL = 64, HA_CODES = 512 };

/* The core's answers carry a seal in their upper half, so that the 0 which cffi returns when Python could not
 * run can never be read as CKR_OK. */
#define HA_SEAL 0x5041C0DE00000000ULL
#define HA_AGAIN 0xFFFFFFFFUL /* the core's "look again": never reaches an application */
CK_RV ha_unseal(uint64_t answer);

struct ha_member {
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t epoch; /* changes at every loss and every return */
    struct ha_counters *counters;                   /* in the status segment, if there is one */
    bool special;                                   /* one of the two that follow */
    bool guard_sigpipe;
    bool one_call_at_a_time;
    const uint8_t *_Atomic clean;
    CK_SLOT_ID slot_id;
    void *functions[HA_FUNCTIONS];
    char name[64], serial[20];
    pthread_mutex_t one_call;
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t latency[HA_WORKS][HA_BUCKETS]; /* calls timed, by kind of work */
};

/* From the object handles of one member to the virtual ones of one slot. */
struct ha_map {
    pthread_mutex_t lock;
    struct ha_map_entry *entries;
    size_t size, used;
    uint32_t epoch;
};

/* Idle sessions of one member in one virtual slot, by the flags they were opened with. */
struct ha_pool {
    pthread_mutex_t lock;
    uint32_t epoch;
    unsigned count;
    CK_SESSION_HANDLE idle[HA_POOL];
};

struct ha_slot {
    CK_SLOT_ID id;
    _Atomic unsigned balance; /* HA_BALANCE_* */
    _Atomic unsigned count;   /* only grows: a member that leaves keeps its place, and serves no more */
    ha_member *member[HA_MAX_MEMBERS];
    struct ha_pool pool[HA_MAX_MEMBERS][2]; /* read-only, read-write */
    struct ha_map map[HA_MAX_MEMBERS];
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t serving; /* members that may take new work; the core's decision */
    _Atomic uint32_t up;                              /* all that are there, standbys too */
    _Atomic uint64_t check_at;                        /* monotonic ns after which the recovery check is due */
    _Atomic uint64_t look_at; /* and after which the members are to be compared; UINT64_MAX: never */
    _Atomic unsigned ordered; /* so many of `order` stand; 0: the order of `member` */
    _Atomic uint8_t order[HA_MAX_MEMBERS];
    _Atomic uint32_t limited; /* of `serving`: those whose `share` is not the whole */
    _Atomic CK_ULONG login;
    _Atomic bool write_protected;
    size_t replay_limit;     /* bytes of input kept of one operation */
    _Atomic bool replicates; /* objects made here are to be on every member: the core sees to it */
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t turn;
    _Alignas(HA_CACHE_LINE) _Atomic CK_ULONG sessions;
    _Atomic CK_ULONG rw_sessions;
    _Atomic uint64_t trials;               /* members to be tried by one operation; << 32: those that are being */
    _Atomic uint8_t share[HA_MAX_MEMBERS]; /* of what would be their load, of HA_WHOLE; 0: ejected */
};

enum { HA_BALANCE_LEAST_BUSY, HA_BALANCE_ROUND_ROBIN, HA_BALANCE_PRIMARY_FIRST };

/* What is kept of an operation, so that it can be repeated on another member: see replay.c. */
struct ha_operation {
    bool kept;            /* all of it is known */
    CK_OBJECT_HANDLE key; /* virtual, 0: none */
    CK_MECHANISM mechanism;
    void *parameter; /* our deep copy, wiped and freed with the operation */
    size_t parameter_size;
    unsigned char *journal;                         /* what it has taken and given since its Init; NULL: nothing */
    size_t journal_room, journal_last, journal_end; /* where its last entry is, and ends */
    size_t taken;                                   /* bytes of input in it */
};

enum { HA_HIDDEN = -1 }; /* as a virtual handle: an object that applications do not see */

struct ha_session {
    _Alignas(HA_CACHE_LINE) _Atomic uint64_t word; /* handle << 2 | waiters | locked */
    ha_slot *slot;
    CK_FLAGS flags;
    uint32_t active;     /* operations under way, HA_OP_* */
    uint32_t in_message; /* those of them that are inside a message which cannot be repeated */
    int member;          /* that they run on, -1: none yet */
    int last_member;     /* that served last */
    uint32_t turn;       /* of its choices among members that are equally busy */
    uint32_t owns;       /* members on which this session has session objects */
    uint32_t made;       /* members that have made an object which no other has */
    bool finding;
    CK_OBJECT_HANDLE *found;
    size_t found_count, found_next;
    struct ha_operation operation[HA_OPS];
    struct {
        CK_SESSION_HANDLE handle;
        uint32_t epoch; /* of the member when it was opened; 0: none */
    } at[HA_MAX_MEMBERS];
    uint32_t trial;   /* the member, as a mask, whose trial the operation under way is */
    uint32_t untimed; /* calls to come whose time is not taken */
    uint32_t chance;
    uint32_t index, next_free; /* in the session table */
    CK_SESSION_HANDLE next_handle;
};

/* ---- the few steps of every call, inline ---- */

enum { HA_SESSION_BITS = 20, HA_SESSION_CHUNK = 64 };
#define HA_LOCKED 1ULL
#define HA_WORD(handle) ((uint64_t)(handle) << 2)

extern ha_session *_Atomic ha_session_chunks[(1 << HA_SESSION_BITS) / HA_SESSION_CHUNK];
extern _Atomic bool ha_forking;
ha_session *ha_session_lock_slowly(ha_session *session, CK_SESSION_HANDLE handle);
void ha_session_unlock_slowly(ha_session *session);
bool ha_member_enter_specially(ha_member *member, uint32_t epoch, ha_call *call);
void ha_member_leave_specially(ha_member *member, ha_call *call);
void ha_wait_for_fork(void);
int ha_slot_balance(ha_session *session, uint32_t candidates);
int ha_slot_first_in_order(ha_slot *slot, uint32_t candidates);
void ha_call_judge(ha_call *call);
void ha_check_when_due(ha_slot *slot, uint64_t check_at);
void ha_latency_sample(ha_call *call);
void ha_latency_end(ha_call *call, CK_RV rv);

/* The recovery check of every call: one load while all members are up, else a look at the clock. */
static inline void ha_gate(ha_slot *slot)
{
    uint64_t check_at = atomic_load_explicit(&slot->check_at, memory_order_relaxed);
    if (__builtin_expect(check_at != UINT64_MAX, 0)) ha_check_when_due(slot, check_at);
}

/* One thread at a time in a session; NULL: CKR_SESSION_HANDLE_INVALID. */
static inline ha_session *ha_session_lock(CK_SESSION_HANDLE handle)
{
    uint32_t index = (uint32_t)(handle & ((1UL << HA_SESSION_BITS) - 1));
    ha_session *chunk = atomic_load_explicit(&ha_session_chunks[index / HA_SESSION_CHUNK], memory_order_acquire);
    if (__builtin_expect(!chunk || handle >> HA_SESSION_BITS == 0 || handle >> 61, 0)) return NULL;
    ha_session *session = &chunk[index % HA_SESSION_CHUNK];
    uint64_t word = HA_WORD(handle);
    if (atomic_compare_exchange_strong_explicit(&session->word, &word, HA_WORD(handle) | HA_LOCKED,
                                                memory_order_acquire, memory_order_relaxed))
        return session;
    return ha_session_lock_slowly(session, handle);
}

static inline void ha_session_unlock(ha_session *session)
{
    uint64_t held = atomic_load_explicit(&session->word, memory_order_relaxed) & ~3ULL;
    uint64_t word = held | HA_LOCKED;
    if (!atomic_compare_exchange_strong_explicit(&session->word, &word, held, memory_order_release,
                                                 memory_order_relaxed))
        ha_session_unlock_slowly(session); /* somebody waits */
}

/* One call in 2^HA_SAMPLED_BITS, by steps of the golden ratio: 34, 55 or 89 calls apart, so that no pattern of an
 * application's (an Init, then its Sign) stands against it. */
static inline bool ha_is_sample(uint64_t calls)
{
    return (uint32_t)calls * 0x9E3779B9U < 1U << (32 - HA_SAMPLED_BITS);
}

/*
 * Counted first, then checked: whoever changes the epoch and then waits until nobody is inside knows that no
 * call with handles of the old epoch can still start (both sides sequentially consistent).
 */
static inline bool ha_enter(ha_member *member, uint32_t epoch, ha_call *call)
{
    _Atomic uint64_t *load = &member->counters->load;
    uint64_t before = atomic_fetch_add(load, (1UL << HA_LOAD_BITS) | 1);
    while (__builtin_expect(atomic_load(&ha_forking), 0)) {
        atomic_fetch_sub(load, 1);
        ha_wait_for_fork();
        atomic_fetch_add(load, 1);
    }
    if (__builtin_expect(atomic_load(&member->epoch) != epoch, 0)) {
        atomic_fetch_sub(load, 1);
        return false;
    }
    if (member->special && !ha_member_enter_specially(member, epoch, call)) return false;
    if (__builtin_expect(ha_is_sample(before >> HA_LOAD_BITS), 0)) ha_latency_sample(call);
    return true;
}

static inline void ha_leave(ha_member *member, ha_call *call)
{
    if (member->special) ha_member_leave_specially(member, call);
    atomic_fetch_sub(&member->counters->load, 1);
}

static inline int ha_in_flight(ha_member *member)
{
    return (int)(atomic_load_explicit(&member->counters->load, memory_order_relaxed) & ((1UL << HA_LOAD_BITS) - 1));
}

/* The primary among `candidates` (never 0). */
static inline int ha_slot_first(ha_slot *slot, uint32_t candidates)
{
    bool moved = __builtin_expect(atomic_load_explicit(&slot->ordered, memory_order_relaxed) != 0, 0);
    return moved ? ha_slot_first_in_order(slot, candidates) : __builtin_ctz(candidates);
}

/*
 * The next member among `candidates` (never 0).  The core decides who may serve; which of them is least busy
 * only the data plane can know at this moment.  Ties go round, session by session: a turn that all threads share
 * would be a cache line they fight over.
 */
static inline int ha_slot_choose(ha_session *session, uint32_t candidates, bool primary)
{
    if (!(candidates & (candidates - 1))) return __builtin_ctz(candidates);
    if (primary) return ha_slot_first(session->slot, candidates);
    return ha_slot_balance(session, candidates);
}

/* A number that follows no pattern of the application's (a linear congruential generator). */
static inline uint32_t ha_session_chance(ha_session *session)
{
    session->chance = session->chance * 1664525U + 1013904223U;
    return session->chance >> 8;
}

/* What is read before it is written; the rest of the structure need not be touched at every call. */
static inline void ha_call_init(ha_call *call, unsigned row)
{
    call->session = NULL;
    call->mechanism = NULL;
    call->mechanism_copy = NULL;
    call->input = NULL;
    call->rv = call->first_rv = CKR_OK;
    call->row = row;
    call->member = -1;
    call->tried = call->suspects = call->late = call->answered = call->repairs = call->objects = 0;
    call->sent = call->finished = call->creates_token = call->query = 0;
    call->translate = call->alone = call->guarded = call->sampled = call->compared = 0;
    call->began_ns = call->size = 0;
}

/* ---- session.c ---- */
CK_RV ha_session_open_member(ha_session *session, int member, uint32_t epoch);
void ha_sessions_close_all(ha_slot *slot);
void ha_sessions_after_fork(void);

/* ---- member.c ---- */
unsigned char ha_guard_enter(void); /* around what may write to a socket whose peer is dead */
void ha_guard_leave(unsigned char guarded);
void ha_members_before_fork(void);
void ha_members_after_fork(bool child);

/* ---- slot.c ---- */
ha_slot *ha_slot_by_id(CK_SLOT_ID id);
void ha_slots_reset(void);

uint32_t ha_slot_limit(const ha_call *call, uint32_t may);
void ha_trial_end(ha_session *session);

/* ---- watch.c ---- */
void ha_watch_after_fork(void);

/* ---- latency.c ---- */
void ha_latency_begin(ha_call *call);

/* ---- segment.c ---- */
struct ha_counters *ha_counters_take(void);
void ha_counters_give_back(struct ha_counters *counters);
void ha_segments_before_fork(void);
void ha_segments_after_fork(bool child);

/* ---- object.c ---- */
bool ha_object_valid(CK_OBJECT_HANDLE object, ha_slot *slot);
int ha_object_preferred(CK_OBJECT_HANDLE object);
uint32_t ha_object_absent_mask(CK_OBJECT_HANDLE object);
CK_OBJECT_HANDLE ha_object_at(CK_OBJECT_HANDLE object, int member, uint32_t epoch);
void ha_objects_virtual(ha_slot *slot, int member, uint32_t epoch, const CK_OBJECT_HANDLE *member_objects, size_t count,
                        CK_OBJECT_HANDLE *objects);
void ha_objects_reset(void);
void ha_objects_after_fork(void);

/* ---- mechanism.c ---- */
struct ha_parameter { /* layout of one mechanism parameter structure, generated; size 0: plain bytes */
    size_t size;
    bool kept;
    unsigned buffers, handles, made;
    struct {
        size_t pointer, length;
    } buffer[4];
    size_t handle[4];
    size_t made_pointer, made_handle[4];
};
const struct ha_parameter *ha_parameter_of(CK_MECHANISM_TYPE type); /* generated; NULL: not in the table */
void ha_mechanism_keep(struct ha_operation *operation);
void ha_operation_wipe(struct ha_operation *operation);
bool ha_mechanism_is(const struct ha_operation *kept, const CK_MECHANISM *mechanism);
bool ha_mechanism_restore(struct ha_operation *operation);
bool ha_message_repeatable(CK_MECHANISM_TYPE type, const void *parameter, CK_ULONG size); /* generated */
void ha_journal_wipe(struct ha_operation *operation);
static inline void ha_operation_forget(struct ha_operation *operation)
{
    if (operation->parameter) ha_operation_wipe(operation);
    if (operation->journal) ha_journal_wipe(operation);
    operation->kept = false;
}
CK_RV ha_mechanism_objects(ha_call *call);
CK_RV ha_mechanism_translate(ha_call *call);
CK_RV ha_mechanism_adopt(ha_call *call);
bool ha_mechanism_makes(const CK_MECHANISM *mechanism);
bool ha_derivation_data(const CK_MECHANISM *mechanism, CK_PRF_DATA_PARAM **data, CK_ULONG *count); /* generated */

static inline void ha_session_end_operations(ha_session *session, uint32_t ops)
{
    for (uint32_t left = ops; left; left &= left - 1) ha_operation_forget(&session->operation[__builtin_ctz(left)]);
    session->active &= ~ops;
    session->in_message &= ~ops;
}

/* ---- call.c ---- */
bool ha_call_begin(ha_call *call, CK_SESSION_HANDLE session);
bool ha_call_route(ha_call *call);
CK_RV ha_call_adopt(ha_call *call, const CK_OBJECT_HANDLE *made, CK_OBJECT_HANDLE *object);
CK_RV ha_call_end(ha_call *call);
bool ha_call_replicates(const ha_call *call);
bool ha_call_has_choice(const ha_call *call);
void ha_call_template(ha_call *call, const CK_ATTRIBUTE *attributes, CK_ULONG count);
void ha_call_refused(ha_call *call);
bool ha_call_survived(ha_call *call);
void ha_operations_lost(ha_call *call);

/* ---- cancel.c ---- */
void ha_session_leave(ha_session *session, int member, uint32_t ops);
void ha_call_leave(ha_call *call, int member);
CK_RV ha_session_cancel(ha_session *session, uint32_t ops);
/* Generated: the last call of one operation, with whatever data. */
CK_RV ha_finish(ha_call *call, unsigned op, unsigned char *out, CK_ULONG out_size);

/* ---- replay.c ---- */
void ha_journal(ha_call *call, unsigned op, unsigned row, const void *in, CK_ULONG in_size, const void *out,
                CK_ULONG out_size);
bool ha_journal_restore(struct ha_operation *operation, unsigned op, const void *journal, size_t size);
uint32_t ha_without_operation_keys(const ha_session *session, uint32_t candidates);
void ha_repeat_operations(ha_call *call);
void ha_call_copy_input(ha_call *call, CK_BYTE_PTR *in, CK_ULONG size);
void ha_call_wipe_input(ha_call *call);
/* A part of an operation; a message's may have a parameter. */
struct ha_part {
    void *parameter;
    CK_ULONG parameter_size;
    const unsigned char *in;
    CK_ULONG in_size;
    unsigned char *out; /* for `out_size` bytes, which becomes how many there are */
    CK_ULONG out_size;
};
/* Generated: the Init of one operation, and a part that it has taken, on the call's member. */
CK_RV ha_replay(ha_call *call, unsigned op, const unsigned char *in, CK_ULONG in_size);
CK_RV ha_replay_part(ha_call *call, struct ha_part *part);

/* Input that lies where the output goes is copied: who comes second must not be given what the first has made of it. */
static inline void ha_call_keep_apart(ha_call *call, CK_BYTE_PTR *in, CK_ULONG size, const CK_BYTE *out, CK_ULONG room)
{
    const uintptr_t from = (uintptr_t)*in, to = (uintptr_t)out;
    if (__builtin_expect(out && (to - from < size || from - to < room), 0)) ha_call_copy_input(call, in, size);
}

/* A length of more than there was room for is no answer: what it counts is somebody else's memory. */
static inline CK_RV ha_bounded(CK_RV rv, const void *out, const CK_ULONG *length, CK_ULONG capacity)
{
    return __builtin_expect(rv == CKR_OK && out && *length > capacity, 0) ? CKR_DEVICE_ERROR : rv;
}

enum ha_message_phase { HA_MESSAGE_WHOLE, HA_MESSAGE_BEGINS, HA_MESSAGE_GOES_ON, HA_MESSAGE_ENDS };
void ha_message_taken(ha_call *call, enum ha_message_phase phase, const struct ha_part *part);

/* ---- message.c ---- */
bool ha_message_kept_size(CK_MECHANISM_TYPE mechanism, const struct ha_part *part, uint32_t *size);
void ha_message_keep(CK_MECHANISM_TYPE mechanism, const struct ha_part *part, unsigned char *at);
void ha_message_restore(CK_MECHANISM_TYPE mechanism, unsigned char *kept, struct ha_part *part);

/* ---- remote.c: the parameter that comes next is of this call's message, and does not say itself what it is ---- */
void ha_message_of(const ha_call *call);
/* What the answer of a stub, just called, does not say: its limit has passed. */
void ha_remote_explain(ha_call *call);

/* ---- state.c ---- */
void ha_states_forget(void);

typedef struct { /* what C_GetAttributeValue's lengths were, for a second member */
    CK_ULONG few[16], *length, count;
    bool failed;
} ha_lengths;
ha_lengths ha_lengths_save(const CK_ATTRIBUTE *attributes, CK_ULONG count);
void ha_lengths_restore(const ha_lengths *lengths, CK_ATTRIBUTE *attributes);
CK_RV ha_lengths_bounded(const ha_lengths *lengths, const CK_ATTRIBUTE *attributes, CK_RV rv);
void ha_lengths_free(ha_lengths *lengths);

/* ---- boot.c ---- */
extern CK_FUNCTION_LIST ha_list_2_40; /* generated */
extern CK_FUNCTION_LIST_3_0 ha_list_3_0;
extern CK_FUNCTION_LIST_3_2 ha_list_3_2;
bool ha_python_start(char *error, size_t error_size);
void ha_python_before_fork(void);
void ha_python_after_fork(bool child);
void ha_wait_begin(void); /* around a wait: lets go of the GIL if the caller, a Python host, holds it */
void ha_wait_end(void);
bool ha_running(void);
CK_RV ha_enter_core(void);
void ha_leave_core(void);

/* Takes the answer of the member just called. */
static inline void ha_call_done(ha_call *call, CK_RV rv)
{
    ha_leave(call->target, call);
    if (__builtin_expect(call->began_ns != 0, 0)) ha_latency_end(call, rv);
    if (__builtin_expect(rv >= HA_AGAIN, 0))
        rv = CKR_GENERAL_ERROR; /* more bits than any CKR_*: the seal has no room */
    call->rv = rv;
    call->session->last_member = call->member;
    if (__builtin_expect(rv == CKR_OK && !call->answered, 1))
        call->finished = 1;
    else
        ha_call_judge(call);
}

/* ---- native entry points, called by the generated ones after the checks that all share ---- */
#define HA_NATIVE(name, args) CK_RV native_##name args;
HA_NATIVE_FUNCTIONS(HA_NATIVE)
#undef HA_NATIVE

extern const struct ha_row ha_rows[HA_FUNCTIONS];

/* ---- the core's functions, attached by Python ---- */
#include "upcalls.gen.h"
extern const struct ha_upcalls ha_core;

#endif
