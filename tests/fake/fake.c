/*
 * A PKCS#11 library for tests that misbehaves on demand, as no real token will: it answers codes, takes its time,
 * holds calls up, ends its process, and forgets sessions, logins and objects.  What reached it is counted.
 *
 * $FAKE_TOKENS names one file for each of its tokens, with `:` between them; slots are numbered from 0.  A file is
 * `struct token`, mapped and shared with the test, which writes the script and reads the counters in place
 * (fake.h; tests/fake/__init__.py has the same layout).  It also holds the token's objects, which so outlive the
 * library.
 *
 * Its cryptography is a toy that hides nothing: a tag is FNV-1a of key, mechanism and data, so tokens with the same
 * key agree on it and those with different keys do not.  Numbers are a trap for who keeps them: object handles are
 * different after each C_Initialize and on each token, and session handles start from 1 again.
 *
 * It is for what no real token does or lets a test see: handles that trap, objects that are memory, counts of PIN tries.
 * Where a real token with faults will do, tests/fault wraps one, with all its functions and any script.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "fake.h"

#define FUNCTION_NUMBER(name, args) FN_##name,
enum { CK_FUNCTIONS_2_40(FUNCTION_NUMBER) };

enum { WAIT_US = 500, MOST_WAITS = 60000 }; /* 30 s: a test that fails must end, too */
enum { SESSIONS = 256, TOKENS = 8, TAG = 32, PIN_TRIES = 3 };

/* ---- what is this library's own ---- */

enum { OP_ENCRYPT, OP_DECRYPT, OP_DIGEST, OP_SIGN, OP_VERIFY, OPERATIONS };

struct operation {
    bool active;
    CK_MECHANISM_TYPE mechanism;
    uint64_t hash[TAG / 8];
    uint8_t pad[TAG];
    size_t position;
};

struct session {
    bool open;
    unsigned slot;
    CK_FLAGS flags;
    uint64_t generation; /* of forget_sessions when it was opened */
    struct operation operation[OPERATIONS];
    bool finding;
    CK_OBJECT_HANDLE found[OBJECTS];
    size_t found_count, found_next;
};

static struct token *tokens[TOKENS];
static unsigned token_count;
static struct session sessions[SESSIONS];
static uint64_t login_generation[TOKENS];
static CK_USER_TYPE user[TOKENS];
static bool logged_in[TOKENS];
static bool initialised;
static uint64_t library_generation;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all the above; calls are made one at a time */

/* Which mechanisms there are, each with the operation it serves. */
static const struct {
    CK_MECHANISM_TYPE type;
    CK_FLAGS flags;
} mechanisms[] = {
    {CKM_RSA_PKCS, CKF_SIGN | CKF_VERIFY | CKF_HW}, {CKM_SHA256_HMAC, CKF_SIGN | CKF_VERIFY},
    {CKM_AES_ECB, CKF_ENCRYPT | CKF_DECRYPT},       {CKM_SHA256, CKF_DIGEST},
    {CKM_GENERIC_SECRET_KEY_GEN, CKF_GENERATE},
};
enum { MECHANISMS = sizeof mechanisms / sizeof *mechanisms };

static unsigned mechanism_count(const struct token *token)
{
    return token->mechanisms < MECHANISMS ? (unsigned)token->mechanisms : MECHANISMS;
}

/* ---- the script ---- */

struct visit {
    bool scripted, late;
    CK_RV answer;
};

static void wait_us(uint64_t us)
{
    struct timespec time = {(time_t)(us / 1000000), (long)(us % 1000000) * 1000};
    while (nanosleep(&time, &time) != 0) {
    }
}

static void come_to(enum end end)
{
    volatile int *volatile nowhere = NULL;
    switch (end) {
    case ANSWERS: return;
    case CRASHES: *nowhere = 1; return;
    case EXITS: exit(0);
    case EXITS_AT_ONCE: _exit(0);
    case ABORTS: abort();
    case SPINS:
        for (;;) atomic_signal_fence(memory_order_seq_cst);
    }
}

static void follow(struct rule *rule, struct visit *visit)
{
    rule->calls++;
    if (rule->sleep_us) wait_us(rule->sleep_us);
    rule->held++;
    for (unsigned waits = 0; rule->hold && waits < MOST_WAITS; waits++) wait_us(WAIT_US);
    rule->held--;
    uint64_t left = rule->skip;
    while (left && !atomic_compare_exchange_weak(&rule->skip, &left, left - 1)) {
    }
    if (left) return;
    left = rule->times;
    while (left && !atomic_compare_exchange_weak(&rule->times, &left, left - 1)) {
    }
    if (!left || visit->scripted) return;
    come_to((enum end)rule->end);
    visit->scripted = true;
    visit->late = rule->late != 0;
    visit->answer = rule->answer;
}

/* Before the work, with no lock held: a call that waits keeps nobody else waiting. */
static struct visit enter(struct token *token, unsigned function)
{
    struct visit visit = {0};
    if (!token) return visit;
    follow(&token->rule[function], &visit);
    if (function != FN_C_Initialize && function != FN_C_Finalize) follow(&token->every, &visit);
    return visit;
}

static bool works(const struct visit *visit)
{
    return !visit->scripted || visit->late;
}

static CK_RV leave(const struct visit *visit, CK_RV rv)
{
    return visit->scripted ? visit->answer : rv;
}

/* ---- tokens, sessions, login ---- */

static bool finalised_by_somebody(void)
{
    uint64_t generation = 0;
    for (unsigned t = 0; t < token_count; t++) generation += tokens[t]->forget_library;
    return generation != library_generation;
}

static struct token *token_of(CK_SLOT_ID slot)
{
    return slot < token_count ? tokens[slot] : NULL;
}

/* The token behind a session handle, also one that is not open: its script is asked first. */
static struct token *token_behind(CK_SESSION_HANDLE handle)
{
    return handle && handle <= SESSIONS ? token_of(sessions[handle - 1].slot) : token_of(0);
}

