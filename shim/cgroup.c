/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the memory cgroups leave.
 *
 * Going over a memory cgroup's limit is not an error code but a SIGKILL, so what is left is read before memory is
 * allocated, and what cannot be read counts as not there.
 */
#include "cgroup.h"

#include "fd.h"
#include "smallfile.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint64_t MIB = 1 << 20;

/*
 * What is not locked of a limit is at least this part of what the memory that is not locked wants, in memory or in swap: with
 * much less, whatever is fetched from swap pushes out what is needed next, and there the kernel kills although swap is free.
 */
enum { CUSHION_PART = 2 };

static void close_levels(struct cgroups *c)
{
	for (unsigned int i = 0; i < c->n_levels; i++) {
		const struct cgroup_level *l = &c->levels[i];
		const int fds[] = { l->limit, l->high, l->usage, l->stat, l->swap_limit, l->swap_usage, l->events };

		for (size_t j = 0; j < sizeof(fds) / sizeof(fds[0]); j++)
			fd_close(fds[j]);
	}
	c->n_levels = 0;
}

/* Opens the files of one cgroup directory. Returns 0, or -errno: -ENOENT in v2 is one without a memory controller. */
static int open_level(struct cgroup_level *level, const char *dir, bool v1)
{
	*level = (struct cgroup_level){ .v1 = v1 };
	level->limit = smallfile_open(dir, v1 ? "memory.limit_in_bytes" : "memory.max");
	if (level->limit < 0)
		return -errno;
	level->high = v1 ? -1 : smallfile_open(dir, "memory.high");
	level->usage = smallfile_open(dir, v1 ? "memory.usage_in_bytes" : "memory.current");
	level->stat = smallfile_open(dir, "memory.stat");
	level->swap_limit = smallfile_open(dir, v1 ? "memory.memsw.limit_in_bytes" : "memory.swap.max");
	level->swap_usage = smallfile_open(dir, v1 ? "memory.memsw.usage_in_bytes" : "memory.swap.current");
	level->events = smallfile_open(dir, v1 ? "memory.failcnt" : "memory.events");
	return 0;
}

/* Opens the cgroup at @mount + @path and all its ancestors below @mount. What cannot be seen may have a limit. */
static void open_levels(struct cgroups *c, const char *mount, char *path, bool v1)
{
	for (;;) {
		char dir[SMALLFILE_PATH];
		char *slash;
		int err;

		if (c->n_levels == CGROUP_DEPTH_MAX ||
		    (size_t)snprintf(dir, sizeof(dir), "%s%s", mount, path) >= sizeof(dir)) {
			c->known = false;
			return;
		}
		err = open_level(&c->levels[c->n_levels], dir, v1);
		if (!err)
			c->n_levels++;
		else if (v1 || err != -ENOENT || !smallfile_exists(dir, "cgroup.procs"))
			c->known = false;
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
static int find_mount(const char *root, bool v1, char *path, char mount[SMALLFILE_PATH])
{
	char file[SMALLFILE_PATH], *line = NULL;
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
		snprintf(mount, SMALLFILE_PATH, "%s%s", root, point);
		err = 0;
	}
	free(line);
	if (f)
		fclose(f);
	return err;
}

/* /proc/self/cgroup lists "ID:CONTROLLERS:PATH"; v2 is "0::PATH" (cgroups(7)). */
static void open_all(struct cgroups *c)
{
	char text[sizeof(c->memberships)], mount[SMALLFILE_PATH], *line, *next;
	int err = smallfile_read(c->membership, c->memberships, sizeof(c->memberships));
	char *v2 = NULL;

	close_levels(c);
	/* A kernel without cgroups has no limits either; without /proc there is no telling. */
	c->known = err ? err == -EBADF && smallfile_exists(c->root, "proc/self/status") : true;
	if (err)
		return;
	memcpy(text, c->memberships, sizeof(text));
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
		if (find_mount(c->root, true, path, mount))
			c->known = false;
		else
			open_levels(c, mount, path, true);
		return; /* v1 has it, so v2 has not */
	}
	if (v2 && strcmp(v2, "/")) {
		if (find_mount(c->root, false, v2, mount))
			c->known = false;
		else
			open_levels(c, mount, v2, false);
	} else if (v2 && !find_mount(c->root, false, v2, mount)) {
		open_levels(c, mount, v2, false); /* "/" can be a cgroup of its own in a namespace */
	}
}

