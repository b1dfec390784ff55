/*
 * Fuzzes the boundary: calls of any function with any arguments, in any order, on a group of two members that fail,
 * forget and come back while they are used.
 *
 * C_Initialize is dear: after each input the sessions are closed, and only a group in which something has changed for
 * good (a fault, a member away, a token written to) is started anew.  So an input does alone what it did among others.
 */
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../fake/fake.h"
#include "fuzz.h"

/* ENOUGH: sessions of a member, which its pools keep and faults lose; there is room for twice as many. */
enum { MEMBERS = 2, CALLS = 64, FAULTS = 8, ENOUGH = 100 };

#define ALWAYS UINT64_MAX

static struct token *tokens[MEMBERS], *pristine[MEMBERS];
static char directory[64];
static CK_SLOT_ID slot;

static void *const functions[HA_FUNCTIONS] = {
#define OURS(name) [FN_##name] = (void *)name,
    HA_FUNCTION_NAMES(OURS)
#undef OURS
};

static void must(const char *what, CK_RV rv)
{
    if (rv != CKR_OK) fuzz_fail(what, rv);
}

/* ---- the members ---- */

static const char *in_directory(const char *name)
{
    static char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static void add(struct object *object, CK_ATTRIBUTE_TYPE type, const void *value, size_t size)
{
    struct attribute *attribute = &object->attribute[object->count++];
    attribute->type = type;
    attribute->size = size;
    memcpy(attribute->value, value, size);
}

/* A key as the fake token's cryptography takes it. */
static void add_key(struct object *object, CK_OBJECT_CLASS class, CK_KEY_TYPE type, const char *label, CK_BYTE byte)
{
    static const CK_BBOOL yes = CK_TRUE;
    static const CK_ATTRIBUTE_TYPE may[] = {CKA_TOKEN, CKA_PRIVATE, CKA_SIGN, CKA_ENCRYPT, CKA_DECRYPT};
    const CK_BYTE exponent[] = {1, 0, 1};
    CK_BYTE value[32];
    memset(value, byte, sizeof value);
    object->used = 1;
    add(object, CKA_CLASS, &class, sizeof class);
    add(object, CKA_KEY_TYPE, &type, sizeof type);
    add(object, CKA_LABEL, label, strlen(label));
    add(object, CKA_ID, &byte, sizeof byte);
    for (unsigned k = 0; k < sizeof may / sizeof *may; k++) add(object, may[k], &yes, sizeof yes);
    add(object, class == CKO_PRIVATE_KEY ? CKA_MODULUS : CKA_VALUE, value, sizeof value);
    if (class == CKO_PRIVATE_KEY) add(object, CKA_PUBLIC_EXPONENT, exponent, sizeof exponent);
}

static void add_data(struct object *object, const char *label)
{
    const CK_OBJECT_CLASS class = CKO_DATA;
    const CK_BBOOL yes = CK_TRUE;
    object->used = 1;
    add(object, CKA_CLASS, &class, sizeof class);
    add(object, CKA_TOKEN, &yes, sizeof yes);
    add(object, CKA_LABEL, label, strlen(label));
    add(object, CKA_VALUE, label, strlen(label));
}

static void make_token(unsigned m)
{
    char name[16];
    snprintf(name, sizeof name, "member%u", m);
    struct token *token = calloc(1, sizeof *token);
    int fd = open(in_directory(name), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (!token || fd < 0) fuzz_fail("no token", m);
    memcpy(token->label, name, strlen(name));
    snprintf(token->serial, sizeof token->serial, "fake%u", m);
    memcpy(token->pin, "1234", 4);
    memcpy(token->so_pin, "87654321", 8);
    token->mechanisms = ALWAYS;
    token->most_sessions = 200;
    add_key(&token->object[0], CKO_PRIVATE_KEY, CKK_RSA, "signing", 0xC1);
    add_key(&token->object[1], CKO_SECRET_KEY, CKK_GENERIC_SECRET, "secret", 2);
    add_key(&token->object[2], CKO_SECRET_KEY, CKK_AES, "cipher", 3);
    add_data(&token->object[3], "note");
    add_data(&token->object[4], name); /* on this member alone */
    pristine[m] = token;
    if (write(fd, token, sizeof *token) != sizeof *token) fuzz_fail("no token", m);
    tokens[m] = mmap(NULL, sizeof *token, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (tokens[m] == MAP_FAILED) fuzz_fail("no token", m);
}

/* Its contents as they were made; what the library counts goes on. */
static void restore(unsigned m)
{
    memcpy(tokens[m]->pin, pristine[m]->pin, sizeof tokens[m]->pin);
    memcpy(tokens[m]->so_pin, pristine[m]->so_pin, sizeof tokens[m]->so_pin);
    memcpy(tokens[m]->object, pristine[m]->object, sizeof tokens[m]->object);
    tokens[m]->pin_failures = 0;
}

static bool is_kept(const struct object *object)
{
    return object->used && !object->session;
}

/* Whether anything has come of the calls that the next start would find. */
static bool is_changed(unsigned m)
{
    const struct token *now = tokens[m], *then = pristine[m];
    if (memcmp(now->pin, then->pin, sizeof now->pin) || memcmp(now->so_pin, then->so_pin, sizeof now->so_pin) ||
        now->pin_failures)
        return true;
    for (unsigned k = 0; k < OBJECTS; k++) {
        const struct object *object = &now->object[k], *was = &then->object[k];
        if (is_kept(object) != is_kept(was)) return true;
        if (is_kept(object) && memcmp(object, was, sizeof *object) != 0) return true;
    }
    return false;
}

static void mend(struct rule *rule)
{
    rule->times = rule->skip = 0;
}

static void let_it_work(unsigned m)
{
    mend(&tokens[m]->every);
    for (unsigned k = 0; k < FUNCTIONS; k++) mend(&tokens[m]->rule[k]);
    tokens[m]->absent = 0;
}

/* ---- the group ---- */

static void configure(void)
{
    char executable[PATH_MAX];
    ssize_t size = readlink("/proc/self/exe", executable, sizeof executable - 1);
    if (size < 0) fuzz_fail("no /proc", 0);
    executable[size] = '\0';
    *strrchr(executable, '/') = '\0';
    FILE *file = fopen(in_directory("pkcs11-ha.toml"), "w");
    if (!file) fuzz_fail("no configuration", 0);
    fprintf(file, "[ha]\nlog = \"file:%s\"\n[recovery]\ninterval_s = 0.000001\n", in_directory("log"));
    fprintf(file, "[[group]]\nlabel = \"fuzz\"\nserial = \"1\"\nmembers = [\"member0\", \"member1\"]\n");
    for (unsigned m = 0; m < MEMBERS; m++)
        fprintf(file,
                "[[member]]\nname = \"member%u\"\nmodule = \"%s/libmember.so\"\ninstance = \"own\"\n"
                "token = \"pkcs11:token=member%u\"\nenv = { FAKE_TOKENS = \"%s/member%u\" }\n",
                m, executable, m, directory, m);
    fclose(file);
    setenv("PKCS11_HA_CONF", in_directory("pkcs11-ha.toml"), 1);
    setenv("PKCS11_HA_STATE", directory, 1);
}

static void remove_directory(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    if (system(command) != 0) fprintf(stderr, "fuzz: %s stays\n", directory);
}

static void start(void)
{
    CK_SLOT_ID slots[4];
    CK_ULONG count = sizeof slots / sizeof *slots;
    for (unsigned m = 0; m < MEMBERS; m++) restore(m);
    must("C_Initialize", C_Initialize(NULL));
    must("C_GetSlotList", C_GetSlotList(CK_TRUE, slots, &count));
    if (count != 1) fuzz_fail("slots", count);
    slot = slots[0];
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    const char *place = getenv("TMPDIR");
    snprintf(directory, sizeof directory, "%.40s/p11ha-fuzz-XXXXXX", place ? place : "/tmp");
    if (!mkdtemp(directory)) fuzz_fail("no directory", 0);
    atexit(remove_directory);
    for (unsigned m = 0; m < MEMBERS; m++) make_token(m);
    configure();
    start();
    return 0;
}

/* What the core did not expect it answers CKR_GENERAL_ERROR to, and says in the log. */
static void read_log(void)
{
    static char said[1 << 16];
    static int log = -1;
    if (log < 0) log = open(in_directory("log"), O_RDWR | O_CLOEXEC);
    for (ssize_t size; (size = read(log, said, sizeof said - 1)) > 0;) {
        said[size] = '\0';
        char *line = strstr(said, "core.failed");
        if (line) fprintf(stderr, "%.400s\n", line);
        if (line) fuzz_fail("an exception in the core", 0);
    }
}

/* ---- faults ---- */

static void rule(struct fuzz *f, struct rule *of)
{
    of->times = 0;
    of->answer = fuzz_code(f);
    uint8_t how = fuzz_byte(f);
    of->skip = how >> 2 & 3;
    of->late = how >> 4 & 1;
    of->times = how & 0x80 ? ALWAYS : (how & 3) + 1U;
}

static void fault(struct fuzz *f, unsigned kind)
{
    uint8_t which = fuzz_byte(f);
    struct token *token = tokens[which % MEMBERS];
    f->undisturbed = false; /* and what nobody has noticed yet must not be there for the next input */
    switch (kind) {
    case 0: rule(f, &token->rule[which / MEMBERS % FUNCTIONS]); break;
    case 1: rule(f, &token->every); break;
    case 2: token->forget_sessions++; break;
    case 3: token->forget_login++; break;
    case 4: token->absent = !token->absent; break;
    case 5: token->object[which / MEMBERS % OBJECTS].used = 0; break;
    case 6: token->forget_library++; break;
    default: let_it_work(which % MEMBERS); break;
    }
}

/* ---- the target ---- */

/* What was given out can be asked about. */
static void look_at_new(struct fuzz *f, unsigned sessions, unsigned objects)
{
    CK_SESSION_INFO info;
    if (f->sessions.count > sessions) {
        CK_RV rv = C_GetSessionInfo(f->sessions.handle[f->sessions.count - 1], &info);
        if (rv != CKR_OK && (f->undisturbed || rv == CKR_SESSION_HANDLE_INVALID))
            fuzz_fail("a session that is none", rv);
    }
    if (f->objects.count > objects && f->undisturbed && f->sessions.count && !f->sessions.dead[f->sessions.count - 1]) {
        CK_ATTRIBUTE class = {CKA_CLASS, NULL, 0};
        CK_OBJECT_HANDLE object = f->objects.handle[f->objects.count - 1];
        CK_RV rv = C_GetAttributeValue(f->sessions.handle[f->sessions.count - 1], object, &class, 1);
        if (rv != CKR_OK && rv != CKR_ATTRIBUTE_TYPE_INVALID) fuzz_fail("an object that is none", rv);
    }
}

static void call(struct fuzz *f, unsigned row)
{
    if (row == FN_C_Finalize && fuzz_byte(f) != 0x5A) return; /* what is dear is to be rare */
    unsigned sessions = f->sessions.count, objects = f->objects.count;
    if (row == FN_C_Finalize || row == FN_C_Initialize) f->undisturbed = false;
    fuzz_calls[row](f, functions[row]);
    look_at_new(f, sessions, objects);
}

/* A session, logged in, with its keys at hand: sequences need not find the way there first. */
static void begin(struct fuzz *f)
{
    CK_SESSION_HANDLE session;
    CK_OBJECT_HANDLE found[8];
    CK_ULONG count = 0;
    uint8_t how = fuzz_byte(f);
    if (how & 1) return;
    must("C_OpenSession", C_OpenSession(slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session));
    fuzz_opened(f, session);
    if (how & 2) return;
    must("C_Login", C_Login(session, CKU_USER, (CK_UTF8CHAR *)(uintptr_t) "1234", 4));
    must("C_FindObjectsInit", C_FindObjectsInit(session, NULL, 0));
    must("C_FindObjects", C_FindObjects(session, found, sizeof found / sizeof *found, &count));
    must("C_FindObjectsFinal", C_FindObjectsFinal(session));
    for (CK_ULONG k = 0; k < count; k++) fuzz_made(f, found[k]);
}

static bool all_are_there(void)
{
    CK_HA_STATUS state;
    CK_RV rv = CA_GetHAState(slot, &state);
    if (rv == CKR_CRYPTOKI_NOT_INITIALIZED) return false;
    must("CA_GetHAState", rv);
    for (CK_ULONG m = 0; m < state.listSize; m++)
        if (state.memberList[m].memberStatus != CKR_OK) return false;
    return true;
}

static void end(bool changed)
{
    for (unsigned m = 0; m < MEMBERS; m++) {
        let_it_work(m);
        changed = changed || is_changed(m) || tokens[m]->sessions > ENOUGH;
    }
    read_log();
    CK_RV rv = C_CloseAllSessions(slot);
    if (rv != CKR_CRYPTOKI_NOT_INITIALIZED) must("C_CloseAllSessions", rv);
    if (!changed && all_are_there()) return;
    rv = C_Finalize(NULL);
    if (rv != CKR_CRYPTOKI_NOT_INITIALIZED) must("C_Finalize", rv);
    start();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct fuzz f;
    fuzz_begin(&f, data, size);
    f.strict = f.undisturbed = true;
    f.slot = slot;
    begin(&f);
    for (unsigned k = 0; k < CALLS && f.at < f.size; k++) {
        unsigned what = fuzz_byte(&f) % (HA_FUNCTIONS + FAULTS);
        if (what < HA_FUNCTIONS)
            call(&f, what);
        else
            fault(&f, what - HA_FUNCTIONS);
        fuzz_free(&f);
    }
    end(!f.undisturbed);
    return 0;
}
