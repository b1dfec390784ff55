/*
 * The script: read, read again when its file is another, and asked of every call what is to be done to it.
 *
 * A rule counts the calls that it is about and hits some of them, by number or by a draw that depends on nothing but
 * the seed, its line and that number.  Counts lie in a block of memory, in $PKCS11_FAULT_STATE in a block of that
 * file, which all processes with the same script share: nobody begins again because somebody was started again.
 */
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fault.h"

enum { RULES = 2728, WORDS = 24, PATTERN = 48, TEXT = 64 };

struct rule {
    unsigned line;
    bool about[HA_FUNCTIONS];
    bool query, late;
    uint64_t after, every, times;
    double probability; /* 1: every time */
    enum fault_action action;
    char sign;
    uint64_t number;
    char text[TEXT]; /* the action, as it is written */
};

/* What of this a reader of the state file may rely on is in docs/fault-injection.md. */
struct block {
    char magic[8];
    struct fault_version version;
    uint64_t rules, unused[2];
    struct count {
        uint64_t line;
        _Atomic uint64_t calls, injected;
    } count[RULES];
};

_Static_assert(sizeof(struct block) == 1 << 16, "blocks can be mapped one by one, whatever the size of a page");
static const char magic[8] = "P11FAULT";

static struct {
    const char *path, *state_path; /* NULL: no script, no state */
    bool read, good;
    struct fault_version version;
    uint64_t seed;
    struct rule *rule;
    unsigned rules;
    struct block *block;
} script;

/* For each object that a function gets: its handle in this call, and the last other one. */
static CK_OBJECT_HANDLE handles[HA_FUNCTIONS][HA_ROW_OBJECTS][2];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all the above */

/* ---- words ---- */

/* Which words an action has, what follows them, and what a function must have for it. */
static const struct {
    const char *word, *second;
    enum fault_action action;
    enum { NOTHING, CODE, TIME, STATUS, CHANGE, NUMBER } operand;
    unsigned needs;
    const char *need;
    bool may_be_late;
} actions[] = {
    {"return", NULL, FAULT_RETURN, CODE, 0, NULL, true},
    {"pretend", NULL, FAULT_PRETEND, NOTHING, 0, NULL, false},
    {"small", NULL, FAULT_SMALL, NOTHING, HAS_ROOM, "an output that could be too small", false},
    {"sleep", NULL, FAULT_SLEEP, TIME, 0, NULL, true},
    {"hang", NULL, FAULT_HANG, NOTHING, 0, NULL, true},
    {"crash", NULL, FAULT_CRASH, NOTHING, 0, NULL, true},
    {"abort", NULL, FAULT_ABORT, NOTHING, 0, NULL, true},
    {"exit", NULL, FAULT_EXIT, STATUS, 0, NULL, true},
    {"kill", NULL, FAULT_KILL, NOTHING, 0, NULL, true},
    {"length", NULL, FAULT_LENGTH, CHANGE, HAS_LENGTH, "an output with a length", false},
    {"flip", NULL, FAULT_FLIP, NUMBER, HAS_OUTPUT, "an output", false},
    {"zero", NULL, FAULT_ZERO, NOTHING, HAS_OUTPUT, "an output", false},
    {"swap", NULL, FAULT_SWAP, NOTHING, HAS_OBJECT, "an object handle", false},
    {"session", "lost", FAULT_SESSION_LOST, NOTHING, HAS_SESSION, "a session", false},
    {"sessions", "lost", FAULT_SESSIONS_LOST, NOTHING, HAS_SESSION, "a session", false},
    {"login", "lost", FAULT_LOGIN_LOST, NOTHING, HAS_SESSION, "a session", false},
    {"token", "lost", FAULT_TOKEN_LOST, NOTHING, HAS_SESSION | HAS_SLOT, "a session or a slot", false},
    {"token", "back", FAULT_TOKEN_BACK, NOTHING, 0, NULL, false},
    {"object", "lost", FAULT_OBJECT_LOST, NOTHING, HAS_OBJECT, "an object handle", false},
};
enum { ACTIONS = sizeof actions / sizeof *actions };

static bool wrong(unsigned line, const char *format, ...) __attribute__((format(printf, 2, 3)));

