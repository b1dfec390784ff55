/* Fuzzes the worker: any request at all for any row, to a vendor that reads all and says what the bytes say. */
#include <string.h>

#include "fuzz.h"
#include "serving.h"
#include "words.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    return 0;
}

/* The first byte is the row, the second says how much of the end is the vendor's script. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static CK_ULONG request[WORDS];
    if (size < 2) return 0;
    struct vendor_script script = {.size = data[1] < size - 2 ? data[1] : size - 2};
    script.data = data + size - script.size;
    struct fuzz f;
    fuzz_begin(&f, data + 2, size - 2 - script.size);
    size_t count = words(&f, request);
    unsigned row = data[0] % HA_FUNCTIONS;
    const struct ha_message *answer = serving_answer(row, 1, request, count * sizeof *request, &script);
    if (answer && (ha_frame_of(answer).row != row || answer->end < sizeof(struct ha_frame) + sizeof(CK_RV)))
        fuzz_fail("an answer without a return value", row);
    serving_end();
    return 0;
}
