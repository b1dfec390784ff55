/* Secrets: PINs in locked memory that no core dump shows and no child of a fork inherits; wiped when dropped. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ha.h"

struct ha_secret {
    CK_ULONG size;
    CK_BYTE bytes[];
};

enum { SECRET_PAGE = 4096, MAX_SECRET = SECRET_PAGE - sizeof(struct ha_secret) };

/* A page of its own. mlock may be refused (RLIMIT_MEMLOCK): swapping is then the system's affair. */
static ha_secret *secret_page(void)
{
    void *page = mmap(NULL, SECRET_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return NULL;
    mlock(page, SECRET_PAGE);
    madvise(page, SECRET_PAGE, MADV_DONTDUMP);
    madvise(page, SECRET_PAGE, MADV_WIPEONFORK);
    return page;
}

ha_secret *ha_secret_new(CK_BYTE *bytes, CK_ULONG size)
{
    ha_secret *secret = size <= MAX_SECRET ? secret_page() : NULL;
    if (!secret) return NULL;
    if (size) memcpy(secret->bytes, bytes, size);
    secret->size = size;
    return secret;
}

/* The first line of a file, without its end of line. */
ha_secret *ha_secret_read(char *path, char *error, size_t error_size)
{
    ha_secret *secret = secret_page();
    if (!secret) {
        snprintf(error, error_size, "no memory");
        return NULL;
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    ssize_t got = -1;
    while (fd >= 0 && (got = read(fd, secret->bytes, MAX_SECRET)) < 0 && errno == EINTR) {
    }
    if (got < 0) snprintf(error, error_size, "%s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    if (got < 0) {
        ha_secret_wipe(secret);
        return NULL;
    }
    CK_ULONG size = 0;
    while (size < (CK_ULONG)got && secret->bytes[size] != '\n' && secret->bytes[size] != '\r') size++;
    explicit_bzero(secret->bytes + size, MAX_SECRET - size);
    secret->size = size;
    return secret;
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
    explicit_bzero(secret, SECRET_PAGE);
    munmap(secret, SECRET_PAGE);
}
