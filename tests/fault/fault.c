/*
 * libpkcs11-fault.so: hands every call to a real PKCS#11 library, and does to it what a script says.
 *
 * docs/fault-injection.md describes it.  The wrapped library keeps its own lists and interfaces: of those of PKCS#11
 * a copy is offered with our functions in the places of its own, the others are passed on as they are.
 *
 * Unlike tests/fake, which is a token of its own with toy cryptography, a test's memory for its objects and its
 * script in that memory, this is any library, keeps nothing, and can be used by whoever has a text editor.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "fault.h"

/* As the function lists of all versions are laid out. */
struct list {
    CK_VERSION version;
    void *function[HA_FUNCTIONS];
};

_Static_assert(offsetof(struct list, function) == offsetof(CK_FUNCTION_LIST, C_Initialize), "a list is a list");

/* One interface of the wrapped library, and what is offered for it. */
struct face {
    CK_INTERFACE theirs, ours;
    struct list list;
};

void *fault_real[HA_FUNCTIONS];

static const char *log_path; /* NULL: none is kept */
static struct face *faces;   /* the first is that of C_GetFunctionList */
static CK_ULONG face_count;
static CK_ULONG first_interface; /* 0 if C_GetFunctionList's list is one of those of C_GetInterfaceList */
static CK_ULONG default_interface;
static atomic_bool loaded;
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

void fault_say(const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fprintf(stderr, "pkcs11-fault: %s\n", line);
}

/* ---- the wrapped library ---- */

/* Deeply bound, so that its list holds its own functions under any preload.  Sanitizers replace malloc, and what is
 * bound deeply would miss it. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { HOW_TO_LOAD = RTLD_NOW | RTLD_LOCAL };
#else
enum { HOW_TO_LOAD = RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND };
#endif

static unsigned functions_in(CK_VERSION version)
{
    if (version.major < 3) return HA_FUNCTIONS_2_40;
    return version.major == 3 && version.minor < 2 ? HA_FUNCTIONS_3_0 : HA_FUNCTIONS_3_2;
}

static bool is_standard(const CK_INTERFACE *interface)
{
    return interface->pInterfaceName && !strcmp((const char *)interface->pInterfaceName, "PKCS 11") &&
           interface->pFunctionList;
}

/* A list as theirs, with our functions; a version that we do not know is offered as the last that we do. */
static void offer(struct face *face)
{
    const struct list *theirs = face->theirs.pFunctionList;
    face->ours = face->theirs;
    if (!is_standard(&face->theirs)) return;
    unsigned count = functions_in(theirs->version);
    face->list.version = theirs->version;
    if (theirs->version.major > 3 || (theirs->version.major == 3 && theirs->version.minor > 2))
        face->list.version = (CK_VERSION){3, 2};
    for (unsigned row = 0; row < count; row++)
        if (theirs->function[row]) face->list.function[row] = fault_wrapper[row];
    face->ours.pFunctionList = &face->list;
}

/* All lists of a library are of the same functions: the longest has them all, and where it has none another may. */
static void take_functions(void)
{
    for (unsigned count = HA_FUNCTIONS_3_2; count; count = count == HA_FUNCTIONS_3_2   ? HA_FUNCTIONS_3_0
                                                           : count == HA_FUNCTIONS_3_0 ? HA_FUNCTIONS_2_40
                                                                                       : 0)
        for (CK_ULONG k = 0; k < face_count; k++) {
            const struct list *theirs = faces[k].theirs.pFunctionList;
            if (!is_standard(&faces[k].theirs) || functions_in(theirs->version) != count) continue;
            for (unsigned row = 0; row < count; row++)
                if (!fault_real[row]) fault_real[row] = theirs->function[row];
        }
}

static CK_RV own_C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR ppFunctionList)
{
    if (!ppFunctionList) return CKR_ARGUMENTS_BAD;
    *ppFunctionList = faces[0].ours.pFunctionList;
    return CKR_OK;
}

