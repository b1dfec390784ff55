/* A fuzzer's bytes as arguments, and what holds after any call whatever they were. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "wire.h"

/* Lengths that make trouble; none of them is that of a buffer. */
static const CK_ULONG wild[] = {1, 24, 1UL << 31, 1UL << 32, 1UL << 62, 1UL << 63, ~7UL, ~0UL};

void fuzz_begin(struct fuzz *f, const uint8_t *data, size_t size)
{
    *f = (struct fuzz){.data = data, .size = size};
}

void fuzz_free(struct fuzz *f)
{
    while (f->pieces) free(f->piece[--f->pieces]);
    f->copies = 0;
    f->query = false;
}

void fuzz_fail(const char *what, CK_ULONG number)
{
    fprintf(stderr, "fuzz: %s: 0x%lx\n", what, number);
    abort();
}

/* ---- numbers ---- */

uint8_t fuzz_byte(struct fuzz *f)
{
    return f->at < f->size ? f->data[f->at++] : 0;
}

CK_ULONG fuzz_word(struct fuzz *f)
{
    CK_ULONG word = 0;
    size_t left = f->size - f->at, size = left < sizeof word ? left : sizeof word;
    if (size) memcpy(&word, f->data + f->at, size);
    f->at += size;
    return word;
}

/* Small ones, which flags and user types are, those of mechanisms, and any. */
CK_ULONG fuzz_number(struct fuzz *f)
{
    uint8_t how = fuzz_byte(f);
    if (how < 0xC0) return how;
    if (how < 0xE0) return fuzz_mechanism_types[fuzz_byte(f) % fuzz_mechanism_types_count];
    if (how < 0xF0) return wild[how % (sizeof wild / sizeof *wild)];
    return fuzz_word(f);
}

static CK_ULONG fuzz_wild(struct fuzz *f)
{
    return wild[fuzz_byte(f) % (sizeof wild / sizeof *wild)];
}

CK_ULONG fuzz_code(struct fuzz *f)
{
    uint8_t how = fuzz_byte(f);
    return how < fuzz_codes_count ? fuzz_codes[how] : CKR_VENDOR_DEFINED | how;
}

/* ---- handles ---- */

static CK_ULONG handle_from(struct fuzz *f, const struct fuzz_handles *handles)
{
    uint8_t how = fuzz_byte(f);
    if (how == 0xFF) return fuzz_word(f);
    if (how >= 0xF0 || !handles->count) return how & 1 ? CK_INVALID_HANDLE : ~0UL;
    return handles->handle[handles->count - 1 - how % handles->count]; /* 0: the newest */
}

CK_ULONG fuzz_session(struct fuzz *f)
{
    return handle_from(f, &f->sessions);
}

CK_ULONG fuzz_object(struct fuzz *f)
{
    return handle_from(f, &f->objects);
}

CK_ULONG fuzz_slot(struct fuzz *f)
{
    uint8_t how = fuzz_byte(f);
    return how < 0xF0 ? f->slot : how == 0xFF ? fuzz_word(f) : how - 0xF0U;
}

static void remember(struct fuzz_handles *handles, CK_ULONG handle)
{
    for (unsigned k = 0; k < handles->count; k++)
        if (handles->handle[k] == handle) {
            handles->dead[k] = false;
            return;
        }
    if (handles->count == FUZZ_HANDLES) {
        memmove(handles->handle, handles->handle + 1, (FUZZ_HANDLES - 1) * sizeof *handles->handle);
        memmove(handles->dead, handles->dead + 1, (FUZZ_HANDLES - 1) * sizeof *handles->dead);
        handles->count--;
    }
    handles->handle[handles->count] = handle;
    handles->dead[handles->count++] = false;
}

static void bury(struct fuzz_handles *handles, CK_ULONG handle)
{
    for (unsigned k = 0; k < handles->count; k++)
        if (handles->handle[k] == handle) handles->dead[k] = true;
}

static bool is_dead(const struct fuzz_handles *handles, CK_ULONG handle)
{
    for (unsigned k = 0; k < handles->count; k++)
        if (handles->handle[k] == handle) return handles->dead[k];
    return handle == CK_INVALID_HANDLE || handle == ~0UL;
}

/* ---- memory ---- */

void *fuzz_memory(struct fuzz *f, size_t size)
{
    if (f->pieces == FUZZ_PIECES) return NULL;
    void *piece = calloc(1, size); /* of 0 bytes it is not NULL, and may not be touched */
    if (!piece) fuzz_fail("no memory", size);
    return f->piece[f->pieces++] = piece;
}

