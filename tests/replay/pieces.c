/*
 * A PKCS#11 3.0 library that puts messages on a real 2.40 one: each message is an operation there, from its Begin to
 * its last part.  For messages of several parts, which no library at hand has.
 *
 * $PIECES_MODULE is the path of the real library (SoftHSM).  $PIECES_FILE may name a file of one byte that a test maps:
 * while it is not 0 every call answers CKR_DEVICE_ERROR, for members that have no process of their own to be killed.
 *
 * Known are CKM_AES_GCM with CK_GCM_MESSAGE_PARAMS, and whatever the real library signs with in parts and without a
 * parameter.  A session has one message under way, as SoftHSM has one operation in a session.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pkcs11.h"

enum { OPERATIONS = 64, MORE = 1 << 10 }; /* more than the tests have at once; more than a tag, a block, a signature */

enum kind { NONE, ENCRYPT, DECRYPT, SIGN, VERIFY };

/* From its Init to its Final. */
struct operation {
    enum kind kind;
    CK_SESSION_HANDLE session;
    CK_OBJECT_HANDLE key;
    CK_MECHANISM_TYPE mechanism;
    CK_ULONG counter; /* of IVs, from 0 in each operation: another library would make the same again */
    bool inside;      /* a message: the real library has an operation */
    CK_ULONG taken;   /* by that */
};

static struct operation operations[OPERATIONS];
static pthread_mutex_t places = PTHREAD_MUTEX_INITIALIZER; /* who takes which; each is then its session's */
static unsigned char never;
static const volatile unsigned char *off = &never;
static CK_FUNCTION_LIST *real;

/* ---- the operations ---- */

static struct operation *find(CK_SESSION_HANDLE session, enum kind kind)
{
    for (unsigned k = 0; k < OPERATIONS; k++)
        if (operations[k].kind == kind && operations[k].session == session) return &operations[k];
    return NULL;
}

static struct operation *operation_of(CK_SESSION_HANDLE session, enum kind kind)
{
    pthread_mutex_lock(&places);
    struct operation *found = find(session, kind);
    pthread_mutex_unlock(&places);
    return found;
}

static CK_RV begin_operation(CK_SESSION_HANDLE session, enum kind kind, const CK_MECHANISM *mechanism,
                             CK_OBJECT_HANDLE key)
{
    if (*off) return CKR_DEVICE_ERROR;
    if (!mechanism) return CKR_ARGUMENTS_BAD;
    if (mechanism->pParameter) return CKR_MECHANISM_PARAM_INVALID; /* each message has its own */
    if ((kind == ENCRYPT || kind == DECRYPT) && mechanism->mechanism != CKM_AES_GCM) return CKR_MECHANISM_INVALID;
    pthread_mutex_lock(&places);
    struct operation *place = find(session, kind) ? NULL : find(0, NONE);
    if (place) *place = (struct operation){kind, session, key, mechanism->mechanism, 0, false, 0};
    pthread_mutex_unlock(&places);
    return place ? CKR_OK : CKR_OPERATION_ACTIVE;
}

/* The real library has no way to end an operation but to finish it, whatever that says. */
static void end_message(struct operation *operation)
{
    CK_BYTE out[MORE];
    CK_ULONG size = sizeof out;
    if (!operation->inside) return;
    operation->inside = false;
    CK_BYTE *room = operation->kind == DECRYPT ? malloc(size += operation->taken) : out;
    switch (operation->kind) {
    case ENCRYPT: real->C_EncryptFinal(operation->session, room, &size); break;
    case DECRYPT: real->C_DecryptFinal(operation->session, room, &size); break;
    case SIGN: real->C_SignFinal(operation->session, room, &size); break;
    default: real->C_VerifyFinal(operation->session, room, 1); break;
    }
    if (room != out) free(room);
}

static CK_RV end_operation(CK_SESSION_HANDLE session, enum kind kind)
{
    if (*off) return CKR_DEVICE_ERROR;
    struct operation *operation = operation_of(session, kind);
    if (!operation) return CKR_OPERATION_NOT_INITIALIZED;
    end_message(operation);
    pthread_mutex_lock(&places);
    *operation = (struct operation){0};
    pthread_mutex_unlock(&places);
    return CKR_OK;
}