static CK_RV own_C_GetInterfaceList(CK_INTERFACE_PTR pInterfacesList, CK_ULONG_PTR pulCount)
{
    if (!pulCount) return CKR_ARGUMENTS_BAD;
    CK_ULONG room = *pulCount, count = face_count - first_interface;
    *pulCount = count;
    if (!pInterfacesList) return CKR_OK;
    if (room < count) return CKR_BUFFER_TOO_SMALL;
    for (CK_ULONG k = 0; k < count; k++) pInterfacesList[k] = faces[first_interface + k].ours;
    return CKR_OK;
}

static bool suits(const CK_INTERFACE *interface, const CK_UTF8CHAR *name, const CK_VERSION *version, CK_FLAGS flags)
{
    const CK_VERSION *theirs = interface->pFunctionList; /* every list begins with one */
    if (!interface->pInterfaceName || !theirs) return false;
    return (!name || !strcmp((const char *)interface->pInterfaceName, (const char *)name)) &&
           (!version || (theirs->major == version->major && theirs->minor == version->minor)) &&
           (interface->flags & flags) == flags;
}

static CK_RV own_C_GetInterface(CK_UTF8CHAR_PTR pInterfaceName, CK_VERSION_PTR pVersion,
                                CK_INTERFACE_PTR_PTR ppInterface, CK_FLAGS flags)
{
    if (!ppInterface) return CKR_ARGUMENTS_BAD;
    *ppInterface = NULL;
    if (!pInterfaceName && suits(&faces[default_interface].ours, NULL, pVersion, flags))
        *ppInterface = &faces[default_interface].ours;
    for (CK_ULONG k = first_interface; !*ppInterface && k < face_count; k++)
        if (suits(&faces[k].ours, pInterfaceName, pVersion, flags)) *ppInterface = &faces[k].ours;
    return *ppInterface ? CKR_OK : CKR_FUNCTION_FAILED;
}

static bool make_faces(CK_FUNCTION_LIST *list, CK_C_GetInterfaceList get_list, CK_C_GetInterface get)
{
    static CK_UTF8CHAR standard[] = "PKCS 11";
    CK_ULONG count = 0;
    CK_INTERFACE *theirs = NULL, *preferred = NULL;
    if (get_list && get_list(NULL, &count) != CKR_OK) count = 0;
    if (!(theirs = calloc(count + 1, sizeof *theirs)) || !(faces = calloc(count + 2, sizeof *faces))) {
        free(theirs);
        return false;
    }
    if (count && get_list(theirs, &count) != CKR_OK) count = 0;
    if (!get || get(NULL, NULL, &preferred, 0) != CKR_OK) preferred = NULL;
    if (!count && preferred) theirs[count++] = *preferred;
    faces[0].theirs = (CK_INTERFACE){standard, list, 0};
    face_count = count + 1;
    first_interface = count ? 1 : 0;
    default_interface = first_interface;
    for (CK_ULONG k = 0; k < count; k++) {
        faces[1 + k].theirs = theirs[k];
        if (preferred && preferred->pFunctionList == theirs[k].pFunctionList) default_interface = 1 + k;
    }
    free(theirs);
    for (CK_ULONG k = 0; k < face_count; k++) offer(&faces[k]);
    take_functions();
    fault_real[FN_C_GetFunctionList] = (void *)own_C_GetFunctionList;
    fault_real[FN_C_GetInterfaceList] = (void *)own_C_GetInterfaceList;
    fault_real[FN_C_GetInterface] = (void *)own_C_GetInterface;
    return true;
}

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);
    Dl_info theirs, ours;
    /* Not ours: a library without it would lead back here. */
    if (!found || !dladdr(found, &theirs) || !dladdr((void *)&fault_say, &ours)) return NULL;
    return theirs.dli_fbase == ours.dli_fbase ? NULL : found;
}

