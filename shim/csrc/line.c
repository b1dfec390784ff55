/*
 * Lines: the two ends of a channel, and the memory they share, in which a request and its answer lie.
 *
 * The asking end makes the memory and hands it over with a socket: sealed, so that neither end can shrink it under the
 * other (SIGBUS).  What does not fit goes over the socket.  Who waits looks for a moment, where that pays; then it says
 * in the box's state that it sleeps, and who posts wakes sleepers alone.  One sleeps on the state (a futex): half the
 * price of a byte through a socket.  But a futex does not tell that who was to wake us has died: so the asking end,
 * after a moment, goes on to sleep at the socket, where the kernel says it at once.  The serving end need not: its
 * process ends with its client's.
 *
 * The other end may write into the memory at any time.  So a size is read once, a message is copied out before a word
 * of it is looked at, and a state that cannot be ends the line.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

enum { BOX = 1 << 14, LOOKS = 32, MOST_SKIPPED_BITS = 10 };
enum { LOOK_NS = 100000, DOZE_NS = 1000000 };

/* DOZING on the state, SLEEPING at the socket. */
enum { EMPTY, DOZING, SLEEPING, POSTED, CLOSED };

struct box {
    _Alignas(HA_CACHE_LINE) _Atomic uint32_t state;
    _Atomic uint32_t size; /* ELSEWHERE: the message goes over the socket */
    _Atomic int processor; /* on which it was posted last */
    _Alignas(HA_CACHE_LINE) unsigned char bytes[BOX - HA_CACHE_LINE];
};
#define ELSEWHERE UINT32_MAX

struct ha_boxes {
    struct box request, answer;
};

/* ---- making ---- */

static int new_memory(void)
{
    static const char name[] = "pkcs11-ha";
    struct rlimit most;
    if (getrlimit(RLIMIT_FSIZE, &most) == 0 && most.rlim_cur < sizeof(struct ha_boxes)) return -1; /* SIGXFSZ */
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING); /* before Linux 6.3 */
    if (fd < 0) return -1;
    if (ftruncate(fd, sizeof(struct ha_boxes)) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        return fd;
    close(fd);
    return -1;
}

