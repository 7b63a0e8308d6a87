/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * QEMU's memory backends. A machine uses its own by itself; any other is used by a device, whose property is a link to it.
 * Only the devices that are known to make main memory of it do so here: pc-dimm but not nvdimm, which is a pc-dimm
 * too, and virtio-mem. The rest is no main memory: nvdimm, virtio-pmem, ivshmem-plain, cxl-type3, and what may come.
 */
#include "backends.h"

#include "lookup.h"
#include "virtio_mem.h"

#include <string.h>

typedef struct Object Object;
typedef struct MemoryRegion MemoryRegion;
typedef int visit_fn(Object *, void *);

static struct {
	Object *(*object_get_objects_root)(void);
	int (*object_child_foreach)(Object *, visit_fn *, void *);
	int (*object_child_foreach_recursive)(Object *, visit_fn *, void *);
	Object *(*object_dynamic_cast)(Object *, const char *);
	_Bool (*object_property_get_bool)(Object *, const char *, void **errp);
	void (*error_free)(void *);
	Object *(*object_property_get_link)(Object *, const char *, void *errp);
	Object *(*object_resolve_path_component)(Object *, const char *);
	Object *(*qdev_get_machine)(void);
	void *machine_consume_memdev; /* from 5.0, when machines' RAM became a backend */
	_Bool (*host_memory_backend_is_mapped)(Object *);
	MemoryRegion *(*host_memory_backend_get_memory)(Object *);
	void *(*memory_region_get_ram_ptr)(MemoryRegion *);
	void *(*memory_region_get_ram_discard_manager)(MemoryRegion *); /* from 6.1 */
	_Bool (*memory_region_has_guest_memfd)(MemoryRegion *); /* from 9.0 */
} sym;

void backends_init(void)
{
	LOOK_UP(object_get_objects_root);
	LOOK_UP(object_child_foreach);
	LOOK_UP(object_child_foreach_recursive);
	LOOK_UP(object_dynamic_cast);
	LOOK_UP(object_property_get_bool);
	LOOK_UP(error_free);
	LOOK_UP(object_property_get_link);
	LOOK_UP(object_resolve_path_component);
	LOOK_UP(qdev_get_machine);
	LOOK_UP(machine_consume_memdev);
	LOOK_UP(host_memory_backend_is_mapped);
	LOOK_UP(host_memory_backend_get_memory);
	LOOK_UP(memory_region_get_ram_ptr);
	LOOK_UP(memory_region_get_ram_discard_manager);
	LOOK_UP(memory_region_has_guest_memfd);
	virtio_mem_init();
}

/* Whether QEMU has asked for the pages of a backend to be merged by KSM. */
static bool asks_for_merging(Object *backend)
{
	void *error = NULL;
	bool merge;

	if (!sym.object_property_get_bool || !sym.error_free)
		return false;
	merge = sym.object_property_get_bool(backend, "merge", &error);
	if (error)
		sym.error_free(error);
	return merge && !error;
}

static int add_backend(Object *child, void *opaque)
{
	struct backends *b = opaque;
	struct backend *e = &b->v[b->n];

	if (b->n == RAM_BLOCKS_MAX || !sym.object_dynamic_cast(child, "memory-backend"))
		return 0;
	if (!sym.host_memory_backend_is_mapped(child)) {
		b->spare = true;
		return 0;
	}
	*e = (struct backend){ .object = child, .use = BACKEND_MAIN };
	e->mr = sym.host_memory_backend_get_memory(child);
	if (!e->mr)
		return 0;
	e->host = sym.memory_region_get_ram_ptr(e->mr);
	e->mergeable = asks_for_merging(child);
	e->manager = sym.memory_region_get_ram_discard_manager ? sym.memory_region_get_ram_discard_manager(e->mr) : NULL;
	if (sym.memory_region_has_guest_memfd && sym.memory_region_has_guest_memfd(e->mr)) {
		e->use = BACKEND_PRIVATE;
	} else if (e->manager && virtio_mem_is(e->manager)) {
		e->use = BACKEND_VIRTIO_MEM;
		e->device = e->manager;
	} else if (e->manager || sym.object_dynamic_cast(child, "memory-backend-epc")) {
		e->use = BACKEND_OTHER;
	}
	b->n++;
	return 0;
}

/* @device uses the backend, and is no DIMM. */
static void judge_use(struct backend *e, Object *device)
{
	if (e->use == BACKEND_MAIN)
		e->use = BACKEND_OTHER;
	if (e->use == BACKEND_OTHER && e->manager && virtio_mem_is(device)) {
		e->use = BACKEND_VIRTIO_MEM;
		e->device = device;
	}
}

static int judge_device(Object *device, void *opaque)
{
	static const char *const links[] = { "memdev", "volatile-memdev", "persistent-memdev", "lsa" };
	struct backends *b = opaque;

	if (!sym.object_dynamic_cast(device, "device")) /* most are memory regions */
		return 0;
	if (sym.object_dynamic_cast(device, "pc-dimm") && !sym.object_dynamic_cast(device, "nvdimm"))
		return 0;
	for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++) {
		Object *backend = sym.object_property_get_link(device, links[i], NULL);

		for (size_t k = 0; backend && k < b->n; k++) {
			if (b->v[k].object == backend)
				judge_use(&b->v[k], device);
		}
	}
	return 0;
}

/* Devices that somebody asked for are all in one of these two; QEMU itself gives none a backend but SGX's. */
static void judge_devices(struct backends *b)
{
	static const char *const places[] = { "peripheral", "peripheral-anon" };

	if (!sym.object_child_foreach_recursive || !sym.object_property_get_link || !sym.object_resolve_path_component ||
	    !sym.qdev_get_machine)
		return;
	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		Object *place = sym.object_resolve_path_component(sym.qdev_get_machine(), places[i]);

		if (place)
			sym.object_child_foreach_recursive(place, judge_device, b);
	}
}

void backends_find(struct backends *b)
{
	b->n = 0;
	b->spare = false;
	if (!sym.object_get_objects_root || !sym.object_child_foreach || !sym.object_dynamic_cast ||
	    !sym.host_memory_backend_is_mapped || !sym.host_memory_backend_get_memory || !sym.memory_region_get_ram_ptr)
		return;
	sym.object_child_foreach(sym.object_get_objects_root(), add_backend, b);
	b->fixed = sym.machine_consume_memdev && b->n <= 1;
	if (!b->fixed) /* this may be 1 ms where there are many devices */
		judge_devices(b);
}

const struct backend *backends_at(const struct backends *b, const void *host)
{
	for (size_t i = 0; i < b->n; i++)
		if (b->v[i].host == host)
			return &b->v[i];
	return NULL;
}
