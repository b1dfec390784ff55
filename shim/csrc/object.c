/*
 * Virtual objects: one handle for the application, a member handle per member, each dated by the member's epoch.
 *
 * Written by the core alone (under its ObjectMap's lock), read by the data plane without one.  Entries are reused with a
 * new generation, so no handle is ever given out twice; the memory is never returned.
 */
#include <stdlib.h>
#include <string.h>

#include "ha.h"

enum { CHUNK = 256, MAX_CHUNKS = 1 << 14, INDEX_BITS = 22 };

struct object {
    _Atomic CK_OBJECT_HANDLE handle; /* generation << INDEX_BITS | index; 0 while free */
    ha_slot *slot;
    _Atomic uint32_t absent; /* members that are known not to have it */
    _Atomic int preferred;   /* the member that is asked for its attributes, -1: none in particular */
    CK_OBJECT_HANDLE last;   /* the handle before, for the next generation */
    uint32_t next_free;
    struct {
        _Atomic CK_OBJECT_HANDLE handle;
        _Atomic uint32_t epoch; /* 0: not known on this member */
    } at[HA_MAX_MEMBERS];
};

struct ha_map_entry {
    CK_OBJECT_HANDLE member_object, object; /* 0: free; object 0: removed */
};

static struct object *_Atomic chunks[MAX_CHUNKS];
static _Atomic uint32_t object_count; /* entries ever used; index 0 is not, so no handle is 0 */
static uint32_t free_list;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

static struct object *entry(CK_OBJECT_HANDLE handle)
{
    uint32_t index = (uint32_t)(handle & ((1UL << INDEX_BITS) - 1));
    if (index == 0 || index > atomic_load_explicit(&object_count, memory_order_acquire)) return NULL;
    struct object *chunk = atomic_load_explicit(&chunks[index / CHUNK], memory_order_acquire);
    return chunk ? &chunk[index % CHUNK] : NULL;
}

static struct object *live(CK_OBJECT_HANDLE handle)
{
    struct object *o = entry(handle);
    return o && handle && atomic_load_explicit(&o->handle, memory_order_acquire) == handle ? o : NULL;
}

CK_OBJECT_HANDLE ha_object_new(ha_slot *slot)
{
    struct object *o = NULL;
    CK_OBJECT_HANDLE handle = 0;
    pthread_mutex_lock(&table_lock);
    if (free_list) {
        o = entry(free_list);
        free_list = o->next_free;
        handle = o->last + (1UL << INDEX_BITS);
    } else {
        uint32_t index = atomic_load(&object_count) + 1;
        if (index / CHUNK >= MAX_CHUNKS) goto out;
        if (!atomic_load(&chunks[index / CHUNK])) {
            struct object *chunk = calloc(CHUNK, sizeof *chunk);
            if (!chunk) goto out;
            atomic_store(&chunks[index / CHUNK], chunk);
        }
        atomic_store(&object_count, index);
        o = entry(index);
        handle = (1UL << INDEX_BITS) | index;
    }
    for (unsigned m = 0; m < HA_MAX_MEMBERS; m++) atomic_store(&o->at[m].epoch, 0);
    atomic_store(&o->absent, 0);
    atomic_store(&o->preferred, -1);
    o->slot = slot;
    o->last = handle;
    atomic_store_explicit(&o->handle, handle, memory_order_release);
out:
    pthread_mutex_unlock(&table_lock);
    return handle;
}

static struct ha_map_entry *map_find(const struct ha_map *map, CK_OBJECT_HANDLE member_object)
{
    size_t mask = map->size - 1, k = (size_t)(((uint64_t)member_object * 0x9E3779B97F4A7C15ULL) >> 20) & mask;
    while (map->entries[k].member_object && map->entries[k].member_object != member_object) k = (k + 1) & mask;
    return &map->entries[k];
}

/* Called when the map is half full: entries whose object is gone are left behind, and if that does not help it doubles. */
static bool map_grow(struct ha_map *map)
{
    struct ha_map old = *map;
    size_t live = 0;
    for (size_t k = 0; k < old.size; k++) live += old.entries[k].object != 0;
    map->size = !old.size ? 256 : live * 4 > old.size ? old.size * 2 : old.size;
    map->used = 0;
    map->entries = calloc(map->size, sizeof *map->entries);
    if (!map->entries) {
        map->entries = old.entries;
        map->size = old.size;
        map->used = old.used;
        return false;
    }
    for (size_t k = 0; k < old.size; k++)
        if (old.entries[k].member_object && old.entries[k].object) {
            *map_find(map, old.entries[k].member_object) = old.entries[k];
            map->used++;
        }
    free(old.entries);
    return true;
}

static void map_set(struct ha_map *map, uint32_t epoch, CK_OBJECT_HANDLE member_object, CK_OBJECT_HANDLE object)
{
    pthread_mutex_lock(&map->lock);
    if (map->epoch != epoch) { /* the numbers of another life mean something else now */
        if (map->size) memset(map->entries, 0, map->size * sizeof *map->entries);
        map->used = 0;
        map->epoch = epoch;
    }
    if (map->used * 2 < map->size || map_grow(map)) {
        struct ha_map_entry *e = map_find(map, member_object);
        if (!e->member_object) map->used++;
        e->member_object = member_object;
        e->object = object;
    }
    pthread_mutex_unlock(&map->lock);
}