int cgroup_number(int fd, uint64_t *out)
{
	char text[64];
	int err = smallfile_read(fd, text, sizeof(text));

	if (err)
		return err;
	*out = strncmp(text, "max", 3) ? strtoull(text, NULL, 10) : UINT64_MAX;
	if (*out >= (uint64_t)INT64_MAX / 2) /* v1 says "none" with a number close to 2^63 */
		*out = UINT64_MAX;
	return 0;
}

uint64_t cgroup_stat(const char *stat, bool v1, const char *key)
{
	char name[64];
	uint64_t value;

	/* v1's plain counters leave out the children. */
	snprintf(name, sizeof(name), "%s%s ", v1 ? "total_" : "", key);
	return smallfile_value(stat, name, 10, &value) ? 0 : value;
}

uint64_t cgroup_unmapped(const char *stat, bool v1, bool inactive_only)
{
	uint64_t inactive = cgroup_stat(stat, v1, "inactive_file"), file = inactive + cgroup_stat(stat, v1, "active_file");
	uint64_t mapped = cgroup_stat(stat, v1, v1 ? "mapped_file" : "file_mapped");

	file = file > mapped ? file - mapped : 0;
	return inactive_only && inactive < file ? inactive : file;
}

/* What of the cgroup is in swap, and what it may still put there; false when that cannot be read. */
static bool read_swap(const struct cgroup_level *level, uint64_t usage, struct evictable *e)
{
	uint64_t limit, used;

	if (cgroup_number(level->swap_limit, &limit) || cgroup_number(level->swap_usage, &used))
		return false;
	e->swap = limit > used ? limit - used : 0;
	e->swapped = !level->v1 ? used : used > usage ? used - usage : 0;
	return true;
}

uint64_t cgroup_reserve(uint64_t limit)
{
	return limit / 16 > 64 * MIB ? limit / 16 : 64 * MIB;
}

/*
 * Reads @e and *@limit, which is UINT64_MAX for none. What it may swap may not be readable (a kernel without accounting of swap):
 * then @swap_unknown. Returns 0 or -errno.
 */
static int read_level(const struct cgroup_level *level, uint64_t swap_free, uint64_t swap_unknown, struct evictable *e,
		      uint64_t *inactive_file, uint64_t *limit)
{
	char stat[16384];
	uint64_t high, usage;
	int err = cgroup_number(level->limit, limit);

	*e = (struct evictable){ .free = 0 };
	*inactive_file = 0;
	if (!err)
		err = cgroup_number(level->usage, &usage);
	if (err)
		return err;
	if (level->high >= 0 && !cgroup_number(level->high, &high) && high < *limit)
		*limit = high;
	if (*limit == UINT64_MAX)
		return 0;
	e->free = *limit > usage ? *limit - usage : 0;
	if (!read_swap(level, usage, e))
		e->swap = swap_unknown;
	if (e->swap > swap_free)
		e->swap = swap_free;
	if (!smallfile_read(level->stat, stat, sizeof(stat))) {
		*inactive_file = cgroup_stat(stat, level->v1, "inactive_file");
		e->file = *inactive_file + cgroup_stat(stat, level->v1, "active_file");
		e->anon = cgroup_stat(stat, level->v1, "inactive_anon") + cgroup_stat(stat, level->v1, "active_anon");
	}
	return 0;
}

/*
 * What one cgroup leaves: its limit less its usage and a reserve, plus the page cache that the kernel gives up easily,
 * plus half of the anonymous memory that could go to swap; and no more than leaves the rest its cushion.
 */
static uint64_t level_left(const struct cgroup_level *level, uint64_t swap_free, bool of_file)
{
	uint64_t limit, left, inactive_file, reserve, most;
	struct evictable e;

	(void)of_file;
	if (read_level(level, swap_free, 0, &e, &inactive_file, &limit))
		return 0;
	if (limit == UINT64_MAX)
		return UINT64_MAX;
	left = e.free + inactive_file + (e.anon < e.swap ? e.anon : e.swap) / 2;
	if (left > limit)
		left = limit;
	reserve = cgroup_reserve(limit);
	left = left > reserve ? left - reserve : 0;
	most = evictable_beyond_cushion(&e);
	return left < most ? left : most;
}