static struct ha_boxes *map(int memory)
{
    void *boxes = mmap(NULL, sizeof(struct ha_boxes), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (boxes == MAP_FAILED) return NULL;
    mlock(boxes, sizeof(struct ha_boxes));
    madvise(boxes, sizeof(struct ha_boxes), MADV_DONTDUMP);
    madvise(boxes, sizeof(struct ha_boxes), MADV_DONTFORK);
    return boxes;
}

/* `handed` is the caller's to close, once the other end has it. */
bool ha_line_make(struct ha_line *line, int handed[HA_LINE_FDS])
{
    int ends[2], memory = new_memory();
    *line = (struct ha_line){.peer = {-1, -1}};
    if (memory >= 0) line->boxes = map(memory);
    if (!line->boxes || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        if (memory >= 0) close(memory);
        ha_line_close(line);
        return false;
    }
    line->peer.socket = ends[0];
    handed[0] = ends[1];
    handed[1] = memory;
    return true;
}

/* What a client says is memory is measured; that it stays so, its seal says. */
bool ha_line_take(struct ha_line *line, const int handed[HA_LINE_FDS])
{
    struct stat status;
    int memory = handed[1], seals = fcntl(memory, F_GET_SEALS);
    *line = (struct ha_line){.peer = {handed[0], -1}};
    if (seals >= 0 && (seals & F_SEAL_SHRINK) && fstat(memory, &status) == 0 &&
        status.st_size == sizeof(struct ha_boxes))
        line->boxes = map(memory);
    close(memory);
    if (!line->boxes) ha_line_close(line);
    return line->boxes;
}

static void wake(struct box *box)
{
    syscall(SYS_futex, &box->state, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* The serving end hears of it at its next request, the asking one by its socket. */
void ha_line_close(struct ha_line *line)
{
    if (line->boxes) {
        if (atomic_exchange(&line->boxes->request.state, CLOSED) == DOZING) wake(&line->boxes->request);
        munmap(line->boxes, sizeof *line->boxes);
    }
    ha_line_forget(line);
}

void ha_line_forget(struct ha_line *line)
{
    if (line->peer.socket >= 0) close(line->peer.socket);
    *line = (struct ha_line){.peer = {-1, -1}};
}

/* ---- passing ---- */

static bool fits(const struct ha_message *message)
{
    return message->end <= sizeof(((struct box *)NULL)->bytes);
}

/* Over the socket, if need be, once whoever sleeps has been woken. */
static enum ha_wire_result post(struct box *box, struct ha_peer peer, struct ha_message *message, uint64_t deadline)
{
    ha_message_measure(message);
    atomic_store_explicit(&box->processor, sched_getcpu(), memory_order_relaxed);
    if (fits(message)) memcpy(box->bytes, message->bytes, message->end);
    atomic_store_explicit(&box->size, fits(message) ? (uint32_t)message->end : ELSEWHERE, memory_order_relaxed);
    switch (atomic_exchange(&box->state, POSTED)) {
    case EMPTY: break;
    case DOZING: wake(box); break;
    case SLEEPING:
        if (send(peer.socket, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1) return HA_WIRE_GONE;
        break;
    case CLOSED: return HA_WIRE_GONE;
    default: return HA_WIRE_MALFORMED;
    }
    return fits(message) ? HA_WIRE_DONE : ha_send(peer, message, deadline);
}

/* Of a box that was posted. The copy is what is measured and read: the box is wiped, and not looked at again. */
static enum ha_wire_result take(struct box *box, struct ha_peer peer, struct ha_message *message, size_t limit,
                                uint64_t deadline)
{
    uint32_t size = atomic_load_explicit(&box->size, memory_order_relaxed), state = POSTED;
    if (size != ELSEWHERE) {
        if (size > sizeof box->bytes || size > sizeof(struct ha_frame) + limit) return HA_WIRE_MALFORMED;
        if (!ha_message_copy(message, box->bytes, size)) return HA_WIRE_MALFORMED;
        explicit_bzero(box->bytes, size);
    }
    if (!atomic_compare_exchange_strong(&box->state, &state, EMPTY))
        return state == CLOSED ? HA_WIRE_GONE : HA_WIRE_MALFORMED;
    return size == ELSEWHERE ? ha_receive(peer, message, limit, deadline) : HA_WIRE_DONE;
}

/* ---- waiting ---- */

static inline void pause_a_little(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static bool has_processors(void)
{
    static _Atomic int known;
    int count = atomic_load_explicit(&known, memory_order_relaxed);
    if (!count) {
        cpu_set_t set;
        count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
        atomic_store_explicit(&known, count, memory_order_relaxed);
    }
    return count > 1;
}

/*
 * For as long as it takes that both ends go to sleep and are woken (on a virtual machine 50 us each), if the other end is
 * not on our own processor, where it cannot run while we look.  Each time in a row that it did not pay, twice as many
 * waits go by without it.
 */
static void look(struct ha_line *line, struct box *box)
{
    if (atomic_load_explicit(&box->processor, memory_order_relaxed) == sched_getcpu() || !has_processors()) return;
    if (line->skip) {
        line->skip--;
        return;
    }
    uint64_t until = ha_monotonic_ns() + LOOK_NS;
    do {
        for (unsigned k = 0; k < LOOKS; k++) {
            if (atomic_load_explicit(&box->state, memory_order_relaxed) != EMPTY) {
                line->in_vain = 0;
                return;
            }
            pause_a_little();
        }
    } while (ha_monotonic_ns() < until);
    if (line->in_vain < MOST_SKIPPED_BITS) line->in_vain++;
    line->skip = (1U << line->in_vain) - 1;
}

/* Until `until` in monotonic ns, 0: for ever. What the box's state is then. */
static uint32_t doze(struct box *box, uint64_t until)
{
    const struct timespec time = {(time_t)(until / 1000000000U), (long)(until % 1000000000U)};
    uint32_t state = EMPTY;
    if (!atomic_compare_exchange_strong(&box->state, &state, DOZING)) return state;
    while ((state = atomic_load(&box->state)) == DOZING)
        if (syscall(SYS_futex, &box->state, FUTEX_WAIT_BITSET, DOZING, until ? &time : NULL, NULL,
                    FUTEX_BITSET_MATCH_ANY) != 0 &&
            errno == ETIMEDOUT)
            break;
    return state;
}

/* At the socket, until a byte says that the box was posted; its end, or our shutdown() of it, ends the wait too. */
static enum ha_wire_result sleep_at(struct ha_peer peer, uint64_t deadline)
{
    char byte;
    ssize_t n;
    do {
        enum ha_wire_result result = ha_wait(peer, POLLIN, deadline);
        if (result != HA_WIRE_DONE) return result;
        n = recv(peer.socket, &byte, 1, MSG_DONTWAIT);
    } while (n < 0 && (errno == EAGAIN || errno == EINTR));
    return n == 1 ? HA_WIRE_DONE : HA_WIRE_GONE;
}

/* ---- the ends ---- */

enum ha_wire_result ha_line_ask(struct ha_line *line, struct ha_message *message, size_t limit, uint64_t deadline)
{
    struct box *box = &line->boxes->answer;
    enum ha_wire_result result = post(&line->boxes->request, line->peer, message, deadline);
    if (result != HA_WIRE_DONE) return result;
    look(line, box);
    uint64_t dozed = ha_monotonic_ns() + DOZE_NS;
    uint32_t state = doze(box, deadline && deadline < dozed ? deadline : dozed);
    if (state == DOZING && atomic_compare_exchange_strong(&box->state, &state, SLEEPING)) {
        result = sleep_at(line->peer, deadline);
        if (result != HA_WIRE_DONE) return result;
        state = atomic_load(&box->state);
    }
    return state == POSTED ? take(box, line->peer, message, limit, deadline) : HA_WIRE_MALFORMED;
}

enum ha_wire_result ha_line_hear(struct ha_line *line, struct ha_message *request)
{
    struct box *box = &line->boxes->request;
    look(line, box);
    uint32_t state = doze(box, 0);
    if (state == CLOSED) return HA_WIRE_GONE;
    return state == POSTED ? take(box, line->peer, request, HA_WIRE_MAX, 0) : HA_WIRE_MALFORMED;
}

enum ha_wire_result ha_line_answer(struct ha_line *line, struct ha_message *answer)
{
    return post(&line->boxes->answer, line->peer, answer, 0);
}
