/* An ordinary PKCS#11 program: signs with one key from several threads and writes down each result.
 *
 * It knows nothing of HA: whatever module it is given, it logs in once, finds its key once, and then only
 * signs. It never retries and never opens anything again; a call that fails is written down and counted. If
 * the module happens to have what pkcs11_ha.h declares, records name the member that signed, and `status`
 * works.
 *
 * Standard output, a line each; times are microseconds of CLOCK_MONOTONIC, numbers decimal, bytes
 * hexadecimal:
 *
 *   signed THREAD COUNTER BEGAN_US TOOK_US MEMBER DATA SIGNATURE
 *   failed THREAD COUNTER BEGAN_US TOOK_US CALL CKR
 *   hung THREAD
 *   done SIGNED FAILED
 *
 * Threads count from 1, counters from 0 without a gap. DATA are the 32 bytes given to C_Sign (CKM_ECDSA):
 * THREAD and COUNTER, each a big-endian number of 16 bytes. SIGNATURE is r and s, 64 bytes for P-256. MEMBER
 * is `-` if unknown. A thread hung when a call of its has not returned long after the end. Exit status: 0 signed to
 * the end, 1 a thread hung, 2 never began.
 *
 * Standard input, a command each line: `stop` ends early; `status` answers on standard output, an empty line
 * last:
 *
 *   HA group 1599447001 status:
 *   HSM 599447001 - CKR_DEVICE_ERROR
 *   HSM 78665001 - CKR_OK
 */
#define _GNU_SOURCE /* getopt_long and CLOCK_MONOTONIC next to -std=c11 */

#include <dlfcn.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pkcs11.h"
#include "pkcs11_ha.h"

enum { MAX_THREADS = 256, HANG_S = 5, DATA_SIZE = 32, SIGNATURE_SIZE = 256, LINE_SIZE = 1024 };

/* Written before the threads start, constant afterwards; except `stop`. */
static struct {
    CK_FUNCTION_LIST_PTR p11;
    CK_CA_GetHAState get_ha_state;             /* NULL: the module has no HA */
    CK_CA_GetSessionMember get_session_member; /* NULL: the same */
    CK_SLOT_ID slot;
    CK_OBJECT_HANDLE key;
    atomic_bool stop;
} app;

struct worker {
    pthread_t thread;
    unsigned number;
    CK_SESSION_HANDLE session;
    atomic_ullong signatures; /* of a thread that hung they are read while it may still count */
    atomic_ullong failures;
};

/* What one attempt to sign came to; `call` is the call that answered rv. */
struct outcome {
    const char *call;
    CK_RV rv;
    CK_BYTE signature[SIGNATURE_SIZE];
    CK_ULONG signature_size;
};

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

/* Codes that a signing program meets; the others are written as numbers. */
static const char *ckr_name(CK_RV rv, char number[32])
{
#define NAME(code) \
    case code: return #code
    switch (rv) {
        NAME(CKR_OK);
        NAME(CKR_HOST_MEMORY);
        NAME(CKR_SLOT_ID_INVALID);
        NAME(CKR_GENERAL_ERROR);
        NAME(CKR_FUNCTION_FAILED);
        NAME(CKR_ARGUMENTS_BAD);
        NAME(CKR_DATA_LEN_RANGE);
        NAME(CKR_DEVICE_ERROR);
        NAME(CKR_DEVICE_MEMORY);
        NAME(CKR_DEVICE_REMOVED);
        NAME(CKR_FUNCTION_CANCELED);
        NAME(CKR_FUNCTION_NOT_SUPPORTED);
        NAME(CKR_KEY_HANDLE_INVALID);
        NAME(CKR_KEY_FUNCTION_NOT_PERMITTED);
        NAME(CKR_MECHANISM_INVALID);
        NAME(CKR_OBJECT_HANDLE_INVALID);
        NAME(CKR_OPERATION_ACTIVE);
        NAME(CKR_OPERATION_NOT_INITIALIZED);
        NAME(CKR_PIN_INCORRECT);
        NAME(CKR_PIN_LOCKED);
        NAME(CKR_SESSION_CLOSED);
        NAME(CKR_SESSION_COUNT);
        NAME(CKR_SESSION_HANDLE_INVALID);
        NAME(CKR_TOKEN_NOT_PRESENT);
        NAME(CKR_TOKEN_NOT_RECOGNIZED);
        NAME(CKR_USER_ALREADY_LOGGED_IN);
        NAME(CKR_USER_NOT_LOGGED_IN);
        NAME(CKR_USER_PIN_NOT_INITIALIZED);
        NAME(CKR_BUFFER_TOO_SMALL);
        NAME(CKR_CRYPTOKI_NOT_INITIALIZED);
        NAME(CKR_CRYPTOKI_ALREADY_INITIALIZED);
    }
#undef NAME
    snprintf(number, 32, "0x%08lx", (unsigned long)rv);
    return number;
}