static bool wrong(unsigned line, const char *format, ...)
{
    char what[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    if (line)
        fault_say("%s:%u: %s", script.path, line, what);
    else
        fault_say("%s: %s", script.path, what);
    return false;
}

static bool is(const char *word, const char *what)
{
    return word && !strcmp(word, what);
}

static bool read_number(const char *word, uint64_t *number)
{
    if (!word || *word < '0' || *word > '9') return false;
    char *end;
    errno = 0;
    *number = strtoull(word, &end, 0);
    return !*end && !errno;
}

/* Whole numbers of us, ms or s, in nanoseconds. */
static bool read_time(const char *word, uint64_t *ns)
{
    static const struct {
        const char *unit;
        uint64_t ns;
    } units[] = {{"us", 1000}, {"ms", 1000000}, {"s", 1000000000}};
    char digits[20] = "";
    size_t size = word ? strspn(word, "0123456789") : 0;
    if (!size || size > 9) return false;
    memcpy(digits, word, size);
    for (size_t k = 0; k < sizeof units / sizeof *units; k++) {
        if (strcmp(word + size, units[k].unit)) continue;
        *ns = strtoull(digits, NULL, 10) * units[k].ns;
        return true;
    }
    return false;
}

/* 1%, 0.25%: in any locale with a point. */
static bool read_probability(const char *word, double *probability)
{
    double value = 0, place = 1;
    bool digits = false, point = false;
    for (; word && *word && *word != '%'; word++) {
        if (*word == '.' && !point) {
            point = true;
        } else if (*word >= '0' && *word <= '9') {
            value = value * 10 + (*word - '0');
            place *= point ? 10 : 1;
            digits = true;
        } else {
            return false;
        }
    }
    *probability = value / place / 100;
    return digits && is(word, "%") && *probability > 0 && *probability <= 1;
}

static bool read_code(const char *word, uint64_t *rv)
{
    for (const struct fault_code *code = fault_codes; word && code->name; code++) {
        if (strcmp(code->name, word)) continue;
        *rv = code->rv;
        return true;
    }
    return read_number(word, rv);
}

/* ---- lines ---- */

static bool read_operand(struct rule *rule, unsigned which, const char *word)
{
    bool good = true;
    uint64_t number = 0;
    switch (actions[which].operand) {
    case NOTHING: return true;
    case CODE:
        if (!read_code(word, &number)) return wrong(rule->line, "return what? %s is no code", word ? word : "nothing");
        if (number == CKR_OK) return wrong(rule->line, "CKR_OK without the work is \"pretend\"");
        break;
    case TIME: good = read_time(word, &number); break;
    case STATUS: good = read_number(word, &number) && number < 256; break;
    case NUMBER: good = read_number(word, &number) && number <= UINT32_MAX; break;
    case CHANGE:
        good = word && strchr("+-=", *word) && read_number(word + 1, &number);
        if (good) rule->sign = *word;
        break;
    }
    static const char *const wanted[] = {
        [TIME] = "a time, 250ms for example",
        [STATUS] = "a status from 0 to 255",
        [NUMBER] = "the offset of a byte",
        [CHANGE] = "+1, -1 or =100, for example",
    };
    if (!good) return wrong(rule->line, "after %s comes %s", actions[which].word, wanted[actions[which].operand]);
    rule->number = number;
    return true;
}

/* The action at the end of a line; `needs` of it, of the functions. */
static bool read_action(struct rule *rule, char **word, const char **need, unsigned *needs)
{
    for (char **each = word; *each; each++) {
        size_t used = strlen(rule->text);
        snprintf(rule->text + used, sizeof rule->text - used, "%s%s", used ? " " : "", *each);
    }
    rule->late = is(*word, "late");
    if (rule->late) word++;
    char as_return[] = "return";
    char *with_return[] = {as_return, *word, NULL, NULL};
    if (rule->late && *word && !strncmp(*word, "CKR_", 4) && !word[1]) word = with_return;
    if (!*word && rule->late)
        return wrong(rule->line, "after late comes a code, CKR_DEVICE_ERROR for example, or an action");
    if (!*word) return wrong(rule->line, "there is no action");
    for (unsigned k = 0; k < ACTIONS; k++) {
        if (!is(*word, actions[k].word) || (actions[k].second && !is(word[1], actions[k].second))) continue;
        unsigned words = actions[k].second || actions[k].operand != NOTHING ? 2 : 1;
        if (rule->late && !actions[k].may_be_late) return wrong(rule->line, "%s is never late", *word);
        rule->action = actions[k].action;
        *needs = actions[k].needs;
        *need = actions[k].need;
        if (!read_operand(rule, k, word[1])) return false;
        if (word[words - 1] && word[words])
            return wrong(rule->line, "what is \"%s\" behind the action? A rule has one", word[words]);
        return true;
    }
    return wrong(rule->line, "there is no action \"%s%s%s\"", *word, word[1] ? " " : "", word[1] ? word[1] : "");
}

/* Which functions the rule is about: those that its pattern matches, that can have this fault, and that there are. */
static bool choose_functions(struct rule *rule, const char *pattern, unsigned needs, const char *need)
{
    bool matched = false, able = false, asks = false, any = false;
    bool one = !strpbrk(pattern, "*?[");
    for (unsigned row = 0; row < HA_FUNCTIONS; row++) {
        if (fnmatch(pattern, fault_row[row].name, 0)) continue;
        /* A program that cannot find the functions says nothing of how it takes their faults. */
        if (!one && (row == FN_C_GetFunctionList || row == FN_C_GetInterfaceList || row == FN_C_GetInterface)) continue;
        matched = true;
        if (needs && !(fault_row[row].has & needs)) continue;
        able = true;
        if (rule->query && !(fault_row[row].has & HAS_QUERY)) continue;
        asks = true;
        if (!fault_real[row]) continue;
        any = rule->about[row] = true;
    }
    if (!matched) return wrong(rule->line, "no function of PKCS#11 is called %s", pattern);
    if (!able) return wrong(rule->line, "%s: \"%s\" needs %s", pattern, rule->text, need);
    if (!asks) return wrong(rule->line, "%s: \"query\" needs an output whose length can be asked for", pattern);
    if (!any) return wrong(rule->line, "the wrapped library has no %s", pattern);
    return true;
}

static bool is_among(char *const *words, char *const *end, const char *word)
{
    for (; words < end; words++)
        if (is(*words, word)) return true;
    return false;
}

static bool read_rule(struct rule *rule, char **word)
{
    const char *pattern = *word++, *need = NULL;
    char *const *conditions = word;
    unsigned needs = 0;
    rule->probability = 1;
    for (; *word; word++) {
        if (is_among(conditions, word, *word)) return wrong(rule->line, "%s is there twice", *word);
        uint64_t *number = is(*word, "after")   ? &rule->after
                           : is(*word, "every") ? &rule->every
                           : is(*word, "times") ? &rule->times
                                                : NULL;
        if (number) {
            const char *name = *word++;
            if (!read_number(*word, number) || (!*number && number != &rule->after))
                return wrong(rule->line, "after %s comes a number of calls", name);
        } else if (is(*word, "probability")) {
            if (!read_probability(*++word, &rule->probability))
                return wrong(rule->line, "after probability comes 1%%, for example");
        } else if (is(*word, "query")) {
            rule->query = true;
        } else {
            break;
        }
    }
    if (!read_action(rule, word, &need, &needs)) return false;
    if (rule->query && (rule->action == FAULT_FLIP || rule->action == FAULT_ZERO || rule->action == FAULT_SMALL))
        return wrong(rule->line, "a query has no output for \"%s\"", rule->text);
    return choose_functions(rule, pattern, needs, need);
}

/* One line, at its words; true also for those that say nothing. */
static bool read_line(char *text, unsigned line)
{
    char *word[WORDS + 2] = {0}, *rest = text;
    unsigned words = 0;
    text[strcspn(text, "#")] = 0;
    while (words < WORDS && (word[words] = strtok_r(rest, " \t\r\n", &rest))) words++;
    if (!words) return true;
    if (words == WORDS) return wrong(line, "there are too many words");
    if (is(*word, "seed")) {
        if (words != 2 || !read_number(word[1], &script.seed)) return wrong(line, "after seed comes a number");
        return true;
    }
    if (script.rules == RULES) return wrong(line, "there are more than %d rules", RULES);
    struct rule *rule = &script.rule[script.rules];
    *rule = (struct rule){.line = line};
    if (!read_rule(rule, word)) return false;
    script.rules++;
    return true;
}

/* ---- the files ---- */

static struct fault_version version_of(const struct stat *file)
{
    return (struct fault_version){
        .device = file->st_dev,
        .inode = file->st_ino,
        .modified_ns = (uint64_t)file->st_mtim.tv_sec * 1000000000U + (uint64_t)file->st_mtim.tv_nsec,
        .size = (uint64_t)file->st_size,
    };
}

/* All zero if there is none. */
static struct fault_version version_now(void)
{
    struct stat file;
    return stat(script.path, &file) ? (struct fault_version){0} : version_of(&file);
}

static bool same(const struct fault_version *a, const struct fault_version *b)
{
    return !memcmp(a, b, sizeof *a);
}

static bool grow(void)
{
    if (script.rules & (script.rules - 1)) return true; /* room for the next power of two */
    size_t room = script.rules ? 2 * (size_t)script.rules : 1;
    struct rule *rule = realloc(script.rule, room * sizeof *rule);
    if (!rule) return false;
    script.rule = rule;
    return true;
}

static bool read_lines(FILE *file)
{
    char *text = NULL;
    size_t room = 0;
    bool good = true;
    ssize_t size;
    for (unsigned line = 1; good && (size = getline(&text, &room, file)) >= 0; line++) {
        if (memchr(text, 0, (size_t)size))
            good = wrong(line, "there is a NUL byte");
        else
            good = grow() ? read_line(text, line) : wrong(line, "there is no memory");
    }
    free(text);
    return good && (!ferror(file) || wrong(0, "cannot be read"));
}

static void begin_block(struct block *block)
{
    block->version = script.version;
    block->rules = script.rules;
    for (unsigned k = 0; k < script.rules; k++) block->count[k].line = script.rule[k].line;
    memcpy(block->magic, magic, sizeof magic);
}

/* The block of this version of the script in the open and locked file, a new one if there is none. */
static struct block *block_in(int file)
{
    struct stat status;
    struct block *block, header;
    const size_t head = offsetof(struct block, count);
    if (fstat(file, &status) || status.st_size % (off_t)sizeof *block) return NULL;
    off_t blocks = status.st_size / (off_t)sizeof *block, at = blocks;
    bool found = false;
    while (!found && at > 0) {
        if (pread(file, &header, head, --at * (off_t)sizeof *block) != (ssize_t)head) return NULL;
        found = !memcmp(header.magic, magic, sizeof magic) && same(&header.version, &script.version);
    }
    if (!found) at = blocks;
    if (!found && ftruncate(file, (at + 1) * (off_t)sizeof *block)) return NULL;
    block = mmap(NULL, sizeof *block, PROT_READ | PROT_WRITE, MAP_SHARED, file, at * (off_t)sizeof *block);
    if (block == MAP_FAILED) return NULL;
    if (!found) begin_block(block);
    return block;
}

static bool complain(const char *path)
{
    fault_say("%s: %s", path, errno ? strerror(errno) : "is no state file");
    return false;
}

static bool attach_counts(void)
{
    if (!script.state_path) {
        script.block = calloc(1, sizeof *script.block);
        if (!script.block) return wrong(0, "there is no memory");
        begin_block(script.block);
        return true;
    }
    int file = open(script.state_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) return complain(script.state_path);
    while (flock(file, LOCK_EX) && errno == EINTR) continue;
    errno = 0;
    script.block = block_in(file);
    if (!script.block) complain(script.state_path);
    flock(file, LOCK_UN); /* the mapping keeps the file open, and its lock */
    close(file);
    return script.block != NULL;
}

static void forget_script(void)
{
    if (script.block && script.state_path) munmap(script.block, sizeof *script.block);
    if (script.block && !script.state_path) free(script.block);
    free(script.rule);
    script.block = NULL;
    script.rule = NULL;
    script.rules = 0;
    script.seed = 0;
}

static bool read_script(void)
{
    struct stat status;
    FILE *file = fopen(script.path, "re");
    if (!file || fstat(fileno(file), &status)) {
        wrong(0, "%s", strerror(errno));
        if (file) fclose(file);
        return false;
    }
    script.version = version_of(&status);
    bool good = read_lines(file) && attach_counts();
    fclose(file);
    return good;
}

/* With the lock.  Whether the script, as its file is now, holds. */
static bool renew(void)
{
    if (!script.path) return true;
    struct fault_version now = version_now();
    if (script.read && same(&now, &script.version)) return script.good;
    forget_script();
    script.version = now;
    script.good = read_script();
    script.read = true;
    return script.good;
}

void fault_script_open(const char *path, const char *state_path)
{
    script.path = path;
    script.state_path = state_path;
}

bool fault_script_is(const struct fault_version *version)
{
    struct fault_version now = version_now();
    return same(&now, version);
}

/* ---- deciding ---- */

/* splitmix64, a number from 0 to below 1. */
static double draw(uint64_t number)
{
    number += 0x9e3779b97f4a7c15U;
    number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9U;
    number = (number ^ number >> 27) * 0x94d049bb133111ebU;
    number ^= number >> 31;
    return (double)(number >> 11) * 0x1p-53;
}

static bool hits(const struct rule *rule, uint64_t number)
{
    if (number < rule->after) return false;
    if (rule->every && (number - rule->after + 1) % rule->every) return false;
    /* Each rule draws for itself, and each of its calls: neighbours are told apart by the mixing. */
    return rule->probability >= 1 ||
           draw(script.seed + (uint64_t)rule->line * 0x100000001b3U + (number << 32)) < rule->probability;
}

static bool take(struct count *count, uint64_t times)
{
    uint64_t had = atomic_load(&count->injected);
    do {
        if (times && had >= times) return false;
    } while (!atomic_compare_exchange_weak(&count->injected, &had, had + 1));
    return true;
}

static bool has_bytes(const struct fault_call *call, bool with_length)
{
    for (unsigned k = 0; k < call->outputs; k++)
        if (call->output[k].bytes && (call->output[k].length || !with_length)) return true;
    for (CK_ULONG k = 0; k < call->attributes && !with_length; k++)
        if (call->attribute[k].pValue) return true;
    return false;
}

/* Whether this very call can have the fault. */
static bool is_about(const struct rule *rule, const struct fault_call *call)
{
    if (!rule->about[call->row] || rule->query != call->query) return false;
    switch (rule->action) {
    case FAULT_FLIP:
    case FAULT_ZERO: return has_bytes(call, false);
    case FAULT_SMALL: return has_bytes(call, true);
    case FAULT_SWAP:
        for (unsigned k = 0; k < fault_row[call->row].objects; k++)
            if (handles[call->row][k][1]) return true;
        return false;
    default: return true;
    }
}

static void swap_objects(struct fault_call *call)
{
    for (unsigned k = 0; k < fault_row[call->row].objects; k++) {
        CK_OBJECT_HANDLE other = handles[call->row][k][1];
        if (other) call->object[k] = other;
    }
}

static void see_objects(const struct fault_call *call)
{
    for (unsigned k = 0; k < fault_row[call->row].objects; k++) {
        CK_OBJECT_HANDLE *seen = handles[call->row][k];
        if (seen[0] == call->object[k]) continue;
        seen[1] = seen[0];
        seen[0] = call->object[k];
    }
}

static void tell(struct fault *fault, const struct rule *rule)
{
    size_t used = strlen(fault->told);
    snprintf(fault->told + used, sizeof fault->told - used, " rule=%u %s", rule->line, rule->text);
}

/* The first rule that hits has the call, and those below it do not hear of it; sleeping alone lets it pass. */
static void ask_rules(struct fault_call *call)
{
    struct fault *fault = &call->fault;
    for (unsigned k = 0; k < script.rules; k++) {
        const struct rule *rule = &script.rule[k];
        struct count *count = &script.block->count[k];
        if (!is_about(rule, call) || !hits(rule, atomic_fetch_add(&count->calls, 1)) || !take(count, rule->times))
            continue;
        tell(fault, rule);
        if (rule->action == FAULT_SLEEP) {
            *(rule->late ? &fault->late_ns : &fault->early_ns) += rule->number;
            continue;
        }
        fault->action = rule->action;
        fault->late = rule->late;
        fault->sign = rule->sign;
        fault->number = rule->number;
        fault->rule = k;
        fault->version = script.version;
        return;
    }
}

bool fault_decide(struct fault_call *call)
{
    pthread_mutex_lock(&lock);
    bool good = renew();
    see_objects(call);
    if (good) ask_rules(call);
    if (call->fault.action == FAULT_SWAP) swap_objects(call);
    pthread_mutex_unlock(&lock);
    return good;
}

void fault_owed(struct fault_call *call)
{
    pthread_mutex_lock(&lock);
    if (script.block && same(&script.version, &call->fault.version))
        atomic_fetch_sub(&script.block->count[call->fault.rule].injected, 1);
    pthread_mutex_unlock(&lock);
    call->fault.told[0] = 0;
}

void fault_before_fork(void)
{
    pthread_mutex_lock(&lock);
}

void fault_after_fork(void)
{
    pthread_mutex_unlock(&lock);
}
