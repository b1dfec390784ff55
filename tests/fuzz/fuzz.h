/* A fuzzer's bytes as arguments of PKCS#11: each piece of memory has exactly the size that is said of it. */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#include "ha.h"

enum { FUZZ_PIECES = 512, FUZZ_HANDLES = 32, FUZZ_TEMPLATES = 2, FUZZ_DEPTH = 6 };

/* Handles that were given out, newest last; those that were taken back stay, to be used again all the same. */
struct fuzz_handles {
    CK_ULONG handle[FUZZ_HANDLES];
    bool dead[FUZZ_HANDLES];
    unsigned count;
};

/* A template as it was handed over. */
struct fuzz_copy {
    CK_ATTRIBUTE *given, *copy;
    CK_ULONG count;
    bool answers;
};

struct fuzz {
    const uint8_t *data; /* when it is used up all that is taken is 0 */
    size_t size, at;
    void *piece[FUZZ_PIECES]; /* of the call */
    unsigned pieces;
    struct fuzz_copy copy[FUZZ_TEMPLATES];
    unsigned copies;
    bool query;       /* an output of the call was NULL */
    bool strict;      /* the functions under test are ours, and have a contract to keep */
    bool undisturbed; /* no fault was ordered: what was given out is there */
    CK_SLOT_ID slot;
    struct fuzz_handles sessions, objects;
    CK_BYTE last[512]; /* what a call wrote last: a signature to verify, a text to decrypt */
    size_t last_size;
};

/* An output: NULL, or exactly so many elements. */
struct fuzz_room {
    CK_BYTE *bytes;
    CK_ULONG *length, capacity;
};

void fuzz_begin(struct fuzz *f, const uint8_t *data, size_t size);
void fuzz_free(struct fuzz *f); /* the memory of a call */
_Noreturn void fuzz_fail(const char *what, CK_ULONG number);

/* ---- what is taken from the bytes ---- */
uint8_t fuzz_byte(struct fuzz *f);
CK_ULONG fuzz_word(struct fuzz *f);
CK_ULONG fuzz_number(struct fuzz *f);
CK_ULONG fuzz_code(struct fuzz *f);
CK_ULONG fuzz_session(struct fuzz *f);
CK_ULONG fuzz_slot(struct fuzz *f);
CK_ULONG fuzz_object(struct fuzz *f);
void *fuzz_memory(struct fuzz *f, size_t size); /* zeroed */
void *fuzz_bytes(struct fuzz *f, CK_ULONG *size);
void *fuzz_pin(struct fuzz *f, CK_ULONG *size);
void *fuzz_text(struct fuzz *f);
void *fuzz_structure(struct fuzz *f, size_t size);
void *fuzz_result(struct fuzz *f, size_t size);
struct fuzz_room fuzz_room(struct fuzz *f, size_t element);
CK_MECHANISM *fuzz_mechanism(struct fuzz *f);
CK_ATTRIBUTE *fuzz_template(struct fuzz *f, CK_ULONG *count, bool answers);
CK_C_INITIALIZE_ARGS *fuzz_initialize(struct fuzz *f);

/* ---- what is looked at after a call ---- */
void fuzz_said(struct fuzz *f, CK_RV rv, bool impossible);
void fuzz_wrote(struct fuzz *f, CK_RV rv, const struct fuzz_room *room, bool keep);
void fuzz_found(struct fuzz *f, CK_RV rv, const CK_OBJECT_HANDLE *objects, const struct fuzz_room *room);
void fuzz_answered(struct fuzz *f, CK_RV rv);
void fuzz_used_session(struct fuzz *f, CK_RV rv, CK_SESSION_HANDLE session);
void fuzz_used_object(struct fuzz *f, CK_RV rv, CK_OBJECT_HANDLE object);
void fuzz_opened(struct fuzz *f, CK_SESSION_HANDLE session);
void fuzz_closed(struct fuzz *f, CK_SESSION_HANDLE session);
void fuzz_closed_all(struct fuzz *f, CK_SLOT_ID slot);
void fuzz_made(struct fuzz *f, CK_OBJECT_HANDLE object);
void fuzz_destroyed(struct fuzz *f, CK_OBJECT_HANDLE object);

/* ---- generated ---- */
typedef CK_RV fuzz_call(struct fuzz *f, void *function);
extern fuzz_call *const fuzz_calls[HA_FUNCTIONS];
extern const CK_MECHANISM_TYPE fuzz_mechanism_types[];
extern const CK_ATTRIBUTE_TYPE fuzz_attribute_types[];
extern const CK_RV fuzz_codes[];
extern const size_t fuzz_mechanism_types_count, fuzz_attribute_types_count, fuzz_codes_count;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
