/* An ordinary PKCS#11 program: makes a key pair, signs with it from several threads and writes down each result.
 *
 * It knows nothing of HA: whatever module it is given, it logs in once, makes its key once, and then only
 * signs. It never retries and never opens anything again; a call that fails is written down and counted. If
 * the module happens to have what pkcs11_ha.h declares, records name the member that served, and `status`
 * works. Without --key it makes nothing: it opens one session, read-only, and only does what it is told.
 *
 * Standard output, a line each; times are microseconds of CLOCK_MONOTONIC, numbers decimal, bytes
 * hexadecimal:
 *
 *   signed LABEL THREAD COUNTER BEGAN_US TOOK_US MEMBER DATA SIGNATURE
 *   failed LABEL THREAD COUNTER BEGAN_US TOOK_US CALL CKR
 *   hung THREAD
 *   done SIGNED FAILED
 *
 * LABEL is the key's. Threads count from 1, counters from 0 without a gap; thread 0 are the commands, below.
 * DATA are the 32 bytes given to C_Sign (CKM_ECDSA): THREAD and COUNTER, each a big-endian number of 16 bytes.
 * SIGNATURE is r and s, 64 bytes for P-256. MEMBER is `-` if unknown. A thread hung when a call of its has not
 * returned long after the end. Exit status: 0 signed to the end, 1 a thread hung, 2 never began.
 *
 * Standard input, a command each line; `stop` ends early, each other one is answered in turn. A LABEL has no
 * blanks and stands for all keys that have it:
 *
 *   generate LABEL   generated LABEL MEMBER POINT      a P-256 key pair, as --key at the start; POINT is CKA_EC_POINT
 *   destroy LABEL    destroyed LABEL COUNT             private and public keys
 *   find LABEL       found LABEL PRIVATE PUBLIC        how many of each
 *   sign LABEL       signed … or failed …, as above    with the first private key of that label, 0 if there is none
 *   any of them      refused COMMAND LABEL CALL CKR
 *   status           an empty line last:
 *
 *     HA group 1599447001 status:
 *     HSM 599447001 - CKR_DEVICE_ERROR
 *     HSM 78665001 - CKR_OK
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

enum { MAX_THREADS = 256, HANG_S = 5, DATA_SIZE = 32, SIGNATURE_SIZE = 256, POINT_SIZE = 256 };
enum { MAX_KEYS = 16, COMMAND_SIZE = 255, LINE_SIZE = 1024 };

/* Written before the threads start, constant afterwards; except `stop`. */
static struct {
    CK_FUNCTION_LIST_PTR p11;
    CK_CA_GetHAState get_ha_state;             /* NULL: the module has no HA */
    CK_CA_GetSessionMember get_session_member; /* NULL: the same */
    CK_SLOT_ID slot;
    const char *label; /* of the key that the threads sign with */
    CK_OBJECT_HANDLE key;
    atomic_bool stop;
} app;

/* A thread that signs; number 0 is the program's first, which obeys commands. */
struct worker {
    pthread_t thread;
    unsigned number;
    uint64_t counter;
    CK_SESSION_HANDLE session;
    atomic_ullong signatures; /* of a thread that hung they are read while it may still count */
    atomic_ullong failures;
};

/* What it came to: `call` is the call that answered rv. */
struct outcome {
    const char *call;
    CK_RV rv;
};