static _Noreturn void give_up(const char *what, const char *why)
{
    fprintf(stderr, "demo-client: %s: %s\n", what, why);
    exit(2);
}

static void must(const char *call, CK_RV rv)
{
    char number[32];
    if (rv != CKR_OK) give_up(call, ckr_name(rv, number));
}

static void load_module(const char *path)
{
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (module == NULL) give_up("dlopen", dlerror());

    CK_RV (*get_function_list)(CK_FUNCTION_LIST_PTR_PTR);
    *(void **)&get_function_list = dlsym(module, "C_GetFunctionList");
    if (get_function_list == NULL) give_up(path, "no PKCS#11 module");
    must("C_GetFunctionList", get_function_list(&app.p11));

    *(void **)&app.get_ha_state = dlsym(module, "CA_GetHAState");

    CK_RV (*get_interface)(CK_UTF8CHAR_PTR, CK_VERSION_PTR, CK_INTERFACE_PTR_PTR, CK_FLAGS);
    *(void **)&get_interface = dlsym(module, "C_GetInterface");
    CK_UTF8CHAR name[] = CK_HA_INTERFACE_NAME;
    CK_INTERFACE_PTR interface;
    if (get_interface != NULL && get_interface(name, NULL, &interface, 0) == CKR_OK)
        app.get_session_member = ((CK_HA_FUNCTION_LIST_PTR)interface->pFunctionList)->CA_GetSessionMember;
}

static void find_token(const char *label)
{
    CK_SLOT_ID slots[256];
    CK_ULONG count = sizeof slots / sizeof *slots;
    must("C_GetSlotList", app.p11->C_GetSlotList(CK_TRUE, slots, &count));

    char padded[33];
    snprintf(padded, sizeof padded, "%-32s", label);
    for (CK_ULONG i = 0; i < count; i++) {
        CK_TOKEN_INFO token;
        if (app.p11->C_GetTokenInfo(slots[i], &token) == CKR_OK &&
            memcmp(token.label, padded, sizeof token.label) == 0) {
            app.slot = slots[i];
            return;
        }
    }
    give_up(label, "no such token");
}

static void find_key(CK_SESSION_HANDLE session, const char *label)
{
    CK_OBJECT_CLASS private_key = CKO_PRIVATE_KEY;
    CK_ATTRIBUTE template[] = {
        {CKA_CLASS, &private_key, sizeof private_key},
        {CKA_LABEL, (void *)(uintptr_t)label, strlen(label)},
    };
    CK_ULONG found = 0;
    must("C_FindObjectsInit", app.p11->C_FindObjectsInit(session, template, 2));
    must("C_FindObjects", app.p11->C_FindObjects(session, &app.key, 1, &found));
    must("C_FindObjectsFinal", app.p11->C_FindObjectsFinal(session));
    if (found == 0) give_up(label, "no such private key");
}

static CK_SESSION_HANDLE open_session(void)
{
    CK_SESSION_HANDLE session;
    must("C_OpenSession", app.p11->C_OpenSession(app.slot, CKF_SERIAL_SESSION, NULL, NULL, &session));
    return session;
}

static void sign(CK_SESSION_HANDLE session, CK_BYTE data[DATA_SIZE], struct outcome *outcome)
{
    CK_MECHANISM ecdsa = {CKM_ECDSA, NULL, 0};
    outcome->call = "C_SignInit";
    outcome->rv = app.p11->C_SignInit(session, &ecdsa, app.key);
    if (outcome->rv != CKR_OK) return;
    outcome->call = "C_Sign";
    outcome->signature_size = sizeof outcome->signature;
    outcome->rv = app.p11->C_Sign(session, data, DATA_SIZE, outcome->signature, &outcome->signature_size);
}