static CK_RV find_token(CK_SLOT_ID slot, struct token **token)
{
    if (!initialised || finalised_by_somebody()) return CKR_CRYPTOKI_NOT_INITIALIZED;
    *token = token_of(slot);
    if (!*token) return CKR_SLOT_ID_INVALID;
    return (*token)->absent ? CKR_TOKEN_NOT_PRESENT : CKR_OK;
}

static void drop_session(struct session *session)
{
    struct token *token = tokens[session->slot];
    CK_SESSION_HANDLE handle = (CK_SESSION_HANDLE)(session - sessions) + 1;
    session->open = false;
    token->sessions--;
    for (unsigned k = 0; k < OBJECTS; k++)
        if (token->object[k].used && token->object[k].session == handle) token->object[k].used = 0;
    bool last = true;
    for (unsigned k = 0; k < SESSIONS; k++) last = last && !(sessions[k].open && sessions[k].slot == session->slot);
    if (last) logged_in[session->slot] = false;
}

static CK_RV find_session(CK_SESSION_HANDLE handle, struct session **session)
{
    if (!initialised || finalised_by_somebody()) return CKR_CRYPTOKI_NOT_INITIALIZED;
    if (!handle || handle > SESSIONS || !sessions[handle - 1].open) return CKR_SESSION_HANDLE_INVALID;
    *session = &sessions[handle - 1];
    struct token *token = tokens[(*session)->slot];
    if (token->absent || (*session)->generation != token->forget_sessions) {
        for (unsigned k = 0; k < SESSIONS; k++)
            if (sessions[k].open && sessions[k].slot == (*session)->slot) drop_session(&sessions[k]);
        return token->absent ? CKR_DEVICE_REMOVED : CKR_SESSION_HANDLE_INVALID;
    }
    return CKR_OK;
}

static bool is_logged_in(unsigned slot, CK_USER_TYPE as)
{
    return logged_in[slot] && user[slot] == as && login_generation[slot] == tokens[slot]->forget_login;
}

static CK_RV check_pin(struct token *token, const char *right, CK_UTF8CHAR_PTR pin, CK_ULONG size)
{
    if (token->pin_failures >= PIN_TRIES) return CKR_PIN_LOCKED;
    token->pin_tries++;
    if (size == strlen(right) && memcmp(pin, right, size) == 0) {
        token->pin_failures = 0;
        return CKR_OK;
    }
    token->pin_failures++;
    return CKR_PIN_INCORRECT;
}

/* ---- objects ---- */

static uint64_t shift(const struct token *token)
{
    uint64_t sum = token->starts;
    for (const char *c = token->serial; *c; c++) sum += (uint8_t)*c;
    return sum;
}

static CK_OBJECT_HANDLE handle_of(const struct token *token, size_t index)
{
    return (index + shift(token)) % OBJECTS + 1;
}

static const struct attribute *attribute_of(const struct object *object, CK_ATTRIBUTE_TYPE type)
{
    for (uint64_t k = 0; k < object->count; k++)
        if (object->attribute[k].type == type) return &object->attribute[k];
    return NULL;
}

static bool flag_of(const struct object *object, CK_ATTRIBUTE_TYPE type)
{
    const struct attribute *attribute = attribute_of(object, type);
    return attribute && attribute->size == 1 && attribute->value[0];
}

static bool may_see(const struct session *session, const struct object *object)
{
    return object->used && (!flag_of(object, CKA_PRIVATE) || is_logged_in(session->slot, CKU_USER));
}

static struct object *find_object(const struct session *session, CK_OBJECT_HANDLE handle)
{
    struct token *token = tokens[session->slot];
    for (size_t k = 0; k < OBJECTS; k++)
        if (handle_of(token, k) == handle) return may_see(session, &token->object[k]) ? &token->object[k] : NULL;
    return NULL;
}

/* Its value is full of pointers of the caller's, which a file cannot keep. */
static bool has_parts(CK_ATTRIBUTE_TYPE type)
{
    return type == CKA_WRAP_TEMPLATE || type == CKA_UNWRAP_TEMPLATE || type == CKA_DERIVE_TEMPLATE ||
           type == CKA_ENCAPSULATE_TEMPLATE || type == CKA_DECAPSULATE_TEMPLATE;
}

static CK_RV set_attribute(struct object *object, CK_ATTRIBUTE_TYPE type, const void *value, CK_ULONG size)
{
    struct attribute *attribute = (struct attribute *)(uintptr_t)attribute_of(object, type);
    if (size > VALUE || (size && (!value || has_parts(type)))) return CKR_ATTRIBUTE_VALUE_INVALID;
    if (!attribute) {
        if (object->count == ATTRIBUTES) return CKR_DEVICE_MEMORY;
        attribute = &object->attribute[object->count++];
    }
    attribute->type = type;
    attribute->size = size;
    if (size) memcpy(attribute->value, value, size);
    return CKR_OK;
}

/* What a session may not change, or not see (PKCS#11 5.6, table 6). */
static CK_RV may_write(const struct session *session, const struct object *object)
{
    if (flag_of(object, CKA_TOKEN) && !(session->flags & CKF_RW_SESSION)) return CKR_SESSION_READ_ONLY;
    if (flag_of(object, CKA_PRIVATE) && !is_logged_in(session->slot, CKU_USER)) return CKR_USER_NOT_LOGGED_IN;
    return CKR_OK;
}

/* A new object: a copy of `from` (or empty), with the template over it. */
static CK_RV make_object(struct session *session, const struct object *from, CK_ATTRIBUTE_PTR template, CK_ULONG count,
                         struct object **made, CK_OBJECT_HANDLE_PTR handle)
{
    struct token *token = tokens[session->slot];
    struct object object = {.used = 1};
    CK_RV rv = CKR_OK;
    if (from) object = *from;
    for (CK_ULONG k = 0; rv == CKR_OK && k < count; k++)
        rv = set_attribute(&object, template[k].type, template[k].pValue, template[k].ulValueLen);
    if (rv == CKR_OK) rv = may_write(session, &object);
    object.session = flag_of(&object, CKA_TOKEN) ? 0 : (uint64_t)(session - sessions) + 1;
    for (size_t k = 0; rv == CKR_OK && k < OBJECTS; k++)
        if (!token->object[k].used) {
            token->object[k] = object;
            *handle = handle_of(token, k);
            if (made) *made = &token->object[k];
            return CKR_OK;
        }
    return rv == CKR_OK ? CKR_DEVICE_MEMORY : rv;
}

