/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the locked-memory limit, the memory cgroup and the host still allow. */
#ifndef RAMLOCK_HEADROOM_H
#define RAMLOCK_HEADROOM_H

#include <stdbool.h>
#include <stdint.h>

/* Why a guarantee is short; as in the protocol's "reason". */
enum shortage {
	SHORTAGE_NONE,
	SHORTAGE_RLIMIT,
	SHORTAGE_CGROUP,
	SHORTAGE_HOST_MEMORY,
	SHORTAGE_MAP_COUNT,
	SHORTAGE_NO_RAM,
	SHORTAGE_MIGRATION,
	SHORTAGE_KERNEL,
	SHORTAGE_COUNT,
};

const char *shortage_name(enum shortage s);

enum { CGROUP_DEPTH_MAX = 16 };

/* One memory cgroup that the process is in, or an ancestor of it. */
struct cgroup_level {
	int limit; /* memory.max, or v1 memory.limit_in_bytes */
	int high; /* memory.high: above it every allocation is slowed down; v1: none */
	int usage; /* memory.current, or v1 memory.usage_in_bytes */
	int stat; /* memory.stat */
	int swap_limit; /* memory.swap.max, or v1 memory.memsw.limit_in_bytes, which is for memory and swap together */
	int swap_usage; /* memory.swap.current, or v1 memory.memsw.usage_in_bytes */
	bool v1;
};

/*
 * Files are opened once, when the process may still: after -runas or -chroot it may not. They are regular files
 * only, never a directory, which would be a way out of QEMU's chroot.
 */
struct headroom {
	const char *root; /* "" but for tests */
	int meminfo;
	int status;
	int membership; /* /proc/self/cgroup */
	char memberships[4096]; /* ... as it was when `levels` were opened */
	struct cgroup_level levels[CGROUP_DEPTH_MAX];
	unsigned int n_levels;
	bool cgroups_known; /* false: there may be limits that we cannot see */
};

void headroom_init(struct headroom *h);

/*
 * Opens what can be opened below @root ("" but for tests). Must run in the process (not its parent) whose limits are
 * asked for.
 */
void headroom_open(struct headroom *h, const char *root);
void headroom_deinit(struct headroom *h);

/* VmLck in bytes, or -errno. */
int64_t headroom_vm_locked(const struct headroom *h);

/* RLIMIT_MEMLOCK in bytes; UINT64_MAX when unlimited or when CAP_IPC_LOCK makes it so. */
uint64_t headroom_memlock_limit(const struct headroom *h);

/*
 * Bytes of memory that can be allocated now without a risk of the kernel killing for it: the least of what the
 * host has available less a reserve (the larger of 512 MiB and 2 %) and of what each memory cgroup leaves less another
 * (the larger of 64 MiB and 1/16 of its limit): QEMU itself needs memory too, and locked memory gives none back. What
 * cannot be read counts as nothing left. A process that was moved to another cgroup is noticed. @why names the tightest.
 */
uint64_t headroom_memory(struct headroom *h, enum shortage *why);

#endif
