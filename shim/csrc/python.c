/*
 * Starting Python, once, isolated from the host: its environment, its directories and its hooks have no say.
 *
 * The paths are fixed at build time (HA_PATHS).  A host that is itself a Python of our minor version shares its
 * interpreter; one of another version, or with another copy of libpython, is refused with one line.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <link.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "build.gen.h" /* HA_PYTHON_HOME, HA_PYTHON_STDLIB, HA_PATHS */
#include "ha.h"

int ha_cffi_start(void); /* in the cffi module */

static _Atomic bool interpreter_is_ours;
static _Atomic bool interpreter_is_up;
static __thread PyThreadState *waiting;
static __thread PyGILState_STATE forking;

/* A wait of ours must not keep the GIL from the thread it waits for; only a Python host can be holding it. */
void ha_wait_begin(void)
{
    PyThreadState *own = atomic_load(&interpreter_is_up) ? PyGILState_GetThisThreadState() : NULL;
    waiting = own && own == _PyThreadState_UncheckedGet() ? PyEval_SaveThread() : NULL;
}

void ha_wait_end(void)
{
    if (waiting) PyEval_RestoreThread(waiting);
}

struct other_python {
    const void *ours;
    char path[256];
};

static int look_for_python(struct dl_phdr_info *info, size_t size, void *data)
{
    struct other_python *other = data;
    const char *name = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
    (void)size;
    if (!name || strncmp(name + 1, "libpython3.", 11) != 0) return 0;
    for (int k = 0; k < info->dlpi_phnum; k++) {
        ElfW(Addr) start = info->dlpi_addr + info->dlpi_phdr[k].p_vaddr;
        ElfW(Addr) at = (ElfW(Addr))(uintptr_t)other->ours;
        if (info->dlpi_phdr[k].p_type == PT_LOAD && at >= start && at < start + info->dlpi_phdr[k].p_memsz) return 0;
    }
    snprintf(other->path, sizeof other->path, "%s", info->dlpi_name);
    return 1;
}

/* Which Python are we bound to, and is it the only one? */
static bool host_is_fit(char *error, size_t error_size)
{
    char expected[16];
    snprintf(expected, sizeof expected, "%d.%d.", PY_MAJOR_VERSION, PY_MINOR_VERSION);
    if (strncmp(Py_GetVersion(), expected, strlen(expected)) != 0) {
        snprintf(error, error_size, "the host process runs Python %.12s, this build needs %d.%d", Py_GetVersion(),
                 PY_MAJOR_VERSION, PY_MINOR_VERSION);
        return false;
    }
    Dl_info ours, host;
    void *global = dlsym(RTLD_DEFAULT, "Py_GetVersion");
    void *bound = (void *)(uintptr_t)&Py_GetVersion;
    /* By a GLOB_DAT relocation a function's address is the definition that we are bound to. */
    if (global && dladdr(global, &host) && dladdr(bound, &ours) && host.dli_fbase != ours.dli_fbase) {
        snprintf(error, error_size, "the host process has a Python of its own (%s) beside ours (%s)", host.dli_fname,
                 ours.dli_fname);
        return false;
    }
    struct other_python other = {.ours = bound};
    if (dl_iterate_phdr(look_for_python, &other)) {
        /* The shared library of the same build beside a static executable is what we were linked with: unused. */
        Dl_info where;
        char executable[256] = "";
        ssize_t n = readlink("/proc/self/exe", executable, sizeof executable - 1);
        bool static_host =
            n > 0 && dladdr(bound, &where) && where.dli_fname && strstr(where.dli_fname, "libpython") == NULL;
        if (!(static_host && strstr(other.path, HA_LIBPYTHON))) {
            snprintf(error, error_size, "another Python is loaded in the host process (%s)", other.path);
            return false;
        }
    }
    return true;
}

/* A host loads modules RTLD_LOCAL, and Python's extension modules, which are not linked to libpython, would not
 * find it: the library that is loaded already is made global. */
