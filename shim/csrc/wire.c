/* Messages of stubs and workers: their memory, their words, and how they are sent within a deadline. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

#include "wire.h"

enum { WORD = sizeof(CK_ULONG), LONGEST_NONCE = 24 };

static size_t padded(size_t size)
{
    return (size + WORD - 1) & ~(size_t)(WORD - 1);
}

/* PINs and keys pass through. Locking is the system's favour (RLIMIT_MEMLOCK), and asked for small pieces alone. */
void *ha_secret_pages(size_t size)
{
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return NULL;
    if (size <= HA_WIRE_SMALL) mlock(pages, size);
    madvise(pages, size, MADV_DONTDUMP);
    madvise(pages, size, MADV_WIPEONFORK);
    return pages;
}

/* Makes room for `size` bytes in all. */
static bool reserve(struct ha_message *message, size_t size)
{
    if (size <= message->room) return true;
    size_t room = HA_WIRE_SMALL;
    while (room < size) room *= 2;
    unsigned char *bytes = size <= sizeof(struct ha_frame) + HA_WIRE_MAX ? ha_secret_pages(room) : NULL;
    if (!bytes) {
        message->no_memory = true;
        return false;
    }
    if (message->bytes) {
        memcpy(bytes, message->bytes, message->end);
        ha_message_free(message);
    }
    message->bytes = bytes;
    message->room = room;
    return true;
}

void ha_message_free(struct ha_message *message)
{
    if (!message->bytes) return;
    explicit_bzero(message->bytes, message->end);
    munmap(message->bytes, message->room);
    message->bytes = NULL;
    message->room = 0;
}

void ha_message_wipe(struct ha_message *message)
{
    if (message->room > HA_WIRE_SMALL)
        ha_message_free(message);
    else if (message->bytes)
        explicit_bzero(message->bytes, message->end);
    message->end = 0;
}

void ha_message_begin(struct ha_message *message, uint32_t row, uint32_t turn)
{
    const struct ha_frame frame = {row, turn, 0};
    message->broken = message->no_memory = false;
    message->end = 0;
    message->at = sizeof frame;
    if (!reserve(message, sizeof frame)) return;
    memcpy(message->bytes, &frame, sizeof frame);
    message->end = sizeof frame;
}

struct ha_frame ha_frame_of(const struct ha_message *message)
{
    struct ha_frame frame;
    memcpy(&frame, message->bytes, sizeof frame);
    return frame;
}

void ha_message_measure(struct ha_message *message)
{
    struct ha_frame frame = ha_frame_of(message);
    frame.size = message->end - sizeof frame;
    memcpy(message->bytes, &frame, sizeof frame);
}

bool ha_message_copy(struct ha_message *message, const void *bytes, size_t size)
{
    message->broken = message->no_memory = false;
    if (message->bytes) explicit_bzero(message->bytes, message->end);
    message->end = 0;
    message->at = sizeof(struct ha_frame);
    if (size < message->at || size % WORD != 0 || !reserve(message, size)) return false;
    memcpy(message->bytes, bytes, size);
    message->end = size;
    return ha_frame_of(message).size == size - message->at;
}

/* ---- words and bytes ---- */

void ha_put(struct ha_message *message, CK_ULONG word)
{
    if (message->no_memory || !reserve(message, message->end + sizeof word)) return;
    memcpy(message->bytes + message->end, &word, sizeof word);
    message->end += sizeof word;
}

void ha_put_bytes(struct ha_message *message, const void *bytes, CK_ULONG size)
{
    ha_put(message, bytes ? HA_SENT_BYTES : HA_SENT_NULL);
    ha_put(message, size);
    if (!bytes || !size || message->no_memory) return;
    if (size > HA_WIRE_MAX || !reserve(message, message->end + padded(size))) {
        message->no_memory = true;
        return;
    }
    memcpy(message->bytes + message->end, bytes, size);
    memset(message->bytes + message->end + size, 0, padded(size) - size);
    message->end += padded(size);
}

CK_ULONG ha_get(struct ha_message *message)
{
    CK_ULONG word;
    if (message->broken || message->end - message->at < sizeof word) {
        message->broken = true;
        return 0;
    }
    memcpy(&word, message->bytes + message->at, sizeof word);
    message->at += sizeof word;
    return word;
}

/* They stay in the message, aligned for any type; NULL if NULL was sent, whose size may yet be said. */
void *ha_get_bytes(struct ha_message *message, CK_ULONG *size)
{
    CK_ULONG sent = ha_get(message);
    *size = ha_get(message);
    if (!message->broken && sent == HA_SENT_NULL) return NULL;
    if (message->broken || sent != HA_SENT_BYTES || *size > message->end - message->at ||
        padded(*size) > message->end - message->at) {
        message->broken = true;
        *size = 0;
        return NULL;
    }
    void *bytes = message->bytes + message->at;
    message->at += padded(*size);
    return bytes;
}

