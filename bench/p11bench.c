/* Times single PKCS#11 operations through a module: the yardstick of `make bench`.
 *
 *   p11bench --module FILE --token LABEL --pin PIN --provision          imports the test keys that are missing
 *   p11bench --module FILE --token LABEL --pin PIN [options] OP...
 *
 * The same program runs against a bare module, a proxy in front of it and a group, so that the figures compare. Each
 * thread has a session of its own and repeats one operation. Every result that is determined is compared with its
 * known answer at each call, and an ECDSA signature is verified first, so a fast wrong answer is a failure.
 *
 * Standard output, a line of JSON for each operation. With `-` as OP, requests `OP THREADS SECONDS` are read from
 * standard input, one a line, so that several programs, each with its module loaded, can take turns.
 */
#define _GNU_SOURCE /* getopt_long and barriers next to -std=c11 */

#include <dlfcn.h>
#include <getopt.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pkcs11.h"

#include "test_keys.h"

enum { MAX_THREADS = 256, OBJECTS = 100, LABEL_SIZE = 32 };

/* results of our own, in the range of CKR_VENDOR_DEFINED */
#define RV_WRONG_ANSWER (CKR_VENDOR_DEFINED | 0x70310001UL)
#define RV_NOT_FOUND (CKR_VENDOR_DEFINED | 0x70310002UL)

static struct {
    CK_FUNCTION_LIST_PTR p11;
    CK_SLOT_ID slot;
    const char *pin;
    double warmup_s;
    uint64_t count; /* calls of each thread; 0: as many as fit in the time */
} app = {.warmup_s = 0.02};

struct worker {
    const struct op *op;
    pthread_t thread;
    pthread_barrier_t *start;
    double seconds;
    CK_SESSION_HANDLE session;
    CK_OBJECT_HANDLE key;
    unsigned turn;
    CK_BYTE in[1024];
    CK_BYTE out[2048];
    CK_ULONG out_size;
    CK_RV rv;
    uint64_t calls;
    uint64_t elapsed_ns;
};

struct op {
    const char *name;
    CK_RV (*call)(struct worker *);
    const char *key; /* label of the key it works with, NULL: none */
    CK_OBJECT_CLASS key_class;
    const char *what;
};