/* Of one session, or of all: a test has one token. */
static void forget(CK_SESSION_HANDLE session, bool all)
{
    pthread_mutex_lock(&places);
    for (unsigned k = 0; k < OPERATIONS; k++)
        if (all || operations[k].session == session) operations[k] = (struct operation){0};
    pthread_mutex_unlock(&places);
}

/* What a part says of its message: CKR_OK after the last one, and an error, end it, and never the operation. */
static CK_RV said(struct operation *operation, CK_RV rv, CK_ULONG in_size, bool last)
{
    if (rv == CKR_OK && last) operation->inside = false; /* the real one has ended with it */
    if (rv == CKR_OK) operation->taken += in_size;
    if (rv != CKR_OK) end_message(operation);
    return rv;
}

/* The room that a call needs and was given; true: that is the answer, and nothing has happened. */
static bool is_about_room(CK_ULONG need, const CK_BYTE *out, CK_ULONG *out_size, CK_RV *rv)
{
    CK_ULONG given = *out_size;
    *rv = out && given < need ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    if (!out || given < need) *out_size = need;
    return !out || given < need;
}

/* ---- encrypt, decrypt ---- */

static bool is_gcm(const CK_GCM_MESSAGE_PARAMS *parameter, CK_ULONG size)
{
    return parameter && size == sizeof *parameter && parameter->pIv && parameter->pTag &&
           parameter->ulIvFixedBits / 8 < parameter->ulIvLen && parameter->ulTagBits <= 128;
}

static CK_RV make_iv(struct operation *operation, CK_GCM_MESSAGE_PARAMS *parameter)
{
    CK_ULONG fixed = parameter->ulIvFixedBits / 8, size = parameter->ulIvLen - fixed;
    CK_BYTE *made = parameter->pIv + fixed;
    switch (parameter->ivGenerator) {
    case CKG_NO_GENERATE: return CKR_OK;
    case CKG_GENERATE_RANDOM: return real->C_GenerateRandom(operation->session, made, size);
    case CKG_GENERATE_COUNTER:
        for (CK_ULONG k = 0; k < size; k++)
            made[size - 1 - k] = (CK_BYTE)(k < sizeof operation->counter ? operation->counter >> 8 * k : 0);
        operation->counter++;
        return CKR_OK;
    default: return CKR_MECHANISM_PARAM_INVALID;
    }
}

static CK_RV begin_cipher(CK_SESSION_HANDLE session, enum kind kind, CK_GCM_MESSAGE_PARAMS *parameter, CK_ULONG size,
                          CK_BYTE *aad, CK_ULONG aad_size)
{
    if (*off) return CKR_DEVICE_ERROR;
    struct operation *operation = operation_of(session, kind);
    if (!operation) return CKR_OPERATION_NOT_INITIALIZED;
    if (operation->inside) return CKR_OPERATION_ACTIVE;
    if (!is_gcm(parameter, size)) return CKR_MECHANISM_PARAM_INVALID;
    CK_RV rv = kind == ENCRYPT ? make_iv(operation, parameter) : CKR_OK;
    if (rv != CKR_OK) return rv;
    CK_GCM_PARAMS gcm = {.pIv = parameter->pIv, .ulIvLen = parameter->ulIvLen, .ulIvBits = 8 * parameter->ulIvLen};
    gcm.pAAD = aad;
    gcm.ulAADLen = aad_size;
    gcm.ulTagBits = parameter->ulTagBits;
    CK_MECHANISM mechanism = {operation->mechanism, &gcm, sizeof gcm};
    rv = (kind == ENCRYPT ? real->C_EncryptInit : real->C_DecryptInit)(session, &mechanism, operation->key);
    operation->inside = rv == CKR_OK;
    operation->taken = 0;
    return rv;
}