struct signature {
    CK_BYTE bytes[SIGNATURE_SIZE];
    CK_ULONG size;
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
        NAME(CKR_SESSION_READ_ONLY);
        NAME(CKR_TOKEN_NOT_PRESENT);
        NAME(CKR_TOKEN_NOT_RECOGNIZED);
        NAME(CKR_TOKEN_WRITE_PROTECTED);
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

static CK_SESSION_HANDLE open_session(CK_FLAGS flags)
{
    CK_SESSION_HANDLE session;
    must("C_OpenSession", app.p11->C_OpenSession(app.slot, CKF_SERIAL_SESSION | flags, NULL, NULL, &session));
    return session;
}

/* The first keys of that class and label. */
static struct outcome find_keys(CK_SESSION_HANDLE session, CK_OBJECT_CLASS class, const char *label,
                                CK_OBJECT_HANDLE keys[MAX_KEYS], CK_ULONG *count)
{
    CK_ATTRIBUTE template[] = {
        {CKA_CLASS, &class, sizeof class},
        {CKA_LABEL, (void *)(uintptr_t)label, strlen(label)},
    };
    *count = 0;
    CK_RV rv = app.p11->C_FindObjectsInit(session, template, 2);
    if (rv != CKR_OK) return (struct outcome){"C_FindObjectsInit", rv};
    rv = app.p11->C_FindObjects(session, keys, MAX_KEYS, count);
    if (rv != CKR_OK) return (struct outcome){"C_FindObjects", rv};
    return (struct outcome){"C_FindObjectsFinal", app.p11->C_FindObjectsFinal(session)};
}

static struct outcome generate_key_pair(CK_SESSION_HANDLE session, const char *label, CK_OBJECT_HANDLE *public_key,
                                        CK_OBJECT_HANDLE *private_key)
{
    static CK_BYTE p256[] = {0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07};
    CK_MECHANISM mechanism = {CKM_EC_KEY_PAIR_GEN, NULL, 0};
    CK_BBOOL yes = CK_TRUE, no = CK_FALSE;
    void *name = (void *)(uintptr_t)label;
    CK_ULONG size = strlen(label);
    CK_ATTRIBUTE public_template[] = {
        {CKA_TOKEN, &yes, sizeof yes},
        {CKA_LABEL, name, size},
        {CKA_ID, name, size},
        {CKA_VERIFY, &yes, sizeof yes},
        {CKA_EC_PARAMS, p256, sizeof p256},
    };
    CK_ATTRIBUTE private_template[] = {
        {CKA_TOKEN, &yes, sizeof yes},   {CKA_LABEL, name, size},           {CKA_ID, name, size},
        {CKA_PRIVATE, &yes, sizeof yes}, {CKA_SENSITIVE, &yes, sizeof yes}, {CKA_EXTRACTABLE, &no, sizeof no},
        {CKA_SIGN, &yes, sizeof yes},
    };
    return (struct outcome){
        "C_GenerateKeyPair",
        app.p11->C_GenerateKeyPair(session, &mechanism, public_template, sizeof public_template / sizeof(CK_ATTRIBUTE),
                                   private_template, sizeof private_template / sizeof(CK_ATTRIBUTE), public_key,
                                   private_key),
    };
}

static struct outcome sign(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key, CK_BYTE data[DATA_SIZE],
                           struct signature *signature)
{
    CK_MECHANISM ecdsa = {CKM_ECDSA, NULL, 0};
    CK_RV rv = app.p11->C_SignInit(session, &ecdsa, key);
    if (rv != CKR_OK) return (struct outcome){"C_SignInit", rv};
    signature->size = sizeof signature->bytes;
    rv = app.p11->C_Sign(session, data, DATA_SIZE, signature->bytes, &signature->size);
    return (struct outcome){"C_Sign", rv};
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
static void write_signed(const struct worker *worker, const char *label, uint64_t began_us, uint64_t took_us,
                         const CK_BYTE data[DATA_SIZE], const struct signature *signature)
{
    CK_CHAR member[CK_HA_MEMBER_NAME_SIZE];
    name_member(worker->session, member);

    char line[LINE_SIZE];
    char *at = line;
    at += snprintf(line, sizeof line, "signed %.*s %u %llu %llu %llu %.*s ", COMMAND_SIZE, label, worker->number,
                   (unsigned long long)worker->counter, (unsigned long long)began_us, (unsigned long long)took_us,
                   (int)sizeof member, (const char *)member);
    at = put_hex(at, data, DATA_SIZE);
    *at++ = ' ';
    at = put_hex(at, signature->bytes, signature->size);
    *at++ = '\n';
    fwrite(line, 1, (size_t)(at - line), stdout);
}

static void write_failed(const struct worker *worker, const char *label, uint64_t began_us, uint64_t took_us,
                         struct outcome outcome)
{
    char number[32];
    printf("failed %s %u %llu %llu %llu %s %s\n", label, worker->number, (unsigned long long)worker->counter,
           (unsigned long long)began_us, (unsigned long long)took_us, outcome.call, ckr_name(outcome.rv, number));
}

static void fill_data(CK_BYTE data[DATA_SIZE], uint64_t thread, uint64_t counter)
{
    memset(data, 0, DATA_SIZE);
    for (unsigned i = 0; i < 8; i++) {
        data[15 - i] = (CK_BYTE)(thread >> (8 * i));
        data[31 - i] = (CK_BYTE)(counter >> (8 * i));
    }
}

/* Signs once and writes down what it came to. */
static bool sign_next(struct worker *worker, const char *label, CK_OBJECT_HANDLE key)
{
    CK_BYTE data[DATA_SIZE];
    struct signature signature;
    fill_data(data, worker->number, worker->counter);

    uint64_t began_us = now_us();
    struct outcome outcome = sign(worker->session, key, data, &signature);
    uint64_t took_us = now_us() - began_us;

    if (outcome.rv == CKR_OK) {
        atomic_fetch_add(&worker->signatures, 1);
        write_signed(worker, label, began_us, took_us, data, &signature);
    } else {
        atomic_fetch_add(&worker->failures, 1);
        write_failed(worker, label, began_us, took_us, outcome);
    }
    worker->counter++;
    return outcome.rv == CKR_OK;
}

static void *sign_until_stopped(void *argument)
{
    struct worker *worker = argument;
    while (!atomic_load(&app.stop))
        if (!sign_next(worker, app.label, app.key))
            /* A dead token answers at once: its failures must not drown whoever reads them. */
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    return NULL;
}

static struct outcome generate(CK_SESSION_HANDLE session, const char *label, CK_OBJECT_HANDLE *private_key)
{
    CK_OBJECT_HANDLE public_key;
    struct outcome outcome = generate_key_pair(session, label, &public_key, private_key);
    if (outcome.rv != CKR_OK) return outcome;
    CK_CHAR member[CK_HA_MEMBER_NAME_SIZE];
    name_member(session, member);

