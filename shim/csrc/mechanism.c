/*
 * Mechanism parameters: kept (a deep copy, so that an Init can be repeated) and translated (handles inside).
 *
 * Both follow the generated layouts of spec/mechanisms.py.  A mechanism outside the table passes through
 * untouched and is not kept, so an operation begun with it is never repeated.
 */
#include <stdlib.h>
#include <string.h>

#include "ha.h"

static void wipe(void *bytes, size_t size)
{
    memset(bytes, 0, size);
    __asm__ volatile("" : : "r"(bytes) : "memory"); /* the stores may not be optimised away */
}

RARE void ha_operation_wipe(struct ha_operation *operation)
{
    wipe(operation->parameter, operation->parameter_size);
    free(operation->parameter);
    operation->parameter = NULL;
}

static size_t get_size(const char *structure, size_t offset)
{
    CK_ULONG value;
    memcpy(&value, structure + offset, sizeof value);
    return value;
}

static void *get_pointer(const char *structure, size_t offset)
{
    void *value;
    memcpy(&value, structure + offset, sizeof value);
    return value;
}

/* Keeps the parameter of an Init; operation->kept stays false where its layout is not known. */
RARE void ha_mechanism_keep(struct ha_operation *operation)
{
    const CK_MECHANISM *mechanism = &operation->mechanism;
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    if (!layout || !layout->kept || (layout->size && layout->size != mechanism->ulParameterLen)) return;

    const char *given = mechanism->pParameter;
    size_t size = mechanism->ulParameterLen;
    for (unsigned k = 0; k < layout->buffers; k++) {
        size_t length = get_size(given, layout->buffer[k].length);
        if (get_pointer(given, layout->buffer[k].pointer) && (size += length) < length) return;
        if (length > (1UL << 24)) return; /* nobody's IV: do not follow a wild length */
    }
    char *copy = malloc(size);
    if (!copy) return;
    memcpy(copy, given, mechanism->ulParameterLen);
    size_t end = mechanism->ulParameterLen;
    for (unsigned k = 0; k < layout->buffers; k++) {
        const void *from = get_pointer(given, layout->buffer[k].pointer);
        size_t length = get_size(given, layout->buffer[k].length);
        if (!from) continue;
        memcpy(copy + end, from, length);
        void *inside = copy + end;
        memcpy(copy + layout->buffer[k].pointer, &inside, sizeof inside);
        end += length;
    }
    operation->parameter = operation->mechanism.pParameter = copy;
    operation->parameter_size = size;
    operation->kept = true;
}

/* Whether a mechanism is as it was kept: a member may have written into what its parameter points to. */
RARE bool ha_mechanism_is(const struct ha_operation *kept, const CK_MECHANISM *mechanism)
{
    const char *ours = kept->parameter, *theirs = mechanism->pParameter;
    const struct ha_parameter *layout = ours ? ha_parameter_of(mechanism->mechanism) : NULL;
    if (!layout) return true;
    if (!layout->buffers) return memcmp(ours, theirs, kept->mechanism.ulParameterLen) == 0;
    for (unsigned k = 0; k < layout->buffers; k++) {
        size_t length = get_size(ours, layout->buffer[k].length);
        const void *before = get_pointer(ours, layout->buffer[k].pointer);
        const void *now = get_pointer(theirs, layout->buffer[k].pointer);
        if (length != get_size(theirs, layout->buffer[k].length) || !before != !now) return false;
        if (before && memcmp(before, now, length) != 0) return false;
    }
    return true;
}

/* A kept parameter that was copied as it lies: its pointers are put right. False: its lengths do not add up. */
bool ha_mechanism_restore(struct ha_operation *operation)
{
    const struct ha_parameter *layout = ha_parameter_of(operation->mechanism.mechanism);
    size_t end = operation->mechanism.ulParameterLen;
    if (!layout || !layout->kept || end > operation->parameter_size) return false;
    if (layout->size && layout->size != end) return false;
    for (unsigned k = 0; k < layout->buffers; k++) {
        char *parameter = operation->parameter;
        size_t length = get_size(parameter, layout->buffer[k].length);
        if (!get_pointer(parameter, layout->buffer[k].pointer)) continue;
        if (length > operation->parameter_size - end) return false;
        void *inside = parameter + end;
        memcpy(parameter + layout->buffer[k].pointer, &inside, sizeof inside);
        end += length;
    }
    operation->mechanism.pParameter = operation->parameter;
    return end == operation->parameter_size;
}

