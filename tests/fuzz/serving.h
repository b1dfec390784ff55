/* A worker's end of a call without its process: a request as bytes, the answer as serve.c makes it. */
#ifndef TESTS_FUZZ_SERVING_H
#define TESTS_FUZZ_SERVING_H

#include "serve.h"
#include "vendor.h"

/* Memory that ends where it is said to end, for what is otherwise mapped in pages. */
void *serving_exactly(size_t size);

/* Serves a request of a row, its frame left out, by the vendor with that script. The answer stays until serving_end. */
const struct ha_message *serving_answer(unsigned row, uint32_t turn, const void *request, size_t size,
                                        struct vendor_script *script);
void serving_end(void);

#endif
