/*
 * A worker's end of a call without its process.  Linked with --wrap for ha_secret_pages and munmap: what the library is
 * given lies in pieces of malloc, so that AddressSanitizer sees their ends.
 */
#include <stdlib.h>
#include <string.h>

#include "serving.h"

enum { PIECES = 4096, MOST = 1 << 22 };

static void *pieces[PIECES];
static unsigned piece_count;
static struct serve serving;

void *__wrap_ha_secret_pages(size_t size);
int __wrap_munmap(void *at, size_t size);
int __real_munmap(void *at, size_t size);

void *serving_exactly(size_t size)
{
    if (size > MOST || piece_count == PIECES) return NULL;
    return pieces[piece_count++] = calloc(1, size);
}

void *__wrap_ha_secret_pages(size_t size)
{
    return serving_exactly(size);
}

int __wrap_munmap(void *at, size_t size)
{
    for (unsigned k = 0; k < piece_count; k++)
        if (pieces[k] == at) {
            free(at);
            pieces[k] = pieces[--piece_count];
            return 0;
        }
    return __real_munmap(at, size);
}

/* With an arena that is used up each piece is one of its own. */
const struct ha_message *serving_answer(unsigned row, uint32_t turn, const void *request, size_t size,
                                        struct vendor_script *script)
{
    struct ha_frame frame = {row, turn, size};
    if (!serving.arena && !serve_begin(&serving)) return NULL;
    serving.arena_used = HA_WIRE_SMALL;
    serving.request = (struct ha_message){.room = sizeof frame + size, .end = sizeof frame + size, .at = sizeof frame};
    serving.request.bytes = serving_exactly(serving.request.room);
    if (!serving.request.bytes) return NULL;
    memcpy(serving.request.bytes, &frame, sizeof frame);
    if (size) memcpy(serving.request.bytes + sizeof frame, request, size);
    vendor_script = script;
    bool served = serve_rows[row] && serve_rows[row](&serving, vendor_functions[row]) && !serving.answer.no_memory;
    return served ? &serving.answer : NULL;
}

void serving_end(void)
{
    serve_end(&serving);
    ha_message_free(&serving.request);
}
