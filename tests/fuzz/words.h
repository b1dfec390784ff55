/* Messages of words from few bytes: most words of a message are small, or numbers that PKCS#11 knows. */
#ifndef TESTS_FUZZ_WORDS_H
#define TESTS_FUZZ_WORDS_H

#include "fuzz.h"

enum { WORDS = 4096 };

/* How many there are, until the bytes are used up. */
static inline size_t words(struct fuzz *f, CK_ULONG into[WORDS])
{
    size_t count = 0;
    while (f->at < f->size && count < WORDS) {
        uint8_t how = fuzz_byte(f);
        CK_ULONG word = how;
        if (how >= 0xFC)
            word = fuzz_word(f);
        else if (how >= 0xF8)
            word = ~0UL - (how - 0xF8U);
        else if (how >= 0xF0)
            word = 1UL << (how & 1 ? 63 : how & 2 ? 32 : how & 4 ? 28 : 12);
        else if (how >= 0xD8)
            word = fuzz_attribute_types[fuzz_byte(f) % fuzz_attribute_types_count];
        else if (how >= 0xC0)
            word = fuzz_mechanism_types[fuzz_byte(f) % fuzz_mechanism_types_count];
        into[count++] = word;
    }
    return count;
}

#endif