    CK_BYTE point[POINT_SIZE];
    CK_ATTRIBUTE wanted = {CKA_EC_POINT, point, sizeof point};
    outcome.call = "C_GetAttributeValue";
    outcome.rv = app.p11->C_GetAttributeValue(session, public_key, &wanted, 1);
    if (outcome.rv != CKR_OK) return outcome;

    char hex[2 * POINT_SIZE + 1];
    *put_hex(hex, point, wanted.ulValueLen) = '\0';
    printf("generated %s %.*s %s\n", label, (int)sizeof member, (const char *)member, hex);
    return outcome;
}

static struct outcome destroy(CK_SESSION_HANDLE session, const char *label)
{
    static const CK_OBJECT_CLASS classes[] = {CKO_PRIVATE_KEY, CKO_PUBLIC_KEY};
    CK_ULONG destroyed = 0;
    for (unsigned i = 0; i < 2; i++) {
        CK_OBJECT_HANDLE keys[MAX_KEYS];
        CK_ULONG count;
        struct outcome outcome = find_keys(session, classes[i], label, keys, &count);
        for (CK_ULONG k = 0; k < count && outcome.rv == CKR_OK; k++, destroyed++)
            outcome = (struct outcome){"C_DestroyObject", app.p11->C_DestroyObject(session, keys[k])};
        if (outcome.rv != CKR_OK) return outcome;
    }
    printf("destroyed %s %lu\n", label, (unsigned long)destroyed);
    return (struct outcome){"C_DestroyObject", CKR_OK};
}

static struct outcome find(CK_SESSION_HANDLE session, const char *label)
{
    CK_OBJECT_HANDLE keys[MAX_KEYS];
    CK_ULONG private, public;
    struct outcome outcome = find_keys(session, CKO_PRIVATE_KEY, label, keys, &private);
    if (outcome.rv != CKR_OK) return outcome;
    outcome = find_keys(session, CKO_PUBLIC_KEY, label, keys, &public);
    if (outcome.rv == CKR_OK) printf("found %s %lu %lu\n", label, (unsigned long)private, (unsigned long)public);
    return outcome;
}

/* Only what finding came to: what signing came to is written down there. */
static struct outcome find_and_sign(struct worker *worker, const char *label)
{
    CK_OBJECT_HANDLE keys[MAX_KEYS];
    CK_ULONG count;
    struct outcome outcome = find_keys(worker->session, CKO_PRIVATE_KEY, label, keys, &count);
    if (outcome.rv == CKR_OK) sign_next(worker, label, count > 0 ? keys[0] : CK_INVALID_HANDLE);
    return outcome;
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
static bool obey(struct worker *self, char *command)
{
    char *label = strchr(command, ' ');
    if (label != NULL)
        *label++ = '\0';
    else
        label = command + strlen(command);

    struct outcome outcome = {"", CKR_OK};
    CK_OBJECT_HANDLE key;
    if (strcmp(command, "stop") == 0) return true;
    if (strcmp(command, "status") == 0)
        write_status();
    else if (strcmp(command, "generate") == 0)
        outcome = generate(self->session, label, &key);
    else if (strcmp(command, "destroy") == 0)
        outcome = destroy(self->session, label);
    else if (strcmp(command, "find") == 0)
        outcome = find(self->session, label);
    else if (strcmp(command, "sign") == 0)
        outcome = find_and_sign(self, label);
    else
        fprintf(stderr, "demo-client: unknown command %s\n", command);

    char number[32];
    if (outcome.rv != CKR_OK)
        printf("refused %s %s %s %s\n", command, label, outcome.call, ckr_name(outcome.rv, number));
    return false;
}

static void obey_until(struct worker *self, uint64_t deadline_us)
{
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    char text[COMMAND_SIZE + 1];
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
            if (obey(self, text)) return;
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
    static const char usage[] = "--token LABEL --pin PIN [--key LABEL] [--threads 1] [--seconds 10] MODULE";
    const char *token = NULL, *pin = NULL;
    unsigned long threads = 1, seconds = 10;
    for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;) {
        switch (option) {
        case 't': token = optarg; break;
        case 'p': pin = optarg; break;
        case 'k': app.label = optarg; break;
        case 'n': threads = number_between(optarg, 1, MAX_THREADS); break;
        case 's': seconds = number_between(optarg, 1, 1000000); break;
        default: give_up("usage", usage);
        }
    }
    if (token == NULL || pin == NULL || optind != count - 1) give_up("usage", usage);