/* Gives out as much as it takes; the tag, which the real one puts behind, has its own place here. */
static CK_RV encrypt_part(const struct operation *operation, const CK_GCM_MESSAGE_PARAMS *parameter, CK_BYTE *in,
                          CK_ULONG in_size, CK_BYTE *room, CK_ULONG room_size, bool last, CK_ULONG *made)
{
    CK_ULONG size = room_size, tag = parameter->ulTagBits / 8;
    CK_RV rv = in_size ? real->C_EncryptUpdate(operation->session, in, in_size, room, &size) : CKR_OK;
    *made = in_size ? size : 0;
    if (rv != CKR_OK || !last) return rv;
    size = room_size - *made;
    rv = real->C_EncryptFinal(operation->session, room + *made, &size);
    if (rv != CKR_OK || size < tag) return rv != CKR_OK ? rv : CKR_GENERAL_ERROR;
    *made += size - tag;
    memcpy(parameter->pTag, room + *made, tag);
    return CKR_OK;
}

/* SoftHSM gives all out at the end, when it has seen the tag, which it takes behind the last part. */
static CK_RV decrypt_part(const struct operation *operation, const CK_GCM_MESSAGE_PARAMS *parameter, CK_BYTE *in,
                          CK_ULONG in_size, CK_BYTE *room, CK_ULONG room_size, bool last, CK_ULONG *made)
{
    CK_ULONG size = room_size;
    CK_RV rv = in_size ? real->C_DecryptUpdate(operation->session, in, in_size, room, &size) : CKR_OK;
    *made = in_size ? size : 0;
    if (rv != CKR_OK || !last) return rv;
    size = room_size - *made;
    rv = real->C_DecryptUpdate(operation->session, parameter->pTag, parameter->ulTagBits / 8, room + *made, &size);
    if (rv != CKR_OK) return rv;
    *made += size;
    size = room_size - *made;
    rv = real->C_DecryptFinal(operation->session, room + *made, &size);
    *made += size;
    return rv == CKR_OK ? rv : CKR_AEAD_DECRYPT_FAILED; /* it says CKR_GENERAL_ERROR, as if it were broken */
}

static CK_RV next_cipher(CK_SESSION_HANDLE session, enum kind kind, CK_GCM_MESSAGE_PARAMS *parameter, CK_ULONG size,
                         CK_BYTE *in, CK_ULONG in_size, CK_BYTE *out, CK_ULONG *out_size, bool last)
{
    if (*off) return CKR_DEVICE_ERROR;
    struct operation *operation = operation_of(session, kind);
    if (!operation || !operation->inside) return CKR_OPERATION_NOT_INITIALIZED;
    if (!is_gcm(parameter, size)) return said(operation, CKR_MECHANISM_PARAM_INVALID, 0, last);
    CK_RV rv;
    CK_ULONG need = kind == ENCRYPT ? in_size : last ? operation->taken + in_size : 0, made = 0;
    if (is_about_room(need, out, out_size, &rv)) return rv;
    CK_ULONG room_size = operation->taken + in_size + MORE; /* the real one wants more than it uses */
    CK_BYTE *room = malloc(room_size);
    if (!room) return CKR_HOST_MEMORY;
    rv = (kind == ENCRYPT ? encrypt_part : decrypt_part)(operation, parameter, in, in_size, room, room_size, last,
                                                         &made);
    if (rv == CKR_OK && made != need) rv = CKR_GENERAL_ERROR; /* it would not be as it was promised */
    if (rv == CKR_OK) memcpy(out, room, *out_size = made);
    free(room);
    return said(operation, rv, in_size, last);
}

static CK_RV whole_cipher(CK_SESSION_HANDLE session, enum kind kind, CK_GCM_MESSAGE_PARAMS *parameter, CK_ULONG size,
                          CK_BYTE *aad, CK_ULONG aad_size, CK_BYTE *in, CK_ULONG in_size, CK_BYTE *out,
                          CK_ULONG *out_size)
{
    CK_RV rv;
    if (*off) return CKR_DEVICE_ERROR;
    if (!operation_of(session, kind)) return CKR_OPERATION_NOT_INITIALIZED;
    if (is_about_room(in_size, out, out_size, &rv)) return rv; /* before an IV is made */
    rv = begin_cipher(session, kind, parameter, size, aad, aad_size);
    if (rv != CKR_OK) return rv;
    return next_cipher(session, kind, parameter, size, in, in_size, out, out_size, true);
}

