/* The serving end of a call: its request taken apart, and its answer put together. */
#ifndef PKCS11_HA_SERVE_H
#define PKCS11_HA_SERVE_H

#include "wire.h"

struct serve_block;

/* What a channel has in hand; `arena` holds what the library is given and does not lie in the request. */
struct serve {
    struct ha_message request, answer;
    unsigned char *arena;
    size_t arena_used;
    struct serve_block *blocks; /* larger pieces */
    size_t blocks_size;
    const CK_MECHANISM *mechanism;              /* of this call */
    char *given;                                /* its structure as it was sent, NULL: it has none */
    const struct ha_message_parameter *message; /* layout of the parameter of this call's message; NULL: it has none */
    struct serve_part {
        CK_ULONG size;
        const CK_BYTE *bytes;
    } part[2];                 /* its buffers */
    const CK_ATTRIBUTE *asked; /* its attributes before the library has filled them in */
};

/* An output with its length as the library sees it; the capacity is kept beside. */
struct serve_room {
    CK_ULONG length, capacity;
    CK_BYTE *bytes;
    bool has_length;
};

CK_ULONG serve_number(struct serve *s);
CK_BYTE *serve_bytes(struct serve *s, CK_ULONG *size);
struct serve_room serve_room(struct serve *s);
struct serve_room serve_fill(struct serve *s);
void *serve_result(struct serve *s, size_t size);
struct serve_room serve_list(struct serve *s, size_t element);
CK_MECHANISM *serve_mechanism(struct serve *s);
CK_BYTE *serve_parameter(struct serve *s, CK_ULONG *size);
CK_ATTRIBUTE *serve_template(struct serve *s, CK_ULONG *count);
CK_ATTRIBUTE *serve_answers(struct serve *s, CK_ULONG *count);
CK_C_INITIALIZE_ARGS *serve_initialize(struct serve *s);
bool serve_is_read(struct serve *s); /* well formed: now the library may be called */

void answer_rv(struct serve *s, CK_RV rv);
void answer_room(struct serve *s, CK_RV rv, const struct serve_room *room);
void answer_fill(struct serve *s, CK_RV rv, const struct serve_room *room);
void answer_result(struct serve *s, CK_RV rv, const void *result, size_t size);
void answer_list(struct serve *s, CK_RV rv, const struct serve_room *room, size_t element);
void answer_mechanism(struct serve *s, CK_RV rv);
void answer_parameter(struct serve *s, CK_RV rv);
void answer_answers(struct serve *s, CK_RV rv, const CK_ATTRIBUTE *attributes, CK_ULONG count);

bool serve_begin(struct serve *s);
void serve_end(struct serve *s); /* wipes what passed */

/* One request after the other, until the line ends or says what cannot be. */
void serve_line(struct ha_line *line, void *const *functions);

extern const char *serve_init_args; /* of this worker, before those of its clients */

typedef bool serve_call(struct serve *s, void *function); /* false: the request is not well formed */
extern serve_call *const serve_rows[HA_FUNCTIONS];        /* generated */

#endif