/* ---- toy cryptography ---- */

static void mix(struct operation *operation, const void *data, size_t size)
{
    for (size_t k = 0; k < size; k++)
        for (unsigned lane = 0; lane < TAG / 8; lane++)
            operation->hash[lane] = (operation->hash[lane] ^ ((const uint8_t *)data)[k]) * 0x100000001B3U;
}

static void start(struct operation *operation, CK_MECHANISM_TYPE mechanism, const struct object *key)
{
    *operation = (struct operation){.active = true, .mechanism = mechanism};
    for (unsigned lane = 0; lane < TAG / 8; lane++) operation->hash[lane] = 0xCBF29CE484222325U + lane;
    const struct attribute *secret = key ? attribute_of(key, CKA_VALUE) : NULL;
    if (key && !secret) secret = attribute_of(key, CKA_MODULUS);
    if (secret) mix(operation, secret->value, secret->size);
    mix(operation, &mechanism, sizeof mechanism);
    memcpy(operation->pad, operation->hash, TAG);
}

static void cipher(struct operation *operation, const uint8_t *in, uint8_t *out, size_t size)
{
    for (size_t k = 0; k < size; k++, operation->position++)
        out[k] = (uint8_t)(in[k] ^ operation->pad[operation->position % TAG] ^ operation->position);
}

static CK_RV give(CK_BYTE_PTR out, CK_ULONG_PTR out_size, const void *value, CK_ULONG size, bool *ends)
{
    CK_ULONG room = *out_size;
    *out_size = size;
    *ends = false;
    if (!out) return CKR_OK;
    if (room < size) return CKR_BUFFER_TOO_SMALL;
    if (value && size) memcpy(out, value, size);
    *ends = true;
    return CKR_OK;
}

static CK_RV begin(CK_SESSION_HANDLE handle, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key, unsigned op)
{
    static const CK_FLAGS needed[] = {CKF_ENCRYPT, CKF_DECRYPT, CKF_DIGEST, CKF_SIGN, CKF_VERIFY};
    struct session *session;
    struct object *object = NULL;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    if (!mechanism) {
        session->operation[op].active = false;
        return CKR_OK;
    }
    if (session->operation[op].active) return CKR_OPERATION_ACTIVE;
    unsigned m = 0, count = mechanism_count(tokens[session->slot]);
    while (m < count && mechanisms[m].type != mechanism->mechanism) m++;
    if (m == count || !(mechanisms[m].flags & needed[op])) return CKR_MECHANISM_INVALID;
    if (op != OP_DIGEST && !(object = find_object(session, key))) return CKR_KEY_HANDLE_INVALID;
    start(&session->operation[op], mechanism->mechanism, object);
    return CKR_OK;
}

static CK_RV under_way(CK_SESSION_HANDLE handle, unsigned op, struct operation **operation)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    *operation = &session->operation[op];
    return (*operation)->active ? CKR_OK : CKR_OPERATION_NOT_INITIALIZED;
}

/* C_Sign and C_Digest, and with no data their Finals. */
static CK_RV tag(CK_SESSION_HANDLE handle, unsigned op, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out,
                 CK_ULONG_PTR out_size)
{
    struct operation *operation;
    bool ends;
    CK_RV rv = under_way(handle, op, &operation);
    if (rv != CKR_OK) return rv;
    struct operation finished = *operation;
    mix(&finished, data, size);
    rv = give(out, out_size, finished.hash, TAG, &ends);
    if (ends) operation->active = false;
    return rv;
}

static CK_RV take(CK_SESSION_HANDLE handle, unsigned op, CK_BYTE_PTR data, CK_ULONG size)
{
    struct operation *operation;
    CK_RV rv = under_way(handle, op, &operation);
    if (rv == CKR_OK) mix(operation, data, size);
    return rv;
}

/* C_Encrypt and its kin; `last`: it ends the operation. */
static CK_RV run_cipher(CK_SESSION_HANDLE handle, unsigned op, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out,
                        CK_ULONG_PTR out_size, bool last)
{
    struct operation *operation;
    bool ends;
    CK_RV rv = under_way(handle, op, &operation);
    if (rv != CKR_OK) return rv;
    rv = give(out, out_size, NULL, size, &ends);
    if (!ends) return rv;
    cipher(operation, data, out, size);
    if (last) operation->active = false;
    return rv;
}

/* ---- the functions: what each does, after its script and under the lock ---- */

/* What was mapped before stays: a call that was held may still look at it. */
static CK_RV map_tokens(void)
{
    static char *mapped;
    struct stat status;
    const char *list = getenv("FAKE_TOKENS");
    if (mapped && list && strcmp(mapped, list) == 0) return CKR_OK;
    free(mapped);
    mapped = NULL;
    token_count = 0;
    char *paths = strdup(list ? list : ""), *rest = paths;
    if (!paths) return CKR_HOST_MEMORY;
    for (char *path; token_count < TOKENS && (path = strsep(&rest, ":")) && *path;) {
        int fd = open(path, O_RDWR | O_CLOEXEC);
        void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(struct token), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        bool fits = fd >= 0 && fstat(fd, &status) == 0 && (size_t)status.st_size == sizeof(struct token);
        if (fd >= 0) close(fd);
        if (map == MAP_FAILED || !fits) { /* another layout than the test's */
            free(paths);
            return CKR_GENERAL_ERROR;
        }
        tokens[token_count++] = map;
    }
    free(paths);
    mapped = strdup(list ? list : "");
    return CKR_OK;
}