/* ---- sign, verify ---- */

static CK_RV begin_tag(CK_SESSION_HANDLE session, enum kind kind, const void *parameter)
{
    if (*off) return CKR_DEVICE_ERROR;
    struct operation *operation = operation_of(session, kind);
    if (!operation) return CKR_OPERATION_NOT_INITIALIZED;
    if (operation->inside) return CKR_OPERATION_ACTIVE;
    if (parameter) return CKR_MECHANISM_PARAM_INVALID;
    CK_MECHANISM mechanism = {operation->mechanism, NULL, 0};
    CK_RV rv = (kind == SIGN ? real->C_SignInit : real->C_VerifyInit)(session, &mechanism, operation->key);
    operation->inside = rv == CKR_OK;
    return rv;
}

/* The last part is the one that has a place for the size (PKCS#11 3.0, 5.14); it takes no data to tell that. */
static CK_RV sign_next(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_size, CK_BYTE *signature, CK_ULONG *size)
{
    if (*off) return CKR_DEVICE_ERROR;
    struct operation *operation = operation_of(session, SIGN);
    if (!operation || !operation->inside) return CKR_OPERATION_NOT_INITIALIZED;
    CK_ULONG need = 0;
    CK_RV rv = size ? real->C_SignFinal(session, NULL, &need) : CKR_OK, answer;
    if (rv == CKR_OK && size && is_about_room(need, signature, size, &answer)) return answer;
    if (rv == CKR_OK && in_size) rv = real->C_SignUpdate(session, in, in_size);
    if (rv == CKR_OK && size) rv = real->C_SignFinal(session, signature, size);
    return said(operation, rv, in_size, size != NULL);
}

static CK_RV verify_next(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_size, CK_BYTE *signature, CK_ULONG size)
{
    if (*off) return CKR_DEVICE_ERROR;
    struct operation *operation = operation_of(session, VERIFY);
    if (!operation || !operation->inside) return CKR_OPERATION_NOT_INITIALIZED;
    CK_RV rv = in_size ? real->C_VerifyUpdate(session, in, in_size) : CKR_OK;
    if (rv != CKR_OK || !signature) return said(operation, rv, in_size, false);
    operation->inside = false; /* whatever it says now */
    return real->C_VerifyFinal(session, signature, size);
}

/* ---- the functions of 3.0 ---- */

static CK_RV piece_C_LoginUser(CK_SESSION_HANDLE session, CK_USER_TYPE user, CK_UTF8CHAR_PTR pin, CK_ULONG pin_size,
                               CK_UTF8CHAR_PTR name, CK_ULONG name_size)
{
    (void)session, (void)user, (void)pin, (void)pin_size, (void)name, (void)name_size;
    return CKR_FUNCTION_NOT_SUPPORTED;
}

/* Of messages alone: nobody asks it for more. */
static CK_RV piece_C_SessionCancel(CK_SESSION_HANDLE session, CK_FLAGS flags)
{
    if (*off) return CKR_DEVICE_ERROR;
    if (flags & CKF_MESSAGE_ENCRYPT) end_operation(session, ENCRYPT);
    if (flags & CKF_MESSAGE_DECRYPT) end_operation(session, DECRYPT);
    if (flags & CKF_MESSAGE_SIGN) end_operation(session, SIGN);
    if (flags & CKF_MESSAGE_VERIFY) end_operation(session, VERIFY);
    const CK_FLAGS known = CKF_MESSAGE_ENCRYPT | CKF_MESSAGE_DECRYPT | CKF_MESSAGE_SIGN | CKF_MESSAGE_VERIFY;
    return flags & ~known ? CKR_OPERATION_CANCEL_FAILED : CKR_OK;
}

