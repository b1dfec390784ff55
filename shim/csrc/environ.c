/*
 * A member's `env`: in the environment while its library is loaded and initialised, then put back.
 *
 * setenv() may move the array under another thread's getenv(), which then reads freed memory.  So environ is
 * replaced once by an array of ours with room to spare, which is never freed, and entries are exchanged by single
 * pointer stores: a reader sees the old value or the new one.
 */
#include <stdlib.h>
#include <string.h>

#include "ha.h"

extern char **environ;

enum { ROOM = 64 };

static char **ours; /* our array, while environ still is it */
static size_t ours_room;

static struct {
    size_t index;
    char *before; /* NULL: the variable was not there */
} changed[ROOM];
static unsigned changes;

static size_t length(char **array)
{
    size_t n = 0;
    while (array && array[n]) n++;
    return n;
}

static int adopt(void)
{
    size_t n = length(environ);
    if (environ == ours && n + ROOM < ours_room) return 1;
    size_t room = n + 4 * ROOM;
    char **array = calloc(room, sizeof *array);
    if (!array) return 0;
    if (n) memcpy(array, environ, n * sizeof *array);
    ours = array; /* the one before is left: somebody may be reading it */
    ours_room = room;
    __atomic_store_n(&environ, array, __ATOMIC_RELEASE);
    return 1;
}

static size_t find(const char *name)
{
    size_t size = strlen(name), k = 0;
    while (environ[k] && (strncmp(environ[k], name, size) != 0 || environ[k][size] != '=')) k++;
    return k;
}

/* Sets all or nothing; 0: no memory or too many. The strings live as long as the process. */
int ha_environ_set(char **names, char **values, unsigned count)
{
    if (count > ROOM || !adopt()) return 0;
    for (unsigned k = 0; k < count; k++) {
        size_t name = strlen(names[k]), value = strlen(values[k]);
        char *entry = malloc(name + value + 2);
        if (!entry) {
            ha_environ_restore();
            return 0;
        }
        memcpy(entry, names[k], name);
        entry[name] = '=';
        memcpy(entry + name + 1, values[k], value + 1);
        changed[changes].index = find(names[k]);
        changed[changes].before = environ[changed[changes].index];
        __atomic_store_n(&environ[changed[changes].index], entry, __ATOMIC_RELEASE);
        changes++;
    }
    return 1;
}

/* In the reverse order, so that what was appended last is taken off first. */
void ha_environ_restore(void)
{
    while (changes) {
        changes--;
        if (environ == ours)
            __atomic_store_n(&environ[changed[changes].index], changed[changes].before, __ATOMIC_RELEASE);
    }
}

char *ha_getenv(char *name)
{
    return secure_getenv(name);
}