_Noreturn __attribute__((format(printf, 1, 2))) static void give_up(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("p11bench: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static void must(CK_RV rv, const char *call)
{
    if (rv != CKR_OK) give_up("%s: 0x%08lx", call, rv);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---------------------------------------------------------------- operations */

static CK_RV find_one(CK_SESSION_HANDLE session, CK_OBJECT_CLASS class, const char *label, CK_OBJECT_HANDLE *object)
{
    CK_ATTRIBUTE wanted[] = {{CKA_CLASS, &class, sizeof class}, {CKA_LABEL, (void *)label, strlen(label)}};
    CK_OBJECT_HANDLE found[2];
    CK_ULONG count = 0;
    CK_RV rv = app.p11->C_FindObjectsInit(session, wanted, 2);
    if (rv != CKR_OK) return rv;
    rv = app.p11->C_FindObjects(session, found, 2, &count);
    CK_RV final = app.p11->C_FindObjectsFinal(session);
    if (rv != CKR_OK) return rv;
    if (final != CKR_OK) return final;
    if (count != 1) return count ? RV_WRONG_ANSWER : RV_NOT_FOUND;
    *object = found[0];
    return CKR_OK;
}

static CK_RV expect(struct worker *w, const CK_BYTE *answer, size_t known, CK_ULONG size)
{
    return w->out_size == size && memcmp(w->out, answer, known) == 0 ? CKR_OK : RV_WRONG_ANSWER;
}

static CK_RV sign(struct worker *w, CK_MECHANISM_TYPE type, CK_BYTE *data, CK_ULONG size)
{
    CK_MECHANISM mechanism = {type, NULL, 0};
    CK_RV rv = app.p11->C_SignInit(w->session, &mechanism, w->key);
    if (rv != CKR_OK) return rv;
    w->out_size = sizeof w->out;
    return app.p11->C_Sign(w->session, data, size, w->out, &w->out_size);
}

static CK_RV encrypt_1k(struct worker *w, CK_MECHANISM_TYPE type, void *parameter, CK_ULONG size)
{
    CK_MECHANISM mechanism = {type, parameter, size};
    CK_RV rv = app.p11->C_EncryptInit(w->session, &mechanism, w->key);
    if (rv != CKR_OK) return rv;
    w->out_size = sizeof w->out;
    return app.p11->C_Encrypt(w->session, w->in, 1024, w->out, &w->out_size);
}

static CK_RV get_session_info(struct worker *w)
{
    CK_SESSION_INFO info;
    CK_RV rv = app.p11->C_GetSessionInfo(w->session, &info);
    return rv != CKR_OK || (info.flags & CKF_SERIAL_SESSION) ? rv : RV_WRONG_ANSWER;
}

static CK_RV random_32(struct worker *w)
{
    return app.p11->C_GenerateRandom(w->session, w->out, 32);
}

static CK_RV sha256_32(struct worker *w)
{
    CK_MECHANISM mechanism = {CKM_SHA256, NULL, 0};
    CK_RV rv = app.p11->C_DigestInit(w->session, &mechanism);
    if (rv != CKR_OK) return rv;
    w->out_size = sizeof w->out;
    rv = app.p11->C_Digest(w->session, w->in, 32, w->out, &w->out_size);
    return rv != CKR_OK ? rv : expect(w, kat_sha256, 32, 32);
}

static CK_RV hmac_64(struct worker *w)
{
    CK_RV rv = sign(w, CKM_SHA256_HMAC, w->in, 64);
    return rv != CKR_OK ? rv : expect(w, kat_hmac, sizeof kat_hmac, 32);
}

static CK_RV ecdsa_sign(struct worker *w)
{
    CK_RV rv = sign(w, CKM_ECDSA, w->in, 32);
    return rv != CKR_OK || w->out_size == 64 ? rv : RV_WRONG_ANSWER;
}

static CK_RV rsa_sign(struct worker *w)
{
    static const CK_BYTE digest_info[] = {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01,
                                          0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20};
    CK_BYTE data[sizeof digest_info + 32];
    memcpy(data, digest_info, sizeof digest_info);
    memcpy(data + sizeof digest_info, w->in, 32);
    CK_RV rv = sign(w, CKM_RSA_PKCS, data, sizeof data);
    return rv != CKR_OK ? rv : expect(w, kat_rsa, sizeof kat_rsa, sizeof rsa_n);
}

static CK_BYTE iv[16] = {0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67,
                         0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e, 0x6f};

static CK_RV aes_cbc_1k(struct worker *w)
{
    CK_RV rv = encrypt_1k(w, CKM_AES_CBC, iv, 16);
    return rv != CKR_OK ? rv : expect(w, kat_cbc, sizeof kat_cbc, 1024);
}

static CK_RV aes_gcm_1k(struct worker *w)
{
    CK_GCM_PARAMS parameter = {.pIv = iv, .ulIvLen = 12, .ulIvBits = 96, .ulTagBits = 128};
    CK_RV rv = encrypt_1k(w, CKM_AES_GCM, &parameter, sizeof parameter);
    return rv != CKR_OK ? rv : expect(w, kat_gcm, sizeof kat_gcm, 1024 + 16);
}

static CK_RV find_label(struct worker *w)
{
    CK_OBJECT_HANDLE object;
    char label[LABEL_SIZE];
    snprintf(label, sizeof label, "p11bench-obj-%03u", w->turn++ % OBJECTS);
    return find_one(w->session, CKO_SECRET_KEY, label, &object);
}

static CK_RV open_close(struct worker *w)
{
    CK_SESSION_HANDLE session;
    (void)w;
    CK_RV rv = app.p11->C_OpenSession(app.slot, CKF_SERIAL_SESSION, NULL, NULL, &session);
    return rv != CKR_OK ? rv : app.p11->C_CloseSession(session);
}

static const struct op ops[] = {
    {"getsessioninfo", get_session_info, NULL, 0, "C_GetSessionInfo"},
    {"random32", random_32, NULL, 0, "C_GenerateRandom of 32 bytes"},
    {"sha256_32", sha256_32, NULL, 0, "C_DigestInit + C_Digest of 32 bytes"},
    {"hmac_sha256_64", hmac_64, "p11bench-hmac", CKO_SECRET_KEY, "C_SignInit + C_Sign of 64 bytes"},
    {"ecdsa_p256_sign", ecdsa_sign, "p11bench-ec", CKO_PRIVATE_KEY, "C_SignInit + C_Sign, CKM_ECDSA"},
    {"rsa2048_sign", rsa_sign, "p11bench-rsa", CKO_PRIVATE_KEY, "C_SignInit + C_Sign, CKM_RSA_PKCS"},
    {"aes_cbc_1k", aes_cbc_1k, "p11bench-aes", CKO_SECRET_KEY, "C_EncryptInit + C_Encrypt of 1 KiB"},
    {"aes_gcm_1k", aes_gcm_1k, "p11bench-aes", CKO_SECRET_KEY, "C_EncryptInit + C_Encrypt of 1 KiB"},
    {"find_label", find_label, NULL, 0, "C_FindObjectsInit + C_FindObjects + C_FindObjectsFinal, one of 100 keys"},
    {"open_close", open_close, NULL, 0, "C_OpenSession + C_CloseSession"},
};
enum { OPS = sizeof ops / sizeof *ops };

static const struct op *op_named(const char *name)
{
    for (unsigned i = 0; i < OPS; i++)
        if (strcmp(ops[i].name, name) == 0) return &ops[i];
    give_up("no operation '%s'; --help lists them", name);
}

/* ---------------------------------------------------------------- test keys */

static CK_BYTE yes = CK_TRUE;

static void import(CK_SESSION_HANDLE session, CK_OBJECT_CLASS class, CK_KEY_TYPE type, const char *label,
                   const CK_ATTRIBUTE *material, unsigned count)
{
    CK_BYTE private = class == CKO_PUBLIC_KEY ? CK_FALSE : CK_TRUE;
    CK_OBJECT_HANDLE object;
    CK_ATTRIBUTE template[24] = {
        {CKA_CLASS, &class, sizeof class},
        {CKA_KEY_TYPE, &type, sizeof type},
        {CKA_TOKEN, &yes, sizeof yes},
        {CKA_PRIVATE, &private, sizeof private},
        {CKA_LABEL, (void *)label, strlen(label)},
        {CKA_ID, (void *)label, strlen(label)},
    };
    CK_RV rv = find_one(session, class, label, &object);
    if (rv == RV_NOT_FOUND) {
        memcpy(template + 6, material, count * sizeof *material);
        rv = app.p11->C_CreateObject(session, template, 6 + count, &object);
    }
    must(rv, label);
}

#define BYTES(type, array) ((CK_ATTRIBUTE){type, (void *)(array), sizeof(array)})
#define YES(type) ((CK_ATTRIBUTE){type, &yes, sizeof yes})
#define IMPORT(session, class, type, label, ...)                                           \
    do {                                                                                   \
        const CK_ATTRIBUTE material[] = {__VA_ARGS__};                                     \
        import(session, class, type, label, material, sizeof material / sizeof *material); \
    } while (0)

static void provision(CK_SESSION_HANDLE session)
{
    CK_BYTE aes[32], hmac[32], value[16];
    for (unsigned i = 0; i < 32; i++) aes[i] = (CK_BYTE)(0x20 + i), hmac[i] = (CK_BYTE)(0x40 + i);

    IMPORT(session, CKO_PRIVATE_KEY, CKK_RSA, "p11bench-rsa", YES(CKA_SIGN), YES(CKA_SENSITIVE),
           BYTES(CKA_MODULUS, rsa_n), BYTES(CKA_PUBLIC_EXPONENT, rsa_e), BYTES(CKA_PRIVATE_EXPONENT, rsa_d),
           BYTES(CKA_PRIME_1, rsa_p), BYTES(CKA_PRIME_2, rsa_q), BYTES(CKA_EXPONENT_1, rsa_dp),
           BYTES(CKA_EXPONENT_2, rsa_dq), BYTES(CKA_COEFFICIENT, rsa_qi));
    IMPORT(session, CKO_PUBLIC_KEY, CKK_RSA, "p11bench-rsa", YES(CKA_VERIFY), BYTES(CKA_MODULUS, rsa_n),
           BYTES(CKA_PUBLIC_EXPONENT, rsa_e));
    IMPORT(session, CKO_PRIVATE_KEY, CKK_EC, "p11bench-ec", YES(CKA_SIGN), YES(CKA_SENSITIVE),
           BYTES(CKA_EC_PARAMS, ec_params), BYTES(CKA_VALUE, ec_d));
    IMPORT(session, CKO_PUBLIC_KEY, CKK_EC, "p11bench-ec", YES(CKA_VERIFY), BYTES(CKA_EC_PARAMS, ec_params),
           BYTES(CKA_EC_POINT, ec_point));
    IMPORT(session, CKO_SECRET_KEY, CKK_AES, "p11bench-aes", YES(CKA_ENCRYPT), YES(CKA_DECRYPT), YES(CKA_SENSITIVE),
           BYTES(CKA_VALUE, aes));
    IMPORT(session, CKO_SECRET_KEY, CKK_GENERIC_SECRET, "p11bench-hmac", YES(CKA_SIGN), YES(CKA_VERIFY),
           YES(CKA_SENSITIVE), BYTES(CKA_VALUE, hmac));
    for (unsigned i = 0; i < OBJECTS; i++) {
        char label[LABEL_SIZE];
        snprintf(label, sizeof label, "p11bench-obj-%03u", i);
        memset(value, (int)i, sizeof value);
        IMPORT(session, CKO_SECRET_KEY, CKK_GENERIC_SECRET, label, YES(CKA_SIGN), YES(CKA_SENSITIVE),
               BYTES(CKA_VALUE, value));
    }
}

/* ---------------------------------------------------------------- measuring */

static CK_RV open_session(CK_SESSION_HANDLE *session)
{
    CK_RV rv = app.p11->C_OpenSession(app.slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, session);
    if (rv != CKR_OK) return rv;
    rv = app.p11->C_Login(*session, CKU_USER, (CK_UTF8CHAR *)app.pin, strlen(app.pin));
    return rv == CKR_USER_ALREADY_LOGGED_IN ? CKR_OK : rv;
}

/* A signature that is good, and one that must not be. */
static CK_RV verify_ecdsa(struct worker *w)
{
    CK_MECHANISM mechanism = {CKM_ECDSA, NULL, 0};
    CK_OBJECT_HANDLE public_key;
    CK_RV rv = find_one(w->session, CKO_PUBLIC_KEY, w->op->key, &public_key);
    if (rv != CKR_OK || (rv = ecdsa_sign(w)) != CKR_OK) return rv;
    for (unsigned damaged = 0; damaged < 2; damaged++) {
        w->out[5] ^= (CK_BYTE)damaged;
        rv = app.p11->C_VerifyInit(w->session, &mechanism, public_key);
        if (rv != CKR_OK) return rv;
        rv = app.p11->C_Verify(w->session, w->in, 32, w->out, w->out_size);
        if ((rv == CKR_OK) == (damaged == 1)) return damaged ? RV_WRONG_ANSWER : rv;
    }
    return CKR_OK;
}

static CK_RV prepare(struct worker *w)
{
    for (unsigned i = 0; i < sizeof w->in; i++) w->in[i] = (CK_BYTE)i;
    CK_RV rv = open_session(&w->session);
    if (rv == CKR_OK && w->op->key) rv = find_one(w->session, w->op->key_class, w->op->key, &w->key);
    if (rv == CKR_OK && w->op->call == ecdsa_sign) rv = verify_ecdsa(w);
    return rv;
}

/* Apart from everything else: bench.py has callgrind count what happens in here alone. */
__attribute__((noinline)) static void p11bench_repeat(struct worker *w, uint64_t times)
{
    for (uint64_t i = 0; i < times && w->rv == CKR_OK; i++) {
        w->rv = w->op->call(w);
        if (w->rv == CKR_OK) w->calls++;
    }
}

static void *work(void *argument)
{
    struct worker *w = argument;
    uint64_t calls = 0, began = now_ns();
    w->rv = prepare(w);
    for (; w->rv == CKR_OK && (calls < 8 || now_ns() - began < (uint64_t)(app.warmup_s * 1e9)); calls++) {
        if (calls == 0) began = now_ns();
        w->rv = w->op->call(w);
    }
    /* The clock is read every 20 us, not at each call. */
    uint64_t each_ns = (now_ns() - began) / (calls ? calls : 1) + 1;
    uint64_t batch = app.count ? app.count : 20000 / each_ns + 1;
    pthread_barrier_wait(w->start);

    began = now_ns();
    do {
        p11bench_repeat(w, batch);
        w->elapsed_ns = now_ns() - began;
    } while (w->rv == CKR_OK && app.count == 0 && w->elapsed_ns < (uint64_t)(w->seconds * 1e9));
    if (w->session) app.p11->C_CloseSession(w->session);
    return NULL;
}

static bool run(const struct op *op, unsigned threads, double seconds)
{
    static struct worker workers[MAX_THREADS];
    pthread_barrier_t start;
    uint64_t calls = 0, elapsed_ns = 1;
    CK_RV rv = CKR_OK;

    if (threads < 1 || threads > MAX_THREADS) give_up("%u threads", threads);
    pthread_barrier_init(&start, NULL, threads);
    for (unsigned i = 0; i < threads; i++) {
        workers[i] = (struct worker){.op = op, .start = &start, .seconds = seconds, .turn = i * 37};
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) give_up("no thread");
    }
    for (unsigned i = 0; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        calls += workers[i].calls;
        if (workers[i].elapsed_ns > elapsed_ns) elapsed_ns = workers[i].elapsed_ns;
        if (workers[i].rv != CKR_OK) rv = workers[i].rv;
    }
    pthread_barrier_destroy(&start);
    printf("{\"op\": \"%s\", \"threads\": %u, \"calls\": %llu, \"rate\": %.2f, \"us\": %.4f", op->name, threads,
           (unsigned long long)calls, (double)calls * 1e9 / (double)elapsed_ns,
           calls ? (double)elapsed_ns * threads / 1e3 / (double)calls : 0.0);
    if (rv != CKR_OK) printf(", \"failed\": \"0x%08lx\"", rv);
    puts("}");
    fflush(stdout);
    return rv == CKR_OK;
}

/* ---------------------------------------------------------------- start */

static void load(const char *path)
{
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (module == NULL) give_up("%s", dlerror());
    CK_C_GetFunctionList get_function_list;
    *(void **)&get_function_list = dlsym(module, "C_GetFunctionList");
    if (get_function_list == NULL) give_up("%s: no PKCS#11 module", path);
    must(get_function_list(&app.p11), "C_GetFunctionList");
    CK_C_INITIALIZE_ARGS arguments = {.flags = CKF_OS_LOCKING_OK};
    must(app.p11->C_Initialize(&arguments), "C_Initialize");
}

/* A Python thread that never stops, in the interpreter that the module has started: it holds the GIL whenever
 * nobody else asks for it, so a call that needed the GIL would have to wait for it. */
static void spin_python(void)
{
    int (*ensure)(void), (*run)(const char *);
    void (*release)(int);
    *(void **)&ensure = dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    *(void **)&run = dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
    *(void **)&release = dlsym(RTLD_DEFAULT, "PyGILState_Release");
    if (!ensure || !run || !release) give_up("the module has started no Python");
    int state = ensure();
    int failed = run("def spin():\n    while True: pass\n"
                     "import threading\nthreading.Thread(target=spin, daemon=True).start()\n");
    release(state);
    if (failed) give_up("the Python thread does not start");
}

static void choose_slot(const char *label)
{
    CK_SLOT_ID slots[64];
    CK_TOKEN_INFO token;
    CK_ULONG count = sizeof slots / sizeof *slots;
    char padded[sizeof token.label + 1];

    snprintf(padded, sizeof padded, "%-*s", (int)sizeof token.label, label);
    must(app.p11->C_GetSlotList(CK_TRUE, slots, &count), "C_GetSlotList");
    for (CK_ULONG i = 0; i < count; i++)
        if (app.p11->C_GetTokenInfo(slots[i], &token) == CKR_OK &&
            memcmp(token.label, padded, sizeof token.label) == 0) {
            app.slot = slots[i];
            return;
        }
    give_up("no token '%s'", label);
}

static void help(void)
{
    puts("usage: p11bench --module FILE --token LABEL --pin PIN [options] OP...\n"
         "  --provision   import the test keys that are missing\n"
         "  --threads N   threads, a session each (1)\n"
         "  --seconds S   time that is measured (1)\n"
         "  --warmup S    time before it that is not (0.02)\n"
         "  --count N     N calls a thread, however long they take\n"
         "  --spin-python a Python thread spins in the module's interpreter meanwhile\n"
         "operations; - reads lines `OP THREADS SECONDS` from standard input:");
    for (unsigned i = 0; i < OPS; i++) printf("  %-16s %s\n", ops[i].name, ops[i].what);
    puts("exit status: 0 good, 1 an operation failed, 2 could not start");
}

static bool run_requests(void)
{
    char line[128], name[64];
    unsigned threads;
    double seconds;
    bool good = true;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "%63s %u %lf", name, &threads, &seconds) != 3) give_up("not a request: %s", line);
        good &= run(op_named(name), threads, seconds);
    }
    return good;
}

