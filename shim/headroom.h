/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the locked-memory limit, the memory cgroups, the host and its NUMA nodes still allow. */
#ifndef RAMLOCK_HEADROOM_H
#define RAMLOCK_HEADROOM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cgroup.h"
#include "numa.h"

/* Why a guarantee is short; as in the protocol's "reason". */
enum shortage {
	SHORTAGE_NONE,
	SHORTAGE_RLIMIT,
	SHORTAGE_CGROUP,
	SHORTAGE_HOST_MEMORY,
	SHORTAGE_NUMA_NODE,
	SHORTAGE_MAP_COUNT,
	SHORTAGE_NO_RAM,
	SHORTAGE_MIGRATION,
	SHORTAGE_DISCARDED,
	SHORTAGE_KERNEL,
	SHORTAGE_COUNT,
};

const char *shortage_name(enum shortage s);

/*
 * What a controller on the host has seen of cgroups that we cannot see: in a cgroup namespace the ancestors of its root, in
 * another root perhaps all of them. It is good for a short time only, and what is allocated counts against it. Once there was one,
 * we know that there is more than we can see, and without one nothing is left.
 */
struct lease {
	_Atomic int64_t left; /* bytes */
	_Atomic uint64_t until_ns; /* CLOCK_MONOTONIC; 0: there was none ever */
};

/* Files are opened once, when the process may still; as in struct cgroups. */
struct headroom {
	int meminfo;
	int status;
	int maps;
	int max_map_count;
	uint64_t total; /* bytes of memory that the host has */
	struct cgroups cgroups;
	struct numa numa;
	struct lease lease; /* written by the control thread too */
	bool cgroups_unknown; /* at the last headroom_memory() what they leave was not known */
	bool pins_lease; /* at the last headroom_pinnable() the lease was asked as well */
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

/* Whether the process has a VFIO device or an iommufd open, which pins guest RAM on account of RLIMIT_MEMLOCK. */
bool headroom_has_vfio(const char *root);

/* What the host keeps: what is @asked for, but 128 MiB at least; for 0 the larger of 512 MiB and 2 %. */
uint64_t headroom_reserve(const struct headroom *h, uint64_t asked);

/* @left bytes may be allocated in the cgroups until @until_ns, as the controller sees it. */
void headroom_lease(struct headroom *h, uint64_t left, uint64_t until_ns);

struct headroom_ask {
	uint64_t reserve; /* as for headroom_reserve() */
	uint64_t nodes; /* as from numa_bound() */
	uint64_t now_ns; /* CLOCK_MONOTONIC */
};

/*
 * Bytes of memory that can be allocated now without a risk of the kernel killing for it: the least of what the host has
 * available less its reserve, of what the cgroups leave as we see them and as the controller does, and of what the nodes
 * have. What cannot be read counts as nothing left. @why names the tightest.
 */
uint64_t headroom_memory(struct headroom *h, const struct headroom_ask *ask, enum shortage *why);

/*
 * Bytes of memory that is there already and may be locked: memory that cannot be swapped out any more is not there for
 * others, and with too much of it the kernel finds nothing to give to QEMU, and kills. @of_file: page cache. @why as above.
 */
uint64_t headroom_pinnable(struct headroom *h, const struct headroom_ask *ask, bool of_file, enum shortage *why);

/* @cost bytes are going to be allocated. */
void headroom_spend(struct headroom *h, uint64_t cost);

/* @size bytes that are there are going to be locked, as headroom_pinnable() has allowed. */
void headroom_spend_pin(struct headroom *h, uint64_t size);

/* Says in @text that @why leaves @left bytes. */
void headroom_explain(const struct headroom *h, enum shortage why, uint64_t left, char *text, size_t size);

/*
 * How many mappings may be added, with @ranges locked ones there: all of ours stay within 1/8 of vm.max_map_count, and with
 * QEMU's own within 3/4, since a process that has reached it can map nothing more.
 */
uint64_t headroom_mappings(const struct headroom *h, size_t ranges);

#endif
