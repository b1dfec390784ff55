/*
 * Replay: what an operation has taken and given since its Init, and how it is done again on another member.
 *
 * Each operation of a session has a journal, in locked pages: an entry for every part it took, with what came out; small
 * parts in a row of which nothing came out are one, as it is the same to whoever takes them.
 * Dual functions are two entries, one in the journal of each operation: what one does is what the other takes.  After
 * a fault the Init is repeated elsewhere and the entries behind it; output that the application has got already
 * must come out again byte for byte, or the operation is lost and said to be.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ha.h"
#include "wire.h" /* ha_secret_pages */

enum { JOURNAL_ROOM = 1 << 14, IDLE_JOURNALS = 64, JOINED = 1 << 12 };

/* What follows it: the parameter of a message, the input, the output, padded together. */
struct entry {
    uint32_t row, parameter;
    size_t in, out;
};

static size_t padded(size_t size)
{
    return (size + 7) & ~(size_t)7;
}

static size_t entry_size(const struct entry *entry)
{
    return padded(sizeof *entry + entry->parameter + entry->in + entry->out);
}

/* ---- pages: kept, wiped, between operations ---- */

static _Atomic(unsigned char *) idle[IDLE_JOURNALS];

static unsigned char *take_pages(size_t size)
{
    for (unsigned k = 0; size == JOURNAL_ROOM && k < IDLE_JOURNALS; k++) {
        if (!atomic_load_explicit(&idle[k], memory_order_relaxed)) continue;
        unsigned char *pages = atomic_exchange(&idle[k], NULL);
        if (pages) return pages;
    }
    unsigned char *pages = ha_secret_pages(size);
    if (pages) mlock(pages, size); /* may be refused (RLIMIT_MEMLOCK): swapping is then the system's affair */
    return pages;
}

static void give_pages(unsigned char *pages, size_t size, size_t used)
{
    explicit_bzero(pages, used);
    for (unsigned k = 0; size == JOURNAL_ROOM && k < IDLE_JOURNALS; k++) {
        unsigned char *none = NULL;
        if (atomic_compare_exchange_strong(&idle[k], &none, pages)) return;
    }
    munmap(pages, size);
}

/* ---- the journal ---- */

RARE void ha_journal_wipe(struct ha_operation *operation)
{
    give_pages(operation->journal, operation->journal_room, operation->journal_end);
    operation->journal = NULL;
    operation->journal_room = operation->journal_last = operation->journal_end = operation->taken = 0;
}

static bool reserve(struct ha_operation *operation, size_t more)
{
    size_t room = operation->journal ? operation->journal_room : JOURNAL_ROOM;
    while (room - operation->journal_end < more) room *= 2;
    if (operation->journal && room == operation->journal_room) return true;
    unsigned char *pages = take_pages(room);
    if (!pages) return false;
    if (operation->journal) {
        memcpy(pages, operation->journal, operation->journal_end);
        give_pages(operation->journal, operation->journal_room, operation->journal_end);
    }
    operation->journal = pages;
    operation->journal_room = room;
    return true;
}

/* What is kept is limited by its input.  As much again may come out, and as much be the entries' own. */
static bool may_be_kept(const ha_call *call, const struct ha_operation *operation, size_t in, size_t more)
{
    const size_t limit = call->slot->replay_limit, most = limit > SIZE_MAX / 4 ? SIZE_MAX : 3 * limit + JOURNAL_ROOM;
    return in <= limit - operation->taken && operation->journal_end <= most && more <= most - operation->journal_end;
}

/* Where what follows an entry is to be put; NULL: it is more than may be kept. */
static unsigned char *add_entry(const ha_call *call, struct ha_operation *operation, const struct entry *entry)
{
    if (entry->in > HA_WIRE_MAX || entry->out > HA_WIRE_MAX) return NULL;
    if (!may_be_kept(call, operation, entry->in, entry_size(entry))) return NULL;
    if (!reserve(operation, entry_size(entry))) return NULL;
    unsigned char *at = operation->journal + operation->journal_end;
    memcpy(at, entry, sizeof *entry);
    operation->journal_last = operation->journal_end;
    operation->journal_end += entry_size(entry);
    operation->taken += entry->in;
    return at + sizeof *entry;
}

