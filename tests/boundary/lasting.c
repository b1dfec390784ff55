/*
 * An application that lasts: the same thing again and again, and what it holds of memory at eleven points.
 *
 *   lasting MODULE lives COUNT      so many times C_Initialize, a session, a signature, C_Finalize
 *   lasting MODULE sessions COUNT   so many sessions, sixteen open at a time, logged in. Each works on a member; now and
 *                                   then one signs, finds a key, or is left in an operation
 *   lasting MODULE objects COUNT    so many sessions, each of which makes an object of its own
 *
 * A line of standard output for each point, the first after a tenth that does not count: how many there were, and the
 * resident memory in KiB.
 */
#include <dlfcn.h>

#include "application.h"

enum { POINTS = 10, AT_ONCE = 16 };

static CK_FUNCTION_LIST *p11;
static CK_SESSION_HANDLE last[AT_ONCE];
static CK_OBJECT_HANDLE private_key, public_key;

static long resident_kib(void)
{
    long size, resident = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    if (!statm || fscanf(statm, "%ld %ld", &size, &resident) != 2) exit(2);
    fclose(statm);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

static void live(unsigned long number)
{
    (void)number;
    MUST(p11->C_Initialize(NULL));
    sign_and_verify(p11, 1);
    MUST(p11->C_Finalize(NULL));
}

/* In the place of the one that was opened sixteen sessions ago. */
static CK_SESSION_HANDLE new_session(unsigned long number)
{
    CK_SESSION_HANDLE *session = &last[number % AT_ONCE];
    if (*session) MUST(p11->C_CloseSession(*session));
    return *session = open_session(p11);
}

static void use_session(unsigned long number)
{
    CK_SESSION_HANDLE session = new_session(number);
    CK_MECHANISM sha256 = {CKM_SHA256, NULL, 0};
    CK_BYTE random[8], signature[64];
    MUST(p11->C_GenerateRandom(session, random, sizeof random));
    if (number % 16 == 1) {
        MUST(sign(p11, session, private_key, signature));
        MUST(verify(p11, session, public_key, signature));
    }
    if (number % 64 == 2) MUST(p11->C_DigestInit(session, &sha256));
    if (number % 64 == 3) find_key(p11, session, CKO_PRIVATE_KEY);
}

static void make_object(unsigned long number)
{
    CK_OBJECT_CLASS class = CKO_DATA;
    CK_BBOOL no = CK_FALSE;
    char value[] = "a session object";
    CK_ATTRIBUTE template[] = {
        {CKA_CLASS, &class, sizeof class},
        {CKA_TOKEN, &no, sizeof no},
        {CKA_PRIVATE, &no, sizeof no},
        {CKA_VALUE, value, sizeof value},
    };
    CK_OBJECT_HANDLE object;
    MUST(p11->C_CreateObject(new_session(number), template, sizeof template / sizeof *template, &object));
}

static void repeat(void (*once)(unsigned long), unsigned long count)
{
    for (unsigned long k = 0; k < count / POINTS; k++) once(k);
    for (unsigned point = 0;; point++) {
        printf("%lu %ld\n", count / POINTS * (point + 1), resident_kib());
        fflush(stdout);
        if (point == POINTS) break;
        for (unsigned long k = 0; k < count / POINTS; k++) once(k);
    }
}

int main(int argc, char **argv)
{
    void *module = argc == 4 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    void *symbol = module ? dlsym(module, "C_GetFunctionList") : NULL;
    CK_C_GetFunctionList get;
    if (!symbol) return 2;
    memcpy(&get, &symbol, sizeof get);
    MUST(get(&p11));
    unsigned long count = strtoul(argv[3], NULL, 10);
    if (strcmp(argv[2], "lives") == 0) {
        repeat(live, count);
        return 0;
    }
    MUST(p11->C_Initialize(NULL));
    CK_SESSION_HANDLE first = open_session(p11); /* stays, and so does the login */
    log_in(p11, first);
    private_key = find_key(p11, first, CKO_PRIVATE_KEY);
    public_key = find_key(p11, first, CKO_PUBLIC_KEY);
    repeat(strcmp(argv[2], "objects") == 0 ? make_object : use_session, count);
    MUST(p11->C_Finalize(NULL));
    return 0;
}
