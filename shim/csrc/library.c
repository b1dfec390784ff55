/* Loading vendor libraries: never ourselves, never through our own symbols, and a private copy on demand. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ha.h"

enum { NUMBER_BITS = 32 }; /* of a private copy */

struct ha_library {
    void *handle;
    void *base; /* where the file is mapped: a symbol counts only if it lives there */
    bool private_copy;
};

static const char *const function_names[] = {
#define HA_NAME(name) #name,
    HA_FUNCTION_NAMES(HA_NAME)
#undef HA_NAME
};

static void *base_of(const void *address)
{
    Dl_info info;
    return address && dladdr(address, &info) ? info.dli_fbase : NULL;
}

/* Our own file by inode, so that a link or another path to it is found out too. */
static bool is_ourselves(const char *path)
{
    Dl_info info;
    struct stat ours, theirs;
    return dladdr((void *)(uintptr_t)&ha_library_open, &info) && !stat(info.dli_fname, &ours) && !stat(path, &theirs) &&
           ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino;
}

/* The same file in memory is another file to the dynamic linker: another copy of the library's state. */
static int copy_in_memory(const char *path, char *error, size_t error_size)
{
    char buffer[1 << 16];
    const char *name = strrchr(path, '/');
    int from = open(path, O_RDONLY | O_CLOEXEC), to = memfd_create(name ? name + 1 : path, MFD_CLOEXEC);
    ssize_t got = -1;
    while (from >= 0 && to >= 0 && (got = read(from, buffer, sizeof buffer)) != 0) {
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 || write(to, buffer, (size_t)got) != got) {
            got = -1;
            break;
        }
    }
    if (got < 0) snprintf(error, error_size, "%s: cannot copy: %s", path, strerror(errno));
    if (from >= 0) close(from);
    if (got < 0 && to >= 0) {
        close(to);
        to = -1;
    }
    return to;
}

/* The linker tells files apart by the name they were opened with, and a descriptor's number comes again: so each
 * copy gets a spelling of its path that is its own, a bit of its number per slash. */
static void spell_path(char *path, int fd)
{
    static _Atomic unsigned copies;
    unsigned number = atomic_fetch_add(&copies, 1);
    path += sprintf(path, "/proc/self/fd");
    for (unsigned bit = 0; bit < NUMBER_BITS; bit++) path += sprintf(path, "%s", number >> bit & 1 ? "/./" : "/");
    sprintf(path, "%d", fd);
}

/*
 * RTLD_DEEPBIND because a library whose function list is filled through global symbols would, under LD_PRELOAD
 * of ours, list our functions as its own.  NULL with one line in `error`.
 */
ha_library *ha_library_open(char *path, int private_copy, char *error, size_t error_size)
{
    char in_memory[32 + 3 * NUMBER_BITS];
    int flags = RTLD_NOW | RTLD_LOCAL, fd = -1;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    flags |= RTLD_DEEPBIND; /* sanitizers replace malloc, which a deep-bound library would miss */
#endif
    if (is_ourselves(path)) {
        snprintf(error, error_size, "%s: is this very library", path);
        return NULL;
    }
    ha_library *library = calloc(1, sizeof *library);
    if (!library) return NULL;
    if (private_copy) {
        fd = copy_in_memory(path, error, error_size);
        if (fd >= 0) spell_path(in_memory, fd);
    }
    if (!private_copy || fd >= 0) {
        library->handle = dlopen(private_copy ? in_memory : path, flags);
        if (!library->handle) {
            const char *why = dlerror();
            snprintf(error, error_size, "%s", why ? why : "dlopen failed");
        }
    }
    if (fd >= 0) close(fd); /* what is mapped stays */
    if (!library->handle) {
        free(library);
        return NULL;
    }
    library->private_copy = private_copy != 0;
    return library;
}

