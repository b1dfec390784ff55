/*
 * Fuzzes the stubs: a worker that answers anything at all, and a true one whose vendor says anything at all.
 *
 * Linked with --wrap for ha_line_ask and ha_receive: a request is taken where it would be sent, and an answer given
 * where one would come.  That is all of the transport that is left out.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fuzz.h"
#include "serving.h"
#include "words.h"

enum { CALLS = 8, REMOTE = 0 };

static struct fuzz *input; /* NULL: the worker is as it should be */
static CK_ULONG request[WORDS * 64];
static size_t request_size;
static struct ha_frame asked;
static int listener = -1, theirs = -1;
static char directory[] = "/tmp/p11ha-fuzz-XXXXXX", path[64];

enum ha_wire_result __wrap_ha_line_ask(struct ha_line *line, struct ha_message *message, size_t limit,
                                       uint64_t deadline);
enum ha_wire_result __wrap_ha_receive(struct ha_peer peer, struct ha_message *message, size_t limit, uint64_t deadline);
int __real_munmap(void *at, size_t size);

static void remove_directory(void)
{
    unlink(path);
    rmdir(directory);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!mkdtemp(directory)) fuzz_fail("no directory", 0);
    snprintf(path, sizeof path, "%s/worker", directory);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    atexit(remove_directory);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 8) != 0)
        fuzz_fail("no socket", 0);
    return 0;
}

/* ---- the transport ---- */

/* A message of exactly these bytes, which end where their memory ends. */
static enum ha_wire_result give(struct ha_message *message, struct ha_frame frame, const void *bytes, size_t size,
                                size_t limit)
{
    if (size > limit) return HA_WIRE_MALFORMED;
    ha_message_free(message);
    message->bytes = serving_exactly(sizeof frame + size);
    if (!message->bytes) return HA_WIRE_GONE;
    frame.size = size;
    memcpy(message->bytes, &frame, sizeof frame);
    if (size) memcpy(message->bytes + sizeof frame, bytes, size);
    message->room = message->end = sizeof frame + size;
    message->at = sizeof frame;
    message->broken = message->no_memory = false;
    return HA_WIRE_DONE;
}

static enum ha_wire_result greet(struct ha_message *message, size_t limit)
{
    static const unsigned char has[HA_FUNCTIONS] = {[0 ... HA_FUNCTIONS - 1] = 1};
    struct ha_message hello = {0};
    ha_message_begin(&hello, HA_WIRE_HELLO, 0);
    ha_put_bytes(&hello, ha_wire_version, strlen(ha_wire_version));
    ha_put_bytes(&hello, NULL, 0);
    ha_put(&hello, 3);
    ha_put(&hello, 2);
    ha_put_bytes(&hello, has, sizeof has);
    enum ha_wire_result result =
        give(message, ha_frame_of(&hello), hello.bytes + sizeof asked, hello.end - sizeof asked, limit);
    ha_message_free(&hello);
    return result;
}

/* Of a worker that is one: only its vendor lies. */
static enum ha_wire_result serve(struct ha_message *message, size_t limit)
{
    struct vendor_script script = {input->data, input->size, input->at};
    const struct ha_message *answer = serving_answer(asked.row, asked.turn, request, request_size, &script);
    enum ha_wire_result result = HA_WIRE_GONE;
    if (answer) result = give(message, asked, answer->bytes + sizeof asked, answer->end - sizeof asked, limit);
    input->at = script.at;
    serving_end();
    if (!answer && request_size) fuzz_fail("a request that the worker does not take", asked.row);
    return result;
}

/* Words as many as the first byte says. */
static enum ha_wire_result lie(struct ha_message *message, size_t limit)
{
    static CK_ULONG answer[WORDS];
    struct fuzz some = *input;
    size_t size = fuzz_byte(input), left = input->size - input->at;
    some.at = input->at;
    some.size = input->at += size < left ? size : left;
    size_t count = words(&some, answer);
    return give(message, asked, answer, count * sizeof *answer, limit);
}

/* The greeting. */
enum ha_wire_result __wrap_ha_receive(struct ha_peer peer, struct ha_message *message, size_t limit, uint64_t deadline)
{
    (void)peer, (void)deadline;
    asked = (struct ha_frame){.row = HA_WIRE_HELLO};
    return input ? lie(message, limit) : greet(message, limit);
}

/* A call. */
enum ha_wire_result __wrap_ha_line_ask(struct ha_line *line, struct ha_message *message, size_t limit,
                                       uint64_t deadline)
{
    (void)line, (void)deadline;
    asked = ha_frame_of(message);
    request_size = message->end - sizeof asked;
    if (request_size > sizeof request) return HA_WIRE_GONE;
    memcpy(request, message->bytes + sizeof asked, request_size);
    uint8_t how = fuzz_byte(input);
    if (how >= 0x80 && how < 0xFC) return serve(message, limit);
    if (how == 0xFD) return HA_WIRE_LATE;
    if (how == 0xFE) return HA_WIRE_GONE;
    if (how == 0xFF) asked.turn++;
    return lie(message, limit);
}

/* ---- the target ---- */

static void connect_worker(struct fuzz *said)
{
    char error[256], unread[64];
    close(theirs);
    input = said;
    unsigned limits_ms[HA_DEADLINES] = {[HA_DEADLINE_CONNECT] = 1000};
    int connected = ha_remote_connect(REMOTE, path, limits_ms, error, sizeof error);
    theirs = accept(listener, NULL, NULL);
    if (!connected && !said) fuzz_fail(error, 0);
    if (recv(theirs, unread, sizeof unread, MSG_DONTWAIT) < 0) { /* the greeting's */
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz f;
    char unread[64];
    fuzz_begin(&f, data, size);
    f.slot = 3;
    for (CK_ULONG handle = 1; handle < 4; handle++) fuzz_opened(&f, handle), fuzz_made(&f, handle);
    if (fuzz_byte(&f) == 0xFF) connect_worker(&f);
    for (unsigned k = 0; k < CALLS && f.at < f.size; k++) {
        if (!ha_remote_alive(REMOTE)) connect_worker(NULL);
        unsigned row = fuzz_byte(&f) % HA_FUNCTIONS;
        void *stub = ha_remote_function(REMOTE, row);
        if (!stub) continue;
        input = &f;
        CK_RV rv = fuzz_calls[row](&f, stub);
        if (!ha_remote_alive(REMOTE) && rv != CKR_DEVICE_ERROR) fuzz_fail("an answer of a dead worker", rv);
        fuzz_free(&f);
        if (recv(theirs, unread, sizeof unread, MSG_DONTWAIT) < 0) { /* channels that were handed over */
        }
    }
    return 0;
}