static bool open_library(const char *path)
{
    CK_FUNCTION_LIST *list = NULL;
    void *library = dlopen(path, HOW_TO_LOAD);
    if (!library) {
        const char *why = dlerror();
        fault_say("PKCS11_FAULT_MODULE: %s", why ? why : path);
        return false;
    }
    CK_C_GetFunctionList get = (CK_C_GetFunctionList)symbol(library, "C_GetFunctionList");
    if (!get || get(&list) != CKR_OK || !list) {
        fault_say("PKCS11_FAULT_MODULE: %s: gives no function list", path);
        return false;
    }
    if (make_faces(list, (CK_C_GetInterfaceList)symbol(library, "C_GetInterfaceList"),
                   (CK_C_GetInterface)symbol(library, "C_GetInterface")))
        return true;
    fault_say("there is no memory");
    return false;
}

/* The environment as it is now: it may be there for this moment alone. */
static bool read_variable(const char *name, const char **value)
{
    const char *set = secure_getenv(name);
    *value = set && *set ? strdup(set) : NULL;
    if (set && *set && !*value) fault_say("there is no memory");
    return *value || !set || !*set;
}

static void before_fork(void)
{
    fault_before_fork();
    fault_lost_before_fork();
}

static void after_fork_here(void)
{
    fault_lost_after_fork(false);
    fault_after_fork();
}

static void after_fork_in_child(void)
{
    fault_lost_after_fork(true);
    fault_after_fork();
}

/* What is not told is as bad as what is not injected. */
static bool can_log(void)
{
    int file = log_path ? open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (log_path && file < 0) fault_say("%s: %s", log_path, strerror(errno));
    if (file >= 0) close(file);
    return !log_path || file >= 0;
}

static bool load(void)
{
    const char *module, *script, *state;
    if (!read_variable("PKCS11_FAULT_MODULE", &module) || !read_variable("PKCS11_FAULT_SCRIPT", &script) ||
        !read_variable("PKCS11_FAULT_STATE", &state) || !read_variable("PKCS11_FAULT_LOG", &log_path))
        return false;
    if (!module) {
        fault_say("PKCS11_FAULT_MODULE names no library");
        return false;
    }
    if (!can_log() || !open_library(module)) return false;
    fault_script_open(script, state);
    pthread_atfork(before_fork, after_fork_here, after_fork_in_child);
    return true;
}

static bool is_loaded(void)
{
    if (atomic_load_explicit(&loaded, memory_order_acquire)) return true;
    pthread_mutex_lock(&loading);
    bool done = atomic_load(&loaded) || load();
    atomic_store_explicit(&loaded, done, memory_order_release);
    pthread_mutex_unlock(&loading);
    return done;
}

/* ---- the log ---- */

static const char *code_name(CK_RV rv, char *number, size_t size)
{
    for (const struct fault_code *code = fault_codes; code->name; code++)
        if (code->rv == rv) return code->name;
    snprintf(number, size, "0x%lx", rv);
    return number;
}

/* One line, in one write.  Opened each time: a host that closes what it does not know must not find our line in what
 * it opens next.  `answered`: else the call does not come back, or not soon. */
static void write_log(const struct fault_call *call, bool answered)
{
    if (!log_path) return;
    struct timespec now;
    struct tm utc;
    char line[FAULT_TOLD + 256], when[32], session[32] = "-", number[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &utc);
    if (fault_row[call->row].has & HAS_SESSION) snprintf(session, sizeof session, "%lu", call->session);
    int size = snprintf(line, sizeof line, "%s.%06ldZ pid=%d tid=%ld %s session=%s rv=%s%s\n", when, now.tv_nsec / 1000,
                        (int)getpid(), syscall(SYS_gettid), fault_row[call->row].name, session,
                        answered ? code_name(call->rv, number, sizeof number) : "-", call->fault.told);
    int file = open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || write(file, line, (size_t)size) != size) fault_say("%s: cannot be written", log_path);
    if (file >= 0) close(file);
}