static unsigned char *put(unsigned char *at, const void *bytes, size_t size)
{
    if (size) memcpy(at, bytes, size);
    return at + size;
}

/* To the last entry, if that is the same to a replay. */
static bool join(const ha_call *call, struct ha_operation *operation, const struct entry *part, const void *in)
{
    struct entry last;
    if (operation->journal_last == operation->journal_end || part->out || part->in > JOINED) return false;
    memcpy(&last, operation->journal + operation->journal_last, sizeof last);
    if (last.row != part->row || last.parameter || last.out || last.in + part->in > JOINED) return false;
    if (ha_rows[part->row].phase != HA_PHASE_UPDATE || part->row == FN_C_DigestKey) return false;
    const size_t before = last.in, size = entry_size(&last);
    last.in += part->in;
    const size_t more = entry_size(&last) - size;
    if (!may_be_kept(call, operation, part->in, more) || !reserve(operation, more)) return false;
    unsigned char *at = operation->journal + operation->journal_last;
    memcpy(at, &last, sizeof last);
    put(at + sizeof last + before, in, part->in);
    operation->journal_end += more;
    operation->taken += part->in;
    return true;
}

/* Adds a part that the operation `op` of the call's session has taken, as if by a call of `row`. */
RARE void ha_journal(ha_call *call, unsigned op, unsigned row, const void *in, CK_ULONG in_size, const void *out,
                     CK_ULONG out_size)
{
    struct ha_operation *operation = &call->session->operation[op];
    if (!operation->kept) return;
    const struct entry entry = {.row = row, .in = in_size, .out = out_size};
    if (join(call, operation, &entry, in)) return;
    unsigned char *at = add_entry(call, operation, &entry);
    if (at) {
        put(put(at, in, in_size), out, out_size);
        return;
    }
    operation->kept = false; /* from here on it cannot be repeated */
    if (operation->journal) ha_journal_wipe(operation);
}

/* ---- messages: the journal of their operation has the one under way, between messages nothing ---- */

static bool keep_part(ha_call *call, struct ha_operation *operation, const struct ha_part *part)
{
    const CK_MECHANISM_TYPE mechanism = operation->mechanism.mechanism;
    uint32_t parameter;
    if (!ha_message_kept_size(mechanism, part, &parameter)) return false;
    const struct entry entry = {call->row, parameter, part->in_size, part->out_size};
    unsigned char *at = add_entry(call, operation, &entry);
    if (!at) return false;
    if (parameter) ha_message_keep(mechanism, part, at);
    put(put(at + parameter, part->in, part->in_size), part->out, part->out_size);
    return true;
}

/* What a call does to the message of its operation. A member that counts IVs cannot be followed by another. */
void ha_message_taken(ha_call *call, enum ha_message_phase phase, const struct ha_part *part)
{
    const uint32_t ops = ha_rows[call->row].ops;
    ha_session *session = call->session;
    struct ha_operation *operation = &session->operation[__builtin_ctz(ops)];
    if (!(session->active & ops) || call->query || call->rv == CKR_BUFFER_TOO_SMALL) return;
    if (ops == ha_rows[FN_C_MessageEncryptInit].ops &&
        !ha_message_repeatable(operation->mechanism.mechanism, part->parameter, part->parameter_size))
        operation->kept = false;
    /* A last part ends its message, right or wrong; a whole one or a first part that is refused has not begun any. */
    if (call->rv != CKR_OK && (phase == HA_MESSAGE_WHOLE || phase == HA_MESSAGE_BEGINS)) return;
    if (phase == HA_MESSAGE_GOES_ON) {
        if (session->in_message & ops) return;                 /* it is not known whole */
        if (!operation->journal && call->rv != CKR_OK) return; /* there is none */
    } else {
        session->in_message &= ~ops;
        if (operation->journal) ha_journal_wipe(operation);
        if (phase != HA_MESSAGE_BEGINS) return;
    }
    if (operation->kept && call->rv == CKR_OK && keep_part(call, operation, part)) return;
    session->in_message |= ops;
    if (operation->journal) ha_journal_wipe(operation);
}

