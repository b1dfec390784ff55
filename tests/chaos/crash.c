/*
 * A PKCS#11 library that hands every call to a real one, and ends its process just before or just after one of them.
 *
 * $CRASH_MODULE is the path of the real library.  $CRASH_PLAN is a file that a test maps and writes while we run: it
 * says which call is the last, and we count in it (tests/chaos/crash.py has the same layout).  Processes that share
 * a plan share its countdown: the n-th call of all of them together.  Without a plan nothing is counted.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pkcs11.h"

enum { TRACE = 256, EXIT_STATUS = 86 };

/* Deep, as our module loads its members: SoftHSM's list must hold its own functions under any preload.  Sanitizers
 * replace malloc, and what is bound deeply would miss it. */
#ifdef SANITIZED
enum { HOW_TO_LOAD = RTLD_NOW | RTLD_LOCAL };
#else
enum { HOW_TO_LOAD = RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND };
#endif

typedef _Atomic uint64_t number;

struct plan {
    number every;        /* all calls count, not only those that write */
    number after;        /* the end comes after the call's work, before anybody hears of it */
    number whole_group;  /* and takes the process group along: a server dies with its connections */
    number countdown;    /* so many calls and the last of them is the end; 0: no end is planned */
    number counted;      /* calls so far */
    number trace[TRACE]; /* which functions they were, by their place in the header */
};

#define FUNCTION_NUMBER(name, args) FN_##name,
enum { CK_FUNCTIONS_2_40(FUNCTION_NUMBER) FUNCTIONS };

static const bool writes[FUNCTIONS] = {
    [FN_C_CreateObject] = true,  [FN_C_CopyObject] = true,  [FN_C_SetAttributeValue] = true,
    [FN_C_DestroyObject] = true, [FN_C_GenerateKey] = true, [FN_C_GenerateKeyPair] = true,
    [FN_C_UnwrapKey] = true,     [FN_C_DeriveKey] = true,
};

static struct plan *plan;
static CK_FUNCTION_LIST *real;

/* ---- the end ---- */

static void end(void)
{
    if (plan->whole_group) kill(0, SIGKILL);
    _exit(EXIT_STATUS);
}

/* Counts a call; whether it is the last one. */
static bool is_last(unsigned function)
{
    if (!plan || !(writes[function] || plan->every)) return false;
    uint64_t number = atomic_fetch_add(&plan->counted, 1);
    if (number < TRACE) plan->trace[number] = function;
    uint64_t left = plan->countdown;
    while (left && !atomic_compare_exchange_weak(&plan->countdown, &left, left - 1)) {
    }
    return left == 1;
}

/* ---- the functions ---- */

/* Every argument of PKCS#11 2.40 is a number or a pointer and travels in a word of its own, and no function has more
 * than eight: so one shape forwards them all, and what a function does not have is never looked at. */
typedef uintptr_t word;
typedef CK_RV (*any_function)(word, word, word, word, word, word, word, word);

#define FORWARD(name, args)                                                                     \
    static CK_RV forward_##name(word a, word b, word c, word d, word e, word f, word g, word h) \
    {                                                                                           \
        bool last = is_last(FN_##name);                                                         \
        if (last && !plan->after) end();                                                        \
        CK_RV rv = ((any_function)(void (*)(void))real->name)(a, b, c, d, e, f, g, h);          \
        if (last) end();                                                                        \
        return rv;                                                                              \
    }
CK_FUNCTIONS_2_40(FORWARD)

#define ENTRY(name, args) .name = (CK_##name)(void (*)(void))forward_##name,
static CK_FUNCTION_LIST list = {CK_FUNCTIONS_2_40(ENTRY)};

/* ---- loading ---- */

static bool open_plan(void)
{
    const char *path = getenv("CRASH_PLAN");
    if (!path || plan) return true;
    int file = open(path, O_RDWR | O_CLOEXEC);
    void *memory = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file >= 0) close(file);
    if (memory == MAP_FAILED) return false;
    plan = memory;
    return true;
}

static bool open_module(void)
{
    const char *path = getenv("CRASH_MODULE");
    void *library = path ? dlopen(path, HOW_TO_LOAD) : NULL;
    void *symbol = library ? dlsym(library, "C_GetFunctionList") : NULL;
    CK_C_GetFunctionList get_list;
    memcpy(&get_list, &symbol, sizeof symbol);
    return get_list && get_list(&real) == CKR_OK;
}

/* p11-kit's client reads its environment at this moment and its list is for the server named there. */
CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR functions)
{
    if (!functions) return CKR_ARGUMENTS_BAD;
    if (!real && !(open_plan() && open_module())) {
        const char *why = dlerror();
        fprintf(stderr, "crash: no plan or no module: %s\n", why ? why : "see CRASH_PLAN and CRASH_MODULE");
        return CKR_GENERAL_ERROR;
    }
    list.version = real->version;
    list.C_GetFunctionList = C_GetFunctionList;
    *functions = &list;
    return CKR_OK;
}