static void *filled(struct fuzz *f, size_t size)
{
    unsigned char *memory = fuzz_memory(f, size);
    for (size_t k = 0; memory && k < size && f->at < f->size; k++) memory[k] = f->data[f->at++];
    return memory;
}

static void *repeated(struct fuzz *f, CK_ULONG *size)
{
    void *memory = fuzz_memory(f, f->last_size);
    if (memory) memcpy(memory, f->last, f->last_size);
    *size = memory ? f->last_size : 0;
    return memory;
}

void *fuzz_bytes(struct fuzz *f, CK_ULONG *size)
{
    uint8_t how = fuzz_byte(f);
    *size = 0;
    if (how < 0xD0) {
        void *memory = filled(f, how);
        if (memory) *size = how;
        return memory;
    }
    if (how < 0xE0) return repeated(f, size);
    if (how < 0xF0) {
        size_t more = (how - 0xDFU) * 1024;
        void *memory = fuzz_memory(f, more);
        *size = memory ? more : 0;
        return memory;
    }
    if (how & 1) *size = fuzz_wild(f);
    return NULL;
}

/* The right PINs are many mutations away. */
void *fuzz_pin(struct fuzz *f, CK_ULONG *size)
{
    static const char user[] = "1234", officer[] = "87654321";
    uint8_t how = fuzz_byte(f);
    if (how >= 0x80) return fuzz_bytes(f, size);
    const char *pin = how & 1 ? officer : user;
    *size = strlen(pin);
    void *memory = fuzz_memory(f, *size);
    if (memory) memcpy(memory, pin, *size);
    return memory;
}

void *fuzz_text(struct fuzz *f)
{
    static const char *const known[] = {"PKCS 11", "Vendor pkcs11-ha", "C_Sign", ""};
    uint8_t how = fuzz_byte(f);
    if (how >= 0x80) return NULL;
    const char *text = known[how % (sizeof known / sizeof *known)];
    void *memory = fuzz_memory(f, strlen(text) + 1);
    if (memory) memcpy(memory, text, strlen(text) + 1);
    return memory;
}

void *fuzz_structure(struct fuzz *f, size_t size)
{
    return fuzz_byte(f) & 0x80 ? NULL : filled(f, size);
}

void *fuzz_result(struct fuzz *f, size_t size)
{
    return fuzz_byte(f) >= 0xF0 ? NULL : fuzz_memory(f, size);
}

struct fuzz_room fuzz_room(struct fuzz *f, size_t element)
{
    struct fuzz_room room = {0};
    uint8_t how = fuzz_byte(f);
    room.capacity = how >= 0xF8 ? fuzz_wild(f) : how >= 0xC0 ? (how - 0xBFU) * 16U : how;
    if (how < 0xF0) room.bytes = fuzz_memory(f, room.capacity * element);
    if (!room.bytes) f->query = true;
    if (how != 0xF7 && how != 0xEF) room.length = fuzz_memory(f, sizeof *room.length);
    if (room.length) *room.length = room.capacity;
    return room;
}

CK_C_INITIALIZE_ARGS *fuzz_initialize(struct fuzz *f)
{
    static const char *const any = "";
    CK_C_INITIALIZE_ARGS *args = fuzz_byte(f) & 0x80 ? NULL : fuzz_memory(f, sizeof *args);
    if (!args) return NULL;
    uint8_t given = fuzz_byte(f);
    void *function = (void *)(uintptr_t)any; /* that nobody may call */
    if (given & 1) memcpy(&args->CreateMutex, &function, sizeof function);
    if (given & 2) memcpy(&args->DestroyMutex, &function, sizeof function);
    if (given & 4) memcpy(&args->LockMutex, &function, sizeof function);
    if (given & 8) memcpy(&args->UnlockMutex, &function, sizeof function);
    args->flags = fuzz_byte(f);
    args->pReserved = fuzz_text(f);
    return args;
}

/* ---- mechanisms ---- */

static void put(void *structure, size_t offset, const void *value)
{
    memcpy((char *)structure + offset, value, sizeof(CK_ULONG));
}