static CK_RV do_C_Initialize(CK_VOID_PTR args)
{
    (void)args;
    if (initialised) return CKR_CRYPTOKI_ALREADY_INITIALIZED;
    initialised = true;
    library_generation = 0;
    memset(sessions, 0, sizeof sessions);
    memset(logged_in, 0, sizeof logged_in);
    for (unsigned t = 0; t < token_count; t++) {
        library_generation += tokens[t]->forget_library;
        tokens[t]->starts++;
        tokens[t]->sessions = 0;
        for (unsigned k = 0; k < OBJECTS; k++)
            if (tokens[t]->object[k].session) tokens[t]->object[k].used = 0;
    }
    return CKR_OK;
}

/* The script of every token counts the call, that of the first decides. */
CK_RV C_Initialize(CK_VOID_PTR args)
{
    CK_RV rv = CKR_OK;
    pthread_mutex_lock(&lock);
    if (finalised_by_somebody()) initialised = false;
    if (!initialised) rv = map_tokens();
    pthread_mutex_unlock(&lock);
    if (rv != CKR_OK) return rv;
    for (unsigned t = 1; t < token_count; t++) tokens[t]->rule[FN_C_Initialize].calls++;
    struct visit visit = enter(token_of(0), FN_C_Initialize);
    pthread_mutex_lock(&lock);
    if (works(&visit)) rv = do_C_Initialize(args);
    pthread_mutex_unlock(&lock);
    return leave(&visit, rv);
}

static CK_RV do_C_Finalize(CK_VOID_PTR reserved)
{
    if (reserved) return CKR_ARGUMENTS_BAD;
    if (!initialised || finalised_by_somebody()) return CKR_CRYPTOKI_NOT_INITIALIZED;
    for (unsigned k = 0; k < SESSIONS; k++)
        if (sessions[k].open) drop_session(&sessions[k]);
    initialised = false;
    return CKR_OK;
}

CK_RV C_Finalize(CK_VOID_PTR reserved)
{
    CK_RV rv = CKR_OK;
    for (unsigned t = 1; t < token_count; t++) tokens[t]->rule[FN_C_Finalize].calls++;
    struct visit visit = enter(token_of(0), FN_C_Finalize);
    pthread_mutex_lock(&lock);
    if (works(&visit)) rv = do_C_Finalize(reserved);
    pthread_mutex_unlock(&lock);
    return leave(&visit, rv);
}

static void put(CK_UTF8CHAR *field, size_t size, const char *text)
{
    memset(field, ' ', size);
    memcpy(field, text, strlen(text) < size ? strlen(text) : size);
}

static CK_RV do_C_GetInfo(CK_INFO_PTR info)
{
    if (!initialised || finalised_by_somebody()) return CKR_CRYPTOKI_NOT_INITIALIZED;
    *info = (CK_INFO){.cryptokiVersion = {2, 40}, .libraryVersion = {1, 0}};
    put(info->manufacturerID, sizeof info->manufacturerID, "tests");
    put(info->libraryDescription, sizeof info->libraryDescription, "fake");
    return CKR_OK;
}

static CK_RV do_C_GetSlotList(CK_BBOOL present, CK_SLOT_ID_PTR slots, CK_ULONG_PTR count)
{
    if (!initialised || finalised_by_somebody()) return CKR_CRYPTOKI_NOT_INITIALIZED;
    CK_ULONG room = *count, n = 0;
    for (unsigned t = 0; t < token_count; t++) {
        if (present && tokens[t]->absent) continue;
        if (slots && n < room) slots[n] = t;
        n++;
    }
    *count = n;
    return slots && room < n ? CKR_BUFFER_TOO_SMALL : CKR_OK;
}

static CK_RV do_C_GetSlotInfo(CK_SLOT_ID slot, CK_SLOT_INFO_PTR info)
{
    struct token *token;
    CK_RV rv = find_token(slot, &token);
    if (rv != CKR_OK && rv != CKR_TOKEN_NOT_PRESENT) return rv;
    *info = (CK_SLOT_INFO){.flags = CKF_REMOVABLE_DEVICE | (rv == CKR_OK ? CKF_TOKEN_PRESENT : 0)};
    put(info->slotDescription, sizeof info->slotDescription, "fake slot");
    put(info->manufacturerID, sizeof info->manufacturerID, "tests");
    return CKR_OK;
}

static CK_RV do_C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info)
{
    struct token *token;
    CK_RV rv = find_token(slot, &token);
    if (rv != CKR_OK) return rv;
    *info = (CK_TOKEN_INFO){
        .flags = CKF_RNG | CKF_LOGIN_REQUIRED | CKF_TOKEN_INITIALIZED | CKF_USER_PIN_INITIALIZED | token->flags,
        .ulMaxSessionCount = token->most_sessions,
        .ulMaxRwSessionCount = token->most_sessions,
        .ulMaxPinLen = sizeof token->pin - 1,
        .ulMinPinLen = 4,
        .ulTotalPublicMemory = CK_UNAVAILABLE_INFORMATION,
        .ulFreePublicMemory = CK_UNAVAILABLE_INFORMATION,
        .ulTotalPrivateMemory = CK_UNAVAILABLE_INFORMATION,
        .ulFreePrivateMemory = CK_UNAVAILABLE_INFORMATION,
    };
    put(info->label, sizeof info->label, token->label);
    put(info->manufacturerID, sizeof info->manufacturerID, "tests");
    put(info->model, sizeof info->model, "fake");
    put(info->serialNumber, sizeof info->serialNumber, token->serial);
    put(info->utcTime, sizeof info->utcTime, "");
    return CKR_OK;
}

static CK_RV do_C_GetMechanismList(CK_SLOT_ID slot, CK_MECHANISM_TYPE_PTR list, CK_ULONG_PTR count)
{
    struct token *token;
    CK_RV rv = find_token(slot, &token);
    if (rv != CKR_OK) return rv;
    CK_ULONG room = *count, n = mechanism_count(token);
    *count = n;
    if (!list) return CKR_OK;
    if (room < n) return CKR_BUFFER_TOO_SMALL;
    for (CK_ULONG m = 0; m < n; m++) list[m] = mechanisms[m].type;
    return CKR_OK;
}

