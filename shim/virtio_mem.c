/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * virtio-mem: which of its memory is plugged.
 *
 * QEMU tells by calling back with a struct MemoryRegionSection for each plugged part (include/exec/memory.h, the same from 6.1,
 * where these functions came, to 11.1). A wrong one would end QEMU in an assertion, so QEMU itself is first asked for a
 * section whose contents are known, and nothing is done unless it looks as it should.
 */
#include "virtio_mem.h"

#include "clock.h"
#include "lookup.h"

#include <errno.h>
#include <string.h>

typedef struct MemoryRegion MemoryRegion;
typedef struct Object Object;

/* struct MemoryRegionSection, with room for what a later QEMU may append. */
struct section {
	_Alignas(16) uint64_t size[2]; /* Int128: low, high */
	MemoryRegion *mr;
	void *fv;
	uint64_t offset_within_region;
	uint64_t offset_within_address_space;
	uint64_t flags_and_more[26];
};

typedef int populated_fn(struct section *s, void *opaque);

static struct {
	Object *(*object_dynamic_cast)(Object *, const char *);
	uint64_t (*object_property_get_uint)(Object *, const char *, void *errp);
	uint64_t (*memory_region_size)(MemoryRegion *);
	MemoryRegion *(*get_system_memory)(void);
	struct section (*memory_region_find)(MemoryRegion *, uint64_t addr, uint64_t size);
	void (*memory_region_unref)(MemoryRegion *);
	int (*ram_discard_manager_replay_populated)(const void *, struct section *, populated_fn *, void *);
	unsigned int (*virtio_queue_get_last_avail_idx)(void *vdev, int n);
	void (*virtio_notify_config)(void *vdev);
} sym;

enum { DEVICES_MAX = 16 };

static struct {
	const void *device;
	struct plugged_history history;
	uint64_t seen; /* when it was listed last, in listings */
} devices[DEVICES_MAX];

static uint64_t listings;

void virtio_mem_init(void)
{
	LOOK_UP(object_dynamic_cast);
	LOOK_UP(object_property_get_uint);
	LOOK_UP(memory_region_size);
	LOOK_UP(get_system_memory);
	LOOK_UP(memory_region_find);
	LOOK_UP(memory_region_unref);
	LOOK_UP(ram_discard_manager_replay_populated);
	LOOK_UP(virtio_queue_get_last_avail_idx);
	LOOK_UP(virtio_notify_config);
}

bool virtio_mem_is(void *object)
{
	return sym.object_dynamic_cast && sym.object_dynamic_cast(object, "virtio-mem");
}

/* Whether a section that QEMU makes has what it must have, where we look for it. */
static bool sections_are_known(void *const others[], size_t n_others)
{
	enum { ADDRESS = 0x3000, SIZE = 0x1000 }; /* main memory in every PC */
	static bool known;
	struct section s;

	if (known)
		return true;
	s = sym.memory_region_find(sym.get_system_memory(), ADDRESS, SIZE);
	for (size_t i = 0; i < n_others && !known; i++)
		known = s.mr == others[i] && s.size[0] == SIZE && !s.size[1] && s.offset_within_address_space == ADDRESS &&
			s.offset_within_region == ADDRESS && s.fv;
	if (known)
		sym.memory_region_unref(s.mr); /* else it is not certain what was taken: one reference more does no harm */
	return known;
}

struct listing {
	struct plugged *p;
	const MemoryRegion *mr;
	uint64_t size;
	int err;
};

static int add_part(struct section *s, void *opaque)
{
	struct listing *l = opaque;
	struct range r = { s->offset_within_region, s->offset_within_region + s->size[0] };

	if (s->mr != l->mr || s->size[1] || s->size[0] > l->size || r.start > l->size || r.end > l->size)
		l->err = -ENOTSUP;
	else if (plugged_add(l->p, r))
		l->err = -ENOTSUP;
	return l->err;
}

/* What is known of @device; a place that has not been used for the longest time is given to a new one. */
static struct plugged_history *history_of(const void *device)
{
	size_t oldest = 0;

	listings++;
	for (size_t i = 0; i < DEVICES_MAX; i++) {
		if (devices[i].device == device) {
			devices[i].seen = listings;
			return &devices[i].history;
		}
		if (devices[i].seen < devices[oldest].seen)
			oldest = i;
	}
	devices[oldest].device = device;
	devices[oldest].seen = listings;
	devices[oldest].history = (struct plugged_history){ .begun = false };
	return &devices[oldest].history;
}

int virtio_mem_list(const struct backend *e, void *const others[], size_t n_others, struct plugged *p, bool *may_lock)
{
	struct listing l = { .p = p, .mr = e->mr };
	struct section all = { .mr = e->mr };
	void *device = e->device;

	if (!sym.object_property_get_uint || !sym.memory_region_size || !sym.get_system_memory || !sym.memory_region_find ||
	    !sym.memory_region_unref || !sym.ram_discard_manager_replay_populated ||
	    !sym.virtio_queue_get_last_avail_idx || !sections_are_known(others, n_others))
		return -ENOTSUP;
	plugged_clear(p);
	l.size = all.size[0] = sym.memory_region_size(e->mr);
	sym.ram_discard_manager_replay_populated(e->manager, &all, add_part, &l);
	/* The device says, too, how much it is. */
	if (l.err || sym.object_property_get_uint(device, "size", NULL) != p->total)
		return -ENOTSUP;
	*may_lock = plugged_may_lock(history_of(device), p, sym.object_property_get_uint(device, "requested-size", NULL),
				     sym.virtio_queue_get_last_avail_idx(device, 0), now_ns());
	return 0;
}

void virtio_mem_nudge(void *device)
{
	struct plugged_history *h = history_of(device);

	/* A change of the device's configuration, though there is none: drivers read it again, and go on. */
	if (!h->told && sym.virtio_notify_config)
		sym.virtio_notify_config(device);
	h->told = true;
}