/* ---- what a wrapper says of its call ---- */

static void add_output(struct fault_call *call, void *bytes, CK_ULONG *length, CK_ULONG capacity, size_t element)
{
    call->output[call->outputs++] = (struct fault_output){bytes, length, capacity, element};
}

void fault_list(struct fault_call *call, void *bytes, CK_ULONG *length, size_t element)
{
    add_output(call, bytes, length, length ? *length : 0, element);
    if (!bytes && length) call->query = true;
}

void fault_found(struct fault_call *call, void *bytes, CK_ULONG capacity, CK_ULONG *length, size_t element)
{
    add_output(call, bytes, length, capacity, element);
}

void fault_whole(struct fault_call *call, void *bytes, CK_ULONG size)
{
    add_output(call, bytes, NULL, 1, size);
}

void fault_attributes(struct fault_call *call, CK_ATTRIBUTE *attribute, CK_ULONG attributes)
{
    call->attribute = attribute;
    call->attributes = attribute ? attributes : 0;
    call->query = call->attributes != 0;
    for (CK_ULONG k = 0; k < call->attributes; k++)
        if (attribute[k].pValue) call->query = false;
}

/* ---- faults ---- */

static void wait_ns(uint64_t ns)
{
    struct timespec left = {(time_t)(ns / 1000000000U), (long)(ns % 1000000000U)};
    while (ns && nanosleep(&left, &left)) continue;
}

/* What does not come back; and what comes back when the script is another. A sanitizer has nothing to find here. */
__attribute__((no_sanitize("undefined"))) static void strike(const struct fault_call *call)
{
    static int *volatile nowhere;
    const struct fault *fault = &call->fault;
    if (fault->action < FAULT_HANG || fault->action > FAULT_KILL) return;
    write_log(call, false);
    switch (fault->action) {
    case FAULT_HANG:
        while (fault_script_is(&fault->version)) wait_ns(20000000);
        break;
    case FAULT_CRASH: *nowhere = 0; break;
    case FAULT_ABORT: abort();
    case FAULT_EXIT: exit((int)fault->number);
    default: kill(getpid(), SIGKILL);
    }
}

/* An error to a call that feeds operations ends them: so it must in the library, which does not know of it. */
static void end_fed(struct fault_call *call, CK_RV rv)
{
    if (!(fault_row[call->row].has & FEEDS_OPERATION) || rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL || call->query)
        return;
    CK_BYTE *scratch = malloc(FAULT_SCRATCH);
    fault_enter(call);
    if (scratch) fault_end_operations(call->session, fault_row[call->row].ops, scratch);
    fault_leave(call);
    free(scratch);
}

/*
 * The answer is decided and the library is not to see the call; but a token that answers so has ended the operation.
 * Where the call would have ended it, the library does it, into memory that nobody sees: true.
 */
static bool instead(struct fault_call *call, CK_RV rv)
{
    call->rv = call->answer = rv;
    end_fed(call, rv);
    if (!(fault_row[call->row].has & ENDS_OPERATION) || rv == CKR_BUFFER_TOO_SMALL || call->query) return false;
    struct fault_output *out = call->outputs ? &call->output[0] : NULL;
    call->scratch_size = call->scratch_length = out && out->capacity > FAULT_SCRATCH ? out->capacity : FAULT_SCRATCH;
    call->scratch = malloc(call->scratch_size);
    if (!call->scratch) return false;
    if (out) *out = (struct fault_output){call->scratch, &call->scratch_length, call->scratch_size, 1};
    return true;
}

static CK_RV too_small(const struct fault_call *call)
{
    for (unsigned k = 0; k < call->outputs; k++)
        if (call->output[k].length) *call->output[k].length = call->output[k].capacity + 1;
    return CKR_BUFFER_TOO_SMALL;
}