static CK_RV do_C_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR info)
{
    struct token *token;
    CK_RV rv = find_token(slot, &token);
    if (rv != CKR_OK) return rv;
    for (unsigned m = 0; m < mechanism_count(token); m++)
        if (mechanisms[m].type == type) {
            *info = (CK_MECHANISM_INFO){1, 4096, mechanisms[m].flags};
            return CKR_OK;
        }
    return CKR_MECHANISM_INVALID;
}

static CK_RV do_C_InitPIN(CK_SESSION_HANDLE handle, CK_UTF8CHAR_PTR pin, CK_ULONG size)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    struct token *token = tokens[session->slot];
    if (!is_logged_in(session->slot, CKU_SO)) return CKR_USER_NOT_LOGGED_IN;
    if (size >= sizeof token->pin) return CKR_PIN_LEN_RANGE;
    memset(token->pin, 0, sizeof token->pin);
    memcpy(token->pin, pin, size);
    token->pin_failures = 0;
    return CKR_OK;
}

static CK_RV do_C_SetPIN(CK_SESSION_HANDLE handle, CK_UTF8CHAR_PTR old, CK_ULONG old_size, CK_UTF8CHAR_PTR new,
                         CK_ULONG new_size)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    struct token *token = tokens[session->slot];
    if (!(session->flags & CKF_RW_SESSION)) return CKR_SESSION_READ_ONLY;
    char *right = is_logged_in(session->slot, CKU_SO) ? token->so_pin : token->pin;
    rv = check_pin(token, right, old, old_size);
    if (rv != CKR_OK) return rv;
    if (new_size < 4 || new_size >= sizeof token->pin) return CKR_PIN_LEN_RANGE;
    memset(right, 0, sizeof token->pin);
    memcpy(right, new, new_size);
    return CKR_OK;
}

static CK_RV do_C_OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR application, CK_NOTIFY notify,
                              CK_SESSION_HANDLE_PTR handle)
{
    struct token *token;
    CK_RV rv = find_token(slot, &token);
    (void)application, (void)notify;
    if (rv != CKR_OK) return rv;
    if (!(flags & CKF_SERIAL_SESSION)) return CKR_SESSION_PARALLEL_NOT_SUPPORTED;
    if (token->sessions >= token->most_sessions) return CKR_SESSION_COUNT;
    if (!(flags & CKF_RW_SESSION) && is_logged_in((unsigned)slot, CKU_SO)) return CKR_SESSION_READ_WRITE_SO_EXISTS;
    if (flags & CKF_RW_SESSION && token->flags & CKF_WRITE_PROTECTED) return CKR_TOKEN_WRITE_PROTECTED;
    for (unsigned k = 0; k < SESSIONS; k++)
        if (!sessions[k].open) {
            sessions[k] = (struct session){
                .open = true, .slot = (unsigned)slot, .flags = flags, .generation = token->forget_sessions};
            token->sessions++;
            *handle = k + 1;
            return CKR_OK;
        }
    return CKR_SESSION_COUNT;
}

static CK_RV do_C_CloseSession(CK_SESSION_HANDLE handle)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv == CKR_OK) drop_session(session);
    return rv;
}

static CK_RV do_C_CloseAllSessions(CK_SLOT_ID slot)
{
    struct token *token;
    CK_RV rv = find_token(slot, &token);
    for (unsigned k = 0; rv == CKR_OK && k < SESSIONS; k++)
        if (sessions[k].open && sessions[k].slot == slot) drop_session(&sessions[k]);
    return rv;
}

static CK_RV do_C_GetSessionInfo(CK_SESSION_HANDLE handle, CK_SESSION_INFO_PTR info)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    bool rw = session->flags & CKF_RW_SESSION;
    *info = (CK_SESSION_INFO){.slotID = session->slot, .flags = session->flags};
    info->state = is_logged_in(session->slot, CKU_SO)     ? CKS_RW_SO_FUNCTIONS
                  : is_logged_in(session->slot, CKU_USER) ? (rw ? CKS_RW_USER_FUNCTIONS : CKS_RO_USER_FUNCTIONS)
                                                          : (rw ? CKS_RW_PUBLIC_SESSION : CKS_RO_PUBLIC_SESSION);
    return CKR_OK;
}

static CK_RV do_C_Login(CK_SESSION_HANDLE handle, CK_USER_TYPE as, CK_UTF8CHAR_PTR pin, CK_ULONG size)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    struct token *token = tokens[session->slot];
    unsigned slot = session->slot;
    if (as != CKU_USER && as != CKU_SO) return CKR_USER_TYPE_INVALID;
    if (is_logged_in(slot, as)) return CKR_USER_ALREADY_LOGGED_IN;
    if (is_logged_in(slot, CKU_USER) || is_logged_in(slot, CKU_SO)) return CKR_USER_ANOTHER_ALREADY_LOGGED_IN;
    for (unsigned k = 0; as == CKU_SO && k < SESSIONS; k++)
        if (sessions[k].open && sessions[k].slot == slot && !(sessions[k].flags & CKF_RW_SESSION))
            return CKR_SESSION_READ_ONLY_EXISTS;
    if (pin || !(token->flags & CKF_PROTECTED_AUTHENTICATION_PATH))
        rv = check_pin(token, as == CKU_SO ? token->so_pin : token->pin, pin, size);
    if (rv != CKR_OK) return rv;
    logged_in[slot] = true;
    user[slot] = as;
    login_generation[slot] = token->forget_login;
    return CKR_OK;
}

static CK_RV do_C_Logout(CK_SESSION_HANDLE handle)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    if (!is_logged_in(session->slot, CKU_USER) && !is_logged_in(session->slot, CKU_SO)) return CKR_USER_NOT_LOGGED_IN;
    logged_in[session->slot] = false;
    return CKR_OK;
}

