/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the locked-memory limit, the memory cgroups, the host and its NUMA nodes still allow.
 *
 * The kernel answers "too much memory" with a SIGKILL and not with an error code, so what is left is read before memory is
 * allocated, and what cannot be read counts as not there.
 */
#include "headroom.h"

#include "fd.h"
#include "smallfile.h"

#include <assert.h>
#include <dirent.h>
#include <inttypes.h>
#include <linux/capability.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static const uint64_t MIB = 1 << 20;
static const uint64_t ASKED_LEAST = 128 << 20;
static const uint64_t MAP_COUNT_USUAL = 65530; /* the kernel's own choice */

static const char *const shortage_names[] = {
	[SHORTAGE_NONE] = "none",
	[SHORTAGE_RLIMIT] = "rlimit",
	[SHORTAGE_CGROUP] = "cgroup",
	[SHORTAGE_HOST_MEMORY] = "host-memory",
	[SHORTAGE_NUMA_NODE] = "numa-node",
	[SHORTAGE_MAP_COUNT] = "map-count",
	[SHORTAGE_NO_RAM] = "no-ram",
	[SHORTAGE_MIGRATION] = "migration",
	[SHORTAGE_DISCARDED] = "discarded",
	[SHORTAGE_KERNEL] = "kernel",
};
static_assert(sizeof(shortage_names) / sizeof(shortage_names[0]) == SHORTAGE_COUNT, "a name for each shortage");

const char *shortage_name(enum shortage s)
{
	return shortage_names[s];
}

/*
 * Reads /proc/meminfo: @host, whose free memory is what the kernel says is available, page cache included, and @total, in bytes.
 * Returns 0 or -errno.
 */
static int read_meminfo(const struct headroom *h, struct evictable *host, uint64_t *total)
{
	uint64_t active = 0, inactive = 0, swap = 0, free = 0, cached = 0;
	char text[8192];
	int err = smallfile_read(h->meminfo, text, sizeof(text));

	*host = (struct evictable){ .free = 0 };
	if (!err)
		err = smallfile_value(text, "MemAvailable:", 10, &host->free);
	if (!err)
		err = smallfile_value(text, "MemTotal:", 10, total);
	if (err)
		return err;
	smallfile_value(text, "Active(anon):", 10, &active);
	smallfile_value(text, "Inactive(anon):", 10, &inactive);
	smallfile_value(text, "SwapTotal:", 10, &swap);
	smallfile_value(text, "SwapFree:", 10, &free);
	smallfile_value(text, "SwapCached:", 10, &cached); /* in memory as well */
	host->free *= 1024;
	host->anon = (active + inactive) * 1024;
	host->swap = free * 1024;
	host->swapped = swap > free + cached ? (swap - free - cached) * 1024 : 0;
	*total *= 1024;
	return 0;
}

void headroom_init(struct headroom *h)
{
	*h = (struct headroom){ .meminfo = -1, .status = -1, .maps = -1, .max_map_count = -1 };
	cgroups_init(&h->cgroups);
	numa_init(&h->numa);
}

void headroom_open(struct headroom *h, const char *root)
{
	struct evictable host;

	h->meminfo = smallfile_open(root, "proc/meminfo");
	h->status = smallfile_open(root, "proc/self/status");
	h->maps = smallfile_open(root, "proc/self/maps");
	h->max_map_count = smallfile_open(root, "proc/sys/vm/max_map_count");
	if (read_meminfo(h, &host, &h->total))
		h->total = 0;
	cgroups_open(&h->cgroups, root);
	numa_open(&h->numa, root);
}

void headroom_deinit(struct headroom *h)
{
	fd_close(h->meminfo);
	fd_close(h->status);
	fd_close(h->maps);
	fd_close(h->max_map_count);
	cgroups_deinit(&h->cgroups);
	numa_deinit(&h->numa);
	headroom_init(h);
}

