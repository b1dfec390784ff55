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

/* "NAME=VALUE". It lives as long as the process, for somebody may be reading it, and is made once: a member is started
 * again and again. */
static char *entry_of(const char *name, const char *value)
{
    static struct made {
        struct made *next;
        char text[];
    } *all;
    size_t name_size = strlen(name), value_size = strlen(value);
    for (struct made *known = all; known; known = known->next)
        if (strncmp(known->text, name, name_size) == 0 && known->text[name_size] == '=' &&
            strcmp(known->text + name_size + 1, value) == 0)
            return known->text;
    struct made *fresh = malloc(sizeof *fresh + name_size + value_size + 2);
    if (!fresh) return NULL;
    memcpy(fresh->text, name, name_size);
    fresh->text[name_size] = '=';
    memcpy(fresh->text + name_size + 1, value, value_size + 1);
    fresh->next = all;
    return (all = fresh)->text;
}

/* Sets all or nothing; 0: no memory or too many. */
int ha_environ_set(char **names, char **values, unsigned count)
{
    if (count > ROOM || !adopt()) return 0;
    for (unsigned k = 0; k < count; k++) {
        char *entry = entry_of(names[k], values[k]);
        if (!entry) {
            ha_environ_restore();
            return 0;
        }
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