static CK_RV do_C_CreateObject(CK_SESSION_HANDLE handle, CK_ATTRIBUTE_PTR template, CK_ULONG count,
                               CK_OBJECT_HANDLE_PTR made)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    return rv == CKR_OK ? make_object(session, NULL, template, count, NULL, made) : rv;
}

static CK_RV do_C_CopyObject(CK_SESSION_HANDLE handle, CK_OBJECT_HANDLE from, CK_ATTRIBUTE_PTR template, CK_ULONG count,
                             CK_OBJECT_HANDLE_PTR made)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    const struct object *object = find_object(session, from);
    return object ? make_object(session, object, template, count, NULL, made) : CKR_OBJECT_HANDLE_INVALID;
}

static CK_RV do_C_DestroyObject(CK_SESSION_HANDLE handle, CK_OBJECT_HANDLE of)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    struct object *object = find_object(session, of);
    if (!object) return CKR_OBJECT_HANDLE_INVALID;
    rv = may_write(session, object);
    if (rv == CKR_OK) object->used = 0;
    return rv;
}

/* Private and secret keys never show their value. */
static CK_RV do_C_GetAttributeValue(CK_SESSION_HANDLE handle, CK_OBJECT_HANDLE of, CK_ATTRIBUTE_PTR template,
                                    CK_ULONG count)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    const struct object *object = find_object(session, of);
    if (!object) return CKR_OBJECT_HANDLE_INVALID;
    const struct attribute *class = attribute_of(object, CKA_CLASS);
    bool data = class && class->value[0] == CKO_DATA;
    for (CK_ULONG k = 0; k < count; k++) {
        const struct attribute *attribute = attribute_of(object, template[k].type);
        CK_ULONG room = template[k].ulValueLen;
        template[k].ulValueLen = CK_UNAVAILABLE_INFORMATION;
        if (!attribute) {
            rv = CKR_ATTRIBUTE_TYPE_INVALID;
        } else if (attribute->type == CKA_VALUE && !data) {
            rv = CKR_ATTRIBUTE_SENSITIVE;
        } else if (template[k].pValue && room < attribute->size) {
            rv = CKR_BUFFER_TOO_SMALL;
        } else {
            template[k].ulValueLen = attribute->size;
            if (template[k].pValue) memcpy(template[k].pValue, attribute->value, attribute->size);
        }
    }
    return rv;
}

static CK_RV do_C_SetAttributeValue(CK_SESSION_HANDLE handle, CK_OBJECT_HANDLE of, CK_ATTRIBUTE_PTR template,
                                    CK_ULONG count)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    struct object *object = find_object(session, of);
    if (!object) return CKR_OBJECT_HANDLE_INVALID;
    rv = may_write(session, object);
    for (CK_ULONG k = 0; rv == CKR_OK && k < count; k++)
        rv = set_attribute(object, template[k].type, template[k].pValue, template[k].ulValueLen);
    return rv;
}

static CK_RV do_C_FindObjectsInit(CK_SESSION_HANDLE handle, CK_ATTRIBUTE_PTR template, CK_ULONG count)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    if (session->finding) return CKR_OPERATION_ACTIVE;
    const struct token *token = tokens[session->slot];
    session->finding = true;
    session->found_count = session->found_next = 0;
    for (size_t k = 0; k < OBJECTS; k++) {
        const struct object *object = &token->object[k];
        bool fits = may_see(session, object);
        for (CK_ULONG a = 0; fits && a < count; a++) {
            const struct attribute *attribute = attribute_of(object, template[a].type);
            fits = attribute && attribute->size == template[a].ulValueLen &&
                   memcmp(attribute->value, template[a].pValue, attribute->size) == 0;
        }
        if (fits) session->found[session->found_count++] = handle_of(token, k);
    }
    return CKR_OK;
}

static CK_RV do_C_FindObjects(CK_SESSION_HANDLE handle, CK_OBJECT_HANDLE_PTR objects, CK_ULONG most, CK_ULONG_PTR count)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    if (!session->finding) return CKR_OPERATION_NOT_INITIALIZED;
    for (*count = 0; *count < most && session->found_next < session->found_count; ++*count)
        objects[*count] = session->found[session->found_next++];
    return CKR_OK;
}

static CK_RV do_C_FindObjectsFinal(CK_SESSION_HANDLE handle)
{
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    if (!session->finding) return CKR_OPERATION_NOT_INITIALIZED;
    session->finding = false;
    return CKR_OK;
}

static CK_RV do_C_EncryptInit(CK_SESSION_HANDLE handle, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
    return begin(handle, mechanism, key, OP_ENCRYPT);
}

static CK_RV do_C_Encrypt(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out,
                          CK_ULONG_PTR out_size)
{
    return run_cipher(handle, OP_ENCRYPT, data, size, out, out_size, true);
}

static CK_RV do_C_EncryptUpdate(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out,
                                CK_ULONG_PTR out_size)
{
    return run_cipher(handle, OP_ENCRYPT, data, size, out, out_size, false);
}

static CK_RV do_C_EncryptFinal(CK_SESSION_HANDLE handle, CK_BYTE_PTR out, CK_ULONG_PTR out_size)
{
    return run_cipher(handle, OP_ENCRYPT, NULL, 0, out, out_size, true);
}

static CK_RV do_C_DecryptInit(CK_SESSION_HANDLE handle, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
    return begin(handle, mechanism, key, OP_DECRYPT);
}

static CK_RV do_C_Decrypt(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out,
                          CK_ULONG_PTR out_size)
{
    return run_cipher(handle, OP_DECRYPT, data, size, out, out_size, true);
}

static CK_RV do_C_DigestInit(CK_SESSION_HANDLE handle, CK_MECHANISM_PTR mechanism)
{
    return begin(handle, mechanism, 0, OP_DIGEST);
}

static CK_RV do_C_Digest(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out,
                         CK_ULONG_PTR out_size)
{
    return tag(handle, OP_DIGEST, data, size, out, out_size);
}

static CK_RV do_C_DigestUpdate(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size)
{
    return take(handle, OP_DIGEST, data, size);
}