int main(int count, char **arguments)
{
    static const struct option options[] = {
        {"module", required_argument, NULL, 'm'},
        {"token", required_argument, NULL, 't'},
        {"pin", required_argument, NULL, 'p'},
        {"provision", no_argument, NULL, 'P'},
        {"threads", required_argument, NULL, 'n'},
        {"seconds", required_argument, NULL, 's'},
        {"warmup", required_argument, NULL, 'w'},
        {"count", required_argument, NULL, 'c'},
        {"help", no_argument, NULL, 'h'},
        {"spin-python", no_argument, NULL, 'S'},
        {NULL, 0, NULL, 0},
    };
    const char *module = NULL, *token = NULL;
    bool provisioning = false, spinning = false, good = true;
    unsigned threads = 1;
    double seconds = 1;

    for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;) switch (option) {
        case 'm': module = optarg; break;
        case 't': token = optarg; break;
        case 'p': app.pin = optarg; break;
        case 'P': provisioning = true; break;
        case 'n': threads = (unsigned)strtoul(optarg, NULL, 10); break;
        case 's': seconds = strtod(optarg, NULL); break;
        case 'w': app.warmup_s = strtod(optarg, NULL); break;
        case 'c': app.count = strtoull(optarg, NULL, 10); break;
        case 'S': spinning = true; break;
        case 'h': help(); return 0;
        default: return 2;
        }
    if (!module || !token || !app.pin) give_up("--module, --token and --pin are needed; see --help");

    load(module);
    choose_slot(token);
    CK_SESSION_HANDLE session; /* stays open, so that the login outlives the threads' sessions */
    must(open_session(&session), "opening a session");
    if (provisioning) provision(session);
    if (spinning) spin_python();
    for (int i = optind; i < count; i++)
        good &= strcmp(arguments[i], "-") == 0 ? run_requests() : run(op_named(arguments[i]), threads, seconds);
    app.p11->C_CloseSession(session);
    app.p11->C_Finalize(NULL);
    return good ? 0 : 1;
}