/* Adds the virtual handles inside the mechanism's parameter to the call's objects. */
CK_RV ha_mechanism_objects(ha_call *call)
{
    const CK_MECHANISM *mechanism = call->mechanism;
    CK_PRF_DATA_PARAM *data = NULL;
    CK_ULONG count;
    if (!ha_derivation_data(mechanism, &data, &count) || (count && !data)) return CKR_MECHANISM_PARAM_INVALID;
    for (CK_ULONG k = 0; k < count; k++)
        if (data[k].type == CK_SP800_108_KEY_HANDLE) return CKR_MECHANISM_PARAM_INVALID;
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    if (!layout || !(layout->handles || layout->made)) return CKR_OK;
    if (mechanism->ulParameterLen != layout->size) return CKR_MECHANISM_PARAM_INVALID;
    call->translate = layout->handles != 0;
    char *filled = layout->made ? get_pointer(mechanism->pParameter, layout->made_pointer) : NULL;
    for (unsigned k = 0; filled && k < layout->made; k++) memset(filled + layout->made_handle[k], 0, sizeof(CK_ULONG));
    for (unsigned k = 0; k < layout->handles; k++) {
        CK_OBJECT_HANDLE object;
        memcpy(&object, (char *)mechanism->pParameter + layout->handle[k], sizeof object);
        if (object == CK_INVALID_HANDLE) continue; /* optional in every structure that has one */
        if (!ha_object_valid(object, call->slot)) return CKR_KEY_HANDLE_INVALID;
        if (call->objects == sizeof call->object / sizeof *call->object) return CKR_MECHANISM_PARAM_INVALID;
        call->object[call->objects++] = object;
    }
    return CKR_OK;
}

/* Whether its parameter brings back objects that the member made. */
bool ha_mechanism_makes(const CK_MECHANISM *mechanism)
{
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    return layout && layout->made;
}

/* A mechanism kept beyond its call, for a key that is to be made again. */
ha_kept *ha_mechanism_copy(CK_MECHANISM *mechanism)
{
    struct ha_operation *operation = calloc(1, sizeof *operation);
    if (!operation) return NULL;
    operation->mechanism = *mechanism;
    operation->kept = !mechanism->pParameter || !mechanism->ulParameterLen;
    if (!operation->kept) ha_mechanism_keep(operation);
    if (operation->kept) return (ha_kept *)operation;
    free(operation);
    return NULL;
}

CK_MECHANISM *ha_mechanism_kept(ha_kept *kept)
{
    return &((struct ha_operation *)kept)->mechanism;
}

void ha_mechanism_forget(ha_kept *kept)
{
    ha_operation_forget((struct ha_operation *)kept);
    free(kept);
}

/* A copy of the parameter with the chosen member's handles; inner buffers stay the application's, since some
 * are written back. */
CK_RV ha_mechanism_translate(ha_call *call)
{
    const struct ha_parameter *layout = ha_parameter_of(call->mechanism->mechanism);
    if (!call->mechanism_copy) call->mechanism_copy = malloc(sizeof(CK_MECHANISM) + layout->size);
    if (!call->mechanism_copy) return CKR_HOST_MEMORY;
    CK_MECHANISM *mechanism = call->mechanism_copy;
    char *parameter = (char *)(mechanism + 1);
    *mechanism = *call->mechanism;
    memcpy(parameter, mechanism->pParameter, layout->size);
    mechanism->pParameter = parameter;
    for (unsigned k = 0; k < layout->handles; k++) {
        CK_OBJECT_HANDLE object;
        memcpy(&object, parameter + layout->handle[k], sizeof object);
        for (unsigned i = 0; i < call->objects; i++)
            if (call->object[i] == object)
                memcpy(parameter + layout->handle[k], &call->member_object[i], sizeof object);
    }
    call->member_mechanism = mechanism;
    return CKR_OK;
}

/* Virtual handles for the objects that the member made through the parameter. */
CK_RV ha_mechanism_adopt(ha_call *call)
{
    const struct ha_parameter *layout = NULL;
    if (call->mechanism->pParameter) layout = ha_parameter_of(call->mechanism->mechanism);
    if (!layout || !layout->made) return CKR_OK;
    char *filled = get_pointer(call->mechanism->pParameter, layout->made_pointer);
    CK_RV rv = CKR_OK;
    for (unsigned k = 0; filled && k < layout->made && rv == CKR_OK; k++) {
        CK_OBJECT_HANDLE made, object = CK_INVALID_HANDLE;
        memcpy(&made, filled + layout->made_handle[k], sizeof made);
        rv = ha_call_adopt(call, &made, &object);
        memcpy(filled + layout->made_handle[k], &object, sizeof object);
    }
    return rv;
}
