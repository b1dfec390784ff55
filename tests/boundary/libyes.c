/*
 * A PKCS#11 3.2 library that says CKR_OK to everything and looks at nothing.
 *
 * So whatever the module under test lets through comes back as CKR_OK, and whatever it must refuse shows.  The
 * functions that the module itself needs answer properly: one token "yes", and an object for every handle.
 *
 * $YES_HOLD names a FIFO: C_Initialize waits until somebody opens it for writing, and fails where there is none.
 * $YES_HOLD_INFO names one for C_GetMechanismInfo, which makes NAME.reached before it waits.
 */
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pkcs11.h"

#define EXPORT __attribute__((visibility("default")))

static CK_FUNCTION_LIST_3_2 list;
static CK_ULONG last_handle = 100; /* so that ours and the module's are never mistaken for each other */

static CK_RV yes(void)
{
    return CKR_OK;
}

/* False: there is no such FIFO. */
static bool hold(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) close(fd);
    return fd >= 0;
}

static CK_RV initialize(CK_VOID_PTR pInitArgs)
{
    const char *path = getenv("YES_HOLD");
    (void)pInitArgs;
    return path && !hold(path) ? CKR_DEVICE_ERROR : CKR_OK;
}

static CK_RV get_mechanism_info(CK_SLOT_ID slotID, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR pInfo)
{
    char reached[256];
    const char *path = getenv("YES_HOLD_INFO");
    (void)slotID, (void)type;
    memset(pInfo, 0, sizeof *pInfo);
    if (!path) return CKR_OK;
    snprintf(reached, sizeof reached, "%s.reached", path);
    close(open(reached, O_CREAT | O_CLOEXEC, 0600));
    hold(path);
    return CKR_OK;
}

static CK_RV get_info(CK_INFO_PTR pInfo)
{
    memset(pInfo, ' ', sizeof *pInfo);
    pInfo->flags = 0;
    return CKR_OK;
}

static CK_RV get_slot_list(CK_BBOOL tokenPresent, CK_SLOT_ID_PTR pSlotList, CK_ULONG_PTR pulCount)
{
    (void)tokenPresent;
    if (pSlotList) *pSlotList = 7;
    *pulCount = 1;
    return CKR_OK;
}

/* A function of the library's own, exported, that it calls by its name as libraries do: in a host where that name
 * means another's function, it must still be its own. */
EXPORT CK_RV C_CancelFunction(CK_SESSION_HANDLE hSession)
{
    (void)hSession;
    return CKR_OK;
}

static CK_RV get_slot_info(CK_SLOT_ID slotID, CK_SLOT_INFO_PTR pInfo)
{
    (void)slotID;
    memset(pInfo, ' ', sizeof *pInfo);
    pInfo->flags = CKF_TOKEN_PRESENT;
    return C_CancelFunction(0);
}

static CK_RV get_token_info(CK_SLOT_ID slotID, CK_TOKEN_INFO_PTR pInfo)
{
    (void)slotID;
    memset(pInfo, ' ', sizeof *pInfo);
    memcpy(pInfo->label, "yes", 3);
    memcpy(pInfo->serialNumber, "1", 1);
    pInfo->flags = CKF_TOKEN_INITIALIZED | CKF_USER_PIN_INITIALIZED | CKF_LOGIN_REQUIRED | CKF_RNG;
    return CKR_OK;
}

static CK_RV get_mechanism_list(CK_SLOT_ID slotID, CK_MECHANISM_TYPE_PTR pMechanismList, CK_ULONG_PTR pulCount)
{
    (void)slotID;
    if (pMechanismList) *pMechanismList = CKM_SHA256;
    *pulCount = 1;
    return CKR_OK;
}

static CK_RV new_handle(CK_ULONG_PTR pHandle)
{
    *pHandle = ++last_handle;
    return CKR_OK;
}

static CK_RV open_session(CK_SLOT_ID slotID, CK_FLAGS flags, CK_VOID_PTR pApplication, CK_NOTIFY Notify,
                          CK_SESSION_HANDLE_PTR phSession)
{
    (void)slotID, (void)flags, (void)pApplication, (void)Notify;
    return new_handle(phSession);
}

static CK_RV create_object(CK_SESSION_HANDLE hSession, CK_ATTRIBUTE_PTR pTemplate, CK_ULONG ulCount,
                           CK_OBJECT_HANDLE_PTR phObject)
{
    (void)hSession, (void)pTemplate, (void)ulCount;
    return new_handle(phObject);
}

static CK_RV find_objects(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE_PTR phObject, CK_ULONG ulMaxObjectCount,
                          CK_ULONG_PTR pulObjectCount)
{
    (void)hSession, (void)phObject, (void)ulMaxObjectCount;
    *pulObjectCount = 0;
    return CKR_OK;
}

/* Every object is a public session object of class CKO_DATA, and says no more. */
static CK_RV get_attribute_value(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE hObject, CK_ATTRIBUTE_PTR pTemplate,
                                 CK_ULONG ulCount)
{
    (void)hSession, (void)hObject;
    for (CK_ULONG k = 0; k < ulCount; k++) {
        CK_ULONG size = pTemplate[k].type == CKA_CLASS                                       ? sizeof(CK_ULONG)
                        : pTemplate[k].type == CKA_TOKEN || pTemplate[k].type == CKA_PRIVATE ? 1
                                                                                             : 0;
        if (pTemplate[k].pValue && size <= pTemplate[k].ulValueLen) memset(pTemplate[k].pValue, 0, size);
        pTemplate[k].ulValueLen = size;
    }
    return CKR_OK;
}

static void fill(void)
{
    CK_RV (*agree)(void) = yes;
    char *at = (char *)&list + offsetof(CK_FUNCTION_LIST_3_2, C_Initialize);
    for (; at < (char *)(&list + 1); at += sizeof agree) memcpy(at, &agree, sizeof agree);
    list.version = (CK_VERSION){3, 2};
    list.C_Initialize = initialize;
    list.C_GetInfo = get_info;
    list.C_GetSlotList = get_slot_list;
    list.C_GetSlotInfo = get_slot_info;
    list.C_GetTokenInfo = get_token_info;
    list.C_GetMechanismList = get_mechanism_list;
    list.C_GetMechanismInfo = get_mechanism_info;
    list.C_OpenSession = open_session;
    list.C_CreateObject = create_object;
    list.C_FindObjects = find_objects;
    list.C_GetAttributeValue = get_attribute_value;
}

EXPORT CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR ppFunctionList)
{
    fill();
    *ppFunctionList = (CK_FUNCTION_LIST_PTR)(void *)&list;
    return CKR_OK;
}

EXPORT CK_RV C_GetInterface(CK_UTF8CHAR_PTR pInterfaceName, CK_VERSION_PTR pVersion, CK_INTERFACE_PTR_PTR ppInterface,
                            CK_FLAGS flags)
{
    static char name[] = "PKCS 11";
    static CK_INTERFACE interface = {(CK_UTF8CHAR_PTR)name, &list, 0};
    (void)pInterfaceName, (void)pVersion, (void)flags;
    fill();
    *ppInterface = &interface;
    return CKR_OK;
}