/* The next entry from `at` on; NULL: none. */
static const unsigned char *next_entry(const struct ha_operation *operation, size_t *at, struct entry *entry)
{
    if (*at >= operation->journal_end) return NULL;
    const unsigned char *start = operation->journal + *at;
    memcpy(entry, start, sizeof *entry);
    *at += entry_size(entry);
    return start + sizeof *entry;
}

/* Entries that fill a journal, of rows that feed the operation, and no more input than may be kept. */
static bool is_sound(struct ha_operation *operation, unsigned op)
{
    for (size_t at = 0; at < operation->journal_end;) {
        struct entry entry;
        size_t left = operation->journal_end - at;
        if (left < sizeof entry) return false;
        memcpy(&entry, operation->journal + at, sizeof entry);
        if (entry.row >= HA_FUNCTIONS || entry.parameter || entry.in > left || entry.out > left) return false;
        if (entry_size(&entry) > left) return false;
        if (ha_rows[entry.row].ops != 1U << op || ha_rows[entry.row].phase != HA_PHASE_UPDATE) return false;
        if (entry.row == FN_C_DigestKey && entry.in != sizeof(CK_OBJECT_HANDLE)) return false;
        operation->taken += entry.in;
        operation->journal_last = at;
        at += entry_size(&entry);
    }
    return true;
}

/* A journal that was outside (C_SetOperationState). False: no memory, or it is none. */
bool ha_journal_restore(struct ha_operation *operation, unsigned op, const void *journal, size_t size)
{
    operation->journal_last = operation->journal_end = operation->taken = 0;
    if (!size) return true;
    if (!reserve(operation, size)) return false;
    memcpy(operation->journal, journal, size);
    operation->journal_end = size;
    return is_sound(operation, op);
}

static CK_OBJECT_HANDLE handle_in(const unsigned char *in)
{
    CK_OBJECT_HANDLE object;
    memcpy(&object, in, sizeof object);
    return object;
}

/* What the operations under way use, in the order in which they came to it. */
static void each_key(const ha_session *session, void (*tell)(void *to, CK_OBJECT_HANDLE key), void *to)
{
    for (uint32_t left = session->active; left; left &= left - 1) {
        const struct ha_operation *operation = &session->operation[__builtin_ctz(left)];
        const unsigned char *in;
        struct entry entry;
        if (operation->key) tell(to, operation->key);
        for (size_t at = 0; (in = next_entry(operation, &at, &entry));)
            if (entry.row == FN_C_DigestKey) tell(to, handle_in(in));
    }
}

static void leave_absent(void *candidates, CK_OBJECT_HANDLE key)
{
    *(uint32_t *)candidates &= ~ha_object_absent_mask(key);
}

/* The members of `candidates` that may have all keys of the operations under way. */
uint32_t ha_without_operation_keys(const ha_session *session, uint32_t candidates)
{
    each_key(session, leave_absent, &candidates);
    return candidates;
}

struct keys {
    CK_OBJECT_HANDLE *key;
    unsigned count, room;
};

static void note_key(void *to, CK_OBJECT_HANDLE key)
{
    struct keys *keys = to;
    if (keys->count < keys->room) keys->key[keys->count] = key;
    keys->count++;
}

/* Virtual handles of these keys, the first `room` of them; how many there are. */
unsigned ha_session_keys(const ha_session *session, CK_OBJECT_HANDLE *key, unsigned room)
{
    struct keys keys = {.key = key, .room = room};
    each_key(session, note_key, &keys);
    return keys.count;
}

/* Operations move to another member while all that they took is known; else they are lost, and said so. */
int ha_session_may_move(ha_session *session)
{
    for (uint32_t left = session->active; left; left &= left - 1)
        if (!session->operation[__builtin_ctz(left)].kept) return 0;
    return !(session->active & session->in_message);
}

/* ---- doing it again ---- */

enum outcome { DONE, LOOK_AGAIN, REFUSED, DIFFERENT };