static void *fuzz_made_by(struct fuzz *f, void *structure, const struct ha_written *written)
{
    char *made = fuzz_byte(f) < 0xE0 ? fuzz_memory(f, written->made_size) : NULL;
    for (unsigned k = 0; made && k < written->ivs; k++) {
        CK_ULONG bits = k ? 0 : fuzz_byte(f);
        if (k)
            memcpy(&bits, (char *)structure + written->iv_bits, sizeof bits);
        else
            put(structure, written->iv_bits, &bits);
        void *iv = fuzz_byte(f) < 0xC0 ? fuzz_memory(f, (bits + 7) / 8) : NULL;
        memcpy(made + written->iv[k], &iv, sizeof iv);
    }
    return made;
}

/* A structure whose pointers are good or NULL; what is not a pointer is anything. */
static void *parts(struct fuzz *f, CK_MECHANISM_TYPE type, const struct ha_parameter *layout)
{
    const struct ha_written *written = ha_written_by(type);
    void *structure = filled(f, layout->size);
    if (!structure) return NULL;
    for (unsigned k = 0; k < layout->buffers; k++) {
        CK_ULONG size;
        void *bytes = fuzz_bytes(f, &size);
        put(structure, layout->buffer[k].pointer, &bytes);
        put(structure, layout->buffer[k].length, &size);
    }
    for (unsigned k = 0; k < layout->handles; k++) {
        CK_ULONG object = fuzz_object(f);
        put(structure, layout->handle[k], &object);
    }
    if (layout->made) {
        void *made = fuzz_made_by(f, structure, written);
        put(structure, layout->made_pointer, &made);
    }
    return structure;
}

/* SP800-108, whose parameters are arrays. */
static void *derivation(struct fuzz *f, CK_MECHANISM_TYPE type, CK_ULONG *size)
{
    CK_SP800_108_FEEDBACK_KDF_PARAMS feedback = {.prfType = fuzz_number(f)};
    CK_SP800_108_KDF_PARAMS other = {.prfType = feedback.prfType};
    CK_ULONG count = fuzz_byte(f) % 5, more = fuzz_byte(f) < 0xE0 ? 0 : fuzz_byte(f);
    CK_PRF_DATA_PARAM *data = fuzz_memory(f, count * sizeof *data);
    for (CK_ULONG k = 0; data && k < count; k++) {
        data[k].type = fuzz_byte(f) % 6;
        data[k].pValue = fuzz_bytes(f, &data[k].ulValueLen);
    }
    feedback.pDataParams = other.pDataParams = data;
    feedback.ulNumberOfDataParams = other.ulNumberOfDataParams = data ? count : 0;
    feedback.ulAdditionalDerivedKeys = other.ulAdditionalDerivedKeys = more;
    bool has_iv = type == CKM_SP800_108_FEEDBACK_KDF;
    if (has_iv) feedback.pIV = fuzz_bytes(f, &feedback.ulIVLen);
    *size = has_iv ? sizeof feedback : sizeof other;
    void *structure = fuzz_memory(f, *size);
    if (structure) memcpy(structure, has_iv ? (void *)&feedback : (void *)&other, *size);
    return structure;
}

static bool is_derivation(CK_MECHANISM_TYPE type)
{
    return type == CKM_SP800_108_COUNTER_KDF || type == CKM_SP800_108_FEEDBACK_KDF ||
           type == CKM_SP800_108_DOUBLE_PIPELINE_KDF;
}

/* A parameter that is not of the size which the mechanism asks for, so that nobody may believe in its pointers. */
static void *misfit(struct fuzz *f, const CK_MECHANISM *mechanism, CK_ULONG *size)
{
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    void *bytes = fuzz_bytes(f, size);
    if (!bytes) return NULL;
    bool fits = layout && layout->size == *size && (layout->buffers || layout->made);
    if (is_derivation(mechanism->mechanism))
        fits = *size == sizeof(CK_SP800_108_KDF_PARAMS) || *size == sizeof(CK_SP800_108_FEEDBACK_KDF_PARAMS);
    if (fits) *size = 0;
    return bytes;
}