static CK_ULONG changed(const struct fault *fault, CK_ULONG length)
{
    if (fault->sign == '=') return fault->number;
    if (fault->sign == '+') return length + fault->number;
    return length > fault->number ? length - fault->number : 0;
}

static bool corrupt(const struct fault *fault, CK_BYTE *bytes, CK_ULONG size, CK_ULONG *length)
{
    if (fault->action == FAULT_LENGTH) {
        if (!length || *length == CK_UNAVAILABLE_INFORMATION) return false;
        *length = changed(fault, *length);
        return true;
    }
    if (!bytes || !size) return false;
    if (fault->action == FAULT_ZERO)
        memset(bytes, 0, size);
    else
        bytes[fault->number % size] ^= 0xff;
    return true;
}

/* Whether there was anything to corrupt. */
static bool corrupt_outputs(const struct fault_call *call)
{
    bool any = false;
    for (unsigned k = 0; k < call->outputs; k++) {
        const struct fault_output *out = &call->output[k];
        CK_ULONG elements = out->length && *out->length < out->capacity ? *out->length : out->capacity;
        any |= corrupt(&call->fault, out->bytes, elements * out->element, out->length);
    }
    for (CK_ULONG k = 0; k < call->attributes; k++) {
        CK_ATTRIBUTE *attribute = &call->attribute[k];
        CK_ULONG size = attribute->ulValueLen == CK_UNAVAILABLE_INFORMATION ? 0 : attribute->ulValueLen;
        any |= corrupt(&call->fault, attribute->pValue, size, &attribute->ulValueLen);
    }
    return any;
}

/* ---- a call ---- */

/* Whether the call takes its way to the library; if so, the wrapper makes it. */
static bool goes_on(struct fault_call *call)
{
    const struct fault *fault = &call->fault;
    wait_ns(fault->early_ns);
    if (!fault->late) strike(call);
    switch (fault->late ? FAULT_NONE : fault->action) {
    case FAULT_RETURN: return instead(call, fault->number);
    case FAULT_PRETEND: return instead(call, CKR_OK);
    case FAULT_SMALL: return instead(call, too_small(call));
    case FAULT_SESSION_LOST:
    case FAULT_SESSIONS_LOST:
    case FAULT_LOGIN_LOST:
    case FAULT_TOKEN_LOST:
    case FAULT_OBJECT_LOST: return instead(call, fault_lose(call));
    case FAULT_TOKEN_BACK: fault_token_back(call); break;
    default: break;
    }
    return !fault_is_lost(call);
}

/* Without a script that can be read nothing works but finding the functions and going away. */
static bool works_always(unsigned row)
{
    return row == FN_C_GetFunctionList || row == FN_C_GetInterfaceList || row == FN_C_GetInterface ||
           row == FN_C_Finalize;
}

bool fault_begin(struct fault_call *call)
{
    call->rv = CKR_GENERAL_ERROR;
    if (!is_loaded() || (!fault_decide(call) && !works_always(call->row))) return false;
    call->function = fault_real[call->row];
    call->forwarded = goes_on(call);
    if (call->forwarded) fault_enter(call);
    return call->forwarded;
}

CK_RV fault_end(struct fault_call *call)
{
    const struct fault *fault = &call->fault;
    if (call->forwarded) fault_leave(call);
    if (call->scratch) {
        explicit_bzero(call->scratch, call->scratch_size);
        free(call->scratch);
        call->rv = call->answer;
    } else if (call->forwarded) {
        fault_was_lost(call);
    }
    if (fault->action >= FAULT_LENGTH && fault->action <= FAULT_ZERO &&
        !(call->forwarded && call->rv == CKR_OK && corrupt_outputs(call)))
        fault_owed(call);
    if (fault->late) {
        strike(call);
        if (fault->action == FAULT_RETURN) end_fed(call, call->rv = fault->number);
    }
    wait_ns(fault->late_ns);
    if (atomic_load(&loaded)) write_log(call, true);
    return call->rv;
}
