/* A member of the fuzzed group: the fake token, and for what it has not the vendor that reads all. */
#include <string.h>

#include "vendor.h"

HA_EXPORT CK_RV C_GetInterface(CK_UTF8CHAR_PTR name, CK_VERSION_PTR version, CK_INTERFACE_PTR_PTR interface,
                               CK_FLAGS flags)
{
    static CK_FUNCTION_LIST_3_2 all = {.version = {3, 2}};
    static CK_UTF8CHAR standard[] = "PKCS 11";
    static CK_INTERFACE ours = {standard, &all, 0};
    CK_FUNCTION_LIST *fake;
    (void)name, (void)flags;
    if (version && (version->major != all.version.major || version->minor != all.version.minor))
        return CKR_FUNCTION_FAILED;
    C_GetFunctionList(&fake);
    char *functions = (char *)&all.C_Initialize;
    memcpy(functions, &fake->C_Initialize, HA_FUNCTIONS_2_40 * sizeof(void *));
    for (unsigned row = 0; row < HA_FUNCTIONS; row++) {
        void *function;
        memcpy(&function, functions + row * sizeof function, sizeof function);
        if (!function) memcpy(functions + row * sizeof function, &vendor_functions[row], sizeof function);
    }
    vendor_create = C_CreateObject;
    vendor_session = C_GetSessionInfo;
    *interface = &ours;
    return CKR_OK;
}