#define INIT_AND_FINAL(Verb, KIND)                                                                  \
    static CK_RV piece_C_Message##Verb##Init(CK_SESSION_HANDLE session, CK_MECHANISM_PTR mechanism, \
                                             CK_OBJECT_HANDLE key)                                  \
    {                                                                                               \
        return begin_operation(session, KIND, mechanism, key);                                      \
    }                                                                                               \
    static CK_RV piece_C_Message##Verb##Final(CK_SESSION_HANDLE session)                            \
    {                                                                                               \
        return end_operation(session, KIND);                                                        \
    }
INIT_AND_FINAL(Encrypt, ENCRYPT)
INIT_AND_FINAL(Decrypt, DECRYPT)
INIT_AND_FINAL(Sign, SIGN)
INIT_AND_FINAL(Verify, VERIFY)

#define CIPHER(Verb, KIND)                                                                                             \
    static CK_RV piece_C_##Verb##Message(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size,              \
                                         CK_BYTE_PTR aad, CK_ULONG aad_size, CK_BYTE_PTR in, CK_ULONG in_size,         \
                                         CK_BYTE_PTR out, CK_ULONG_PTR out_size)                                       \
    {                                                                                                                  \
        return whole_cipher(session, KIND, parameter, size, aad, aad_size, in, in_size, out, out_size);                \
    }                                                                                                                  \
    static CK_RV piece_C_##Verb##MessageBegin(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size,         \
                                              CK_BYTE_PTR aad, CK_ULONG aad_size)                                      \
    {                                                                                                                  \
        return begin_cipher(session, KIND, parameter, size, aad, aad_size);                                            \
    }                                                                                                                  \
    static CK_RV piece_C_##Verb##MessageNext(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size,          \
                                             CK_BYTE_PTR in, CK_ULONG in_size, CK_BYTE_PTR out, CK_ULONG_PTR out_size, \
                                             CK_FLAGS flags)                                                           \
    {                                                                                                                  \
        return next_cipher(session, KIND, parameter, size, in, in_size, out, out_size, flags & CKF_END_OF_MESSAGE);    \
    }
CIPHER(Encrypt, ENCRYPT)
CIPHER(Decrypt, DECRYPT)

static CK_RV piece_C_SignMessageBegin(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size)
{
    (void)size;
    return begin_tag(session, SIGN, parameter);
}

static CK_RV piece_C_SignMessageNext(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size, CK_BYTE_PTR in,
                                     CK_ULONG in_size, CK_BYTE_PTR signature, CK_ULONG_PTR signature_size)
{
    (void)parameter, (void)size;
    return sign_next(session, in, in_size, signature, signature_size);
}

/* After a question for the size nothing is under way: that a message would begin cannot be seen. */
static CK_RV piece_C_SignMessage(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size, CK_BYTE_PTR in,
                                 CK_ULONG in_size, CK_BYTE_PTR signature, CK_ULONG_PTR signature_size)
{
    (void)size;
    CK_RV rv = begin_tag(session, SIGN, parameter);
    if (rv != CKR_OK) return rv;
    rv = sign_next(session, in, in_size, signature, signature_size);
    end_message(operation_of(session, SIGN));
    return rv;
}

static CK_RV piece_C_VerifyMessageBegin(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size)
{
    (void)size;
    return begin_tag(session, VERIFY, parameter);
}

static CK_RV piece_C_VerifyMessageNext(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size, CK_BYTE_PTR in,
                                       CK_ULONG in_size, CK_BYTE_PTR signature, CK_ULONG signature_size)
{
    (void)parameter, (void)size;
    return verify_next(session, in, in_size, signature, signature_size);
}

static CK_RV piece_C_VerifyMessage(CK_SESSION_HANDLE session, CK_VOID_PTR parameter, CK_ULONG size, CK_BYTE_PTR in,
                                   CK_ULONG in_size, CK_BYTE_PTR signature, CK_ULONG signature_size)
{
    (void)size;
    if (!signature) return CKR_ARGUMENTS_BAD;
    CK_RV rv = begin_tag(session, VERIFY, parameter);
    return rv == CKR_OK ? verify_next(session, in, in_size, signature, signature_size) : rv;
}

