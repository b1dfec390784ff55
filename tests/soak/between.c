/*
 * A PKCS#11 library between one side and the other, which hands every call to a real one and does a little more.
 *
 * In front of a token ($BETWEEN_ORDERS, $BETWEEN_HISTORY): it notes each C_Login with what the token answered, as a
 * line of the history (tests/soak/history.py: Pin), and loses sessions or the login when it is told to, by really
 * closing the session or logging out just before the call that comes next.
 *
 * In front of the module under test ($BETWEEN_PLANT): it has a bug, which the checker must find.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "pkcs11.h"

/* What is to be lost by each process that maps it: totals that only grow (tests/soak/between.py has the same). */
struct orders {
    _Atomic uint64_t sessions, logins;
};

enum { EVERY = 60 }; /* a planted bug shows once in so many calls */

static CK_FUNCTION_LIST *real;
static struct orders *orders;
static _Atomic uint64_t sessions_lost, logins_lost;
static int history = -1;
static const char *member = "", *client = "", *plant = "";

/* ---- what a token notes and loses ---- */

/* One of those that were ordered, if any is open; whoever gets it does it. */
static bool take(_Atomic uint64_t *ordered, _Atomic uint64_t *done)
{
    uint64_t so_far = *done;
    while (so_far < *ordered)
        if (atomic_compare_exchange_weak(done, &so_far, so_far + 1)) return true;
    return false;
}

static void lose(CK_SESSION_HANDLE session)
{
    if (!orders) return;
    if (take(&orders->sessions, &sessions_lost)) real->C_CloseSession(session);
    if (take(&orders->logins, &logins_lost)) real->C_Logout(session);
}

/* FNV-1a: tells PINs apart in a history, which is no place for them. */
static uint64_t digest(const unsigned char *bytes, CK_ULONG size)
{
    uint64_t hash = 0xCBF29CE484222325ULL;
    for (CK_ULONG k = 0; bytes && k < size; k++) hash = (hash ^ bytes[k]) * 0x100000001B3ULL;
    return hash;
}

static CK_RV note_login(CK_SESSION_HANDLE session, CK_USER_TYPE user, CK_UTF8CHAR_PTR pin, CK_ULONG size)
{
    struct timespec now;
    char line[256];
    clock_gettime(CLOCK_MONOTONIC, &now);
    CK_RV rv = real->C_Login(session, user, pin, size);
    long long us = (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000;
    int length = snprintf(line, sizeof line, "[\"Pin\",%lld,\"%s\",\"%s\",\"%016llx\",%lu]\n", us, client, member,
                          (unsigned long long)digest(pin, size), rv);
    if (length < 0 || write(history, line, (size_t)length) != length) abort(); /* a soak that cannot tell is none */
    return rv;
}

/* ---- bugs ---- */

static bool is_planted(const char *name)
{
    static _Atomic uint64_t calls;
    return strcmp(plant, name) == 0 && ++calls % EVERY == 0;
}

/* CKR_OK for work that nobody did. */
static CK_RV sign(CK_SESSION_HANDLE session, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out, CK_ULONG_PTR length)
{
    CK_RV rv = real->C_Sign(session, data, size, out, length);
    if (rv == CKR_OK && out && is_planted("ok-without-work")) memset(out, 0, *length);
    return rv;
}

/* The handle that another thread, or this one, used before. */
static CK_RV sign_init(CK_SESSION_HANDLE session, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
    static _Atomic CK_OBJECT_HANDLE before, other;
    if (mechanism && mechanism->mechanism == CKM_ECDSA) {
        if (before != key) other = (CK_OBJECT_HANDLE)before;
        before = key;
        if (other && is_planted("wrong-key")) key = other;
    }
    return real->C_SignInit(session, mechanism, key);
}

/* ---- the functions ---- */

#define FUNCTION_NUMBER(name, args) FN_##name,
enum { CK_FUNCTIONS_2_40(FUNCTION_NUMBER) FUNCTIONS };

/* The first argument of these is no session. */
static const bool sessionless[FUNCTIONS] = {
    [FN_C_Initialize] = true,       [FN_C_Finalize] = true,         [FN_C_GetInfo] = true,
    [FN_C_GetFunctionList] = true,  [FN_C_GetSlotList] = true,      [FN_C_GetSlotInfo] = true,
    [FN_C_GetTokenInfo] = true,     [FN_C_GetMechanismList] = true, [FN_C_GetMechanismInfo] = true,
    [FN_C_InitToken] = true,        [FN_C_OpenSession] = true,      [FN_C_CloseAllSessions] = true,
    [FN_C_WaitForSlotEvent] = true, [FN_C_CloseSession] = true,     [FN_C_Login] = true,
    [FN_C_Logout] = true,
};

/* Every argument of PKCS#11 2.40 is a number or a pointer and travels in a word of its own, and no function has more
 * than eight: so one shape forwards them all, and what a function does not have is never looked at. */
typedef uintptr_t word;
typedef CK_RV (*any_function)(word, word, word, word, word, word, word, word);

#define FORWARD(name, args)                                                                     \
    static CK_RV forward_##name(word a, word b, word c, word d, word e, word f, word g, word h) \
    {                                                                                           \
        if (!sessionless[FN_##name]) lose(a);                                                   \
        return ((any_function)(void (*)(void))real->name)(a, b, c, d, e, f, g, h);              \
    }
CK_FUNCTIONS_2_40(FORWARD)

#define ENTRY(name, args) .name = (CK_##name)(void (*)(void))forward_##name,
static CK_FUNCTION_LIST list = {CK_FUNCTIONS_2_40(ENTRY)};

/* ---- loading ---- */

static const char *told(const char *name)
{
    const char *value = getenv(name);
    return value ? value : "";
}

static bool open_token_side(void)
{
    const char *path = getenv("BETWEEN_ORDERS");
    if (!path) return true;
    int file = open(path, O_RDWR | O_CLOEXEC);
    void *memory = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file >= 0) close(file);
    history = open(told("BETWEEN_HISTORY"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (memory == MAP_FAILED || history < 0) return false;
    orders = memory;
    sessions_lost = (uint64_t)orders->sessions; /* what was ordered before is not for us */
    logins_lost = (uint64_t)orders->logins;
    list.C_Login = note_login;
    return true;
}

static bool open_real(void)
{
    void *library = dlopen(told("BETWEEN_MODULE"), RTLD_NOW | RTLD_LOCAL);
    void *symbol = library ? dlsym(library, "C_GetFunctionList") : NULL;
    CK_C_GetFunctionList get_list;
    memcpy(&get_list, &symbol, sizeof symbol);
    return get_list && get_list(&real) == CKR_OK;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR functions)
{
    if (!functions) return CKR_ARGUMENTS_BAD;
    if (!real) {
        member = told("BETWEEN_MEMBER");
        client = told("BETWEEN_CLIENT");
        plant = told("BETWEEN_PLANT");
        if (*plant) {
            list.C_Sign = sign;
            list.C_SignInit = sign_init;
        }
        if (!open_token_side() || !open_real()) {
            const char *why = dlerror();
            fprintf(stderr, "between: no module, orders or history: %s\n", why ? why : "see BETWEEN_MODULE");
            return CKR_GENERAL_ERROR;
        }
    }
    list.version = real->version;
    list.C_GetFunctionList = C_GetFunctionList;
    *functions = &list;
    return CKR_OK;
}
