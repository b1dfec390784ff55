/* Secrets: PINs and values of keys in locked memory that no core dump shows and no child of a fork inherits; wiped when dropped. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ha.h"

struct ha_secret {
    size_t pages; /* bytes that it takes, all in all */
    CK_ULONG size;
    CK_BYTE bytes[];
};

enum { SECRET_PAGE = 4096, LONGEST_LINE = SECRET_PAGE - sizeof(struct ha_secret), MAX_SECRET = 1 << 20 };

/* Pages of its own. mlock may be refused (RLIMIT_MEMLOCK): swapping is then the system's affair. */
static ha_secret *secret_pages(size_t size)
{
    size_t pages = (sizeof(struct ha_secret) + size + SECRET_PAGE - 1) / SECRET_PAGE * SECRET_PAGE;
    ha_secret *secret = mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (secret == MAP_FAILED) return NULL;
    mlock(secret, pages);
    madvise(secret, pages, MADV_DONTDUMP);
    madvise(secret, pages, MADV_WIPEONFORK);
    secret->pages = pages;
    return secret;
}

ha_secret *ha_secret_new(CK_BYTE *bytes, CK_ULONG size)
{
    ha_secret *secret = size <= MAX_SECRET && (bytes || !size) ? secret_pages(size) : NULL;
    if (!secret) return NULL;
    if (size) memcpy(secret->bytes, bytes, size);
    secret->size = size;
    return secret;
}

static bool is_end_of_line(CK_BYTE c)
{
    return c == '\n' || c == '\r';
}

/* The first line of what `path` opens, without its end; an empty one is no PIN, and would cost a try. `step` bytes are
 * asked for at a time. */
static ha_secret *read_first_line(char *path, size_t step, char *error, size_t error_size)
{
    ha_secret *secret = secret_pages(LONGEST_LINE);
    if (!secret) {
        snprintf(error, error_size, "no memory");
        return NULL;
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    ssize_t got = fd < 0 ? -1 : 1;
    size_t size = 0, end = 0;
    while (got > 0 && end == size && size < LONGEST_LINE) {
        size_t room = LONGEST_LINE - size;
        got = read(fd, secret->bytes + size, step < room ? step : room);
        if (got < 0 && errno == EINTR)
            got = 1;
        else if (got > 0)
            size += (size_t)got;
        while (end < size && !is_end_of_line(secret->bytes[end])) end++;
    }
    if (got < 0)
        snprintf(error, error_size, "%s: %s", path, strerror(errno));
    else if (!end)
        snprintf(error, error_size, "%s: no PIN: its first line is empty", path);
    if (fd >= 0) close(fd);
    if (got < 0 || !end) {
        ha_secret_wipe(secret);
        return NULL;
    }
    explicit_bzero(secret->bytes + end, LONGEST_LINE - end);
    secret->size = end;
    return secret;
}

ha_secret *ha_secret_read(char *path, char *error, size_t error_size)
{
    return read_first_line(path, LONGEST_LINE, error, error_size);
}

/* From a pipe that others read on from: a byte at a time. */
ha_secret *ha_secret_read_line(char *path, char *error, size_t error_size)
{
    return read_first_line(path, 1, error, error_size);
}

CK_BYTE *ha_secret_bytes(ha_secret *secret)
{
    return secret->bytes;
}

CK_ULONG ha_secret_size(ha_secret *secret)
{
    return secret->size;
}

/* In constant time for equal sizes. */
int ha_secret_equal(ha_secret *secret, CK_BYTE *bytes, CK_ULONG size)
{
    unsigned difference = 0;
    if (size != secret->size) return 0;
    for (CK_ULONG k = 0; k < size; k++) difference |= secret->bytes[k] ^ bytes[k];
    return difference == 0;
}

void ha_secret_wipe(ha_secret *secret)
{
    /* In the child of a fork it is wiped already. */
    const size_t pages = secret->pages ? secret->pages : SECRET_PAGE;
    explicit_bzero(secret, pages);
    munmap(secret, pages);
}
