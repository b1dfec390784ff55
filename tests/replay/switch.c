/*
 * A PKCS#11 3.0 library that hands every call to a real one while it is on, and answers CKR_DEVICE_ERROR while it is
 * off: for members whose calls do not cross to a worker that could be killed.
 *
 * $SWITCH_MODULE is the path of the real library, $SWITCH_FILE a file of one byte that a test maps: 0 is on.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pkcs11.h"

static const volatile unsigned char *off;
static CK_FUNCTION_LIST_3_0 *real;

/* Every argument is a number or a pointer and travels in a word of its own, and no function has more than nine: so one
 * shape forwards them all, and what a function does not have is never looked at. */
typedef uintptr_t word;
typedef CK_RV (*any_function)(word, word, word, word, word, word, word, word, word);

#define FORWARD(name, args)                                                                             \
    static CK_RV forward_##name(word a, word b, word c, word d, word e, word f, word g, word h, word i) \
    {                                                                                                   \
        if (*off) return CKR_DEVICE_ERROR;                                                              \
        return ((any_function)(void (*)(void))real->name)(a, b, c, d, e, f, g, h, i);                   \
    }
CK_FUNCTIONS_2_40(FORWARD)
CK_FUNCTIONS_3_0(FORWARD)

#define ENTRY(name, args) .name = (CK_##name)(void (*)(void))forward_##name,
static CK_FUNCTION_LIST_3_0 list = {{3, 0}, CK_FUNCTIONS_2_40(ENTRY) CK_FUNCTIONS_3_0(ENTRY)};
static CK_UTF8CHAR name_of_all[] = "PKCS 11";
static CK_INTERFACE interface = {name_of_all, &list, 0};

static CK_RV ended(void *reserved)
{
    return real->C_Finalize(reserved); /* also while it is off: so the next start is a fresh one */
}

static CK_RV open_real(void)
{
    const char *path = getenv("SWITCH_MODULE"), *file = getenv("SWITCH_FILE");
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    void *symbol = library ? dlsym(library, "C_GetInterface") : NULL;
    int byte = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
    void *memory = byte < 0 ? MAP_FAILED : mmap(NULL, 1, PROT_READ, MAP_SHARED, byte, 0);
    if (byte >= 0) close(byte);
    CK_C_GetInterface get;
    CK_VERSION version = {3, 0};
    CK_INTERFACE *found;
    memcpy(&get, &symbol, sizeof symbol);
    if (!get || memory == MAP_FAILED || get(name_of_all, &version, &found, 0) != CKR_OK) return CKR_GENERAL_ERROR;
    off = memory;
    real = found->pFunctionList;
    list.C_Finalize = ended;
    return CKR_OK;
}

CK_RV C_GetInterface(CK_UTF8CHAR_PTR name, CK_VERSION_PTR version, CK_INTERFACE_PTR_PTR given, CK_FLAGS flags)
{
    (void)name, (void)version, (void)flags;
    CK_RV rv = real ? CKR_OK : open_real();
    *given = &interface;
    return rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR functions)
{
    (void)functions;
    return CKR_FUNCTION_NOT_SUPPORTED; /* who asks for less has no messages */
}