/* A call of one operation on the member that `call` was given. */
static ha_call part_of(const ha_call *call, unsigned row)
{
    ha_call part = {.row = row, .member = call->member, .epoch = call->epoch, .session = call->session};
    part.slot = call->slot;
    part.target = call->target;
    part.member_session = call->member_session;
    part.tried = call->tried;
    part.repairs = call->repairs;
    return part;
}

/* Its objects on that member; LOOK_AGAIN: something has changed, or the call is finished. */
static enum outcome resolve(ha_call *call, ha_call *part)
{
    for (unsigned i = 0; i < part->objects; i++) {
        part->member_object[i] = ha_object_at(part->object[i], part->member, part->epoch);
        if (part->member_object[i]) continue;
        CK_RV rv = ha_unseal(ha_core.locate(part));
        call->tried = part->tried;
        call->repairs = part->repairs;
        if (rv != HA_AGAIN) {
            call->rv = rv;
            call->finished = 1;
        }
        return LOOK_AGAIN;
    }
    return DONE;
}

/* All that the operations need, before the first is begun: to look for a key in the middle would begin them again, and
 * one that is made again in the session on that member would go with the session. */
static enum outcome resolve_all(ha_call *call)
{
    enum outcome outcome = DONE;
    for (uint32_t left = call->session->active; left && outcome == DONE; left &= left - 1) {
        unsigned op = (unsigned)__builtin_ctz(left);
        struct ha_operation *operation = &call->session->operation[op];
        ha_call init = part_of(call, ha_init_rows[op]);
        const unsigned char *in;
        struct entry entry;
        init.mechanism = &operation->mechanism;
        if (operation->key) init.object[init.objects++] = operation->key;
        if (!init.mechanism->pParameter || ha_mechanism_objects(&init) == CKR_OK) outcome = resolve(call, &init);
        for (size_t at = 0; outcome == DONE && (in = next_entry(operation, &at, &entry));) {
            if (entry.row != FN_C_DigestKey) continue;
            ha_call part = part_of(call, entry.row);
            part.object[part.objects++] = handle_in(in);
            outcome = resolve(call, &part);
        }
    }
    return outcome;
}

/* What the member said to one step, whose output is to be that of before. */
static enum outcome outcome_of(ha_call *call, CK_RV rv, bool same)
{
    if (rv == CKR_OK) return same ? DONE : DIFFERENT;
    if (rv == CKR_BUFFER_TOO_SMALL) return DIFFERENT;
    call->rv = rv < HA_AGAIN ? rv : CKR_GENERAL_ERROR;
    ha_remote_explain(call);
    return REFUSED;
}

static enum outcome repeat_init(ha_call *call, unsigned op, bool *begun)
{
    struct ha_operation *operation = &call->session->operation[op];
    ha_call init = part_of(call, ha_init_rows[op]);
    /* A copy: what a member writes into it (an IV of its own making) would be unknown to the application. */
    ha_kept *given = ha_mechanism_copy(&operation->mechanism);
    if (!given) return DIFFERENT;
    init.mechanism = init.member_mechanism = ha_mechanism_kept(given);
    if (operation->key) init.object[init.objects++] = operation->key;
    CK_RV rv = init.mechanism->pParameter ? ha_mechanism_objects(&init) : CKR_OK;
    enum outcome outcome = rv == CKR_OK ? resolve(call, &init) : outcome_of(call, rv, true);
    if (outcome == DONE && init.translate) outcome = outcome_of(call, ha_mechanism_translate(&init), true);
    if (outcome == DONE && !ha_enter(call->target, call->epoch, &init)) outcome = LOOK_AGAIN;
    if (outcome == DONE) {
        size_t at = 0;
        struct entry entry = {0};
        const unsigned char *in = next_entry(operation, &at, &entry);
        *begun = true;
        rv = ha_replay(&init, op, in, in ? entry.in : 0);
        ha_leave(call->target, &init);
        outcome = outcome_of(call, rv, ha_mechanism_is(operation, init.mechanism));
    }
    free(init.mechanism_copy);
    ha_mechanism_forget(given);
    return outcome;
}