    load_module(arguments[optind]);
    must("C_Initialize", app.p11->C_Initialize(&(CK_C_INITIALIZE_ARGS){.flags = CKF_OS_LOCKING_OK}));
    find_token(token);
    static struct worker workers[1 + MAX_THREADS];
    CK_SESSION_HANDLE own = workers[0].session = open_session(app.label != NULL ? CKF_RW_SESSION : 0);
    must("C_Login", app.p11->C_Login(own, CKU_USER, (CK_UTF8CHAR_PTR)(uintptr_t)pin, strlen(pin)));

    setvbuf(stdout, NULL, _IOLBF, 1 << 16);
    if (app.label == NULL) {
        threads = 0;
    } else {
        struct outcome outcome = generate(own, app.label, &app.key);
        must(outcome.call, outcome.rv);
    }
    for (unsigned i = 1; i <= threads; i++) {
        workers[i].number = i;
        workers[i].session = open_session(0);
    }
    uint64_t deadline_us = now_us() + seconds * 1000000u;
    for (unsigned i = 1; i <= threads; i++)
        if (pthread_create(&workers[i].thread, NULL, sign_until_stopped, &workers[i]) != 0)
            give_up("pthread_create", "no thread");

    obey_until(&workers[0], deadline_us);

    atomic_store(&app.stop, true);
    struct timespec patience;
    clock_gettime(CLOCK_MONOTONIC, &patience);
    patience.tv_sec += HANG_S;
    uint64_t signatures = 0, failures = 0;
    bool hung = false;
    for (unsigned i = 0; i <= threads; i++) {
        if (i > 0 && pthread_clockjoin_np(workers[i].thread, NULL, CLOCK_MONOTONIC, &patience) != 0) {
            printf("hung %u\n", workers[i].number);
            hung = true;
        }
        signatures += atomic_load(&workers[i].signatures);
        failures += atomic_load(&workers[i].failures);
    }
    printf("done %llu %llu\n", (unsigned long long)signatures, (unsigned long long)failures);
    if (hung) _exit(1); /* C_Finalize would wait for the call that hangs; stdout is line buffered */

    /* The end is nobody's signature: a dead token may refuse it. */
    app.p11->C_Logout(own);
    app.p11->C_CloseAllSessions(app.slot);
    app.p11->C_Finalize(NULL);
    return 0;
}
