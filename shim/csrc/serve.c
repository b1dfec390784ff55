/*
 * The serving half of a call, in a worker or a thread of hand.c: requests are measured before the vendor's library sees them, answers are put together.
 *
 * Pointers in what a client sent are never followed: each is replaced by one into the request or the arena.
 */
#include <string.h>
#include <sys/mman.h>

#include "serve.h"

enum { ARENA = HA_WIRE_SMALL, ALIGNMENT = 16 };

struct serve_block {
    struct serve_block *next;
    size_t size;
};

const char *serve_init_args;

/* ---- memory of a call ---- */

bool serve_begin(struct serve *s)
{
    memset(s, 0, sizeof *s);
    s->arena = ha_secret_pages(ARENA);
    return s->arena != NULL;
}

void serve_end(struct serve *s)
{
    explicit_bzero(s->arena, s->arena_used);
    s->arena_used = 0;
    while (s->blocks) {
        struct serve_block *block = s->blocks;
        s->blocks = block->next;
        munmap(block, block->size); /* the system clears what it gives out again */
    }
    s->blocks_size = 0;
    s->mechanism = NULL;
    s->given = NULL;
    s->message = NULL;
    s->asked = NULL;
    ha_message_wipe(&s->request);
    ha_message_wipe(&s->answer);
}

static void serve_free(struct serve *s)
{
    serve_end(s);
    ha_message_free(&s->request);
    ha_message_free(&s->answer);
    munmap(s->arena, ARENA);
}

