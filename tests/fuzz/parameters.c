/* Fuzzes what is kept of mechanism parameters, and what is translated in them. */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "vendor.h"

enum { OBJECTS = 7 };

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    return 0;
}

/* ---- the data plane, which mechanism.c is linked with (--wrap) ---- */

bool __wrap_ha_object_valid(CK_OBJECT_HANDLE object, ha_slot *slot);
CK_RV __wrap_ha_call_adopt(ha_call *call, const CK_OBJECT_HANDLE *made, CK_OBJECT_HANDLE *object);

bool __wrap_ha_object_valid(CK_OBJECT_HANDLE object, ha_slot *slot)
{
    return object && object <= OBJECTS && !slot;
}

CK_RV __wrap_ha_call_adopt(ha_call *call, const CK_OBJECT_HANDLE *made, CK_OBJECT_HANDLE *object)
{
    (void)call;
    *object = *made ? *made + 1000 : CK_INVALID_HANDLE;
    return CKR_OK;
}

static CK_OBJECT_HANDLE of_member(CK_OBJECT_HANDLE object)
{
    return object ? object + 500 : CK_INVALID_HANDLE;
}

/* ---- the target ---- */

static uint64_t contents(const CK_MECHANISM *mechanism)
{
    struct vendor v = vendor_begin();
    vendor_mechanism(&v, mechanism);
    return v.seen;
}

static CK_OBJECT_HANDLE handle_at(const CK_MECHANISM *mechanism, size_t offset)
{
    CK_OBJECT_HANDLE object;
    memcpy(&object, (char *)mechanism->pParameter + offset, sizeof object);
    return object;
}

/* A copy does not need the original, and says the same. */
static void keep(struct fuzz *f, CK_MECHANISM *mechanism)
{
    struct ha_operation operation = {.mechanism = *mechanism};
    uint64_t given = contents(mechanism);
    ha_kept *kept = ha_mechanism_copy(mechanism);
    if (mechanism->pParameter && mechanism->ulParameterLen) ha_mechanism_keep(&operation);
    fuzz_free(f);
    if (operation.kept && contents(&operation.mechanism) != given)
        fuzz_fail("kept otherwise", operation.mechanism.mechanism);
    ha_operation_forget(&operation);
    if (!kept) return;
    if (contents(ha_mechanism_kept(kept)) != given) fuzz_fail("copied otherwise", ha_mechanism_kept(kept)->mechanism);
    ha_mechanism_forget(kept);
}

/* All handles are the member's in what it is given, and none in what the application gave. */
static void translate(CK_MECHANISM *mechanism)
{
    ha_call call;
    ha_call_init(&call, FN_C_DeriveKey);
    call.slot = NULL;
    call.mechanism = call.member_mechanism = mechanism;
    if (!mechanism->pParameter || ha_mechanism_objects(&call) != CKR_OK) return;
    for (unsigned k = 0; k < call.objects; k++) call.member_object[k] = of_member(call.object[k]);
    if (call.translate) {
        const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
        if (ha_mechanism_translate(&call) != CKR_OK) fuzz_fail("not translated", mechanism->mechanism);
        for (unsigned k = 0; k < layout->handles; k++)
            if (handle_at(call.member_mechanism, layout->handle[k]) !=
                of_member(handle_at(mechanism, layout->handle[k])))
                fuzz_fail("a handle of another", k);
    }
    struct vendor v = vendor_begin();
    vendor_mechanism(&v, call.member_mechanism);
    vendor_fill_mechanism(&v, call.member_mechanism);
    if (ha_mechanism_adopt(&call) != CKR_OK) fuzz_fail("not adopted", mechanism->mechanism);
    free(call.mechanism_copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz f;
    fuzz_begin(&f, data, size);
    for (CK_OBJECT_HANDLE object = 1; object <= OBJECTS + 1; object++) fuzz_made(&f, object);
    CK_MECHANISM *mechanism = fuzz_mechanism(&f);
    if (mechanism) {
        translate(mechanism);
        keep(&f, mechanism);
    }
    fuzz_free(&f);
    return 0;
}
