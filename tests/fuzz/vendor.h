/* A vendor's library that reads every byte it is given, so that a sanitizer sees what should not have been given. */
#ifndef TESTS_VENDOR_H
#define TESTS_VENDOR_H

#include "wire.h"

/* With a script it says what the script says, lengths beyond the capacities too; without one it keeps PKCS#11's
 * rules, and what it says follows from what it was given. */
struct vendor_script {
    const uint8_t *data;
    size_t size, at;
};
extern struct vendor_script *vendor_script;
extern CK_C_CreateObject vendor_create;    /* how it makes objects; NULL: it makes handles up */
extern CK_C_GetSessionInfo vendor_session; /* what knows its sessions; NULL: it has any */

struct vendor { /* one call */
    CK_RV rv;
    uint64_t seen; /* a hash of all that was given */
};

struct vendor vendor_begin(void);
void vendor_read(struct vendor *v, const void *bytes, CK_ULONG size);
void vendor_mechanism(struct vendor *v, const CK_MECHANISM *mechanism);
void vendor_template(struct vendor *v, const CK_ATTRIBUTE *attributes, CK_ULONG count, bool answers);
void vendor_initialize(struct vendor *v, const CK_C_INITIALIZE_ARGS *args);
void vendor_decide(struct vendor *v, CK_SESSION_HANDLE session);
void vendor_room(struct vendor *v, void *bytes, CK_ULONG *length, CK_ULONG capacity, size_t element);
void vendor_fill(struct vendor *v, void *bytes, CK_ULONG size);
void vendor_fill_mechanism(struct vendor *v, CK_MECHANISM *mechanism);
void vendor_answers(struct vendor *v, CK_ATTRIBUTE *attributes, CK_ULONG count);
void vendor_object(struct vendor *v, CK_SESSION_HANDLE session, CK_ATTRIBUTE *attributes, CK_ULONG count,
                   CK_OBJECT_HANDLE *object);

extern void *const vendor_functions[HA_FUNCTIONS]; /* generated */

#endif
