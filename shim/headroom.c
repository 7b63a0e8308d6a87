/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the locked-memory limit, the memory cgroup and the host still allow.
 *
 * Going over a memory cgroup's limit is not an error code but a SIGKILL, so what is left is read before memory is
 * allocated, and what cannot be read counts as not there.
 */
#include "headroom.h"

#include "fd.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static const uint64_t MIB = 1 << 20;

static const char *const shortage_names[] = {
	[SHORTAGE_NONE] = "none",
	[SHORTAGE_RLIMIT] = "rlimit",
	[SHORTAGE_CGROUP] = "cgroup",
	[SHORTAGE_HOST_MEMORY] = "host-memory",
	[SHORTAGE_MAP_COUNT] = "map-count",
	[SHORTAGE_NO_RAM] = "no-ram",
	[SHORTAGE_MIGRATION] = "migration",
	[SHORTAGE_KERNEL] = "kernel",
};
static_assert(sizeof(shortage_names) / sizeof(shortage_names[0]) == SHORTAGE_COUNT, "a name for each shortage");

const char *shortage_name(enum shortage s)
{
	return shortage_names[s];
}

enum { PATH_SIZE = 2 * PATH_MAX };

static int open_file(const char *dir, const char *name)
{
	char path[PATH_SIZE];

	if ((size_t)snprintf(path, sizeof(path), "%s/%s", dir, name) >= sizeof(path))
		return -1;
	return fd_above_stdio(open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY));
}

static bool exists(const char *dir, const char *name)
{
	char path[PATH_SIZE];

	return (size_t)snprintf(path, sizeof(path), "%s/%s", dir, name) < sizeof(path) && !access(path, F_OK);
}

/* Reads a whole small file from its start. Returns 0 or -errno. */
static int read_file(int fd, char *buf, size_t size)
{
	size_t got = 0;

	if (fd < 0)
		return -EBADF;
	while (got < size - 1) {
		ssize_t n = pread(fd, buf + got, size - 1 - got, (off_t)got);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		got += (size_t)n;
	}
	buf[got] = '\0';
	return 0;
}

/* The number after @key at the start of a line; base 10 or 16. Returns 0 or -ENOENT. */
static int find_value(const char *text, const char *key, int base, uint64_t *out)
{
	size_t len = strlen(key);

	for (const char *line = text; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (!strncmp(line, key, len)) {
			*out = strtoull(line + len, NULL, base);
			return 0;
		}
	}
	return -ENOENT;
}

static void close_levels(struct headroom *h)
{
	for (unsigned int i = 0; i < h->n_levels; i++) {
		const struct cgroup_level *l = &h->levels[i];
		const int fds[] = { l->limit, l->high, l->usage, l->stat, l->swap_limit, l->swap_usage };

		for (size_t j = 0; j < sizeof(fds) / sizeof(fds[0]); j++)
			fd_close(fds[j]);
	}
	h->n_levels = 0;
}

/* Opens the files of one cgroup directory. Returns 0, or -errno: -ENOENT in v2 is one without a memory controller. */
static int open_level(struct cgroup_level *level, const char *dir, bool v1)
{
	*level = (struct cgroup_level){ .v1 = v1 };
	level->limit = open_file(dir, v1 ? "memory.limit_in_bytes" : "memory.max");
	if (level->limit < 0)
		return -errno;
	level->high = v1 ? -1 : open_file(dir, "memory.high");
	level->usage = open_file(dir, v1 ? "memory.usage_in_bytes" : "memory.current");
	level->stat = open_file(dir, "memory.stat");
	level->swap_limit = open_file(dir, v1 ? "memory.memsw.limit_in_bytes" : "memory.swap.max");
	level->swap_usage = open_file(dir, v1 ? "memory.memsw.usage_in_bytes" : "memory.swap.current");
	return 0;
}

/* Opens the cgroup at @mount + @path and all its ancestors below @mount. What cannot be seen may have a limit. */
static void open_levels(struct headroom *h, const char *mount, char *path, bool v1)
{
	for (;;) {
		char dir[PATH_SIZE];
		char *slash;
		int err;

		if (h->n_levels == CGROUP_DEPTH_MAX ||
		    (size_t)snprintf(dir, sizeof(dir), "%s%s", mount, path) >= sizeof(dir)) {
			h->cgroups_known = false;
			return;
		}
		err = open_level(&h->levels[h->n_levels], dir, v1);
		if (!err)
			h->n_levels++;
		else if (v1 || err != -ENOENT || !exists(dir, "cgroup.procs"))
			h->cgroups_known = false;
		slash = strrchr(path, '/');
		if (!slash || path[1] == '\0')
			return;
		*(slash == path ? slash + 1 : slash) = '\0';
	}
}