static uint64_t level_pinnable(const struct cgroup_level *level, uint64_t swap_free, bool of_file)
{
	uint64_t limit, inactive_file;
	struct evictable e;

	if (read_level(level, swap_free, UINT64_MAX, &e, &inactive_file, &limit))
		return 0;
	return limit == UINT64_MAX ? UINT64_MAX : evictable_pinnable(&e, cgroup_reserve(limit), of_file);
}

uint64_t evictable_beyond_cushion(const struct evictable *e)
{
	uint64_t room = e->free + e->file + e->anon, cushion = (e->anon + e->swapped) / CUSHION_PART;

	if (!e->swap && !e->swapped)
		return UINT64_MAX;
	return room > cushion ? room - cushion : 0;
}

uint64_t evictable_pinnable(const struct evictable *e, uint64_t reserve, bool of_file)
{
	uint64_t swappable = e->anon < e->swap ? e->anon : e->swap, most = evictable_beyond_cushion(e);
	uint64_t left = e->free + e->file + swappable;

	left = left > reserve ? left - reserve : 0;
	if (!of_file)
		left = e->swap ? left + (e->anon - swappable) : UINT64_MAX;
	return left < most ? left : most;
}

void cgroups_follow(struct cgroups *c)
{
	char now[sizeof(c->memberships)];

	if (c->membership >= 0 && (smallfile_read(c->membership, now, sizeof(now)) || strcmp(now, c->memberships)))
		open_all(c);
}

void cgroups_init(struct cgroups *c)
{
	*c = (struct cgroups){ .root = "", .membership = -1, .lru_gen = -1 };
}

void cgroups_open(struct cgroups *c, const char *root)
{
	c->root = root;
	c->membership = smallfile_open(root, "proc/self/cgroup");
	c->lru_gen = smallfile_open(root, "sys/kernel/mm/lru_gen/enabled");
	open_all(c);
}

void cgroups_deinit(struct cgroups *c)
{
	fd_close(c->membership);
	fd_close(c->lru_gen);
	close_levels(c);
	cgroups_init(c);
}

/* The least that @ask says of any level; 0 when they cannot be known. */
static uint64_t tightest(struct cgroups *c, uint64_t swap_free, bool of_file,
			 uint64_t (*ask)(const struct cgroup_level *, uint64_t, bool))
{
	uint64_t least = UINT64_MAX;

	cgroups_follow(c);
	if (!c->known)
		return 0;
	for (unsigned int i = 0; i < c->n_levels; i++) {
		uint64_t here = ask(&c->levels[i], swap_free, of_file);

		if (here < least)
			least = here;
	}
	return least;
}

uint64_t cgroups_left(struct cgroups *c, uint64_t swap_free)
{
	return tightest(c, swap_free, false, level_left);
}

uint64_t cgroups_pinnable(struct cgroups *c, uint64_t swap_free, bool of_file)
{
	return tightest(c, swap_free, of_file, level_pinnable);
}

/* As cgroups_loose(), of one of them. */
static uint64_t level_loose(const struct cgroup_level *level, uint64_t enough)
{
	uint64_t limit, usage, free;
	char stat[16384];

	if (cgroup_number(level->limit, &limit) || limit == UINT64_MAX)
		return UINT64_MAX;
	if (cgroup_number(level->usage, &usage))
		return 0;
	free = limit > usage ? limit - usage : 0;
	if (free >= enough || smallfile_read(level->stat, stat, sizeof(stat)))
		return free;
	/* Some of the page cache may have to be written first. */
	return free + cgroup_unmapped(stat, level->v1, true) / 2;
}

uint64_t cgroups_loose(const struct cgroups *c, uint64_t enough)
{
	uint64_t least = UINT64_MAX;

	for (unsigned int i = 0; i < c->n_levels; i++) {
		uint64_t here = level_loose(&c->levels[i], enough);

		if (here < least)
			least = here;
	}
	return least;
}
