/*
 * Finding objects: every serving member is asked at C_FindObjectsInit, and the answers are united by identity.
 *
 * All of them, because a key that could not be copied lives on one member only and must still be found.  The
 * result is taken whole, so a member that leaves afterwards changes nothing.  Handles the data plane has met
 * before cost one look in a map; new ones are identified by the core.
 */
#include <stdlib.h>
#include <string.h>

#include "ha.h"

struct handles {
    CK_OBJECT_HANDLE *at;
    size_t count, room;
};

static bool reserve(struct handles *list, size_t more)
{
    if (list->count + more <= list->room) return true;
    size_t room = list->room ? list->room * 2 : 64;
    while (room < list->count + more) room *= 2;
    void *at = realloc(list->at, room * sizeof *list->at);
    if (!at) return false;
    list->at = at;
    list->room = room;
    return true;
}

/* A member that has forgotten the login shows the public objects alone, with CKR_OK: nobody could tell that from a key
 * that is not there. */
static CK_RV keeps_the_login(const ha_call *call)
{
    CK_SESSION_INFO info;
    CK_C_GetSessionInfo ask = (CK_C_GetSessionInfo)call->target->functions[FN_C_GetSessionInfo];
    if (atomic_load(&call->slot->login) == CK_UNAVAILABLE_INFORMATION || !ask) return CKR_OK;
    CK_RV rv = ask(call->member_session, &info);
    if (rv != CKR_OK) return rv == CKR_DEVICE_REMOVED ? rv : CKR_OK;
    bool is_public = info.state == CKS_RO_PUBLIC_SESSION || info.state == CKS_RW_PUBLIC_SESSION;
    return is_public ? CKR_USER_NOT_LOGGED_IN : CKR_OK;
}

/* All that one member finds, by its handles. */
static CK_RV find_on_member(ha_call *call, CK_ATTRIBUTE *template, CK_ULONG count, struct handles *found)
{
    ha_member *target = call->target;
    CK_C_FindObjects next = (CK_C_FindObjects)target->functions[FN_C_FindObjects];
    CK_C_FindObjectsFinal final = (CK_C_FindObjectsFinal)target->functions[FN_C_FindObjectsFinal];
    if (!next || !final) return CKR_FUNCTION_NOT_SUPPORTED;
    found->count = 0;
    CK_RV rv = ((CK_C_FindObjectsInit)call->function)(call->member_session, template, count);
    if (rv != CKR_OK) return rv;
    CK_ULONG got;
    do { /* until none is left: a library may give fewer at a time than it is asked for (PKCS#11 5.7.7) */
        if (!reserve(found, 64)) rv = CKR_HOST_MEMORY;
        size_t room = found->room - found->count;
        got = 0;
        if (rv == CKR_OK) rv = next(call->member_session, found->at + found->count, room, &got);
        if (rv == CKR_OK && got > room) rv = CKR_DEVICE_ERROR;
        if (rv == CKR_OK) found->count += got;
    } while (rv == CKR_OK && got);
    CK_RV ended = final(call->member_session);
    if (rv == CKR_OK) rv = ended;
    return rv == CKR_OK ? keeps_the_login(call) : rv;
}

static int by_handle(const void *a, const void *b)
{
    CK_OBJECT_HANDLE x = *(const CK_OBJECT_HANDLE *)a, y = *(const CK_OBJECT_HANDLE *)b;
    return x < y ? -1 : x > y;
}

/* Adds what one more member found, in its order, without what is there already. */
static CK_RV unite(struct handles *all, const CK_OBJECT_HANDLE *more, size_t count)
{
    size_t known = all->count;
    CK_OBJECT_HANDLE *sorted = NULL;
    if (!reserve(all, count)) return CKR_HOST_MEMORY;
    if (known) {
        sorted = malloc(known * sizeof *sorted);
        if (!sorted) return CKR_HOST_MEMORY;
        memcpy(sorted, all->at, known * sizeof *sorted);
        qsort(sorted, known, sizeof *sorted, by_handle);
    }
    for (size_t k = 0; k < count; k++) {
        if (!more[k] || more[k] == (CK_OBJECT_HANDLE)HA_HIDDEN) continue;
        if (known && bsearch(&more[k], sorted, known, sizeof *sorted, by_handle)) continue;
        all->at[all->count++] = more[k];
    }
    free(sorted);
    return CKR_OK;
}