/* ---- the functions of 2.40, and how all are found ---- */

/* Every argument is a number or a pointer and travels in a word of its own, and no function has more than nine: so one
 * shape forwards them all, and what a function does not have is never looked at. */
typedef uintptr_t word;
typedef CK_RV (*any_function)(word, word, word, word, word, word, word, word, word);

#define FORWARD(name, args)                                                                             \
    static CK_RV forward_##name(word a, word b, word c, word d, word e, word f, word g, word h, word i) \
    {                                                                                                   \
        if (*off) return CKR_DEVICE_ERROR;                                                              \
        return ((any_function)(void (*)(void))real->name)(a, b, c, d, e, f, g, h, i);                   \
    }
CK_FUNCTIONS_2_40(FORWARD)

static CK_RV close_session(CK_SESSION_HANDLE session)
{
    if (*off) return CKR_DEVICE_ERROR;
    forget(session, false);
    return real->C_CloseSession(session);
}

static CK_RV close_all(CK_SLOT_ID slot)
{
    if (*off) return CKR_DEVICE_ERROR;
    forget(0, true);
    return real->C_CloseAllSessions(slot);
}

static CK_RV finalize(void *reserved)
{
    forget(0, true);
    return real->C_Finalize(reserved); /* also while it is off: so the next start is a fresh one */
}

#define ENTRY(name, args) .name = (CK_##name)(void (*)(void))forward_##name,
#define PIECE(name, args) .name = piece_##name,
#define piece_C_GetInterface C_GetInterface
static CK_RV piece_C_GetInterfaceList(CK_INTERFACE_PTR interfaces, CK_ULONG_PTR count);
static CK_FUNCTION_LIST_3_0 list = {{3, 0}, CK_FUNCTIONS_2_40(ENTRY) CK_FUNCTIONS_3_0(PIECE)};
static CK_FUNCTION_LIST old_list = {{2, 40}, CK_FUNCTIONS_2_40(ENTRY)};
static CK_UTF8CHAR name_of_all[] = "PKCS 11";
static CK_INTERFACE interface = {name_of_all, &list, 0};

static bool map_switch(const char *path)
{
    int byte = open(path, O_RDONLY | O_CLOEXEC);
    void *memory = byte < 0 ? MAP_FAILED : mmap(NULL, 1, PROT_READ, MAP_SHARED, byte, 0);
    if (byte >= 0) close(byte);
    if (memory != MAP_FAILED) off = memory;
    return memory != MAP_FAILED;
}

static CK_RV open_real(void)
{
    const char *path = getenv("PIECES_MODULE"), *file = getenv("PIECES_FILE");
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    void *symbol = library ? dlsym(library, "C_GetFunctionList") : NULL;
    CK_C_GetFunctionList get;
    CK_FUNCTION_LIST *found;
    if (real) return CKR_OK;
    memcpy(&get, &symbol, sizeof symbol);
    if (!get || (file && !map_switch(file)) || get(&found) != CKR_OK) return CKR_GENERAL_ERROR;
    old_list.C_GetFunctionList = list.C_GetFunctionList = C_GetFunctionList;
    old_list.C_CloseSession = list.C_CloseSession = close_session;
    old_list.C_CloseAllSessions = list.C_CloseAllSessions = close_all;
    old_list.C_Finalize = list.C_Finalize = finalize;
    real = found;
    return CKR_OK;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR functions)
{
    *functions = &old_list;
    return open_real();
}

CK_RV C_GetInterface(CK_UTF8CHAR_PTR name, CK_VERSION_PTR version, CK_INTERFACE_PTR_PTR given, CK_FLAGS flags)
{
    (void)name, (void)version, (void)flags;
    *given = &interface;
    return open_real();
}

static CK_RV piece_C_GetInterfaceList(CK_INTERFACE_PTR interfaces, CK_ULONG_PTR count)
{
    if (interfaces && *count < 1) return CKR_BUFFER_TOO_SMALL;
    *count = 1;
    if (interfaces) *interfaces = interface;
    return open_real();
}