static void name_member(CK_SESSION_HANDLE session, CK_CHAR name[CK_HA_MEMBER_NAME_SIZE])
{
    CK_CHAR serial[CK_HA_SERIAL_SIZE];
    if (app.get_session_member == NULL || app.get_session_member(session, name, serial) != CKR_OK || name[0] == '\0')
        memcpy(name, "-", 2);
}

static char *put_hex(char *at, const CK_BYTE *bytes, CK_ULONG size)
{
    static const char digits[] = "0123456789abcdef";
    for (CK_ULONG i = 0; i < size; i++) {
        *at++ = digits[bytes[i] >> 4];
        *at++ = digits[bytes[i] & 15];
    }
    return at;
}

/* Lines of several threads must not mix: each is written by one call. */
static void write_signed(const struct worker *worker, uint64_t counter, uint64_t began_us, uint64_t took_us,
                         const CK_BYTE data[DATA_SIZE], const struct outcome *outcome)
{
    CK_CHAR member[CK_HA_MEMBER_NAME_SIZE];
    name_member(worker->session, member);

    char line[LINE_SIZE];
    char *at = line;
    at += snprintf(line, sizeof line, "signed %u %llu %llu %llu %.*s ", worker->number, (unsigned long long)counter,
                   (unsigned long long)began_us, (unsigned long long)took_us, (int)sizeof member, (const char *)member);
    at = put_hex(at, data, DATA_SIZE);
    *at++ = ' ';
    at = put_hex(at, outcome->signature, outcome->signature_size);
    *at++ = '\n';
    fwrite(line, 1, (size_t)(at - line), stdout);
}

static void write_failed(const struct worker *worker, uint64_t counter, uint64_t began_us, uint64_t took_us,
                         const struct outcome *outcome)
{
    char number[32];
    printf("failed %u %llu %llu %llu %s %s\n", worker->number, (unsigned long long)counter,
           (unsigned long long)began_us, (unsigned long long)took_us, outcome->call, ckr_name(outcome->rv, number));
}

static void fill_data(CK_BYTE data[DATA_SIZE], uint64_t thread, uint64_t counter)
{
    memset(data, 0, DATA_SIZE);
    for (unsigned i = 0; i < 8; i++) {
        data[15 - i] = (CK_BYTE)(thread >> (8 * i));
        data[31 - i] = (CK_BYTE)(counter >> (8 * i));
    }
}

static void *sign_until_stopped(void *argument)
{
    struct worker *worker = argument;
    for (uint64_t counter = 0; !atomic_load(&app.stop); counter++) {
        CK_BYTE data[DATA_SIZE];
        struct outcome outcome;
        fill_data(data, worker->number, counter);

        uint64_t began_us = now_us();
        sign(worker->session, data, &outcome);
        uint64_t took_us = now_us() - began_us;

        if (outcome.rv == CKR_OK) {
            atomic_fetch_add(&worker->signatures, 1);
            write_signed(worker, counter, began_us, took_us, data, &outcome);
        } else {
            atomic_fetch_add(&worker->failures, 1);
            write_failed(worker, counter, began_us, took_us, &outcome);
            /* A dead token answers at once: its failures must not drown whoever reads them. */
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        }
    }
    return NULL;
}

static void write_status(void)
{
    char number[32];
    CK_HA_STATUS status = {.listSize = 0};
    flockfile(stdout);
    if (app.get_ha_state == NULL) {
        printf("no HA status: the module has no CA_GetHAState\n\n");
    } else {
        CK_RV rv = app.get_ha_state(app.slot, &status);
        if (rv != CKR_OK) {
            printf("no HA status: CA_GetHAState %s\n\n", ckr_name(rv, number));
        } else {
            printf("HA group %.*s status:\n", CK_HA_SERIAL_SIZE, (const char *)status.groupSerial);
            for (CK_ULONG i = 0; i < status.listSize && i < CK_HA_MAX_MEMBERS; i++)
                printf("HSM %.*s - %s\n", CK_HA_SERIAL_SIZE, (const char *)status.memberList[i].memberSerial,
                       ckr_name(status.memberList[i].memberStatus, number));
            printf("\n");
        }
    }
    funlockfile(stdout);
}