int64_t headroom_vm_locked(const struct headroom *h)
{
	char text[4096];
	uint64_t kib;
	int err = smallfile_read(h->status, text, sizeof(text));

	if (!err)
		err = smallfile_value(text, "VmLck:", 10, &kib);
	return err ? err : (int64_t)(kib * 1024);
}

uint64_t headroom_memlock_limit(const struct headroom *h)
{
	char text[4096];
	uint64_t caps;
	struct rlimit limit;

	if (!smallfile_read(h->status, text, sizeof(text)) && !smallfile_value(text, "CapEff:", 16, &caps) &&
	    (caps & (1ULL << CAP_IPC_LOCK)))
		return UINT64_MAX;
	if (getrlimit(RLIMIT_MEMLOCK, &limit))
		return 0;
	return limit.rlim_cur == RLIM_INFINITY ? UINT64_MAX : limit.rlim_cur;
}

bool headroom_has_vfio(const char *root)
{
	static const char *const prefixes[] = { "/dev/vfio/", "/dev/iommu", "anon_inode:[vfio", "anon_inode:kvm-vfio",
						"anon_inode:[iommufd" };
	char path[SMALLFILE_PATH], link[64];
	bool found = false;
	struct dirent *e;
	DIR *dir;

	if ((size_t)snprintf(path, sizeof(path), "%s/proc/self/fd", root) >= sizeof(path) || !(dir = opendir(path)))
		return false; /* the controller, which raises the limit, looks too */
	while (!found && (e = readdir(dir))) {
		ssize_t n = readlinkat(dirfd(dir), e->d_name, link, sizeof(link) - 1);

		if (n < 0)
			continue;
		link[n] = '\0';
		for (size_t i = 0; i < sizeof(prefixes) / sizeof(prefixes[0]); i++)
			found |= !strncmp(link, prefixes[i], strlen(prefixes[i]));
	}
	closedir(dir);
	return found;
}

uint64_t headroom_reserve(const struct headroom *h, uint64_t asked)
{
	if (asked) /* whoever may ask must not have the kernel kill others for it */
		return asked > ASKED_LEAST ? asked : ASKED_LEAST;
	return h->total / 50 > 512 * MIB ? h->total / 50 : 512 * MIB;
}

void headroom_lease(struct headroom *h, uint64_t left, uint64_t until_ns)
{
	atomic_store(&h->lease.left, left > INT64_MAX ? INT64_MAX : (int64_t)left);
	atomic_store(&h->lease.until_ns, until_ns);
}

void headroom_spend(struct headroom *h, uint64_t cost)
{
	atomic_fetch_sub(&h->lease.left, (int64_t)cost);
}

/* What the cgroups leave: as we see them, as the controller does, and never more than one of the two says. */
static uint64_t cgroups_allow(struct headroom *h, uint64_t swap_free, uint64_t now_ns)
{
	uint64_t seen = cgroups_left(&h->cgroups, swap_free), leased;
	uint64_t until_ns = atomic_load(&h->lease.until_ns);
	int64_t left = atomic_load(&h->lease.left);

	h->cgroups_unknown = now_ns >= until_ns && (until_ns || !h->cgroups.known);
	if (now_ns >= until_ns)
		return h->cgroups_unknown ? 0 : seen;
	leased = left > 0 ? (uint64_t)left : 0;
	return !h->cgroups.known || leased < seen ? leased : seen;
}

/* Makes *@left the smaller @here, for which @reason is why. */
static void tighten(uint64_t *left, uint64_t here, enum shortage *why, enum shortage reason)
{
	if (here < *left) {
		*left = here;
		*why = reason;
	}
}

