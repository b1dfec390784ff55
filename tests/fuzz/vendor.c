/* What all functions of the vendor share: reading, deciding, and filling what there is room for. */
#include <string.h>

#include "vendor.h"

struct vendor_script *vendor_script;
CK_C_CreateObject vendor_create;
CK_C_GetSessionInfo vendor_session;

static uint8_t scripted(void)
{
    return vendor_script->at < vendor_script->size ? vendor_script->data[vendor_script->at++] : 0;
}

struct vendor vendor_begin(void)
{
    return (struct vendor){.rv = CKR_OK, .seen = 0xCBF29CE484222325U};
}

void vendor_read(struct vendor *v, const void *bytes, CK_ULONG size)
{
    const uint8_t *at = bytes;
    for (CK_ULONG k = 0; at && k < size; k++) v->seen = (v->seen ^ at[k]) * 0x100000001B3U;
}

static CK_ULONG number_at(const void *structure, size_t offset)
{
    CK_ULONG number;
    memcpy(&number, (const char *)structure + offset, sizeof number);
    return number;
}

static void *pointer_at(const void *structure, size_t offset)
{
    void *pointer;
    memcpy(&pointer, (const char *)structure + offset, sizeof pointer);
    return pointer;
}

static CK_ULONG parameter_size(const CK_MECHANISM *mechanism)
{
    return mechanism && mechanism->pParameter ? mechanism->ulParameterLen : 0;
}

void vendor_mechanism(struct vendor *v, const CK_MECHANISM *mechanism)
{
    CK_ULONG size = parameter_size(mechanism);
    if (!size) return;
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    if (!layout || layout->size != size) {
        vendor_read(v, mechanism->pParameter, size);
        return;
    }
    for (unsigned k = 0; k < layout->buffers; k++)
        vendor_read(v, pointer_at(mechanism->pParameter, layout->buffer[k].pointer),
                    number_at(mechanism->pParameter, layout->buffer[k].length));
}

void vendor_template(struct vendor *v, const CK_ATTRIBUTE *attributes, CK_ULONG count, bool answers)
{
    for (CK_ULONG k = 0; attributes && k < count; k++) {
        CK_ULONG size = attributes[k].ulValueLen;
        if (attributes[k].pValue && size && ha_attribute_has_parts(attributes[k].type))
            vendor_template(v, attributes[k].pValue, size / sizeof *attributes, answers);
        else if (!answers)
            vendor_read(v, attributes[k].pValue, size);
    }
}

void vendor_initialize(struct vendor *v, const CK_C_INITIALIZE_ARGS *args)
{
    if (args && args->pReserved) vendor_read(v, args->pReserved, strlen(args->pReserved));
}

void vendor_decide(struct vendor *v, CK_SESSION_HANDLE session)
{
    static const CK_RV codes[] = {CKR_FUNCTION_FAILED,        CKR_BUFFER_TOO_SMALL,  CKR_ATTRIBUTE_SENSITIVE,
                                  CKR_ATTRIBUTE_TYPE_INVALID, CKR_DATA_LEN_RANGE,    CKR_MECHANISM_INVALID,
                                  CKR_SIGNATURE_INVALID,      CKR_KEY_HANDLE_INVALID};
    enum { CODES = sizeof codes / sizeof *codes };
    uint64_t how = vendor_script ? scripted() : (v->seen >> 32) % 64;
    CK_SESSION_INFO info;
    v->rv = how < CODES ? codes[how] : CKR_OK;
    if (how == 0 && !vendor_script) v->rv = CKR_DATA_INVALID; /* what is a fault is for the rules to say */
    CK_RV rv = session && vendor_session ? vendor_session(session, &info) : CKR_OK;
    if (rv != CKR_OK) v->rv = rv;
}

/* What it says of an output with so much room. */
static CK_ULONG length_of(CK_ULONG capacity)
{
    uint8_t how = scripted();
    switch (how) {
    case 0xFF: return CK_UNAVAILABLE_INFORMATION;
    case 0xFE: return capacity + 1;
    case 0xFD: return 1UL << 63;
    case 0xFC: return capacity * 2;
    case 0xFB: return 1UL << 32;
    default: return how < 0x80 ? capacity : how < 0xC0 ? capacity / 2 : how - 0xC0U;
    }
}

void vendor_room(struct vendor *v, void *bytes, CK_ULONG *length, CK_ULONG capacity, size_t element)
{
    if (!length) return;
    CK_ULONG size = vendor_script ? length_of(capacity) : v->seen % 40;
    if (!vendor_script && v->rv != CKR_OK) return;
    if (!vendor_script && bytes && size > capacity) v->rv = CKR_BUFFER_TOO_SMALL;
    if (bytes && v->rv != CKR_BUFFER_TOO_SMALL)
        memset(bytes, (int)v->seen, (size < capacity ? size : capacity) * element);
    *length = size;
}

void vendor_fill(struct vendor *v, void *bytes, CK_ULONG size)
{
    if (bytes && size && (vendor_script || v->rv == CKR_OK)) memset(bytes, (int)v->seen, size);
}

void vendor_fill_mechanism(struct vendor *v, CK_MECHANISM *mechanism)
{
    CK_ULONG size = parameter_size(mechanism);
    const struct ha_written *written = size ? ha_written_by(mechanism->mechanism) : NULL;
    const struct ha_parameter *layout = size ? ha_parameter_of(mechanism->mechanism) : NULL;
    if (!written || !layout || layout->size != size || written->refused) return;
    char *parameter = mechanism->pParameter;
    for (unsigned k = 0; k < layout->buffers; k++) {
        CK_ULONG length = number_at(parameter, layout->buffer[k].length);
        if (!(written->buffers >> k & 1)) continue;
        vendor_fill(v, pointer_at(parameter, layout->buffer[k].pointer), length);
        if (vendor_script) length = length_of(length); /* as libraries do that make an IV of their own */
        memcpy(parameter + layout->buffer[k].length, &length, sizeof length);
    }
    char *made = layout->made ? pointer_at(parameter, layout->made_pointer) : NULL;
    CK_ULONG bits = made && written->ivs ? number_at(parameter, written->iv_bits) : 0;
    for (unsigned k = 0; made && k < written->ivs; k++)
        vendor_fill(v, pointer_at(made, written->iv[k]), bits / 8 + (bits % 8 != 0));
    if (made && written->ivs && vendor_script) {
        bits = length_of(bits);
        memcpy(parameter + written->iv_bits, &bits, sizeof bits);
    }
}

void vendor_answers(struct vendor *v, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    for (CK_ULONG k = 0; attributes && k < count; k++) {
        CK_ATTRIBUTE *attribute = &attributes[k];
        CK_ULONG capacity = attribute->ulValueLen, size = vendor_script ? length_of(capacity) : v->seen % 40;
        bool parts = attribute->pValue && capacity && ha_attribute_has_parts(attribute->type);
        if (parts)
            vendor_answers(v, attribute->pValue, capacity / sizeof *attributes);
        else if (attribute->pValue)
            memset(attribute->pValue, (int)v->seen, size < capacity ? size : capacity);
        attribute->ulValueLen = size;
    }
}

void vendor_object(struct vendor *v, CK_SESSION_HANDLE session, CK_ATTRIBUTE *attributes, CK_ULONG count,
                   CK_OBJECT_HANDLE *object)
{
    if (v->rv != CKR_OK || !object) return;
    if (vendor_create)
        v->rv = vendor_create(session, attributes, count, object);
    else
        *object = vendor_script ? length_of(1) : v->seen;
}
