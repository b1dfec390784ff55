/* What pkcs11-ha offers an application beyond PKCS#11: the status of its group, and who serves a session.
 *
 * No application needs any of it. One that wants it finds it in two places:
 *
 *   CA_GetHAState    as a symbol of the module (dlsym), as applications written for Luna clients look for it;
 *   both functions   in the interface CK_HA_INTERFACE_NAME, by C_GetInterface of PKCS#11 3.0.
 *
 * Include the PKCS#11 header of your choice first: only CK_CHAR, CK_ULONG, CK_RV, CK_VERSION, CK_SLOT_ID and
 * CK_SESSION_HANDLE are taken from it. Structures have natural alignment, as PKCS#11 wants it on Unix.
 */
#ifndef PKCS11_HA_H
#define PKCS11_HA_H

#ifdef __cplusplus
extern "C" {
#endif

#define CK_HA_MAX_MEMBERS 32
#define CK_HA_SERIAL_SIZE 20 /* the token's 16 characters, NUL-padded */
#define CK_HA_MEMBER_NAME_SIZE 64

/* One member: its token's serial number, NUL-terminated without trailing blanks, and
 *   CKR_OK                  it serves,
 *   CKR_DEVICE_ERROR        it was lost, and nobody has read the status since,
 *   CKR_TOKEN_NOT_PRESENT   it is still away. */
typedef struct CK_HA_MEMBER {
    CK_CHAR memberSerial[CK_HA_SERIAL_SIZE];
    CK_RV memberStatus;
} CK_HA_MEMBER;

/* One group: listSize says how many entries of memberList are filled, in the order of the configuration.
 * 1056 bytes where CK_ULONG has 64 bits. */
typedef struct CK_HA_STATUS {
    CK_CHAR groupSerial[CK_HA_SERIAL_SIZE];
    CK_HA_MEMBER memberList[CK_HA_MAX_MEMBERS];
    CK_ULONG listSize;
} CK_HA_STATUS;

typedef CK_HA_STATUS *CK_HA_STATE_PTR;

/* Fills *pState for the group behind the virtual slot slotId. Reading is an event: the first status read
 * after a loss says CKR_DEVICE_ERROR for that member, every later one CKR_TOKEN_NOT_PRESENT until it is
 * back. No session is needed.
 *   CKR_OK, CKR_ARGUMENTS_BAD, CKR_SLOT_ID_INVALID (not a virtual slot), CKR_CRYPTOKI_NOT_INITIALIZED */
extern CK_RV CA_GetHAState(CK_SLOT_ID slotId, CK_HA_STATE_PTR pState);
typedef CK_RV (*CK_CA_GetHAState)(CK_SLOT_ID slotId, CK_HA_STATE_PTR pState);

/* Says which member served the last call on a virtual session: its name in the configuration and its token's
 * serial number, both NUL-terminated, both empty when no member has served the session yet. It asks no
 * member and changes nothing, so it may be called after every operation. Ask in the thread that uses the
 * session: a call of another thread on the same session would change the answer.
 *   CKR_OK, CKR_ARGUMENTS_BAD, CKR_SESSION_HANDLE_INVALID, CKR_CRYPTOKI_NOT_INITIALIZED */
typedef CK_RV (*CK_CA_GetSessionMember)(CK_SESSION_HANDLE hSession, CK_CHAR memberName[CK_HA_MEMBER_NAME_SIZE],
                                        CK_CHAR memberSerial[CK_HA_SERIAL_SIZE]);

/* The vendor interface: pFunctionList of C_GetInterface(CK_HA_INTERFACE_NAME, NULL, &interface, 0). Functions
 * are only ever appended, with version.minor raised. */
#define CK_HA_INTERFACE_NAME "Vendor pkcs11-ha"

typedef struct CK_HA_FUNCTION_LIST {
    CK_VERSION version; /* 1.0 */
    CK_CA_GetHAState CA_GetHAState;
    CK_CA_GetSessionMember CA_GetSessionMember;
} CK_HA_FUNCTION_LIST;

typedef CK_HA_FUNCTION_LIST *CK_HA_FUNCTION_LIST_PTR;

#ifdef __cplusplus
}
#endif

#endif