/* Whether the comma-separated @list of v1 controllers has "memory". */
static bool has_memory(const char *list)
{
	for (const char *p = list; p; p = strchr(p, ',')) {
		p += *p == ',';
		if (!strncmp(p, "memory", 6) && (p[6] == '\0' || p[6] == ','))
			return true;
	}
	return false;
}

/*
 * Finds where the memory controller is mounted: /proc/self/mountinfo has lines of "ID PARENT DEV ROOT MOUNTPOINT OPTIONS...
 * - TYPE SOURCE SUPEROPTIONS" (proc(5)). In a container ROOT is a cgroup further down, which @path begins with and the
 * mount point does not show. Returns 0 with @path made relative to @mount, or -ENOENT.
 */
static int find_mount(const char *root, bool v1, char *path, char mount[PATH_SIZE])
{
	char file[PATH_SIZE], *line = NULL;
	size_t size = 0;
	int err = -ENOENT;
	FILE *f;

	snprintf(file, sizeof(file), "%s/proc/self/mountinfo", root);
	f = fopen(file, "re");
	while (f && err && getline(&line, &size, f) > 0) {
		char subtree[PATH_MAX], point[PATH_MAX], type[32], options[PATH_MAX];
		const char *dash = strstr(line, " - ");
		size_t n;

		if (!dash || sscanf(line, "%*s %*s %*s %4095s %4095s", subtree, point) != 2 ||
		    sscanf(dash, " - %31s %*s %4095s", type, options) != 2 || strcmp(type, v1 ? "cgroup" : "cgroup2") ||
		    (v1 && !has_memory(options)))
			continue;
		n = strcmp(subtree, "/") ? strlen(subtree) : 0;
		if (strncmp(path, subtree, n) || (path[n] && path[n] != '/'))
			continue; /* not the part that we are in */
		memmove(path, path + n, strlen(path + n) + 1);
		if (!*path)
			strcpy(path, "/");
		snprintf(mount, PATH_SIZE, "%s%s", root, point);
		err = 0;
	}
	free(line);
	if (f)
		fclose(f);
	return err;
}

/* /proc/self/cgroup lists "ID:CONTROLLERS:PATH"; v2 is "0::PATH" (cgroups(7)). */
static void open_cgroups(struct headroom *h)
{
	char text[sizeof(h->memberships)], mount[PATH_SIZE], *line, *next;
	int err = read_file(h->membership, h->memberships, sizeof(h->memberships));
	char *v2 = NULL;

	close_levels(h);
	/* A kernel without cgroups has no limits either; without /proc there is no telling. */
	h->cgroups_known = err ? err == -EBADF && exists(h->root, "proc/self/status") : true;
	if (err)
		return;
	memcpy(text, h->memberships, sizeof(text));
	for (line = text; line && *line; line = next) {
		char *controllers, *path;

		next = strchr(line, '\n');
		if (next)
			*next++ = '\0';
		controllers = strchr(line, ':');
		path = controllers ? strchr(controllers + 1, ':') : NULL;
		if (!path)
			continue;
		*path++ = '\0';
		controllers++;
		if (!*controllers)
			v2 = path;
		if (!has_memory(controllers))
			continue;
		if (find_mount(h->root, true, path, mount))
			h->cgroups_known = false;
		else
			open_levels(h, mount, path, true);
		return; /* v1 has it, so v2 has not */
	}
	if (v2 && strcmp(v2, "/")) {
		if (find_mount(h->root, false, v2, mount))
			h->cgroups_known = false;
		else
			open_levels(h, mount, v2, false);
	} else if (v2 && !find_mount(h->root, false, v2, mount)) {
		open_levels(h, mount, v2, false); /* "/" can be a cgroup of its own in a namespace */
	}
}

void headroom_init(struct headroom *h)
{
	*h = (struct headroom){ .meminfo = -1, .status = -1, .membership = -1 };
}

void headroom_open(struct headroom *h, const char *root)
{
	h->root = root;
	h->meminfo = open_file(root, "proc/meminfo");
	h->status = open_file(root, "proc/self/status");
	h->membership = open_file(root, "proc/self/cgroup");
	open_cgroups(h);
}

void headroom_deinit(struct headroom *h)
{
	fd_close(h->meminfo);
	fd_close(h->status);
	fd_close(h->membership);
	close_levels(h);
	headroom_init(h);
}

