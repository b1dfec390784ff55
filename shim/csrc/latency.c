/*
 * How long calls take on each member: histograms of their latency.
 *
 * Those of the status segment are of calls that are chosen whatever they are (ha_is_sample), by class of function: what
 * they say holds for all calls.
 *
 * Those by kind of work are for who compares the members, and only slots that want it take them (`look_at`).  What takes
 * long is always timed; what is quick is passed over as often as makes the two looks at the clock a hundredth of it, by
 * chance, so that no pattern of an application's stands against it.  The thread that finds `look_at` passed asks the
 * core to look at what was counted.
 */
#include "wire.h" /* ha_monotonic_ns */

enum { LONG_NS = 4096, SHORTEST_BITS = 8, LOOK_AGAIN_NS = 100000000 };

/* Two to an octave from 256 ns on; edge_ns() in core/outlier.py is its inverse. */
unsigned ha_latency_bucket(unsigned long long ns)
{
    if (ns < 1ULL << SHORTEST_BITS) return 0;
    unsigned octave = 63U - (unsigned)__builtin_clzll(ns);
    unsigned bucket = (octave - SHORTEST_BITS) * 2 + (ns >> (octave - 1) & 1);
    return bucket < HA_BUCKETS ? bucket : HA_BUCKETS - 1;
}

static uint64_t mix(uint64_t hash, uint64_t value)
{
    return (hash ^ value) * 0x9E3779B97F4A7C15U;
}

/* The Stage of core/outlier.py: what begins work or asks for a length, a part of it, and what does it. */
static unsigned stage_of(const ha_call *call, const struct ha_row *row)
{
    if (call->query || row->phase == HA_PHASE_INIT) return 0;
    return row->phase == HA_PHASE_UPDATE ? 1 : 2;
}

/* Like and like: the same function, mechanism and key, and as much input, to a factor of two. */
static unsigned kind_of_work(const ha_call *call, const struct ha_row *row)
{
    if (row->deadline == HA_DEADLINE_INFORMATION) return HA_WORK_INFORMATION;
    if (row->deadline == HA_DEADLINE_GENERATION) return HA_WORK_GENERATION;
    uint64_t hash = mix(call->row, call->query);
    if (row->ops) {
        const struct ha_operation *operation = &call->session->operation[__builtin_ctz(row->ops)];
        if (row->phase != HA_PHASE_INIT) hash = mix(mix(hash, operation->mechanism.mechanism), operation->key);
    }
    if (call->mechanism) hash = mix(hash, call->mechanism->mechanism);
    for (unsigned i = 0; i < call->objects; i++) hash = mix(hash, call->object[i]);
    hash = mix(hash, 64U - (unsigned)__builtin_clzll(call->size | 1));
    unsigned number = (unsigned)((hash >> 32) % ((HA_WORKS - HA_WORK_COMPARED) / HA_STAGES));
    return HA_WORK_COMPARED + number * HA_STAGES + stage_of(call, row);
}

RARE void ha_latency_sample(ha_call *call)
{
    call->sampled = 1;
    call->began_ns = ha_monotonic_ns();
}

static void count_sample(struct ha_counters *counters, uint8_t deadline, uint64_t took)
{
    unsigned class = deadline - HA_DEADLINE_INFORMATION; /* connecting is nobody's call */
    unsigned bits = took ? 64U - (unsigned)__builtin_clzll(took) : 0;
    unsigned bucket = bits > HA_SEGMENT_SHORTEST_BITS ? bits - HA_SEGMENT_SHORTEST_BITS : 0;
    if (class >= HA_SEGMENT_CLASSES) return;
    if (bucket >= HA_SEGMENT_BUCKETS) bucket = HA_SEGMENT_BUCKETS - 1;
    atomic_fetch_add_explicit(&counters->latency[class][bucket], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&counters->latency_ns[class], took, memory_order_relaxed);
}

/* The call has entered its member. */
RARE void ha_latency_begin(ha_call *call)
{
    ha_session *session = call->session;
    if (call->alone) return;
    if (session->untimed && !session->trial) {
        session->untimed--;
        return;
    }
    /* Work that only one member can do says nothing about the others. */
    if (ha_rows[call->row].deadline == HA_DEADLINE_CRYPTOGRAPHY && !ha_call_has_choice(call)) return;
    call->compared = 1;
    if (!call->began_ns) call->began_ns = ha_monotonic_ns();
}

/* The member has answered. */
RARE void ha_latency_end(ha_call *call, CK_RV rv)
{
    ha_session *session = call->session;
    ha_slot *slot = call->slot;
    uint64_t now = ha_monotonic_ns(), took = now - call->began_ns;
    call->began_ns = 0;
    if (call->sampled) count_sample(call->target->counters, ha_rows[call->row].deadline, took);
    call->sampled = 0;
    if (!call->compared) return;
    call->compared = 0;
    if (rv == CKR_OK)
        atomic_fetch_add_explicit(
            &call->target->latency[kind_of_work(call, &ha_rows[call->row])][ha_latency_bucket(took)], 1,
            memory_order_relaxed);
    session->untimed = ha_session_chance(session) % (uint32_t)(2 * LONG_NS / (took | 1) + 1);
    uint64_t look_at = atomic_load_explicit(&slot->look_at, memory_order_relaxed);
    if (now > look_at && atomic_compare_exchange_strong(&slot->look_at, &look_at, now + LOOK_AGAIN_NS)) {
        if (ha_enter_core() != CKR_OK) return;
        ha_core.look(slot);
        ha_leave_core();
    }
}

void ha_member_latency(ha_member *member, unsigned *counts)
{
    for (unsigned work = 0; work < HA_WORKS; work++)
        for (unsigned bucket = 0; bucket < HA_BUCKETS; bucket++)
            *counts++ = atomic_load_explicit(&member->latency[work][bucket], memory_order_relaxed);
}

void ha_member_fault(ha_member *member, unsigned class)
{
    if (class < HA_FAULTS) atomic_fetch_add_explicit(&member->counters->faults[class], 1, memory_order_relaxed);
}

void ha_member_failover(ha_member *member)
{
    atomic_fetch_add_explicit(&member->counters->failovers, 1, memory_order_relaxed);
}

unsigned long long ha_member_faults(ha_member *member, unsigned class)
{
    return class < HA_FAULTS ? atomic_load_explicit(&member->counters->faults[class], memory_order_relaxed) : 0;
}