static enum outcome repeat_part(ha_call *call, const struct entry *entry, const unsigned char *in)
{
    ha_call part = part_of(call, entry->row);
    if (entry->row == FN_C_DigestKey) {
        part.object[part.objects++] = handle_in(in);
        enum outcome resolved = resolve(call, &part);
        if (resolved != DONE) return resolved;
    }
    const struct ha_operation *operation = &call->session->operation[__builtin_ctz(ha_rows[entry->row].ops)];
    /* In the same pages, before the output: the parameter, which the member may write into. */
    const size_t before = padded(entry->parameter);
    size_t room = before + (entry->out > entry->in ? entry->out : entry->in) + HA_CACHE_LINE;
    if (room < JOURNAL_ROOM) room = JOURNAL_ROOM;
    unsigned char *pages = take_pages(room);
    if (!pages) return DIFFERENT;
    struct ha_part given = {.in = in + entry->parameter, .in_size = entry->in, .out = pages + before};
    given.out_size = room - before;
    put(pages, in, entry->parameter);
    if (entry->parameter) ha_message_restore(operation->mechanism.mechanism, pages, &given);
    if (ha_rows[entry->row].phase == HA_PHASE_MESSAGE) ha_message_of(&part);
    enum outcome outcome = LOOK_AGAIN;
    if (ha_enter(call->target, call->epoch, &part)) {
        CK_RV rv = ha_replay_part(&part, &given);
        ha_leave(call->target, &part);
        const unsigned char *expected = in + entry->parameter + entry->in;
        outcome = outcome_of(call, rv, given.out_size == entry->out && memcmp(given.out, expected, entry->out) == 0);
    }
    if (ha_rows[call->row].phase == HA_PHASE_MESSAGE) ha_message_of(call);
    give_pages(pages, room, room);
    return outcome;
}

static enum outcome repeat_operation(ha_call *call, unsigned op, bool *begun)
{
    const struct ha_operation *operation = &call->session->operation[op];
    enum outcome outcome = repeat_init(call, op, begun);
    const unsigned char *in;
    struct entry entry;
    for (size_t at = 0; outcome == DONE && (in = next_entry(operation, &at, &entry));)
        if (entry.row != ha_init_rows[op]) outcome = repeat_part(call, &entry, in);
    return outcome;
}

/* All operations under way, again, on the member that `call` was given; the route looks again, or call is finished. */
void ha_repeat_operations(ha_call *call)
{
    ha_session *session = call->session;
    enum outcome outcome = resolve_all(call);
    bool begun = false;
    for (uint32_t left = session->active; left && outcome == DONE; left &= left - 1)
        outcome = repeat_operation(call, (unsigned)__builtin_ctz(left), &begun);
    if (outcome != DONE && begun) ha_call_leave(call, call->member);
    switch (outcome) {
    case DONE: {
        int before = session->member;
        session->member = call->member;
        if (before >= 0 && before != call->member && !(call->tried >> before & 1)) /* else the core has counted it */
            ha_member_failover(session->slot->member[before]);
        /* Where it was under way before, it still is: that session must not reach another user.  Who is suspected of
         * hanging, say, is not asked for more: what is left there ends when it stands in the way. */
        if (before >= 0 && before != call->member && !(session->owns & call->suspects & 1U << before))
            ha_call_leave(call, before);
        break;
    }
    case LOOK_AGAIN: break;
    case REFUSED: ha_call_refused(call); break;
    case DIFFERENT: ha_operations_lost(call); break;
    }
}

/* ---- input that the output overwrites ---- */

/* A member that fails half-way may have written over what the next one is to be given. */
RARE void ha_call_copy_input(ha_call *call, CK_BYTE_PTR *in, CK_ULONG size)
{
    call->input_size = size > JOURNAL_ROOM ? size : JOURNAL_ROOM;
    call->input = take_pages(call->input_size);
    if (!call->input) {
        call->rv = CKR_HOST_MEMORY;
        call->finished = 1;
        return;
    }
    memcpy(call->input, *in, size);
    *in = call->input;
}

RARE void ha_call_wipe_input(ha_call *call)
{
    give_pages(call->input, call->input_size, call->input_size);
    call->input = NULL;
}