int64_t headroom_vm_locked(const struct headroom *h)
{
	char text[4096];
	uint64_t kib;
	int err = read_file(h->status, text, sizeof(text));

	if (!err)
		err = find_value(text, "VmLck:", 10, &kib);
	return err ? err : (int64_t)(kib * 1024);
}

uint64_t headroom_memlock_limit(const struct headroom *h)
{
	char text[4096];
	uint64_t caps;
	struct rlimit limit;

	if (!read_file(h->status, text, sizeof(text)) && !find_value(text, "CapEff:", 16, &caps) &&
	    (caps & (1ULL << CAP_IPC_LOCK)))
		return UINT64_MAX;
	if (getrlimit(RLIMIT_MEMLOCK, &limit))
		return 0;
	return limit.rlim_cur == RLIM_INFINITY ? UINT64_MAX : limit.rlim_cur;
}

/* A cgroup's number; "max" is UINT64_MAX. Returns 0 or -errno. */
static int read_number(int fd, uint64_t *out)
{
	char text[64];
	int err = read_file(fd, text, sizeof(text));

	if (err)
		return err;
	*out = strncmp(text, "max", 3) ? strtoull(text, NULL, 10) : UINT64_MAX;
	return 0;
}

static uint64_t stat_value(const char *stat, bool v1, const char *key)
{
	char name[64];
	uint64_t value;

	/* v1's plain counters leave out the children. */
	snprintf(name, sizeof(name), "%s%s ", v1 ? "total_" : "", key);
	return find_value(stat, name, 10, &value) ? 0 : value;
}

/* Bytes that the cgroup may still put into swap; what cannot be read is nothing. */
static uint64_t swap_left(const struct cgroup_level *level)
{
	uint64_t limit, usage;

	if (read_number(level->swap_limit, &limit) || read_number(level->swap_usage, &usage))
		return 0;
	return limit > usage ? limit - usage : 0;
}

/*
 * What one cgroup leaves: its limit less its usage and a reserve, plus the page cache that the kernel gives up easily,
 * plus half of the anonymous memory that could go to swap.
 */
static uint64_t level_left(const struct cgroup_level *level, uint64_t swap_free)
{
	char stat[16384];
	uint64_t limit, high, usage, left, anon, swap = swap_left(level), reserve;

	if (read_number(level->limit, &limit) || read_number(level->usage, &usage))
		return 0;
	if (level->high >= 0 && !read_number(level->high, &high) && high < limit)
		limit = high;
	if (limit >= (uint64_t)INT64_MAX / 2) /* v1 says "none" with a number close to 2^63 */
		return UINT64_MAX;
	left = limit > usage ? limit - usage : 0;
	if (!read_file(level->stat, stat, sizeof(stat))) {
		left += stat_value(stat, level->v1, "inactive_file");
		anon = stat_value(stat, level->v1, "inactive_anon") + stat_value(stat, level->v1, "active_anon");
		if (swap > swap_free)
			swap = swap_free;
		left += (anon < swap ? anon : swap) / 2;
	}
	if (left > limit)
		left = limit;
	reserve = limit / 16 > 64 * MIB ? limit / 16 : 64 * MIB;
	return left > reserve ? left - reserve : 0;
}

/* Whether the process is still in the cgroups whose files are open. */
static bool has_moved(const struct headroom *h)
{
	char now[sizeof(h->memberships)];

	return h->membership >= 0 && (read_file(h->membership, now, sizeof(now)) || strcmp(now, h->memberships));
}

uint64_t headroom_memory(struct headroom *h, enum shortage *why)
{
	char text[8192];
	uint64_t available, total, reserve, left, swap_free = 0;

	*why = SHORTAGE_HOST_MEMORY;
	if (read_file(h->meminfo, text, sizeof(text)) || find_value(text, "MemAvailable:", 10, &available) ||
	    find_value(text, "MemTotal:", 10, &total))
		return 0;
	if (!find_value(text, "SwapFree:", 10, &swap_free))
		swap_free *= 1024;
	available *= 1024;
	reserve = total * 1024 / 50;
	if (reserve < 512 * MIB)
		reserve = 512 * MIB;
	left = available > reserve ? available - reserve : 0;
	if (has_moved(h))
		open_cgroups(h);
	if (!h->cgroups_known) {
		*why = SHORTAGE_CGROUP;
		return 0;
	}
	for (unsigned int i = 0; i < h->n_levels; i++) {
		uint64_t here = level_left(&h->levels[i], swap_free);

		if (here < left) {
			*why = SHORTAGE_CGROUP;
			left = here;
		}
	}
	return left;
}