CK_MECHANISM *fuzz_mechanism(struct fuzz *f)
{
    uint8_t which = fuzz_byte(f), how;
    if (which == 0xFF) return NULL;
    CK_MECHANISM *mechanism = fuzz_memory(f, sizeof *mechanism);
    if (!mechanism) return NULL;
    /* Those of the fake token first: without them nothing begins. */
    static const CK_MECHANISM_TYPE usual[] = {CKM_SHA256_HMAC, CKM_AES_ECB, CKM_SHA256, CKM_RSA_PKCS,
                                              CKM_GENERIC_SECRET_KEY_GEN};
    if (which < sizeof usual / sizeof *usual)
        mechanism->mechanism = usual[which];
    else
        mechanism->mechanism = which == 0xFE ? fuzz_word(f) : fuzz_mechanism_types[which % fuzz_mechanism_types_count];
    how = fuzz_byte(f) % 8;
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    if (how == 0) return mechanism;
    if (how == 1)
        mechanism->ulParameterLen = fuzz_wild(f);
    else if (how == 2)
        mechanism->pParameter = misfit(f, mechanism, &mechanism->ulParameterLen);
    else if (is_derivation(mechanism->mechanism))
        mechanism->pParameter = derivation(f, mechanism->mechanism, &mechanism->ulParameterLen);
    else if (!layout || !layout->size)
        mechanism->pParameter = fuzz_bytes(f, &mechanism->ulParameterLen);
    else if ((mechanism->pParameter = parts(f, mechanism->mechanism, layout)))
        mechanism->ulParameterLen = layout->size;
    return mechanism;
}

/* ---- templates ---- */

static CK_ATTRIBUTE *attributes(struct fuzz *f, CK_ULONG *count, bool answers, unsigned depth);

static void value(struct fuzz *f, CK_ATTRIBUTE *attribute, bool answers, unsigned depth)
{
    static const CK_ULONG classes[] = {CKO_SECRET_KEY, CKO_PRIVATE_KEY, CKO_DATA};
    uint8_t how = fuzz_byte(f);
    CK_ULONG count;
    if (ha_attribute_has_parts(attribute->type) && how < 0xC0) {
        attribute->pValue = depth < FUZZ_DEPTH ? attributes(f, &count, answers, depth + 1) : NULL;
        if (attribute->pValue) attribute->ulValueLen = count * sizeof(CK_ATTRIBUTE);
    } else if (answers && how < 0xE0) {
        attribute->pValue = fuzz_memory(f, how);
        attribute->ulValueLen = attribute->pValue ? how : 0;
    } else if (!answers && how < 2) { /* CK_BBOOL */
        attribute->pValue = fuzz_memory(f, 1);
        if (attribute->pValue) attribute->ulValueLen = 1, *(CK_BBOOL *)attribute->pValue = how;
    } else if (!answers && how < 0x10) { /* CK_ULONG */
        CK_ULONG number = how < 5 ? classes[how - 2] : how;
        attribute->pValue = fuzz_memory(f, sizeof number);
        if (attribute->pValue) memcpy(attribute->pValue, &number, attribute->ulValueLen = sizeof number);
    } else if (ha_attribute_has_parts(attribute->type) || how >= 0xF8) {
        attribute->ulValueLen = fuzz_wild(f); /* of nothing */
    } else {
        attribute->pValue = fuzz_bytes(f, &attribute->ulValueLen);
    }
}

static CK_ATTRIBUTE *attributes(struct fuzz *f, CK_ULONG *count, bool answers, unsigned depth)
{
    static const CK_ATTRIBUTE_TYPE usual[] = {CKA_CLASS, CKA_TOKEN,   CKA_PRIVATE,   CKA_LABEL, CKA_KEY_TYPE,
                                              CKA_ID,    CKA_VALUE,   CKA_VALUE_LEN, CKA_SIGN,  CKA_WRAP_TEMPLATE,
                                              CKA_WRAP,  CKA_MODULUS, CKA_EC_POINT,  0};
    const uint8_t usual_count = sizeof usual / sizeof *usual;
    uint8_t how = fuzz_byte(f);
    *count = how & 0x80 ? 0 : how % 9;
    if (how >= 0xF0) {
        if (how & 1) *count = fuzz_wild(f);
        return NULL;
    }
    CK_ATTRIBUTE *all = fuzz_memory(f, *count * sizeof *all);
    if (!all) *count = 0;
    for (CK_ULONG k = 0; all && k < *count; k++) {
        uint8_t type = fuzz_byte(f);
        if (type < usual_count)
            all[k].type = usual[type];
        else
            all[k].type = type == 0xFF ? fuzz_word(f) : fuzz_attribute_types[type % fuzz_attribute_types_count];
        value(f, &all[k], answers, depth);
    }
    return all;
}

