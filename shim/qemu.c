/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the shim knows of QEMU; of its memory backends, of virtio-mem and of its monitor backends.c, virtio_mem.c and monitor.c know more.
 *
 * Theory of operation: QEMU's symbols are looked up with dlsym() and called only from bottom halves on its main
 * thread, where the big lock is held; the one exception is the scheduling of such a bottom half, which QEMU allows
 * from any thread. Nothing here depends on a structure's layout except RAMBlockNotifier, see there.
 *
 * Prototypes are those of QEMU 4.2 to 11.1 (include/exec/cpu-common.h, include/exec/ramblock.h, include/block/aio.h,
 * include/sysemu/hostmem.h, include/qom/object.h). Functions that return bool are declared _Bool: a bool's upper bits
 * are garbage in the ABI.
 */
#include "qemu.h"

#include "backends.h"
#include "lookup.h"
#include "monitor.h"
#include "syscalls.h"
#include "virtio_mem.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <linux/magic.h>
#include <fcntl.h>

typedef struct AioContext AioContext;
typedef struct RAMBlock RAMBlock;

static struct {
	AioContext *(*qemu_get_aio_context)(void);
	/* From 6.2; the older one has no name. */
	void (*aio_bh_schedule_oneshot_full)(AioContext *, void (*)(void *), void *, const char *);
	void (*aio_bh_schedule_oneshot)(AioContext *, void (*)(void *), void *);
	_Bool (*phase_check)(int); /* from 6.0 */
	_Bool *qdev_hotplug; /* before 6.0: true once the machine is complete */
	void *qemu_finish_async_prealloc_mem; /* tells which MachineInitPhase values are in use */
	int (*qemu_ram_foreach_block)(int (*)(RAMBlock *, void *), void *);
	const char *(*qemu_ram_get_idstr)(RAMBlock *);
	void *(*qemu_ram_get_host_addr)(RAMBlock *);
	unsigned long (*qemu_ram_get_used_length)(RAMBlock *); /* ram_addr_t */
	size_t (*qemu_ram_pagesize)(RAMBlock *);
	int (*qemu_ram_get_fd)(RAMBlock *); /* from 6.1 */
	uint64_t (*get_plugged_memory_size)(void); /* of DIMMs and their like */
	void (*ram_block_notifier_add)(void *);
	_Bool (*qemu_ram_is_shared)(RAMBlock *);
	_Bool (*qemu_ram_is_noreserve)(RAMBlock *); /* from 6.1, as is what it tells of */
	_Bool (*runstate_check)(int);
	_Bool (*migrate_postcopy_ram)(void);
	_Bool (*migration_in_incoming_postcopy)(void);
} sym;

/*
 * util/oslib: struct RAMBlockNotifier. Since 6.1 it is {added, removed, resized, next} and the first two get max_size
 * too; before, {added, removed, next}. This one serves both: an older QEMU writes its list links over `resized`, which
 * it never calls, and an unused argument costs nothing.
 */
static struct {
	void (*added)(void *n, void *host, size_t size, size_t max_size);
	void (*removed)(void *n, void *host, size_t size, size_t max_size);
	void (*resized)(void *n, void *host, size_t old_size, size_t new_size);
	void *links[4];
} notifier;

static struct qemu_watcher watcher;

/* A QEMU that exports nothing is known by its file's name: qemu-system-*, also wrapped, and the distributions' kvm. */
static bool named_like_qemu(void)
{
	char path[PATH_MAX];
	ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
	const char *base;

	if (n < 0)
		return false;
	path[n] = '\0';
	base = strrchr(path, '/');
	base = base ? base + 1 : path;
	return strstr(base, "qemu-system-") || !strcmp(base, "qemu-kvm") || !strcmp(base, "kvm");
}

/* Whether the command line has @option, with one dash or two. */
static bool has_option(const char *option)
{
	char arg[4096] = "";
	FILE *f = fopen("/proc/self/cmdline", "re");
	bool found = false;
	size_t n = 0;
	int c;

	if (!f)
		return false;
	while (!found && (c = getc(f)) != EOF) {
		if (n < sizeof(arg) - 1)
			arg[n++] = (char)c;
		if (c == '\0') {
			const char *name = arg + (arg[0] == '-') + (arg[0] == '-' && arg[1] == '-');

			found = arg[0] == '-' && !strcmp(name, option);
			n = 0;
		}
	}
	fclose(f);
	return found;
}

