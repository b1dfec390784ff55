/*
 * A host program that does as it is told: a line of stdin is a command, a line of stdout its answer.
 *
 *   host HOW MODULE      HOW: local, global, deepbind (how it is loaded), preload (it is here by LD_PRELOAD)
 *
 *   call NAME WORD…      a function of the module, or the one at an address; answers its return value. A word is a
 *                        number, or PAGE:OFFSET
 *   spawn NAME WORD…     the same in a thread, one at a time; answers "ok" at once
 *   spawned              what came of it: its return value, or "running"
 *   symbol NAME          answers its address
 *   put PAGE OFFSET HEX  writes memory; answers "ok"
 *   get PAGE OFFSET SIZE reads memory; answers it in hexadecimal
 *   base                 the address of page 0; each other one is two pages behind the one before
 *   signals              mask and dispositions of this thread, as one line that changes when any of them does
 *   fork                 a child that starts the module and signs; answers its wait status, 0 if all went well
 *   load PATH            dlopen(PATH), RTLD_LOCAL; answers "ok" or the reason
 *   exit                 ends by exit(), as at the end of main
 *
 * Every page lies before one that may not be touched, so what is written behind a buffer's end ends the program.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "application.h"

enum { PAGES = 64, PAGE = 4096, WORDS = 13, PATIENCE_S = 100, CHILD_PATIENCE_S = 20 };

typedef CK_RV (*any_function)(CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG,
                              CK_ULONG, CK_ULONG, CK_ULONG, CK_ULONG);

static void *module;
static unsigned char *memory;

static void die(const char *why)
{
    fprintf(stderr, "host: %s\n", why);
    exit(3);
}

static unsigned char *place(unsigned long page, unsigned long offset)
{
    if (page >= PAGES || offset > PAGE) die("no such place");
    return memory + page * 2 * PAGE + offset;
}

static CK_ULONG word(const char *text)
{
    char *end;
    unsigned long value = strtoul(text, &end, 0);
    if (*end == ':') return (CK_ULONG)(size_t)place(value, strtoul(end + 1, &end, 0));
    if (*end) die(text);
    return value;
}

/* Some libraries export nothing but C_GetFunctionList, and p11-kit-client has a new list at each call. */
static void *function_of(const char *name)
{
    static const struct {
        const char *name;
        size_t offset;
    } rows[] = {
#define ROW(name, args) {#name, offsetof(CK_FUNCTION_LIST, name)},
        CK_FUNCTIONS_2_40(ROW)
#undef ROW
    };
    void *symbol = dlsym(module, name), *get_symbol = dlsym(module, "C_GetFunctionList");
    static CK_FUNCTION_LIST *p11;
    CK_C_GetFunctionList get;
    memcpy(&get, &get_symbol, sizeof get);
    for (size_t k = 0; !symbol && k < sizeof rows / sizeof *rows; k++)
        if (strcmp(rows[k].name, name) == 0 && (p11 || get(&p11) == CKR_OK))
            memcpy(&symbol, (char *)p11 + rows[k].offset, sizeof symbol);
    return symbol;
}

struct request {
    any_function function;
    CK_ULONG words[WORDS];
    _Atomic(CK_RV) rv;
    _Atomic int ended;
};

static void *carry_out(void *given)
{
    struct request *r = given;
    const CK_ULONG *w = r->words;
    r->rv = r->function(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12]);
    r->ended = 1;
    return NULL;
}

static struct request parse(char *rest)
{
    struct request request = {0};
    char *save, *name = strtok_r(rest, " ", &save), *text;
    void *symbol = name[0] == '0' ? (void *)word(name) : function_of(name);
    for (unsigned n = 0; n < WORDS && (text = strtok_r(NULL, " ", &save)); n++) request.words[n] = word(text);
    if (!symbol) die(name);
    memcpy(&request.function, &symbol, sizeof symbol);
    return request;
}

static void call(char *rest)
{
    struct request request = parse(rest);
    carry_out(&request);
    printf("0x%lx\n", request.rv);
}

static struct request spawned;

static void spawn(char *rest)
{
    pthread_t thread;
    spawned = parse(rest);
    puts(pthread_create(&thread, NULL, carry_out, &spawned) == 0 ? "ok" : "no thread");
}