/* Zeroed, aligned for any type; NULL makes the request a broken one. */
static void *allocate(struct serve *s, size_t size)
{
    size_t all = (size + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    if (all < size || all > HA_WIRE_MAX || s->blocks_size + all > HA_WIRE_MAX) {
        s->request.broken = true;
        return NULL;
    }
    if (all <= ARENA - s->arena_used) {
        void *piece = s->arena + s->arena_used;
        s->arena_used += all;
        return piece;
    }
    size_t header = (sizeof(struct serve_block) + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    struct serve_block *block = ha_secret_pages(header + all);
    if (!block) {
        s->request.broken = true;
        return NULL;
    }
    block->next = s->blocks;
    block->size = header + all;
    s->blocks = block;
    s->blocks_size += all;
    return (unsigned char *)block + header;
}

static void *broken(struct serve *s)
{
    s->request.broken = true;
    return NULL;
}

/* ---- requests ---- */

CK_ULONG serve_number(struct serve *s)
{
    return ha_get(&s->request);
}

CK_BYTE *serve_bytes(struct serve *s, CK_ULONG *size)
{
    return ha_get_bytes(&s->request, size);
}

/* Room for nothing is not NULL: that would ask for the length. */
static void make_room(struct serve *s, struct serve_room *room, bool wanted, CK_ULONG capacity, size_t element)
{
    if (wanted && capacity > HA_WIRE_ROOM / element) broken(s);
    if (!s->request.broken && wanted) room->bytes = allocate(s, capacity ? capacity * element : ALIGNMENT);
    room->length = room->capacity = s->request.broken ? 0 : capacity;
}

struct serve_room serve_room(struct serve *s)
{
    struct serve_room room = {0};
    room.has_length = ha_get(&s->request) != 0;
    bool wanted = ha_get(&s->request) != 0;
    CK_ULONG capacity = ha_get(&s->request);
    make_room(s, &room, wanted, capacity, 1);
    return room;
}

struct serve_room serve_fill(struct serve *s)
{
    struct serve_room room = {0};
    bool wanted = ha_get(&s->request) != 0;
    CK_ULONG capacity = ha_get(&s->request);
    make_room(s, &room, wanted, capacity, 1);
    return room;
}

void *serve_result(struct serve *s, size_t size)
{
    return ha_get(&s->request) ? allocate(s, size) : NULL;
}

struct serve_room serve_list(struct serve *s, size_t element)
{
    struct serve_room room = {0};
    bool wanted = ha_get(&s->request) != 0;
    CK_ULONG capacity = ha_get(&s->request);
    make_room(s, &room, wanted, capacity, element);
    return room;
}

static void set_pointer(void *structure, size_t offset, const void *value)
{
    memcpy((char *)structure + offset, &value, sizeof value);
}

static CK_ULONG number_at(const void *structure, size_t offset)
{
    CK_ULONG value;
    memcpy(&value, (const char *)structure + offset, sizeof value);
    return value;
}

static const void *pointer_at(const void *structure, size_t offset)
{
    void *value;
    memcpy(&value, (const char *)structure + offset, sizeof value);
    return value;
}

/* A structure as it was sent, its pointers put right; the layout is ours, whatever the client says. */
static void *structure(struct serve *s, const struct ha_parameter *layout, const struct ha_written *written)
{
    CK_ULONG size;
    void *parameter = ha_get_bytes(&s->request, &size);
    if (!parameter || size != layout->size) return broken(s);
    for (unsigned k = 0; k < layout->buffers; k++) {
        CK_ULONG length;
        const void *bytes = ha_get_bytes(&s->request, &length);
        set_pointer(parameter, layout->buffer[k].pointer, bytes);
        memcpy((char *)parameter + layout->buffer[k].length, &length, sizeof length);
    }
    if (!layout->made) return parameter;
    if (!written || !written->made_size) return broken(s);
    void *made = ha_get(&s->request) ? allocate(s, written->made_size) : NULL;
    set_pointer(parameter, layout->made_pointer, made);
    for (unsigned k = 0; made && k < written->ivs; k++)
        if (ha_get(&s->request)) set_pointer(made, written->iv[k], allocate(s, ha_iv_size(written, parameter) + 1));
    return parameter;
}

CK_MECHANISM *serve_mechanism(struct serve *s)
{
    if (!ha_get(&s->request)) return NULL;
    CK_MECHANISM *mechanism = allocate(s, sizeof *mechanism);
    if (!mechanism) return NULL;
    mechanism->mechanism = ha_get(&s->request);
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    const struct ha_written *written = ha_written_by(mechanism->mechanism);
    bool has_pointers = layout && (layout->buffers || layout->made);
    size_t at = s->request.at;
    if (ha_get(&s->request) == HA_SENT_PARTS) {
        if (!has_pointers || (written && written->refused)) return broken(s);
        mechanism->pParameter = structure(s, layout, written);
        s->given = allocate(s, layout->size);
        if (s->request.broken) return NULL;
        memcpy(s->given, mechanism->pParameter, layout->size);
        mechanism->ulParameterLen = layout->size;
    } else {
        s->request.at = at;
        mechanism->pParameter = ha_get_bytes(&s->request, &mechanism->ulParameterLen);
        bool is_flat = layout && !has_pointers && !(written && written->refused);
        if (mechanism->pParameter && mechanism->ulParameterLen && !is_flat) return broken(s);
    }
    s->mechanism = mechanism;
    return s->request.broken ? NULL : mechanism;
}

/* The layout is that of the mechanism, which the client tells; the library knows which one is under way. */
CK_BYTE *serve_parameter(struct serve *s, CK_ULONG *size)
{
    size_t at = s->request.at;
    if (ha_get(&s->request) != HA_SENT_PARTS) {
        s->request.at = at;
        CK_BYTE *nothing = ha_get_bytes(&s->request, size);
        return nothing && *size ? broken(s) : nothing;
    }
    const struct ha_message_parameter *layout = ha_message_parameter_of(ha_get(&s->request));
    CK_BYTE *parameter = ha_get_bytes(&s->request, size);
    if (!layout || !parameter || *size != layout->size) return broken(s);
    for (unsigned k = 0; k < layout->buffers; k++) {
        struct serve_part *part = &s->part[k];
        part->bytes = ha_get_bytes(&s->request, &part->size);
        if (part->size != ha_message_buffer_size(layout, k, parameter)) return broken(s);
        set_pointer(parameter, layout->buffer[k].pointer, part->bytes);
    }
    s->message = layout;
    return parameter;
}

static bool has_parts(const CK_ATTRIBUTE *attribute)
{
    return attribute->pValue && attribute->ulValueLen && ha_attribute_has_parts(attribute->type);
}

static CK_ATTRIBUTE *attributes(struct serve *s, CK_ULONG *count, bool answers, unsigned depth)
{
    bool sent = ha_get(&s->request) != 0;
    *count = ha_get(&s->request);
    if (!sent || s->request.broken) return NULL;
    /* Each takes three words at least. */
    if (*count > (s->request.end - s->request.at) / (3 * sizeof(CK_ULONG)) || depth > HA_WIRE_DEPTH) return broken(s);
    CK_ATTRIBUTE *all = allocate(s, *count ? *count * sizeof *all : sizeof *all);
    for (CK_ULONG k = 0; all && k < *count && !s->request.broken; k++) {
        all[k].type = ha_get(&s->request);
        size_t at = s->request.at;
        CK_ULONG how = ha_get(&s->request), size = ha_get(&s->request), parts;
        if (how == HA_SENT_PARTS) {
            all[k].pValue = attributes(s, &parts, answers, depth + 1);
            all[k].ulValueLen = size;
            if (parts != size / sizeof *all || !has_parts(&all[k])) return broken(s);
        } else if (!answers) {
            s->request.at = at;
            all[k].pValue = ha_get_bytes(&s->request, &all[k].ulValueLen);
        } else {
            struct serve_room room = {0};
            make_room(s, &room, how == HA_SENT_BYTES, size, 1);
            all[k].pValue = room.bytes;
            all[k].ulValueLen = size;
        }
        if (how != HA_SENT_PARTS && has_parts(&all[k])) return broken(s);
    }
    return s->request.broken ? NULL : all;
}

CK_ATTRIBUTE *serve_template(struct serve *s, CK_ULONG *count)
{
    return attributes(s, count, false, 0);
}

/* A copy of an array and of the arrays in it, with the same buffers. */
static CK_ATTRIBUTE *copy_of(struct serve *s, const CK_ATTRIBUTE *from, CK_ULONG count)
{
    CK_ATTRIBUTE *copy = allocate(s, count ? count * sizeof *copy : sizeof *copy);
    for (CK_ULONG k = 0; copy && k < count; k++) {
        copy[k] = from[k];
        if (has_parts(&from[k])) copy[k].pValue = copy_of(s, from[k].pValue, from[k].ulValueLen / sizeof *from);
    }
    return copy;
}

CK_ATTRIBUTE *serve_answers(struct serve *s, CK_ULONG *count)
{
    CK_ATTRIBUTE *all = attributes(s, count, true, 0);
    s->asked = all ? copy_of(s, all, *count) : NULL;
    return all;
}

CK_C_INITIALIZE_ARGS *serve_initialize(struct serve *s)
{
    CK_ULONG size;
    CK_C_INITIALIZE_ARGS *args = allocate(s, sizeof *args);
    CK_FLAGS flags = ha_get(&s->request);
    char *reserved = ha_get_bytes(&s->request, &size);
    if (!args || (reserved && (!size || reserved[size - 1] != '\0'))) return broken(s);
    args->flags = flags;
    args->pReserved = serve_init_args ? (void *)(uintptr_t)serve_init_args : reserved;
    return args;
}

bool serve_is_read(struct serve *s)
{
    struct ha_frame frame = ha_frame_of(&s->request);
    ha_message_begin(&s->answer, frame.row, frame.turn);
    return ha_message_is_read(&s->request) && !s->answer.no_memory;
}

/* ---- answers ---- */

void answer_rv(struct serve *s, CK_RV rv)
{
    ha_put(&s->answer, rv);
}

static void put_output(struct serve *s, CK_RV rv, const void *bytes, CK_ULONG size, CK_ULONG capacity)
{
    bool filled = rv == CKR_OK && bytes && size <= capacity;
    ha_put_bytes(&s->answer, filled ? bytes : NULL, filled ? size : 0);
}

void answer_room(struct serve *s, CK_RV rv, const struct serve_room *room)
{
    ha_put(&s->answer, room->length);
    put_output(s, rv, room->bytes, room->length, room->capacity);
}

void answer_fill(struct serve *s, CK_RV rv, const struct serve_room *room)
{
    put_output(s, rv, room->bytes, room->capacity, room->capacity);
}

void answer_result(struct serve *s, CK_RV rv, const void *result, size_t size)
{
    put_output(s, rv, result, size, size);
}

void answer_list(struct serve *s, CK_RV rv, const struct serve_room *room, size_t element)
{
    bool fits = room->length <= room->capacity;
    ha_put(&s->answer, room->length);
    put_output(s, rv, fits ? room->bytes : NULL, fits ? room->length * element : 0, room->capacity * element);
}

void answer_mechanism(struct serve *s, CK_RV rv)
{
    const CK_MECHANISM *mechanism = s->mechanism;
    const struct ha_written *written = mechanism ? ha_written_by(mechanism->mechanism) : NULL;
    if (!written || !s->given) return;
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    const char *parameter = s->given; /* the library may have changed the other */
    for (unsigned k = 0; k < layout->buffers; k++) {
        CK_ULONG size = number_at(parameter, layout->buffer[k].length);
        if (written->buffers >> k & 1) put_output(s, rv, pointer_at(parameter, layout->buffer[k].pointer), size, size);
    }
    const char *made = layout->made ? pointer_at(parameter, layout->made_pointer) : NULL;
    for (unsigned k = 0; made && k < layout->made; k++) ha_put(&s->answer, number_at(made, layout->made_handle[k]));
    for (unsigned k = 0; made && k < written->ivs; k++)
        put_output(s, rv, pointer_at(made, written->iv[k]), ha_iv_size(written, parameter), HA_WIRE_ROOM);
}

void answer_parameter(struct serve *s, CK_RV rv)
{
    for (unsigned k = 0; s->message && k < s->message->buffers; k++)
        put_output(s, rv, s->part[k].bytes, s->part[k].size, s->part[k].size);
}

/* `asked` has the capacities, `attributes` what the library made of them. */
static void put_attributes(struct serve *s, const CK_ATTRIBUTE *asked, const CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    for (CK_ULONG k = 0; k < count; k++) {
        CK_ULONG length = attributes[k].ulValueLen;
        ha_put(&s->answer, attributes[k].type);
        ha_put(&s->answer, length);
        if (!asked[k].pValue || length > asked[k].ulValueLen) continue;
        if (has_parts(&asked[k]))
            put_attributes(s, asked[k].pValue, attributes[k].pValue, length / sizeof *asked);
        else
            ha_put_bytes(&s->answer, asked[k].pValue, length);
    }
}

void answer_answers(struct serve *s, CK_RV rv, const CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    bool answered = s->asked && ha_attributes_are_answered(rv);
    ha_put(&s->answer, answered);
    if (answered) put_attributes(s, s->asked, attributes, count);
}

/* ---- a channel ---- */

/* A request for a row that there is, well formed; else the channel ends, and with it the client's trust in us. */
static bool serve_one(struct serve *s, struct ha_line *line, void *const *functions)
{
    if (ha_line_hear(line, &s->request) != HA_WIRE_DONE) return false;
    struct ha_frame frame = ha_frame_of(&s->request);
    if (frame.row >= HA_FUNCTIONS || !serve_rows[frame.row] || !functions[frame.row]) return false;
    if (!serve_rows[frame.row](s, functions[frame.row]) || s->answer.no_memory) return false;
    return ha_line_answer(line, &s->answer) == HA_WIRE_DONE;
}

void serve_line(struct ha_line *line, void *const *functions)
{
    struct serve s;
    if (!serve_begin(&s)) return;
    while (serve_one(&s, line, functions)) serve_end(&s);
    serve_free(&s);
}
