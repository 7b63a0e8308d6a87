/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Memory of NUMA nodes: what is bound to a node (policy=bind, cpuset.mems) can meet the OOM killer while the host as a whole
 * has plenty.
 */
#ifndef RAMLOCK_NUMA_H
#define RAMLOCK_NUMA_H

#include <stdbool.h>
#include <stdint.h>

enum { NUMA_NODES_MAX = 64 };

struct numa {
	int meminfo[NUMA_NODES_MAX]; /* /sys/devices/system/node/nodeN/meminfo; -1: no such node */
	uint64_t online; /* a bit for each node that has one */
};

void numa_init(struct numa *n);
void numa_open(struct numa *n, const char *root);
void numa_deinit(struct numa *n);

/* The nodes that memory at @address has to come from, a bit for each; 0: it may come from anywhere. */
uint64_t numa_bound(const struct numa *n, uint64_t address);

/*
 * Bytes that @nodes have together: free, and page cache that is given up easily, less a reserve (the larger of 64 MiB
 * and 2 %). What cannot be read is nothing.
 */
uint64_t numa_left(const struct numa *n, uint64_t nodes);

/* Bytes of memory that is there on @nodes and may be locked; as evictable_pinnable(), with the same reserve. @swap_free is the host's. */
uint64_t numa_pinnable(const struct numa *n, uint64_t nodes, uint64_t swap_free, bool of_file);

#endif