static void show_spawned(void)
{
    if (spawned.ended)
        printf("0x%lx\n", spawned.rv);
    else
        puts("running");
}

static void put(const char *rest)
{
    unsigned long page, offset;
    int at = 0;
    if (sscanf(rest, "%lu %lu %n", &page, &offset, &at) != 2) die(rest);
    for (const char *hex = rest + at; hex[0] && hex[1]; hex += 2) {
        char digits[3] = {hex[0], hex[1], 0};
        *place(page, offset++) = (unsigned char)strtoul(digits, NULL, 16);
    }
    puts("ok");
}

static void get(const char *rest)
{
    unsigned long page, offset, size;
    if (sscanf(rest, "%lu %lu %lu", &page, &offset, &size) != 3) die(rest);
    while (size--) printf("%02x", *place(page, offset++));
    puts("");
}

static void signals(void)
{
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    for (int number = 1; number < NSIG; number++) {
        struct sigaction action;
        if (sigaction(number, NULL, &action) != 0) continue;
        printf("%d=%d/%p/%x ", number, sigismember(&mask, number), *(void **)(void *)&action.sa_handler,
               (unsigned)action.sa_flags & ~0x04000000U /* SA_RESTORER, which libc adds */);
    }
    puts("");
}

static void load(const char *path)
{
    const char *why = dlopen(path, RTLD_NOW | RTLD_LOCAL) ? NULL : dlerror();
    puts(why ? why : "ok");
}

static void fork_one(void)
{
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        void *symbol = dlsym(module, "C_GetFunctionList");
        CK_C_GetFunctionList get;
        CK_FUNCTION_LIST *p11;
        memcpy(&get, &symbol, sizeof get);
        alarm(CHILD_PATIENCE_S);
        MUST(get(&p11));
        MUST(p11->C_Initialize(NULL));
        sign_and_verify(p11, 1);
        MUST(p11->C_Finalize(NULL));
        _exit(0);
    }
    if (child > 0) waitpid(child, &status, 0);
    printf("%d\n", status);
}

static void *open_module(const char *how, const char *path)
{
    int flags = strcmp(how, "global") == 0     ? RTLD_NOW | RTLD_GLOBAL
                : strcmp(how, "deepbind") == 0 ? RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND
                                               : RTLD_NOW | RTLD_LOCAL;
    void *handle = strcmp(how, "preload") == 0 ? dlopen(NULL, RTLD_NOW) : dlopen(path, flags);
    if (!handle || !dlsym(handle, "C_GetFunctionList")) {
        const char *why = dlerror();
        printf("cannot load: %s\n", why ? why : "no PKCS#11 library");
        exit(4);
    }
    return handle;
}

int main(int argc, char **argv)
{
    static char line[4 * PAGE];
    if (argc != 3) die("HOW MODULE");
    memory = mmap(NULL, (size_t)PAGES * 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("no memory");
    for (size_t page = 0; page < PAGES; page++) mprotect(memory + page * 2 * PAGE, PAGE, PROT_READ | PROT_WRITE);
    signal(SIGINT, SIG_DFL); /* which a shell ignores for what runs in the background */
    module = open_module(argv[1], argv[2]);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        alarm(PATIENCE_S); /* a call that hangs ends the program, whoever waits for it */
        if (strncmp(line, "call ", 5) == 0)
            call(line + 5);
        else if (strncmp(line, "put ", 4) == 0)
            put(line + 4);
        else if (strncmp(line, "get ", 4) == 0)
            get(line + 4);
        else if (strncmp(line, "load ", 5) == 0)
            load(line + 5);
        else if (strncmp(line, "spawn ", 6) == 0)
            spawn(line + 6);
        else if (strcmp(line, "spawned") == 0)
            show_spawned();
        else if (strncmp(line, "symbol ", 7) == 0)
            printf("%p\n", dlsym(module, line + 7));
        else if (strcmp(line, "fork") == 0)
            fork_one();
        else if (strcmp(line, "base") == 0)
            printf("%p\n", (void *)memory);
        else if (strcmp(line, "signals") == 0)
            signals();
        else if (strcmp(line, "exit") == 0)
            return 0;
        else
            die(line);
        fflush(stdout);
    }
    return 0;
}
