/* AES key wrap through p11-kit, which does not carry it: a PKCS#11 module in front of another one.
 *
 * p11-kit's client passes on to its server only the mechanisms of a fixed list. CKM_AES_KEY_WRAP_PAD is not in that
 * list (seen with 0.24); CKM_KEY_WRAP_LYNKS is: it takes no parameter either, and no HSM of today has it. So one of
 * these stands in front of p11-kit's client and says LYNKS where the application said CKM_AES_KEY_WRAP_PAD, and one
 * stands in the server, in front of the HSM's own library, and says CKM_AES_KEY_WRAP_PAD again. The HSM wraps and
 * unwraps; every other function is the module's behind.
 *
 * Fixed when it is built, for each end (tests/chaos/keywrap.py): BEHIND, the path of the module behind; SAID, the mechanism
 * as the caller calls it; MEANT, as the module behind does.
 */
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

#include "pkcs11.h"

static CK_FUNCTION_LIST_PTR behind;

static CK_RV get_mechanism_list(CK_SLOT_ID slot, CK_MECHANISM_TYPE *list, CK_ULONG *count)
{
    CK_RV rv = behind->C_GetMechanismList(slot, list, count);
    for (CK_ULONG i = 0; rv == CKR_OK && list != NULL && i < *count; i++)
        if (list[i] == MEANT) list[i] = SAID;
    return rv;
}

static CK_RV get_mechanism_info(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO *info)
{
    return behind->C_GetMechanismInfo(slot, type == SAID ? MEANT : type, info);
}

static CK_RV wrap_key(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE with, CK_OBJECT_HANDLE key,
                      CK_BYTE *wrapped, CK_ULONG *size)
{
    CK_MECHANISM meant = {MEANT, NULL, 0};
    if (mechanism != NULL && mechanism->mechanism == SAID) mechanism = &meant;
    return behind->C_WrapKey(session, mechanism, with, key, wrapped, size);
}

static CK_RV unwrap_key(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE with, CK_BYTE *wrapped,
                        CK_ULONG size, CK_ATTRIBUTE *template, CK_ULONG count, CK_OBJECT_HANDLE *key)
{
    CK_MECHANISM meant = {MEANT, NULL, 0};
    if (mechanism != NULL && mechanism->mechanism == SAID) mechanism = &meant;
    return behind->C_UnwrapKey(session, mechanism, with, wrapped, size, template, count, key);
}

static CK_RV load(void)
{
    void *module = dlopen(BEHIND, RTLD_NOW | RTLD_LOCAL);
    if (module == NULL) {
        fprintf(stderr, "keywrap: %s\n", dlerror());
        return CKR_GENERAL_ERROR;
    }
    CK_RV (*get_function_list)(CK_FUNCTION_LIST_PTR_PTR);
    *(void **)&get_function_list = dlsym(module, "C_GetFunctionList");
    return get_function_list == NULL ? CKR_GENERAL_ERROR : get_function_list(&behind);
}

/* The list of p11-kit's client is for the server that P11_KIT_SERVER_ADDRESS names at this moment, and stays so: a
 * process with several servers needs a copy of this library for each (instance = "own"). */
CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list)
{
    static CK_FUNCTION_LIST own;
    CK_RV rv = behind == NULL ? load() : CKR_OK;
    if (rv != CKR_OK) return rv;
    own = *behind;
    own.C_GetFunctionList = C_GetFunctionList;
    own.C_GetMechanismList = get_mechanism_list;
    own.C_GetMechanismInfo = get_mechanism_info;
    own.C_WrapKey = wrap_key;
    own.C_UnwrapKey = unwrap_key;
    *list = &own;
    return CKR_OK;
}