void qemu_init(struct qemu *q)
{
	LOOK_UP(qemu_get_aio_context);
	LOOK_UP(aio_bh_schedule_oneshot_full);
	LOOK_UP(aio_bh_schedule_oneshot);
	LOOK_UP(phase_check);
	LOOK_UP(qdev_hotplug);
	LOOK_UP(qemu_finish_async_prealloc_mem);
	LOOK_UP(qemu_ram_foreach_block);
	LOOK_UP(qemu_ram_get_idstr);
	LOOK_UP(qemu_ram_get_host_addr);
	LOOK_UP(qemu_ram_get_used_length);
	LOOK_UP(qemu_ram_pagesize);
	LOOK_UP(qemu_ram_get_fd);
	LOOK_UP(get_plugged_memory_size);
	LOOK_UP(ram_block_notifier_add);
	LOOK_UP(qemu_ram_is_shared);
	LOOK_UP(qemu_ram_is_noreserve);
	LOOK_UP(runstate_check);
	LOOK_UP(migrate_postcopy_ram);
	LOOK_UP(migration_in_incoming_postcopy);

	backends_init();

	/* qemu-img and its sisters export stubs of most of the above, but only an emulator has the list of RAM. */
	q->symbols = dlsym(RTLD_DEFAULT, "ram_list") && sym.qemu_get_aio_context &&
		     (sym.aio_bh_schedule_oneshot_full || sym.aio_bh_schedule_oneshot) &&
		     (sym.phase_check || sym.qdev_hotplug) && sym.qemu_ram_foreach_block && sym.qemu_ram_get_idstr &&
		     sym.qemu_ram_get_host_addr && sym.qemu_ram_get_used_length && sym.qemu_ram_pagesize;
	q->emulator = q->symbols || named_like_qemu();
	monitor_init(q->symbols);
}

bool qemu_daemonizes(void)
{
	return has_option("daemonize");
}

bool qemu_is_incoming(void)
{
	return has_option("incoming");
}

bool qemu_has_main_loop(void)
{
	return sym.qemu_get_aio_context && sym.qemu_get_aio_context();
}

void qemu_schedule(void (*cb)(void *opaque), void *opaque)
{
	AioContext *ctx = sym.qemu_get_aio_context();

	if (sym.aio_bh_schedule_oneshot_full)
		sym.aio_bh_schedule_oneshot_full(ctx, cb, opaque, "ramlock");
	else
		sym.aio_bh_schedule_oneshot(ctx, cb, opaque);
}

bool qemu_machine_ready(void)
{
	/*
	 * MachineInitPhase (include/hw/qdev-core.h): PHASE_MACHINE_READY is 4, and 5 since PHASE_LATE_BACKENDS_CREATED
	 * was put before it. The function that came with that phase tells which it is.
	 */
	if (sym.phase_check)
		return sym.phase_check(sym.qemu_finish_async_prealloc_mem ? 5 : 4);
	return *sym.qdev_hotplug;
}

bool qemu_is_postcopy_target(void)
{
	const int inmigrate = 1; /* RunState (qapi/run-state.json) begins: debug, inmigrate */

	return (sym.migration_in_incoming_postcopy && sym.migration_in_incoming_postcopy()) ||
	       (sym.runstate_check && sym.runstate_check(inmigrate) && sym.migrate_postcopy_ram &&
		sym.migrate_postcopy_ram());
}

/*
 * Before 5.1 machine RAM was no backend, but boards named its block "pc.ram", "mach-virt.ram" and so on. Video RAM is
 * "vga.vram", and devices' blocks have a path ("0000:00:02.0/vga.vram", "/rom@etc/acpi/tables").
 */
static bool named_like_machine_ram(const char *id)
{
	size_t n = strlen(id);

	return n > 4 && !strcmp(id + n - 4, ".ram") && !strchr(id, '/');
}

static enum backing find_backing(RAMBlock *rb, uint64_t page_size)
{
	char link[64], path[PATH_MAX];
	struct statfs fs;
	ssize_t n;
	int fd = sym.qemu_ram_get_fd ? sym.qemu_ram_get_fd(rb) : -1;

	if (page_size > (uint64_t)sysconf(_SC_PAGESIZE))
		return BACKING_HUGETLB;
	if (fd < 0)
		return BACKING_ANONYMOUS;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, path, sizeof(path) - 1);
	if (n > 0 && !strncmp(path, "/memfd:", 7))
		return BACKING_MEMFD;
	if (!fstatfs(fd, &fs) && fs.f_type == TMPFS_MAGIC)
		return BACKING_SHMEM;
	return BACKING_FILE;
}

struct walk {
	struct backends backends;
	struct ram_layout *layout;
	struct ram_layout before; /* the last listing */
	struct qemu_outlook *outlook;
	bool can_discard;
	int err;
};

/* Appends [host.start, host.end) of @rb to the layout; @e is its backend, if any. Returns nonzero when there is no room. */
static int append(struct walk *w, RAMBlock *rb, const struct backend *e, struct range host)
{
	const char *id = sym.qemu_ram_get_idstr(rb);
	const struct ram_block *known;
	struct ram_block *b;

	if (w->layout->n == RAM_BLOCKS_MAX) {
		w->err = -E2BIG;
		return 1;
	}
	b = &w->layout->v[w->layout->n++];
	snprintf(b->id, sizeof(b->id), "%s", id);
	b->host = host;
	b->page_size = sym.qemu_ram_pagesize(rb);
	b->shared = sym.qemu_ram_is_shared && sym.qemu_ram_is_shared(rb);
	b->mergeable = e && e->mergeable;
	known = layout_find(&w->before, (struct range){ host.start, host.start + 1 });
	/* Asking a file system may take long when it is a remote one: once for each block is enough. */
	b->backing = known && !strcmp(known->id, b->id) ? known->backing : find_backing(rb, b->page_size);
	b->tmpfs = b->backing == BACKING_SHMEM && b->shared;
	b->fd = b->tmpfs ? sym.qemu_ram_get_fd(rb) : -1;
	b->unreserved = b->backing == BACKING_HUGETLB && sym.qemu_ram_is_noreserve && sym.qemu_ram_is_noreserve(rb);
	return 0;
}

