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

#define HA_EXPORT __attribute__((visibility("default")))

enum { HA_MAX_MEMBERS = 32, HA_CACHE_LINE = 64, HA_POOL = 64, HA_CODES = 512 };

/* The core's answers carry a seal in their upper half, so that the 0 which cffi returns when Python could not
 * run can never be read as CKR_OK. */
#define HA_SEAL 0x5041C0DE00000000ULL
#define HA_AGAIN 0xFFFFFFFFUL /* the core's "look again": never reaches an application */
CK_RV ha_unseal(uint64_t answer);

struct ha_member {
    _Alignas(HA_CACHE_LINE) _Atomic int in_flight; /* calls inside the vendor library now */
    _Atomic uint64_t calls;                        /* calls ever, for the status */
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t epoch; /* changes at every loss and every return */
    const uint8_t *_Atomic clean;
    bool guard_sigpipe;
    bool one_call_at_a_time;
    CK_SLOT_ID slot_id;
    void *functions[HA_FUNCTIONS];
    char name[64], serial[20];
    pthread_mutex_t one_call;
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
    unsigned balance; /* HA_BALANCE_* */
    unsigned count;
    ha_member *member[HA_MAX_MEMBERS];
    struct ha_pool pool[HA_MAX_MEMBERS][2]; /* read-only, read-write */
    struct ha_map map[HA_MAX_MEMBERS];
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t serving; /* members that may take new work; the core's decision */
    _Atomic uint64_t check_at;                        /* monotonic ns after which the recovery check is due */
    _Atomic CK_ULONG login;
    _Atomic bool write_protected;
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t turn;
    _Alignas(HA_CACHE_LINE) _Atomic CK_ULONG sessions;
    _Atomic CK_ULONG rw_sessions;
};

enum { HA_BALANCE_LEAST_BUSY, HA_BALANCE_ROUND_ROBIN, HA_BALANCE_PRIMARY_FIRST };

/* What is kept of an operation's Init, so that it can be repeated on another member. */
struct ha_operation {
    bool kept;
    CK_OBJECT_HANDLE key; /* virtual, 0: none */
    CK_MECHANISM mechanism;
    void *parameter; /* our deep copy, wiped and freed with the operation */
    size_t parameter_size;
};

struct ha_session {
    _Alignas(HA_CACHE_LINE) _Atomic uint64_t word; /* handle << 2 | waiters | locked */
    ha_slot *slot;
    CK_FLAGS flags;
    uint32_t active; /* operations under way, HA_OP_* */
    uint32_t fresh;  /* those of them that have taken no input yet */
    int member;      /* that they run on */
    int last_member; /* that served last */
    uint32_t owns;   /* members on which this session has session objects */
    bool finding;
    CK_OBJECT_HANDLE *found;
    size_t found_count, found_next;
    struct ha_operation operation[HA_OPS];
    struct {
        CK_SESSION_HANDLE handle;
        uint32_t epoch; /* of the member when it was opened; 0: none */
    } at[HA_MAX_MEMBERS];
    uint32_t index, next_free; /* in the session table */
    CK_SESSION_HANDLE next_handle;
};

/* ---- session.c ---- */
ha_session *ha_session_lock(CK_SESSION_HANDLE handle);
void ha_session_unlock(ha_session *session);
CK_RV ha_session_open_member(ha_session *session, int member, uint32_t epoch);
void ha_session_forget_operations(ha_session *session);
void ha_sessions_close_all(ha_slot *slot);
void ha_sessions_after_fork(void);

/* ---- member.c ---- */
void ha_members_before_fork(void);
void ha_members_after_fork(void);

/* ---- slot.c ---- */
ha_slot *ha_slot_by_id(CK_SLOT_ID id);
void ha_slots_reset(void);
int ha_slot_choose(ha_slot *slot, uint32_t candidates, bool primary);

/* ---- object.c ---- */
bool ha_object_valid(CK_OBJECT_HANDLE object, ha_slot *slot);
uint32_t ha_object_absent_mask(CK_OBJECT_HANDLE object);
CK_OBJECT_HANDLE ha_object_at(CK_OBJECT_HANDLE object, int member, uint32_t epoch);
void ha_objects_virtual(ha_slot *slot, int member, uint32_t epoch, const CK_OBJECT_HANDLE *member_objects,
                        size_t count, CK_OBJECT_HANDLE *objects);
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
void ha_mechanism_keep(struct ha_operation *operation, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key);
void ha_operation_forget(struct ha_operation *operation);
CK_RV ha_mechanism_objects(ha_call *call);
CK_RV ha_mechanism_translate(ha_call *call);
CK_RV ha_mechanism_adopt(ha_call *call);
bool ha_derivation_data(const CK_MECHANISM *mechanism, CK_PRF_DATA_PARAM **data, CK_ULONG *count); /* generated */

/* ---- call.c ---- */
bool ha_call_begin(ha_call *call, CK_SESSION_HANDLE session);
bool ha_call_route(ha_call *call);
void ha_call_done(ha_call *call, CK_RV rv);
CK_RV ha_call_adopt(ha_call *call, const CK_OBJECT_HANDLE *made, CK_OBJECT_HANDLE *object);
CK_RV ha_call_end(ha_call *call);
void ha_call_template(ha_call *call, const CK_ATTRIBUTE *attributes, CK_ULONG count);
void ha_gate(ha_slot *slot);
CK_RV ha_replay(ha_call *call, unsigned op); /* generated: the Init of one operation on call's member */

typedef struct { /* what C_GetAttributeValue's lengths were, for a second member */
    CK_ULONG few[16], *length, count;
    bool failed;
} ha_lengths;
ha_lengths ha_lengths_save(const CK_ATTRIBUTE *attributes, CK_ULONG count);
void ha_lengths_restore(const ha_lengths *lengths, CK_ATTRIBUTE *attributes);
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

/* ---- native entry points, called by the generated ones after the checks that all share ---- */
#define HA_NATIVE(name, args) CK_RV native_##name args;
HA_NATIVE_FUNCTIONS(HA_NATIVE)
#undef HA_NATIVE

extern const struct ha_row ha_rows[HA_FUNCTIONS];

/* ---- the core's functions, attached by Python ---- */
#include "upcalls.gen.h"
extern const struct ha_upcalls ha_core;

#endif
