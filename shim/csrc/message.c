/*
 * The parameter of a message (PKCS#11 3.0), kept so that a message of several parts can go on on another member: the
 * structure as it is, behind it the buffers that it points to.
 */
#include <string.h>

#include "ha.h"
#include "wire.h"

enum { LONGEST = 1 << 16 }; /* nobody's IV or tag is as long: a wild length is not followed */

static void *pointer_in(const void *parameter, size_t offset)
{
    void *value;
    memcpy(&value, (const char *)parameter + offset, sizeof value);
    return value;
}

/* How many bytes are kept of the parameter of a part; false: its layout is not known. */
bool ha_message_kept_size(CK_MECHANISM_TYPE mechanism, const struct ha_part *part, uint32_t *size)
{
    const struct ha_message_parameter *layout = ha_message_parameter_of(mechanism);
    *size = 0;
    if (!part->parameter || !part->parameter_size) return true;
    if (!layout || layout->size != part->parameter_size) return false;
    size_t sum = layout->size;
    for (unsigned k = 0; k < layout->buffers; k++) {
        const CK_ULONG length = ha_message_buffer_size(layout, k, part->parameter);
        if (length > LONGEST) return false;
        if (pointer_in(part->parameter, layout->buffer[k].pointer)) sum += length;
    }
    *size = (uint32_t)sum;
    return true;
}

/* Keeps it as the member has left it: an IV that it drew is from now on one that was given. */
void ha_message_keep(CK_MECHANISM_TYPE mechanism, const struct ha_part *part, unsigned char *at)
{
    const struct ha_message_parameter *layout = ha_message_parameter_of(mechanism);
    const CK_GENERATOR_FUNCTION given = CKG_NO_GENERATE;
    memcpy(at, part->parameter, layout->size);
    if (layout->generator) memcpy(at + layout->generator, &given, sizeof given);
    unsigned char *end = at + layout->size;
    for (unsigned k = 0; k < layout->buffers; k++) {
        const void *from = pointer_in(part->parameter, layout->buffer[k].pointer);
        if (!from) continue;
        const CK_ULONG length = ha_message_buffer_size(layout, k, part->parameter);
        /* A tag is there with the last part, which is never repeated: until then its memory need not even be. */
        if (layout->buffer[k].is_tag)
            memset(end, 0, length);
        else
            memcpy(end, from, length);
        end += length;
    }
}

/* A copy of what was kept becomes a parameter again: its pointers lead into itself. */
void ha_message_restore(CK_MECHANISM_TYPE mechanism, unsigned char *kept, struct ha_part *part)
{
    const struct ha_message_parameter *layout = ha_message_parameter_of(mechanism);
    unsigned char *end = kept + layout->size;
    part->parameter = kept;
    part->parameter_size = layout->size;
    for (unsigned k = 0; k < layout->buffers; k++) {
        if (!pointer_in(kept, layout->buffer[k].pointer)) continue;
        memcpy(kept + layout->buffer[k].pointer, &end, sizeof(void *));
        end += ha_message_buffer_size(layout, k, kept);
    }
}