uint64_t headroom_memory(struct headroom *h, const struct headroom_ask *ask, enum shortage *why)
{
	uint64_t total, reserve, left, here;
	struct evictable host;

	*why = SHORTAGE_HOST_MEMORY;
	if (read_meminfo(h, &host, &total))
		return 0;
	reserve = headroom_reserve(h, ask->reserve);
	left = host.free > reserve ? host.free - reserve : 0;
	tighten(&left, evictable_beyond_cushion(&host), why, SHORTAGE_HOST_MEMORY);
	if (ask->nodes)
		tighten(&left, numa_left(&h->numa, ask->nodes), why, SHORTAGE_NUMA_NODE);
	here = cgroups_allow(h, host.swap, ask->now_ns);
	tighten(&left, here, why, SHORTAGE_CGROUP);
	if (h->cgroups_unknown)
		*why = SHORTAGE_CGROUP;
	return left;
}

uint64_t headroom_pinnable(struct headroom *h, const struct headroom_ask *ask, bool of_file, enum shortage *why)
{
	uint64_t total, left, here;
	struct evictable host;

	*why = SHORTAGE_HOST_MEMORY;
	if (read_meminfo(h, &host, &total))
		return 0;
	left = evictable_pinnable(&host, headroom_reserve(h, ask->reserve), of_file);
	if (ask->nodes)
		tighten(&left, numa_pinnable(&h->numa, ask->nodes, host.swap, of_file), why, SHORTAGE_NUMA_NODE);
	here = cgroups_pinnable(&h->cgroups, host.swap, of_file);
	if (h->cgroups.known)
		tighten(&left, here, why, SHORTAGE_CGROUP);
	/* What we do not see can take nothing away where nothing can be evicted; else it leaves what we are told. */
	h->pins_lease = (!h->cgroups.known || atomic_load(&h->lease.until_ns)) && (host.swap || host.swapped || of_file);
	if (h->pins_lease)
		tighten(&left, cgroups_allow(h, host.swap, ask->now_ns), why, SHORTAGE_CGROUP);
	return left;
}

void headroom_spend_pin(struct headroom *h, uint64_t size)
{
	if (h->pins_lease)
		headroom_spend(h, size);
}

void headroom_explain(const struct headroom *h, enum shortage why, uint64_t left, char *text, size_t size)
{
	if (why == SHORTAGE_CGROUP && h->cgroups_unknown)
		snprintf(text, size, "the limits of QEMU's memory cgroup cannot be read from inside, and no controller has told them just now");
	else if (why == SHORTAGE_CGROUP)
		snprintf(text, size, "QEMU's memory cgroup leaves %" PRIu64 " MiB beyond its reserve", left / MIB);
	else if (why == SHORTAGE_NUMA_NODE)
		snprintf(text, size, "the NUMA nodes that this memory is bound to have %" PRIu64 " MiB beyond their reserve", left / MIB);
	else
		snprintf(text, size, "the host has %" PRIu64 " MiB available beyond its reserve", left / MIB);
}

/* How many mappings the process has; it stops counting at @enough. Returns UINT64_MAX when that cannot be read. */
static uint64_t count_mappings(const struct headroom *h, uint64_t enough)
{
	char text[8192];
	uint64_t count = 0;
	off_t at = 0;
	ssize_t n;

	if (h->maps < 0)
		return UINT64_MAX;
	while (count < enough && (n = pread(h->maps, text, sizeof(text), at)) != 0) {
		if (n < 0)
			return UINT64_MAX;
		for (ssize_t i = 0; i < n; i++)
			count += text[i] == '\n';
		at += n;
	}
	return count;
}

uint64_t headroom_mappings(const struct headroom *h, size_t ranges)
{
	char text[32];
	uint64_t most, ours, all, count;

	if (smallfile_read(h->max_map_count, text, sizeof(text)) || smallfile_value(text, "", 10, &most))
		most = MAP_COUNT_USUAL;
	ours = most / 8 > 2 * ranges ? most / 8 - 2 * ranges : 0; /* a locked range in the middle of a mapping makes it three */
	all = most - most / 4;
	count = count_mappings(h, all);
	if (count == UINT64_MAX)
		count = most / 2;
	all = all > count ? all - count : 0;
	return ours < all ? ours : all;
}
