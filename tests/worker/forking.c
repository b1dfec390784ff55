/* SoftHSM ($FORKING_MODULE) behind a library that starts a process of its own, which keeps every descriptor that it got. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pkcs11.h"

static CK_FUNCTION_LIST list;
static CK_RV (*initialize)(void *);

static CK_RV initialize_and_fork(void *arguments)
{
    if (fork() == 0) {
        for (;;) pause();
    }
    return initialize(arguments);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR functions)
{
    const char *path = getenv("FORKING_MODULE");
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    void *symbol = library ? dlsym(library, "C_GetFunctionList") : NULL;
    CK_C_GetFunctionList get;
    CK_FUNCTION_LIST *real;
    memcpy(&get, &symbol, sizeof symbol);
    if (!symbol || get(&real) != CKR_OK) return CKR_GENERAL_ERROR;
    list = *real;
    initialize = real->C_Initialize;
    list.C_Initialize = initialize_and_fork;
    *functions = &list;
    return CKR_OK;
}
