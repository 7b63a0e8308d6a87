/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Memory of NUMA nodes; numa(7), get_mempolicy(2). */
#include "numa.h"

#include "cgroup.h"
#include "fd.h"
#include "smallfile.h"

#include <limits.h>
#include <linux/mempolicy.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const uint64_t MIB = 1 << 20;

/* The kernel wants room for as many nodes as it was built for, at most 1024. */
enum { MASK_BITS = 1024, MASK_WORDS = MASK_BITS / (8 * sizeof(unsigned long)) };

void numa_init(struct numa *n)
{
	for (unsigned int i = 0; i < NUMA_NODES_MAX; i++)
		n->meminfo[i] = -1;
	n->online = 0;
}

void numa_open(struct numa *n, const char *root)
{
	char name[64];

	for (unsigned int i = 0; i < NUMA_NODES_MAX; i++) {
		snprintf(name, sizeof(name), "sys/devices/system/node/node%u/meminfo", i);
		n->meminfo[i] = smallfile_open(root, name);
		if (n->meminfo[i] >= 0)
			n->online |= 1ULL << i;
	}
}

void numa_deinit(struct numa *n)
{
	for (unsigned int i = 0; i < NUMA_NODES_MAX; i++)
		fd_close(n->meminfo[i]);
	numa_init(n);
}

/* Returns the nodes below NUMA_NODES_MAX, or 0 on any error: a kernel without NUMA, or a filter that forbids to ask. */
static uint64_t get_nodes(int *mode, uint64_t address, unsigned long flags)
{
	unsigned long mask[MASK_WORDS] = { 0 };

	if (syscall(SYS_get_mempolicy, mode, mask, (unsigned long)MASK_BITS + 1, address, flags))
		return 0;
	return mask[0];
}

uint64_t numa_bound(const struct numa *n, uint64_t address)
{
	int mode = MPOL_DEFAULT;
	uint64_t allowed = get_nodes(NULL, 0, MPOL_F_MEMS_ALLOWED);
	uint64_t nodes = get_nodes(&mode, address, MPOL_F_ADDR);

	if ((mode & ~MPOL_MODE_FLAGS) == MPOL_BIND && nodes)
		return nodes & allowed ? nodes & allowed : nodes;
	return n->online & ~allowed ? allowed : 0;
}

/* The number of KiB after "Node N @key". */
static uint64_t node_value(const char *text, unsigned int node, const char *key)
{
	char name[64];
	uint64_t kib;

	snprintf(name, sizeof(name), "Node %u %s:", node, key);
	return smallfile_value(text, name, 10, &kib) ? 0 : kib * 1024;
}

static uint64_t reserve_of(uint64_t total)
{
	return total / 50 > 64 * MIB ? total / 50 : 64 * MIB;
}

uint64_t numa_pinnable(const struct numa *n, uint64_t nodes, uint64_t swap_free, bool of_file)
{
	struct evictable e = { .swap = swap_free };
	uint64_t total = 0;

	for (unsigned int i = 0; i < NUMA_NODES_MAX; i++) {
		char text[8192];

		if (!(nodes >> i & 1) || smallfile_read(n->meminfo[i], text, sizeof(text)))
			continue;
		total += node_value(text, i, "MemTotal");
		e.free += node_value(text, i, "MemFree");
		e.file += node_value(text, i, "Inactive(file)") + node_value(text, i, "Active(file)");
		e.anon += node_value(text, i, "Inactive(anon)") + node_value(text, i, "Active(anon)");
	}
	return evictable_pinnable(&e, reserve_of(total), of_file);
}

uint64_t numa_left(const struct numa *n, uint64_t nodes)
{
	uint64_t left = 0, total = 0, reserve;

	for (unsigned int i = 0; i < NUMA_NODES_MAX; i++) {
		char text[8192];

		if (!(nodes >> i & 1) || smallfile_read(n->meminfo[i], text, sizeof(text)))
			continue;
		total += node_value(text, i, "MemTotal");
		left += node_value(text, i, "MemFree") + node_value(text, i, "Inactive(file)") +
			node_value(text, i, "Active(file)") / 2;
	}
	reserve = reserve_of(total);
	return left > reserve ? left - reserve : 0;
}