/* Appends the plugged parts of a virtio-mem device, if they may be locked. */
static int append_plugged(struct walk *w, RAMBlock *rb, const struct backend *e)
{
	struct qemu_outlook *o = w->outlook;
	uint64_t start = (uint64_t)(uintptr_t)e->host;
	static struct plugged parts;
	void *others[RAM_BLOCKS_MAX];
	bool may_lock = false;
	int err = 0;

	for (size_t i = 0; i < w->backends.n; i++)
		others[i] = w->backends.v[i].mr;
	if (virtio_mem_list(e, others, w->backends.n, &parts, &may_lock))
		return 0;
	may_lock |= w->can_discard;
	w->layout->left_out += may_lock ? parts.left_out : parts.total;
	if (!may_lock && o->n_wanted < sizeof(o->wanted) / sizeof(o->wanted[0])) {
		o->wanted[o->n_wanted].device = e->device;
		o->wanted[o->n_wanted++].host = (struct range){ start, start + sym.qemu_ram_get_used_length(rb) };
	}
	for (size_t i = 0; may_lock && i < parts.n && !err; i++)
		err = append(w, rb, e, (struct range){ start + parts.v[i].start, start + parts.v[i].end });
	return err;
}

static int add_block(RAMBlock *rb, void *opaque)
{
	struct walk *w = opaque;
	const char *host = sym.qemu_ram_get_host_addr(rb);
	uint64_t start = (uint64_t)(uintptr_t)host, size = sym.qemu_ram_get_used_length(rb);
	const struct backend *e = backends_at(&w->backends, host);

	if (!host || !size)
		return 0;
	if (e && e->use == BACKEND_VIRTIO_MEM)
		return append_plugged(w, rb, e);
	if (e && e->use == BACKEND_PRIVATE)
		w->layout->private = true;
	if (e ? e->use == BACKEND_MAIN : named_like_machine_ram(sym.qemu_ram_get_idstr(rb)))
		return append(w, rb, e, (struct range){ start, start + size });
	return 0;
}

int qemu_walk(struct ram_layout *l, bool can_discard, struct qemu_outlook *outlook)
{
	static struct walk w; /* too large for QEMU's stack; bottom halves never run in parallel */

	l->n = 0;
	l->left_out = 0;
	l->private = false;
	w.layout = l;
	w.outlook = outlook;
	w.can_discard = can_discard;
	w.err = 0;
	outlook->n_wanted = 0;
	backends_find(&w.backends);
	sym.qemu_ram_foreach_block(add_block, &w);
	layout_finish(l);
	w.before = *l;
	outlook->may_grow = w.backends.spare;
	outlook->may_change = !w.backends.fixed && (!sym.get_plugged_memory_size || sym.get_plugged_memory_size());
	for (size_t i = 0; i < w.backends.n; i++)
		outlook->may_change |= w.backends.v[i].use == BACKEND_VIRTIO_MEM;
	return w.err;
}

void qemu_let_go(void *device)
{
	virtio_mem_nudge(device);
}

static struct range host_range(void *host, size_t size)
{
	return (struct range){ (uint64_t)(uintptr_t)host, (uint64_t)(uintptr_t)host + size };
}

static void on_added(void *n, void *host, size_t size, size_t max_size)
{
	(void)n, (void)host, (void)size, (void)max_size;
	watcher.changed(watcher.opaque);
}

static void on_removed(void *n, void *host, size_t size, size_t max_size)
{
	(void)n, (void)max_size;
	watcher.removed(watcher.opaque, host_range(host, size));
}

static void on_resized(void *n, void *host, size_t old_size, size_t new_size)
{
	(void)n;
	if (new_size < old_size) {
		/* The mapping stays, so a lock of ours would too. */
		if (watcher.removed(watcher.opaque, host_range((char *)host + new_size, old_size - new_size)))
			sys_munlock(host_range((char *)host + new_size, old_size - new_size));
	}
	watcher.changed(watcher.opaque);
}

bool qemu_watch(const struct qemu_watcher *w)
{
	if (!sym.ram_block_notifier_add)
		return false;
	watcher = *w;
	notifier.added = on_added;
	notifier.removed = on_removed;
	notifier.resized = on_resized;
	sym.ram_block_notifier_add(&notifier);
	return true;
}