void ha_object_bind(CK_OBJECT_HANDLE object, int member, unsigned epoch, CK_OBJECT_HANDLE member_object)
{
    struct object *o = live(object);
    if (!o || member < 0 || (unsigned)member >= o->slot->count) return;
    atomic_store(&o->at[member].epoch, 0);
    atomic_store(&o->at[member].handle, member_object);
    atomic_store(&o->at[member].epoch, epoch);
    atomic_fetch_and(&o->absent, ~(1U << member));
    map_set(&o->slot->map[member], epoch, member_object, object);
}

static void unbind(struct object *o, int member)
{
    uint32_t epoch = atomic_exchange(&o->at[member].epoch, 0);
    if (epoch && o->slot->map[member].epoch == epoch)
        map_set(&o->slot->map[member], epoch, atomic_load(&o->at[member].handle), 0);
}

void ha_object_unbind(CK_OBJECT_HANDLE object, int member)
{
    struct object *o = live(object);
    if (o && member >= 0 && (unsigned)member < o->slot->count) unbind(o, member);
}

void ha_object_absent(CK_OBJECT_HANDLE object, unsigned mask)
{
    struct object *o = live(object);
    if (o) atomic_store(&o->absent, mask);
}

void ha_object_prefer(CK_OBJECT_HANDLE object, int member)
{
    struct object *o = live(object);
    if (o) atomic_store(&o->preferred, member);
}

int ha_object_preferred(CK_OBJECT_HANDLE object)
{
    struct object *o = live(object);
    return o ? atomic_load_explicit(&o->preferred, memory_order_relaxed) : -1;
}

void ha_object_hide(ha_slot *slot, int member, unsigned epoch, CK_OBJECT_HANDLE member_object)
{
    map_set(&slot->map[member], epoch, member_object, (CK_OBJECT_HANDLE)HA_HIDDEN);
}

void ha_object_show(ha_slot *slot, int member, unsigned epoch, CK_OBJECT_HANDLE member_object)
{
    map_set(&slot->map[member], epoch, member_object, CK_INVALID_HANDLE);
}

void ha_object_free(CK_OBJECT_HANDLE object)
{
    struct object *o = live(object);
    if (!o) return;
    atomic_store(&o->handle, 0);
    for (unsigned m = 0; m < o->slot->count; m++) unbind(o, (int)m);
    pthread_mutex_lock(&table_lock);
    o->next_free = free_list;
    free_list = (uint32_t)(object & ((1UL << INDEX_BITS) - 1));
    pthread_mutex_unlock(&table_lock);
}

bool ha_object_valid(CK_OBJECT_HANDLE object, ha_slot *slot)
{
    struct object *o = live(object);
    return o && o->slot == slot;
}

uint32_t ha_object_absent_mask(CK_OBJECT_HANDLE object)
{
    struct object *o = live(object);
    return o ? atomic_load_explicit(&o->absent, memory_order_relaxed) : UINT32_MAX;
}

/* The handle on a member, 0 where it is not known in this epoch. Read between two looks at the entry, which may be
 * given to another object meanwhile. */
CK_OBJECT_HANDLE ha_object_at(CK_OBJECT_HANDLE object, int member, uint32_t epoch)
{
    struct object *o = live(object);
    if (!o || atomic_load_explicit(&o->at[member].epoch, memory_order_acquire) != epoch) return CK_INVALID_HANDLE;
    CK_OBJECT_HANDLE handle = atomic_load_explicit(&o->at[member].handle, memory_order_acquire);
    return atomic_load_explicit(&o->handle, memory_order_relaxed) == object ? handle : CK_INVALID_HANDLE;
}

/* Virtual handles of what a member found, HA_HIDDEN among them; 0 for those that the core has not identified yet. */
void ha_objects_virtual(ha_slot *slot, int member, uint32_t epoch, const CK_OBJECT_HANDLE *member_objects, size_t count,
                        CK_OBJECT_HANDLE *objects)
{
    struct ha_map *map = &slot->map[member];
    pthread_mutex_lock(&map->lock);
    bool known = map->size && map->epoch == epoch;
    for (size_t k = 0; k < count; k++) objects[k] = known ? map_find(map, member_objects[k])->object : 0;
    pthread_mutex_unlock(&map->lock);
}

/* All handles of the run that ends become invalid. */
void ha_objects_reset(void)
{
    uint32_t count = atomic_load(&object_count);
    for (uint32_t index = 1; index <= count; index++) {
        struct object *o = entry(index);
        CK_OBJECT_HANDLE handle = atomic_load(&o->handle);
        if (handle) ha_object_free(handle);
    }
}

/* In the child of a fork: all handles are dead, and so are the locks and maps of the parent's slots. */
void ha_objects_after_fork(void)
{
    pthread_mutex_init(&table_lock, NULL);
    uint32_t count = atomic_load(&object_count);
    free_list = 0;
    for (uint32_t index = 1; index <= count; index++) {
        struct object *o = entry(index);
        atomic_store(&o->handle, 0);
        o->next_free = free_list;
        free_list = index;
    }
}