static CK_RV identify(ha_call *call, const struct handles *found, struct handles *all)
{
    if (!found->count) return CKR_OK;
    CK_OBJECT_HANDLE *objects = malloc(found->count * sizeof *objects);
    if (!objects) return CKR_HOST_MEMORY;
    ha_objects_virtual(call->slot, call->member, call->epoch, found->at, found->count, objects);
    bool all_known = true;
    for (size_t k = 0; k < found->count && all_known; k++) all_known = objects[k] != 0;
    CK_RV rv = CKR_OK;
    if (!all_known) rv = ha_unseal(ha_core.identify(call, found->at, found->count, objects));
    if (rv == CKR_OK) rv = unite(all, objects, found->count);
    free(objects);
    return rv;
}

CK_RV native_C_FindObjectsInit(CK_SESSION_HANDLE hSession, CK_ATTRIBUTE_PTR pTemplate, CK_ULONG ulCount)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    ha_slot *slot = session->slot;
    struct handles all = {0}, found = {0};
    CK_RV rv = CKR_OK;
    ha_gate(slot);
    if (session->finding) rv = CKR_OPERATION_ACTIVE;

    /* A call per member, `alone`: routed and repaired like any other, but never sent to another member. */
    ha_call verdict = {.row = FN_C_FindObjectsInit, .member = -1, .session = session, .slot = slot};
    uint32_t asked = 0, answered = 0, left;
    while (rv == CKR_OK && (left = atomic_load(&slot->serving) & ~asked)) {
        ha_call call = {.row = FN_C_FindObjectsInit, .member = -1, .session = session, .slot = slot, .alone = 1};
        uint32_t bit = left & -left;
        call.tried = ~bit;
        asked |= bit;
        while (!call.finished && ha_call_route(&call))
            ha_call_done(&call, find_on_member(&call, pTemplate, ulCount, &found));
        if (call.rv == CKR_OK) call.rv = identify(&call, &found, &all);
        if (call.rv == CKR_OK)
            answered |= bit;
        else if (call.rv == CKR_OPERATION_ACTIVE)
            rv = call.rv; /* no search beside its operation: what the others find would be taken for all there is */
        else if (!verdict.first_rv)
            verdict.first_rv = call.rv;
        verdict.suspects |= call.suspects;
        verdict.answered |= call.suspects;
        if (!(atomic_load(&slot->serving) & ~asked) && !answered &&
            verdict.suspects) { /* nobody could: what does that mean? */
            rv = ha_unseal(ha_core.no_member(&verdict));
            if (rv == HA_AGAIN) {
                rv = CKR_OK;
                asked = verdict.tried;
            }
        }
    }
    if (rv == CKR_OK && !answered) rv = verdict.first_rv ? verdict.first_rv : CKR_DEVICE_ERROR;
    if (rv == CKR_OK && verdict.suspects) ha_core.settled(&verdict);
    free(found.at);
    if (rv == CKR_OK) {
        free(session->found);
        session->found = all.at;
        session->found_count = all.count;
        session->found_next = 0;
        session->finding = true;
    } else {
        free(all.at);
    }
    ha_session_unlock(session);
    return rv;
}

CK_RV native_C_FindObjects(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE_PTR phObject, CK_ULONG ulMaxObjectCount,
                           CK_ULONG_PTR pulObjectCount)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    CK_RV rv = session->finding ? CKR_OK : CKR_OPERATION_NOT_INITIALIZED;
    CK_ULONG given = 0;
    while (rv == CKR_OK && given < ulMaxObjectCount && session->found_next < session->found_count) {
        CK_OBJECT_HANDLE object = session->found[session->found_next++];
        if (ha_object_valid(object, session->slot)) phObject[given++] = object; /* not destroyed meanwhile */
    }
    if (rv == CKR_OK) *pulObjectCount = given;
    ha_session_unlock(session);
    return rv;
}

CK_RV native_C_FindObjectsFinal(CK_SESSION_HANDLE hSession)
{
    ha_session *session = ha_session_lock(hSession);
    if (!session) return CKR_SESSION_HANDLE_INVALID;
    CK_RV rv = session->finding ? CKR_OK : CKR_OPERATION_NOT_INITIALIZED;
    session->finding = false;
    ha_session_unlock(session);
    return rv;
}