static CK_RV do_C_DigestFinal(CK_SESSION_HANDLE handle, CK_BYTE_PTR out, CK_ULONG_PTR out_size)
{
    return tag(handle, OP_DIGEST, NULL, 0, out, out_size);
}

static CK_RV do_C_SignInit(CK_SESSION_HANDLE handle, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
    return begin(handle, mechanism, key, OP_SIGN);
}

static CK_RV do_C_Sign(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR out,
                       CK_ULONG_PTR out_size)
{
    return tag(handle, OP_SIGN, data, size, out, out_size);
}

static CK_RV do_C_SignUpdate(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size)
{
    return take(handle, OP_SIGN, data, size);
}

static CK_RV do_C_SignFinal(CK_SESSION_HANDLE handle, CK_BYTE_PTR out, CK_ULONG_PTR out_size)
{
    return tag(handle, OP_SIGN, NULL, 0, out, out_size);
}

static CK_RV do_C_VerifyInit(CK_SESSION_HANDLE handle, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
    return begin(handle, mechanism, key, OP_VERIFY);
}

static CK_RV do_C_Verify(CK_SESSION_HANDLE handle, CK_BYTE_PTR data, CK_ULONG size, CK_BYTE_PTR signature,
                         CK_ULONG signature_size)
{
    struct operation *operation;
    CK_RV rv = under_way(handle, OP_VERIFY, &operation);
    if (rv != CKR_OK) return rv;
    mix(operation, data, size);
    operation->active = false;
    if (signature_size != TAG) return CKR_SIGNATURE_LEN_RANGE;
    return memcmp(signature, operation->hash, TAG) == 0 ? CKR_OK : CKR_SIGNATURE_INVALID;
}

/* The key's value is different each time and on each token. */
static CK_RV do_C_GenerateKey(CK_SESSION_HANDLE handle, CK_MECHANISM_PTR mechanism, CK_ATTRIBUTE_PTR template,
                              CK_ULONG count, CK_OBJECT_HANDLE_PTR made)
{
    static uint64_t made_before;
    struct session *session;
    struct object *object;
    CK_RV rv = find_session(handle, &session);
    if (rv != CKR_OK) return rv;
    if (mechanism->mechanism != CKM_GENERIC_SECRET_KEY_GEN) return CKR_MECHANISM_INVALID;
    const struct token *token = tokens[session->slot];
    struct {
        char serial[16];
        uint64_t starts, number;
    } value = {.starts = token->starts, .number = ++made_before};
    memcpy(value.serial, token->serial, sizeof value.serial);
    rv = make_object(session, NULL, template, count, &object, made);
    return rv == CKR_OK ? set_attribute(object, CKA_VALUE, &value, sizeof value) : rv;
}

static CK_RV do_C_SeedRandom(CK_SESSION_HANDLE handle, CK_BYTE_PTR seed, CK_ULONG size)
{
    struct session *session;
    (void)seed, (void)size;
    return find_session(handle, &session);
}

static CK_RV do_C_GenerateRandom(CK_SESSION_HANDLE handle, CK_BYTE_PTR out, CK_ULONG size)
{
    static uint64_t state = 0x9E3779B97F4A7C15U;
    struct session *session;
    CK_RV rv = find_session(handle, &session);
    for (CK_ULONG k = 0; rv == CKR_OK && k < size; k++) {
        state = state * 6364136223846793005U + 1442695040888963407U;
        out[k] = (CK_BYTE)(state >> 56);
    }
    return rv;
}

/* ---- the entry points: script, lock, work ---- */