/* Returns true for `stop`. */
static bool obey(const char *command)
{
    if (strcmp(command, "stop") == 0) return true;
    if (strcmp(command, "status") == 0)
        write_status();
    else
        fprintf(stderr, "demo-client: unknown command %s\n", command);
    return false;
}

static void obey_until(uint64_t deadline_us)
{
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    char text[256];
    size_t used = 0;
    for (uint64_t now; (now = now_us()) < deadline_us;) {
        if (poll(&input, 1, (int)((deadline_us - now) / 1000 + 1)) <= 0) continue;
        ssize_t got = read(STDIN_FILENO, text + used, sizeof text - 1 - used);
        if (got <= 0) {
            input.fd = -1; /* nobody commands us any more; poll() then only waits */
            continue;
        }
        used += (size_t)got;
        text[used] = '\0';
        for (char *end; (end = strchr(text, '\n')) != NULL;) {
            *end = '\0';
            if (obey(text)) return;
            used -= (size_t)(end + 1 - text);
            memmove(text, end + 1, used + 1);
        }
        if (used == sizeof text - 1) used = 0; /* no command is that long */
    }
}

static unsigned long number_between(const char *text, unsigned long low, unsigned long high)
{
    char *end;
    unsigned long number = strtoul(text, &end, 10);
    if (*text == '\0' || *end != '\0' || number < low || number > high) give_up(text, "not a number in range");
    return number;
}

int main(int count, char **arguments)
{
    static const struct option options[] = {
        {"token", required_argument, NULL, 't'},   {"pin", required_argument, NULL, 'p'},
        {"key", required_argument, NULL, 'k'},     {"threads", required_argument, NULL, 'n'},
        {"seconds", required_argument, NULL, 's'}, {NULL, 0, NULL, 0},
    };
    static const char usage[] = "--token LABEL --pin PIN --key LABEL [--threads 1] [--seconds 10] MODULE";
    const char *token = NULL, *pin = NULL, *key = NULL;
    unsigned long threads = 1, seconds = 10;
    for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;) {
        switch (option) {
        case 't': token = optarg; break;
        case 'p': pin = optarg; break;
        case 'k': key = optarg; break;
        case 'n': threads = number_between(optarg, 1, MAX_THREADS); break;
        case 's': seconds = number_between(optarg, 1, 1000000); break;
        default: give_up("usage", usage);
        }
    }
    if (token == NULL || pin == NULL || key == NULL || optind != count - 1) give_up("usage", usage);

    load_module(arguments[optind]);
    must("C_Initialize", app.p11->C_Initialize(&(CK_C_INITIALIZE_ARGS){.flags = CKF_OS_LOCKING_OK}));
    find_token(token);
    CK_SESSION_HANDLE login = open_session();
    must("C_Login", app.p11->C_Login(login, CKU_USER, (CK_UTF8CHAR_PTR)(uintptr_t)pin, strlen(pin)));
    find_key(login, key);

    setvbuf(stdout, NULL, _IOLBF, 1 << 16);
    static struct worker workers[MAX_THREADS];
    for (unsigned i = 0; i < threads; i++) {
        workers[i].number = i + 1;
        workers[i].session = open_session();
    }
    uint64_t deadline_us = now_us() + seconds * 1000000u;
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&workers[i].thread, NULL, sign_until_stopped, &workers[i]) != 0)
            give_up("pthread_create", "no thread");

    obey_until(deadline_us);

    atomic_store(&app.stop, true);
    struct timespec patience;
    clock_gettime(CLOCK_MONOTONIC, &patience);
    patience.tv_sec += HANG_S;
    uint64_t signatures = 0, failures = 0;
    bool hung = false;
    for (unsigned i = 0; i < threads; i++) {
        if (pthread_clockjoin_np(workers[i].thread, NULL, CLOCK_MONOTONIC, &patience) != 0) {
            printf("hung %u\n", workers[i].number);
            hung = true;
        }
        signatures += atomic_load(&workers[i].signatures);
        failures += atomic_load(&workers[i].failures);
    }
    printf("done %llu %llu\n", (unsigned long long)signatures, (unsigned long long)failures);
    if (hung) _exit(1); /* C_Finalize would wait for the call that hangs; stdout is line buffered */

    /* The end is nobody's signature: a dead token may refuse it. */
    app.p11->C_Logout(login);
    app.p11->C_CloseAllSessions(app.slot);
    app.p11->C_Finalize(NULL);
    return 0;
}
