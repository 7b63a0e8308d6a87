/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The memory cgroups that the process is in, v1 and v2, with all their ancestors. */
#ifndef RAMLOCK_CGROUP_H
#define RAMLOCK_CGROUP_H

#include <stdbool.h>
#include <stdint.h>

enum { CGROUP_DEPTH_MAX = 16 };

/* One memory cgroup that the process is in, or an ancestor of it. */
struct cgroup_level {
	int limit; /* memory.max, or v1 memory.limit_in_bytes */
	int high; /* memory.high: above it every allocation is slowed down; v1: none */
	int usage; /* memory.current, or v1 memory.usage_in_bytes */
	int stat; /* memory.stat */
	int swap_limit; /* memory.swap.max, or v1 memory.memsw.limit_in_bytes, which is for memory and swap together */
	int swap_usage; /* memory.swap.current, or v1 memory.memsw.usage_in_bytes */
	int events; /* memory.events, or v1 memory.failcnt: it was at its limit */
	bool v1;
	uint64_t n_events; /* ... so often, at the last cgroups_freshen() */
	uint64_t at_limit_ns; /* ... and when it was there last; CLOCK_MONOTONIC */
};

/*
 * Files are opened once, when the process may still: after -runas or -chroot it may not. They are regular files
 * only, never a directory, which would be a way out of QEMU's chroot.
 */
struct cgroups {
	const char *root; /* "" but for tests */
	int membership; /* /proc/self/cgroup */
	char memberships[4096]; /* ... as it was when `levels` were opened */
	struct cgroup_level levels[CGROUP_DEPTH_MAX];
	unsigned int n_levels;
	bool known; /* false: there may be limits that we cannot see */
	int lru_gen; /* /sys/kernel/mm/lru_gen/enabled */
};

void cgroups_init(struct cgroups *c);
void cgroups_open(struct cgroups *c, const char *root);
void cgroups_deinit(struct cgroups *c);

/*
 * Bytes that the tightest of them leaves less a reserve (the larger of 64 MiB and 1/16 of its limit): QEMU itself needs
 * memory too, and locked memory gives none back. UINT64_MAX without a limit, 0 when it cannot be known. @swap_free is
 * what the host has. A process that was moved to another cgroup is noticed.
 */
uint64_t cgroups_left(struct cgroups *c, uint64_t swap_free);

/* What can be given up of an amount of memory, in bytes. */
struct evictable {
	uint64_t free; /* not used at all */
	uint64_t file; /* page cache */
	uint64_t anon; /* memory that swap is needed for, and not locked */
	uint64_t swap; /* how much of it swap can take */
	uint64_t swapped; /* what is there already, and will be wanted again */
};

/*
 * Bytes that may be taken from it, so that what is left is at least half of what else is wanted of it, in memory or in swap;
 * UINT64_MAX where nothing can be swapped.
 */
uint64_t evictable_beyond_cushion(const struct evictable *e);

/*
 * Bytes of memory that is there and may be locked, so that besides @reserve stays free or can be made so, and the cushion is
 * left; @of_file: of page cache. What swap cannot take stays there anyway, and may be locked.
 */
uint64_t evictable_pinnable(const struct evictable *e, uint64_t reserve, bool of_file);

/* The same of the tightest cgroup: UINT64_MAX without a limit, 0 when it cannot be known. */
uint64_t cgroups_pinnable(struct cgroups *c, uint64_t swap_free, bool of_file);

/*
 * Bytes that can be allocated in the tightest of them so that next to nothing is swapped out: UINT64_MAX without a limit, and no more
 * is looked for than @enough.
 */
uint64_t cgroups_loose(const struct cgroups *c, uint64_t enough);

/*
 * Where a cgroup is at its limit, has the kernel bring its statistics of it up to date, without which it may kill although there
 * is something to swap out, see freshen.c. Returns after how many ns it is to be called again; UINT64_MAX when that is not
 * urgent: limits may change, so after some seconds.
 */
uint64_t cgroups_freshen(struct cgroups *c);

/* ---- For cgroup.c and freshen.c ---- */

/* Opens the files again if the process has moved. */
void cgroups_follow(struct cgroups *c);

/* Reads a number; "max" is UINT64_MAX, and so is what v1 says for none. Returns 0 or -errno. */
int cgroup_number(int fd, uint64_t *out);

/* The counter @key in the text of memory.stat, children included; 0 when it is not there. */
uint64_t cgroup_stat(const char *stat, bool v1, const char *key);

/* Page cache that is mapped by nobody: it is given up easily. */
uint64_t cgroup_unmapped(const char *stat, bool v1, bool inactive_only);

/* What is not to be used of a limit. */
uint64_t cgroup_reserve(uint64_t limit);

#endif