bool ha_message_is_read(const struct ha_message *message)
{
    return !message->broken && message->at == message->end;
}

/* PKCS#11 5.7.5: these errors are of one attribute, and the others are answered. */
bool ha_attributes_are_answered(CK_RV rv)
{
    return rv == CKR_OK || rv == CKR_ATTRIBUTE_SENSITIVE || rv == CKR_ATTRIBUTE_TYPE_INVALID ||
           rv == CKR_BUFFER_TOO_SMALL;
}

CK_ULONG ha_iv_size(const struct ha_written *written, const void *parameter)
{
    CK_ULONG bits, size;
    memcpy(&bits, (const char *)parameter + written->iv_bits, sizeof bits);
    size = bits / 8 + (bits % 8 != 0);
    return size < HA_WIRE_ROOM ? size : HA_WIRE_ROOM;
}

CK_ULONG ha_message_buffer_size(const struct ha_message_parameter *layout, unsigned buffer, const void *parameter)
{
    CK_ULONG length = layout->buffer[buffer].bytes;
    if (length) return length;
    memcpy(&length, (const char *)parameter + layout->buffer[buffer].length, sizeof length);
    bool is_bits = layout->buffer[buffer].unit == HA_UNIT_BITS;
    if (layout->buffer[buffer].unit == HA_UNIT_NONCE) is_bits = length > LONGEST_NONCE;
    return is_bits ? length / 8 + (length % 8 != 0) : length;
}

/* ---- sockets ---- */

uint64_t ha_monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

/* For poll(). */
static int left_ms(uint64_t deadline)
{
    if (!deadline) return -1;
    uint64_t now = ha_monotonic_ns(), left = now < deadline ? (deadline - now) / 1000000U + 1 : 0;
    return left < 1000000 ? (int)left : 1000000;
}

/* Until the socket is ready; what was sent before the other end died is there to be read. */
enum ha_wire_result ha_wait(struct ha_peer peer, short event, uint64_t deadline)
{
    struct pollfd ends[] = {{.fd = peer.socket, .events = event}, {.fd = peer.process, .events = POLLIN}};
    do {
        if (poll(ends, 2, left_ms(deadline)) < 0) {
            if (errno != EINTR) return HA_WIRE_GONE;
        } else if (ends[0].revents) {
            return HA_WIRE_DONE;
        } else if (ends[1].revents) {
            return poll(ends, 1, 0) == 1 ? HA_WIRE_DONE : HA_WIRE_GONE;
        }
    } while (!deadline || ha_monotonic_ns() < deadline);
    return HA_WIRE_LATE;
}

enum ha_wire_result ha_send(struct ha_peer peer, struct ha_message *message, uint64_t deadline)
{
    ha_message_measure(message);
    for (size_t sent = 0; sent < message->end;) {
        ssize_t n = send(peer.socket, message->bytes + sent, message->end - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            sent += (size_t)n;
        } else if (n < 0 && errno == EAGAIN) {
            enum ha_wire_result result = ha_wait(peer, POLLOUT, deadline);
            if (result != HA_WIRE_DONE) return result;
        } else if (n == 0 || errno != EINTR) {
            return HA_WIRE_GONE;
        }
    }
    return HA_WIRE_DONE;
}

/*
 * One message of at most `limit` bytes, into a message whose bytes are overwritten.  Not a byte may follow it: the
 * other end speaks only when it is asked.
 */
enum ha_wire_result ha_receive(struct ha_peer peer, struct ha_message *message, size_t limit, uint64_t deadline)
{
    struct ha_frame frame = {0};
    size_t whole = sizeof frame, got = 0;
    message->broken = message->no_memory = false;
    if (message->bytes) explicit_bzero(message->bytes, message->end);
    message->end = 0;
    if (!reserve(message, HA_WIRE_SMALL)) return HA_WIRE_MALFORMED;
    while (got < whole) {
        ssize_t n = recv(peer.socket, message->bytes + got, message->room - got, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) {
            enum ha_wire_result result = ha_wait(peer, POLLIN, deadline);
            if (result != HA_WIRE_DONE) return result;
        } else if (n == 0 || (n < 0 && errno != EINTR)) {
            return HA_WIRE_GONE;
        }
        if (n < 0) continue;
        message->end = got += (size_t)n;
        if (whole == sizeof frame && got >= sizeof frame) {
            frame = ha_frame_of(message);
            if (frame.size > limit || frame.size % WORD != 0) return HA_WIRE_MALFORMED;
            whole += frame.size;
            if (!reserve(message, whole)) return HA_WIRE_MALFORMED;
        }
    }
    message->at = sizeof frame;
    return got == whole ? HA_WIRE_DONE : HA_WIRE_MALFORMED;
}