static void make_libpython_global(void)
{
    Dl_info info;
    if (dladdr((void *)(uintptr_t)&Py_IsInitialized, &info) && info.dli_fname && strstr(info.dli_fname, "libpython"))
        dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

static PyStatus append_path(PyConfig *config, const char *path)
{
    wchar_t *wide = Py_DecodeLocale(path, NULL);
    PyStatus status = wide ? PyWideStringList_Append(&config->module_search_paths, wide) : PyStatus_NoMemory();
    PyMem_RawFree(wide);
    return status;
}

/* The first import of `signal` lets Python handle SIGINT, whatever the configuration says, and Ctrl-C would no
 * longer end the application: it is imported here, and the application's handling put back. */
static void import_signal(void)
{
    struct sigaction interrupt;
    sigaction(SIGINT, NULL, &interrupt);
    Py_XDECREF(PyImport_ImportModule("_signal"));
    PyErr_Clear();
    sigaction(SIGINT, &interrupt, NULL);
}

static const char *const paths[] = {HA_PATHS};

static bool start_interpreter(char *error, size_t error_size)
{
    if (access(HA_PYTHON_STDLIB "/encodings/__init__.py", R_OK) != 0) {
        snprintf(error, error_size, "no Python library in %s", HA_PYTHON_STDLIB);
        return false;
    }
    PyPreConfig preconfig;
    PyPreConfig_InitIsolatedConfig(&preconfig);
    preconfig.utf8_mode = 1;
    PyStatus status = Py_PreInitialize(&preconfig);
    PyConfig config;
    PyConfig_InitIsolatedConfig(&config);
    if (!PyStatus_Exception(status)) {
        config.site_import = 0;
        config.install_signal_handlers = 0;
        config.write_bytecode = 0;
        config.pathconfig_warnings = 0;
        config.module_search_paths_set = 1;
        status = PyConfig_SetBytesString(&config, &config.home, HA_PYTHON_HOME);
    }
    for (size_t k = 0; !PyStatus_Exception(status) && k < sizeof paths / sizeof *paths; k++)
        status = append_path(&config, paths[k]);
    if (!PyStatus_Exception(status)) status = append_path(&config, HA_PYTHON_STDLIB);
    if (!PyStatus_Exception(status)) status = append_path(&config, HA_PYTHON_STDLIB "/lib-dynload");
    if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status)) {
        snprintf(error, error_size, "Python does not start: %s", status.err_msg ? status.err_msg : "no reason given");
        return false;
    }
    import_signal();
    PyEval_SaveThread();
    atomic_store(&interpreter_is_ours, true);
    return true;
}

/* The exception under way as one line. */
static void describe_exception(const char *what, char *error, size_t error_size)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *text = value ? PyObject_Str(value) : NULL;
    const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
    snprintf(error, error_size, "%s: %s: %s", what, type ? ((PyTypeObject *)type)->tp_name : "error",
             utf8 ? utf8 : "no text");
    PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
}

/* Imports what the core needs before cffi starts, so that a broken installation is one line and not a traceback.
 * In a shared interpreter our paths stand in sys.path only for that long. */
static bool import_core(char *error, size_t error_size)
{
    static const char *const modules[] = {"_cffi_backend", "pkcs11_ha.entry"};
    PyObject *path = PySys_GetObject("path"); /* borrowed */
    bool ours = atomic_load(&interpreter_is_ours), good = path && PyList_Check(path);
    Py_ssize_t inserted = 0;
    for (size_t k = sizeof paths / sizeof *paths; good && !ours && k-- > 0;) {
        PyObject *text = PyUnicode_DecodeFSDefault(paths[k]);
        good = text && PyList_Insert(path, 0, text) == 0;
        if (good) inserted++;
        Py_XDECREF(text);
    }
    for (size_t k = 0; good && k < sizeof modules / sizeof *modules; k++) {
        PyObject *module = PyImport_ImportModule(modules[k]);
        good = module != NULL;
        Py_XDECREF(module);
    }
    if (!good) describe_exception("broken installation", error, error_size);
    if (inserted) PyList_SetSlice(path, 0, inserted, NULL);
    return good;
}

/* Makes the core ready to be called; true at once if it is. Called under the lock of C_Initialize. */
bool ha_python_start(char *error, size_t error_size)
{
    if (!host_is_fit(error, error_size)) return false;
    make_libpython_global();
    if (!Py_IsInitialized() && !start_interpreter(error, error_size)) return false;
    atomic_store(&interpreter_is_up, true);
    PyGILState_STATE state = PyGILState_Ensure();
    bool good = import_core(error, error_size);
    PyGILState_Release(state);
    if (good && ha_cffi_start() != 0) {
        snprintf(error, error_size, "the core does not start");
        good = false;
    }
    return good;
}

/* os.fork() of a Python host does this itself; for our own interpreter nobody else would. */
void ha_python_before_fork(void)
{
    if (!atomic_load(&interpreter_is_ours)) return;
    forking = PyGILState_Ensure();
    PyOS_BeforeFork();
}

void ha_python_after_fork(bool child)
{
    if (!atomic_load(&interpreter_is_ours)) return;
    if (child)
        PyOS_AfterFork_Child();
    else
        PyOS_AfterFork_Parent();
    PyGILState_Release(forking);
}
