/*
 * The status segment: where this process counts so that others can see it (docs/status-segments.md).
 *
 * The core makes the file and its header; here it is mapped, and each member that is made takes a record of it for its
 * counters.  Without a file, or beyond its last record, a member counts in memory of its own: the data plane does not
 * know the difference.  What is written there no one here relies on for an address.
 *
 * A segment stays mapped until the last of its members is freed: a call may be stuck in one.  In the child of a fork
 * its pages become the child's own, so that a call which comes back there is not counted off the parent's.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ha.h"

struct segment {
    unsigned char *base;
    size_t size, text_room;
    struct ha_segment_header *header;
    char *text;
    struct ha_counters *records;
    unsigned room, taken, users;
    bool closed;
    struct segment *next;
};

static struct segment *all; /* the first one not closed is that of this run */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct segment *current(void)
{
    return all && !all->closed ? all : NULL;
}

/* With the lock held. */
static void unmap_unused(void)
{
    for (struct segment **at = &all; *at;) {
        struct segment *segment = *at;
        if (!segment->closed || segment->users) {
            at = &segment->next;
            continue;
        }
        *at = segment->next;
        munmap(segment->base, segment->size);
        free(segment);
    }
}

/* The file is the caller's to close. */
int ha_segment_open(int file, unsigned long long size)
{
    ha_segment_close();
    struct segment *segment = calloc(1, sizeof *segment);
    void *base = segment ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    if (base == MAP_FAILED) {
        free(segment);
        return 0;
    }
    const struct ha_segment_header *header = base;
    *segment = (struct segment){
        .base = base,
        .size = size,
        .header = base,
        .text = (char *)base + header->text_at,
        .text_room = header->text_room,
        .records = (void *)((unsigned char *)base + header->records_at),
        .room = (unsigned)header->records,
    };
    pthread_mutex_lock(&lock);
    segment->next = all;
    all = segment;
    pthread_mutex_unlock(&lock);
    return 1;
}

void ha_segment_close(void)
{
    pthread_mutex_lock(&lock);
    if (all) all->closed = true;
    unmap_unused();
    pthread_mutex_unlock(&lock);
}

/* Between two even numbers, so that who reads meanwhile knows that he has read halves. */
int ha_segment_tell(char *text, unsigned long long size)
{
    pthread_mutex_lock(&lock);
    struct segment *segment = current();
    bool told = segment && size <= segment->text_room;
    if (told) {
        struct ha_segment_header *header = segment->header;
        uint64_t sequence = atomic_load_explicit(&header->text_sequence, memory_order_relaxed) | 1;
        atomic_store_explicit(&header->text_sequence, sequence, memory_order_relaxed);
        atomic_thread_fence(memory_order_release);
        memcpy(segment->text, text, size);
        atomic_store_explicit(&header->text_size, size, memory_order_relaxed);
        atomic_store_explicit(&header->text_sequence, sequence + 1, memory_order_release);
    }
    pthread_mutex_unlock(&lock);
    return told;
}

/* Counters for a new member; NULL: no memory. */
struct ha_counters *ha_counters_take(void)
{
    struct ha_counters *counters = NULL;
    pthread_mutex_lock(&lock);
    struct segment *segment = current();
    if (segment && segment->taken < segment->room) {
        counters = &segment->records[segment->taken++];
        segment->users++;
    }
    pthread_mutex_unlock(&lock);
    if (counters) return counters;
    counters = aligned_alloc(HA_CACHE_LINE, sizeof *counters);
    if (counters) memset(counters, 0, sizeof *counters);
    return counters;
}

static struct segment *segment_with(const struct ha_counters *counters)
{
    for (struct segment *segment = all; segment; segment = segment->next)
        if (counters >= segment->records && counters < segment->records + segment->room) return segment;
    return NULL;
}

void ha_counters_give_back(struct ha_counters *counters)
{
    pthread_mutex_lock(&lock);
    struct segment *segment = segment_with(counters);
    if (segment) {
        segment->users--;
        unmap_unused();
    } else {
        free(counters);
    }
    pthread_mutex_unlock(&lock);
}

int ha_member_record(ha_member *member)
{
    pthread_mutex_lock(&lock);
    const struct segment *segment = segment_with(member->counters);
    int record = segment && segment == current() ? (int)(member->counters - segment->records) : -1;
    pthread_mutex_unlock(&lock);
    return record;
}

/* ---- fork ---- */

void ha_segments_before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void make_own(const struct segment *segment)
{
    void *copy = mmap(NULL, segment->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED) return;
    memcpy(copy, segment->base, segment->size);
    if (mremap(copy, segment->size, segment->size, MREMAP_MAYMOVE | MREMAP_FIXED, segment->base) == MAP_FAILED)
        munmap(copy, segment->size);
}

void ha_segments_after_fork(bool child)
{
    if (child) {
        for (struct segment *segment = all; segment; segment = segment->next) {
            make_own(segment);
            segment->closed = true; /* the parent's members keep their counters, for whoever comes back from a call */
        }
        pthread_mutex_init(&lock, NULL);
    } else {
        pthread_mutex_unlock(&lock);
    }
}