#define ENTRY(name, token, parameters, arguments)     \
    CK_RV name parameters                             \
    {                                                 \
        struct visit visit = enter(token, FN_##name); \
        CK_RV rv = CKR_OK;                            \
        pthread_mutex_lock(&lock);                    \
        if (works(&visit)) rv = do_##name arguments;  \
        pthread_mutex_unlock(&lock);                  \
        return leave(&visit, rv);                     \
    }

/* clang-format off */
#define BYTES(name) CK_BYTE_PTR name, CK_ULONG name##_size
#define OUT CK_BYTE_PTR out, CK_ULONG_PTR out_size
#define SESSION CK_SESSION_HANDLE s
#define TEMPLATE CK_ATTRIBUTE_PTR t, CK_ULONG n

ENTRY(C_GetInfo, token_of(0), (CK_INFO_PTR info), (info))
ENTRY(C_GetSlotList, token_of(0), (CK_BBOOL present, CK_SLOT_ID_PTR l, CK_ULONG_PTR n), (present, l, n))
ENTRY(C_GetSlotInfo, token_of(slot), (CK_SLOT_ID slot, CK_SLOT_INFO_PTR info), (slot, info))
ENTRY(C_GetTokenInfo, token_of(slot), (CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info), (slot, info))
ENTRY(C_GetMechanismList, token_of(slot), (CK_SLOT_ID slot, CK_MECHANISM_TYPE_PTR l, CK_ULONG_PTR n), (slot, l, n))
ENTRY(C_GetMechanismInfo, token_of(slot), (CK_SLOT_ID slot, CK_MECHANISM_TYPE m, CK_MECHANISM_INFO_PTR info), (slot, m, info))
ENTRY(C_InitPIN, token_behind(s), (SESSION, BYTES(pin)), (s, pin, pin_size))
ENTRY(C_SetPIN, token_behind(s), (SESSION, BYTES(old), BYTES(new)), (s, old, old_size, new, new_size))
ENTRY(C_OpenSession, token_of(slot), (CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR p, CK_NOTIFY f, CK_SESSION_HANDLE_PTR made), (slot, flags, p, f, made))
ENTRY(C_CloseSession, token_behind(s), (SESSION), (s))
ENTRY(C_CloseAllSessions, token_of(slot), (CK_SLOT_ID slot), (slot))
ENTRY(C_GetSessionInfo, token_behind(s), (SESSION, CK_SESSION_INFO_PTR info), (s, info))
ENTRY(C_Login, token_behind(s), (SESSION, CK_USER_TYPE as, BYTES(pin)), (s, as, pin, pin_size))
ENTRY(C_Logout, token_behind(s), (SESSION), (s))
ENTRY(C_CreateObject, token_behind(s), (SESSION, TEMPLATE, CK_OBJECT_HANDLE_PTR made), (s, t, n, made))
ENTRY(C_CopyObject, token_behind(s), (SESSION, CK_OBJECT_HANDLE o, TEMPLATE, CK_OBJECT_HANDLE_PTR made), (s, o, t, n, made))
ENTRY(C_DestroyObject, token_behind(s), (SESSION, CK_OBJECT_HANDLE o), (s, o))
ENTRY(C_GetAttributeValue, token_behind(s), (SESSION, CK_OBJECT_HANDLE o, TEMPLATE), (s, o, t, n))
ENTRY(C_SetAttributeValue, token_behind(s), (SESSION, CK_OBJECT_HANDLE o, TEMPLATE), (s, o, t, n))
ENTRY(C_FindObjectsInit, token_behind(s), (SESSION, TEMPLATE), (s, t, n))
ENTRY(C_FindObjects, token_behind(s), (SESSION, CK_OBJECT_HANDLE_PTR l, CK_ULONG most, CK_ULONG_PTR n), (s, l, most, n))
ENTRY(C_FindObjectsFinal, token_behind(s), (SESSION), (s))
ENTRY(C_EncryptInit, token_behind(s), (SESSION, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE key), (s, m, key))
ENTRY(C_Encrypt, token_behind(s), (SESSION, BYTES(data), OUT), (s, data, data_size, out, out_size))
ENTRY(C_EncryptUpdate, token_behind(s), (SESSION, BYTES(data), OUT), (s, data, data_size, out, out_size))
ENTRY(C_EncryptFinal, token_behind(s), (SESSION, OUT), (s, out, out_size))
ENTRY(C_DecryptInit, token_behind(s), (SESSION, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE key), (s, m, key))
ENTRY(C_Decrypt, token_behind(s), (SESSION, BYTES(data), OUT), (s, data, data_size, out, out_size))
ENTRY(C_DigestInit, token_behind(s), (SESSION, CK_MECHANISM_PTR m), (s, m))
ENTRY(C_Digest, token_behind(s), (SESSION, BYTES(data), OUT), (s, data, data_size, out, out_size))
ENTRY(C_DigestUpdate, token_behind(s), (SESSION, BYTES(data)), (s, data, data_size))
ENTRY(C_DigestFinal, token_behind(s), (SESSION, OUT), (s, out, out_size))
ENTRY(C_SignInit, token_behind(s), (SESSION, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE key), (s, m, key))
ENTRY(C_Sign, token_behind(s), (SESSION, BYTES(data), OUT), (s, data, data_size, out, out_size))
ENTRY(C_SignUpdate, token_behind(s), (SESSION, BYTES(data)), (s, data, data_size))
ENTRY(C_SignFinal, token_behind(s), (SESSION, OUT), (s, out, out_size))
ENTRY(C_VerifyInit, token_behind(s), (SESSION, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE key), (s, m, key))
ENTRY(C_Verify, token_behind(s), (SESSION, BYTES(data), BYTES(tag)), (s, data, data_size, tag, tag_size))
ENTRY(C_GenerateKey, token_behind(s), (SESSION, CK_MECHANISM_PTR m, TEMPLATE, CK_OBJECT_HANDLE_PTR made), (s, m, t, n, made))
ENTRY(C_SeedRandom, token_behind(s), (SESSION, BYTES(seed)), (s, seed, seed_size))
ENTRY(C_GenerateRandom, token_behind(s), (SESSION, BYTES(out)), (s, out, out_size))

/* A function that is not here is NULL in the list, as with libraries that know no better. */
static CK_FUNCTION_LIST list = {
    .version = {2, 40},
    .C_Initialize = C_Initialize, .C_Finalize = C_Finalize, .C_GetInfo = C_GetInfo,
    .C_GetFunctionList = C_GetFunctionList, .C_GetSlotList = C_GetSlotList, .C_GetSlotInfo = C_GetSlotInfo,
    .C_GetTokenInfo = C_GetTokenInfo, .C_GetMechanismList = C_GetMechanismList,
    .C_GetMechanismInfo = C_GetMechanismInfo, .C_InitPIN = C_InitPIN, .C_SetPIN = C_SetPIN,
    .C_OpenSession = C_OpenSession, .C_CloseSession = C_CloseSession, .C_CloseAllSessions = C_CloseAllSessions,
    .C_GetSessionInfo = C_GetSessionInfo, .C_Login = C_Login, .C_Logout = C_Logout,
    .C_CreateObject = C_CreateObject, .C_CopyObject = C_CopyObject, .C_DestroyObject = C_DestroyObject,
    .C_GetAttributeValue = C_GetAttributeValue, .C_SetAttributeValue = C_SetAttributeValue,
    .C_FindObjectsInit = C_FindObjectsInit, .C_FindObjects = C_FindObjects, .C_FindObjectsFinal = C_FindObjectsFinal,
    .C_EncryptInit = C_EncryptInit, .C_Encrypt = C_Encrypt, .C_EncryptUpdate = C_EncryptUpdate,
    .C_EncryptFinal = C_EncryptFinal, .C_DecryptInit = C_DecryptInit, .C_Decrypt = C_Decrypt,
    .C_DigestInit = C_DigestInit, .C_Digest = C_Digest, .C_DigestUpdate = C_DigestUpdate,
    .C_DigestFinal = C_DigestFinal, .C_SignInit = C_SignInit, .C_Sign = C_Sign, .C_SignUpdate = C_SignUpdate,
    .C_SignFinal = C_SignFinal, .C_VerifyInit = C_VerifyInit, .C_Verify = C_Verify, .C_GenerateKey = C_GenerateKey,
    .C_SeedRandom = C_SeedRandom, .C_GenerateRandom = C_GenerateRandom,
};
/* clang-format on */

__attribute__((visibility("default"))) CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR functions)
{
    *functions = &list;
    return CKR_OK;
}