CK_ATTRIBUTE *fuzz_template(struct fuzz *f, CK_ULONG *count, bool answers)
{
    CK_ATTRIBUTE *given = attributes(f, count, answers, 0);
    if (given && f->copies < FUZZ_TEMPLATES) {
        struct fuzz_copy *copy = &f->copy[f->copies];
        *copy = (struct fuzz_copy){.given = given, .count = *count, .answers = answers};
        copy->copy = fuzz_memory(f, *count * sizeof *given);
        if (copy->copy && *count) memcpy(copy->copy, given, *count * sizeof *given);
        if (copy->copy) f->copies++;
    }
    return given;
}

/* ---- after a call ---- */

static bool is_code(CK_RV rv)
{
    if (rv >= CKR_VENDOR_DEFINED) return rv < HA_AGAIN;
    for (size_t k = 0; k < fuzz_codes_count; k++)
        if (fuzz_codes[k] == rv) return true;
    return false;
}

void fuzz_said(struct fuzz *f, CK_RV rv, bool impossible)
{
    if (f->strict && !is_code(rv)) fuzz_fail("no code of PKCS#11", rv);
    if (f->strict && impossible && rv == CKR_OK) fuzz_fail("CKR_OK where it cannot be", rv);
    for (unsigned k = 0; k < f->copies; k++) {
        const struct fuzz_copy *copy = &f->copy[k];
        if (!copy->answers && copy->count && memcmp(copy->given, copy->copy, copy->count * sizeof *copy->given))
            fuzz_fail("a template was written to", k);
    }
}

void fuzz_wrote(struct fuzz *f, CK_RV rv, const struct fuzz_room *room, bool keep)
{
    if (rv != CKR_OK || !room->bytes || !room->length) return;
    if (*room->length > room->capacity) fuzz_fail("more than there was room for", *room->length);
    if (!keep) return;
    f->last_size = *room->length < sizeof f->last ? *room->length : sizeof f->last;
    if (f->last_size) memcpy(f->last, room->bytes, f->last_size);
}

void fuzz_found(struct fuzz *f, CK_RV rv, const CK_OBJECT_HANDLE *objects, const struct fuzz_room *room)
{
    if (rv != CKR_OK || !objects || !room->length) return;
    if (*room->length > room->capacity) fuzz_fail("more objects than there was room for", *room->length);
    for (CK_ULONG k = 0; k < *room->length; k++) fuzz_made(f, objects[k]);
}

/* Attributes that were asked for keep their types and places; what is said to be there fits in. */
void fuzz_answered(struct fuzz *f, CK_RV rv)
{
    for (unsigned k = 0; k < f->copies; k++) {
        const struct fuzz_copy *copy = &f->copy[k];
        for (CK_ULONG a = 0; copy->answers && a < copy->count; a++) {
            const CK_ATTRIBUTE *given = &copy->given[a], *before = &copy->copy[a];
            if (given->type != before->type || given->pValue != before->pValue) fuzz_fail("another attribute", a);
            if (rv == CKR_OK && given->pValue && given->ulValueLen > before->ulValueLen &&
                given->ulValueLen != CK_UNAVAILABLE_INFORMATION)
                fuzz_fail("an attribute larger than its room", given->ulValueLen);
        }
    }
}

void fuzz_used_session(struct fuzz *f, CK_RV rv, CK_SESSION_HANDLE session)
{
    if (f->strict && rv == CKR_OK && is_dead(&f->sessions, session)) fuzz_fail("CKR_OK in no session", session);
}

void fuzz_used_object(struct fuzz *f, CK_RV rv, CK_OBJECT_HANDLE object)
{
    if (f->strict && rv == CKR_OK && is_dead(&f->objects, object)) fuzz_fail("CKR_OK with no object", object);
}

void fuzz_opened(struct fuzz *f, CK_SESSION_HANDLE session)
{
    if (f->strict && !session) fuzz_fail("a session without a handle", 0);
    remember(&f->sessions, session);
}

void fuzz_closed(struct fuzz *f, CK_SESSION_HANDLE session)
{
    bury(&f->sessions, session);
}

void fuzz_closed_all(struct fuzz *f, CK_SLOT_ID slot)
{
    for (unsigned k = 0; slot == f->slot && k < f->sessions.count; k++) f->sessions.dead[k] = true;
}

void fuzz_made(struct fuzz *f, CK_OBJECT_HANDLE object)
{
    if (f->strict && !object) fuzz_fail("an object without a handle", 0);
    remember(&f->objects, object);
}

void fuzz_destroyed(struct fuzz *f, CK_OBJECT_HANDLE object)
{
    bury(&f->objects, object);
}
