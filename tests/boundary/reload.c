/* A host that loads the module, signs and closes it again, three times; the last time without C_Finalize. */
#include <dlfcn.h>
#include <sys/wait.h>

#include "application.h"

int main(int argc, char **argv)
{
    if (argc != 2) return 2;
    for (unsigned round = 0; round < 3; round++) {
        void *module = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        void *symbol = module ? dlsym(module, "C_GetFunctionList") : NULL;
        CK_C_GetFunctionList get;
        CK_FUNCTION_LIST *p11 = NULL;
        if (!symbol) return 3;
        memcpy(&get, &symbol, sizeof get);
        MUST(get(&p11));
        MUST(p11->C_Initialize(NULL));
        sign_and_verify(p11, 3);
        if (round < 2) MUST(p11->C_Finalize(NULL));
        dlclose(module);
    }
    int status = -1;
    pid_t child = fork(); /* the handlers that we registered are still there */
    if (child == 0) exit(0);
    return waitpid(child, &status, 0) == child && status == 0 ? 0 : 4;
}
