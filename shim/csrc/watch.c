/*
 * A watch on directories (inotify): one thread waits in it for what operators change, and costs nobody else anything.
 *
 * Hosts close descriptors that are not theirs, and their numbers come again: a number is used only while an inotify
 * instance is behind it.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "ha.h"

enum { STEP_MS = 60000, EVENTS_SIZE = 4096 };

#define CHANGES (IN_CLOSE_WRITE | IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_ATTRIB | IN_ONLYDIR)

struct ha_watch {
    _Atomic int number; /* of the descriptor, -1: none */
    _Atomic int any;    /* one of its watches */
    _Atomic bool ended;
};

static ha_watch *_Atomic current; /* of the run there is: a child of a fork lets go of it */

ha_watch *ha_watch_new(void)
{
    ha_watch *watch = calloc(1, sizeof *watch);
    if (!watch) return NULL;
    atomic_init(&watch->any, -1);
    atomic_init(&watch->number, inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
    if (atomic_load(&watch->number) < 0) {
        free(watch);
        return NULL;
    }
    atomic_store(&current, watch);
    return watch;
}

static int number_of(ha_watch *watch)
{
    static const char inotify[] = "anon_inode:inotify";
    char path[32], behind[sizeof inotify] = "";
    int number = atomic_load(&watch->number);
    snprintf(path, sizeof path, "/proc/self/fd/%d", number);
    return readlink(path, behind, sizeof behind) == sizeof inotify - 1 && !memcmp(behind, inotify, sizeof inotify - 1)
               ? number
               : -1;
}

void ha_watch_directory(ha_watch *watch, char *path)
{
    int one = inotify_add_watch(number_of(watch), path, CHANGES);
    if (one >= 0) atomic_store(&watch->any, one);
}

int ha_watch_wait(ha_watch *watch)
{
    char events[EVENTS_SIZE];
    struct pollfd wanted = {.fd = number_of(watch), .events = POLLIN};
    int ready = 0;
    while (ready <= 0) {
        if (atomic_load(&watch->ended) || number_of(watch) != wanted.fd || wanted.fd < 0) return 0;
        ready = poll(&wanted, 1, STEP_MS); /* now and then a look whether the descriptor is still ours */
    }
    if (atomic_load(&watch->ended) || number_of(watch) != wanted.fd) return 0;
    while (read(wanted.fd, events, sizeof events) > 0) {
    }
    return 1;
}

int ha_watch_end(ha_watch *watch)
{
    atomic_store(&watch->ended, true);
    return inotify_rm_watch(number_of(watch), atomic_load(&watch->any)) == 0; /* which is an event, too */
}

void ha_watch_free(ha_watch *watch)
{
    ha_watch *own = watch;
    int number = number_of(watch);
    atomic_compare_exchange_strong(&current, &own, NULL);
    if (number >= 0) close(number);
    free(watch);
}

/* In the child of a fork there is no thread that waits: the parent's goes on. */
void ha_watch_after_fork(void)
{
    ha_watch *watch = atomic_exchange(&current, NULL);
    int number = watch ? number_of(watch) : -1;
    if (number >= 0) close(number);
    if (watch) atomic_store(&watch->number, -1);
}
