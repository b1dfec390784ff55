/* What the parts of the fault module share: a call on its way through it, and what the script has decided for it. */
#ifndef PKCS11_FAULT_H
#define PKCS11_FAULT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pkcs11.h"

#include "functions.gen.h"

enum { FAULT_OUTPUTS = 2, FAULT_TOLD = 256, FAULT_SCRATCH = 1 << 16 };

/* ---- rows, drawn from the table of functions (fault.gen.c) ---- */

/* What a call has, and so which faults it can have; and what its errors mean to the operation of its session. */
enum {
    HAS_SESSION = 1,
    HAS_SLOT = 2,
    HAS_OBJECT = 4,
    HAS_OUTPUT = 8,
    HAS_LENGTH = 16, /* of an output */
    HAS_ROOM = 32,   /* an output that may be too small */
    HAS_QUERY = 64,  /* a call that only asks for lengths */
    ENDS_OPERATION = 128,
    FEEDS_OPERATION = 256,
};

struct fault_row {
    const char *name;
    unsigned has, ops, objects;
    CK_RV bad_object[HA_ROW_OBJECTS];
};

struct fault_code {
    const char *name;
    CK_RV rv;
};

extern const struct fault_row fault_row[HA_FUNCTIONS];
extern const struct fault_code fault_codes[]; /* the last has no name */
extern void *const fault_wrapper[HA_FUNCTIONS];
extern void *fault_real[HA_FUNCTIONS]; /* the wrapped library's functions, NULL where it has none */

/* Ends these operations in the wrapped library, whose answers are of no interest; `scratch` has FAULT_SCRATCH bytes. */
void fault_end_operations(CK_SESSION_HANDLE session, unsigned ops, CK_BYTE *scratch);

/* ---- what the script decides (script.c) ---- */

/* Those from FAULT_HANG to FAULT_KILL do not come back, or not soon; those from FAULT_LENGTH to FAULT_ZERO corrupt. */
enum fault_action {
    FAULT_NONE,
    FAULT_RETURN,
    FAULT_PRETEND,
    FAULT_SMALL,
    FAULT_SLEEP,
    FAULT_HANG,
    FAULT_CRASH,
    FAULT_ABORT,
    FAULT_EXIT,
    FAULT_KILL,
    FAULT_LENGTH,
    FAULT_FLIP,
    FAULT_ZERO,
    FAULT_SWAP,
    FAULT_SESSION_LOST,
    FAULT_SESSIONS_LOST,
    FAULT_LOGIN_LOST,
    FAULT_TOKEN_LOST,
    FAULT_TOKEN_BACK,
    FAULT_OBJECT_LOST,
};

/* A file as it was read: what differs is another script, and counts from the beginning. */
struct fault_version {
    uint64_t device, inode, modified_ns, size;
};

struct fault {
    enum fault_action action;
    bool late;                  /* after the work */
    char sign;                  /* of a length: + - = */
    uint64_t number;            /* code, exit status, length, offset */
    uint64_t early_ns, late_ns; /* sleeps, of all rules that hit */
    unsigned rule;              /* which one decided, by its place */
    struct fault_version version;
    char told[FAULT_TOLD]; /* for the log: the rules that hit */
};

struct fault_output {
    CK_BYTE *bytes;
    CK_ULONG *length; /* in elements; NULL: the output is always whole */
    CK_ULONG capacity, element;
};

struct fault_call {
    unsigned row;
    CK_BBOOL present_only; /* of C_GetSlotList */
    CK_SESSION_HANDLE session;
    CK_SLOT_ID slot;
    CK_OBJECT_HANDLE object[HA_ROW_OBJECTS];
    unsigned outputs;
    struct fault_output output[FAULT_OUTPUTS];
    CK_ATTRIBUTE *attribute;
    CK_ULONG attributes;

    void *function; /* the wrapped library's */
    CK_RV rv;
    CK_RV answer;     /* with `scratch`: what is said instead */
    bool query;       /* asks for lengths alone */
    bool forwarded;   /* the wrapped library has it, or had it */
    CK_BYTE *scratch; /* takes the output of work that nobody is to see */
    CK_ULONG scratch_size, scratch_length;
    struct fault fault;
};

void fault_script_open(const char *path, const char *state_path); /* NULL: without */
/* Whether the file is still that one. */
bool fault_script_is(const struct fault_version *version);
/* What is to be done to this call.  False: the script is wrong, that was said, and nothing may go on as if all were well. */
bool fault_decide(struct fault_call *call);
/* The fault could not be done to this call: it is still owed to another. */
void fault_owed(struct fault_call *call);
void fault_before_fork(void);
void fault_after_fork(void);

/* ---- what was lost, and stays lost (lost.c) ---- */

/* Loses what the action says, in the wrapped library too; the answer to this call. */
CK_RV fault_lose(const struct fault_call *call);
void fault_token_back(const struct fault_call *call);
/* Whether the call is answered (`rv`) without the wrapped library, as what it is about is lost. */
bool fault_is_lost(struct fault_call *call);
/* Corrects what the wrapped library has answered, and sees what was opened, found or logged in again. */
void fault_was_lost(struct fault_call *call);
/* Around every call of a session: losing one waits until nobody is inside. */
void fault_enter(struct fault_call *call);
void fault_leave(struct fault_call *call);
void fault_lost_before_fork(void);
void fault_lost_after_fork(bool in_child);

/* ---- the module (fault.c) ---- */

void fault_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fault_list(struct fault_call *call, void *bytes, CK_ULONG *length, size_t element);
void fault_found(struct fault_call *call, void *bytes, CK_ULONG capacity, CK_ULONG *length, size_t element);
void fault_whole(struct fault_call *call, void *bytes, CK_ULONG size);
void fault_attributes(struct fault_call *call, CK_ATTRIBUTE *attribute, CK_ULONG attributes);
bool fault_begin(struct fault_call *call);
CK_RV fault_end(struct fault_call *call);

#endif