/* A symbol of that very file, not of something it depends on, and not ours. */
static void *own_symbol(ha_library *library, const char *name)
{
    void *symbol = dlsym(library->handle, name);
    void *base = base_of(symbol);
    if (!symbol || !base || base == base_of((void *)(uintptr_t)&ha_library_open)) return NULL;
    if (!library->base) {
        void *get_list = dlsym(library->handle, "C_GetFunctionList");
        library->base = base_of(get_list);
    }
    return base == library->base ? symbol : NULL;
}

/*
 * The library's function list at the highest version it offers: `count` pointers after the CK_VERSION.  Asked
 * again it may answer with a new list (p11-kit-client does, one per connection).
 */
void *ha_library_list(ha_library *library, unsigned *count, unsigned *major, unsigned *minor, char *error,
                      size_t error_size)
{
    static const struct {
        CK_BYTE major, minor;
        unsigned count;
    } versions[] = {{3, 2, HA_FUNCTIONS_3_2}, {3, 0, HA_FUNCTIONS_3_0}, {2, 40, HA_FUNCTIONS_2_40}};
    CK_C_GetInterface get_interface = NULL;
    CK_C_GetFunctionList get_list = NULL;
    CK_FUNCTION_LIST *list = NULL;
    void *symbol;

    symbol = own_symbol(library, "C_GetFunctionList");
    memcpy(&get_list, &symbol, sizeof symbol);
    symbol = own_symbol(library, "C_GetInterface");
    memcpy(&get_interface, &symbol, sizeof symbol);
    for (unsigned k = 0; get_interface && k < 2; k++) {
        CK_INTERFACE *interface = NULL;
        CK_VERSION version = {versions[k].major, versions[k].minor};
        CK_UTF8CHAR name[] = "PKCS 11";
        if (get_interface(name, &version, &interface, 0) != CKR_OK || !interface || !interface->pFunctionList) continue;
        list = interface->pFunctionList;
        if (list->version.major != versions[k].major || list->version.minor < versions[k].minor) continue;
        *count = versions[k].count;
        *major = list->version.major;
        *minor = list->version.minor;
        return list;
    }
    if (!get_list) {
        snprintf(error, error_size, "no C_GetFunctionList of its own: not a PKCS#11 library");
        return NULL;
    }
    CK_RV rv = get_list(&list);
    if (rv != CKR_OK || !list) {
        snprintf(error, error_size, "C_GetFunctionList answers 0x%lx", (unsigned long)rv);
        return NULL;
    }
    *count = HA_FUNCTIONS_2_40;
    *major = list->version.major;
    *minor = list->version.minor;
    return list;
}

/*
 * The pointer of one row, cured: an application linked directly against the vendor's library has had that
 * library's list bound to our symbols (LD_PRELOAD), and calling it would come straight back here.
 */
void *ha_library_function(ha_library *library, void *list, unsigned row)
{
    void *function;
    memcpy(&function, (char *)list + offsetof(CK_FUNCTION_LIST, C_Initialize) + row * sizeof function, sizeof function);
    if (function && base_of(function) == base_of((void *)(uintptr_t)&ha_library_open))
        function = own_symbol(library, function_names[row]);
    return function;
}

CK_RV ha_library_initialize(void *initialize, CK_FLAGS flags, char *reserved)
{
    CK_C_INITIALIZE_ARGS args = {.flags = flags, .pReserved = reserved};
    CK_C_Initialize function;
    memcpy(&function, &initialize, sizeof function);
    unsigned char guarded = ha_guard_enter();
    CK_RV rv = function ? function(&args) : CKR_FUNCTION_NOT_SUPPORTED;
    ha_guard_leave(guarded);
    return rv;
}

CK_RV ha_library_finalize(void *finalize)
{
    CK_C_Finalize function;
    memcpy(&function, &finalize, sizeof function);
    unsigned char guarded = ha_guard_enter();
    CK_RV rv = function ? function(NULL) : CKR_FUNCTION_NOT_SUPPORTED;
    ha_guard_leave(guarded);
    return rv;
}
