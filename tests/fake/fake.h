/* A fake token as its library and a test share it: numbers of 64 bits, and text that ends with NUL. */
#ifndef TESTS_FAKE_H
#define TESTS_FAKE_H

#include <stdatomic.h>
#include <stdint.h>

#include "pkcs11.h"

#define FAKE_COUNT(name, args) +1
enum { FUNCTIONS = 0 CK_FUNCTIONS_2_40(FAKE_COUNT), OBJECTS = 64, ATTRIBUTES = 24, VALUE = 256 };

typedef _Atomic uint64_t number;

struct rule {
    number calls;    /* that reached this function, whatever came of them */
    number skip;     /* so many calls more work as usual before `answer` holds */
    number times;    /* for so many calls; each takes one off */
    number answer;   /* said instead of doing the work */
    number late;     /* or after having done it all the same */
    number sleep_us; /* before each call */
    number hold;     /* while it is set, calls wait */
    number held;     /* calls that wait now */
    number end;      /* instead of an answer: enum end, how the process ends */
};

enum end { ANSWERS, CRASHES, EXITS, EXITS_AT_ONCE, ABORTS, SPINS };

struct attribute {
    uint64_t type, size;
    uint8_t value[VALUE];
};

struct object {
    uint64_t used, session /* 0: a token object */, count;
    struct attribute attribute[ATTRIBUTES];
};

struct token {
    char label[32], serial[16], pin[32], so_pin[32];
    number absent;          /* pulled out of its slot: its sessions are gone */
    number flags;           /* besides those that every token has */
    number mechanisms;      /* so many of those it could offer it offers */
    number most_sessions;   /* CKR_SESSION_COUNT beyond */
    number pin_tries;       /* comparisons with the PIN or the SO's */
    number pin_failures;    /* since it was last right; PIN_TRIES of them lock it */
    number forget_sessions; /* raise it: sessions that are open are known no more */
    number forget_login;    /* raise it: nobody is logged in any more */
    number forget_library;  /* raise it: as if somebody had called C_Finalize */
    number starts;          /* C_Initialize that worked */
    number sessions;        /* open now */
    struct rule every;      /* counts and rules all but C_Initialize and C_Finalize */
    struct rule rule[FUNCTIONS];
    struct object object[OBJECTS];
};

#endif
