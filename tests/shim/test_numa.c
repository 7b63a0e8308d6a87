/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Memory of NUMA nodes: which are meant, by real mappings of this process, and what they have, by a tree of files. */
#include "check.h"
#include "headroom.h"
#include "numa.h"
#include "tree.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static const uint64_t MIB = 1 << 20;
static struct headroom h;

static void put_node(int node, int total_mib, int free_mib, int inactive_mib, int active_mib)
{
	char name[64];

	snprintf(name, sizeof(name), "sys/devices/system/node/node%d/meminfo", node);
	put(name,
	    "Node %d MemTotal: %d kB\nNode %d MemFree:  %d kB\nNode %d Active(file): %d kB\nNode %d Inactive(file): %d kB\n",
	    node, total_mib << 10, node, free_mib << 10, node, active_mib << 10, node, inactive_mib << 10);
}

static void begin(void)
{
	tree_begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\n", 64 << 20, 32 << 20);
	put("proc/self/status", "VmLck: 0 kB\n");
	put("proc/self/cgroup", "0::/\n");
	put_node(0, 32768, 20000, 1000, 500);
	put_node(1, 32768, 1000, 100, 200);
	headroom_init(&h);
	headroom_open(&h, root);
}

static void end(void)
{
	headroom_deinit(&h);
	tree_end();
}

static void a_node_has_what_is_free_less_a_reserve(void)
{
	const uint64_t total = 32768 * MIB;

	begin();
	CHECK_EQ(h.numa.online, 3);
	CHECK_EQ(numa_left(&h.numa, 1), 21250 * MIB - total / 50);
	CHECK_EQ(numa_left(&h.numa, 2), 1200 * MIB - total / 50);
	CHECK_EQ(numa_left(&h.numa, 3), 22450 * MIB - 2 * total / 50);
	CHECK_EQ(numa_left(&h.numa, 4), 0); /* there is none */
	put_node(1, 1024, 50, 0, 0);
	CHECK_EQ(numa_left(&h.numa, 2), 0);
	end();
}

static void the_node_is_tighter_than_the_host(void)
{
	struct headroom_ask ask = { .nodes = 2 };
	enum shortage why;
	char text[256];

	begin();
	CHECK_EQ(headroom_memory(&h, &ask, &why), numa_left(&h.numa, 2));
	CHECK_EQ(why, SHORTAGE_NUMA_NODE);
	CHECK(!strcmp(shortage_name(why), "numa-node"));
	headroom_explain(&h, why, MIB, text, sizeof(text));
	CHECK_CONTAINS(text, "NUMA");
	ask.nodes = 1;
	headroom_memory(&h, &ask, &why);
	CHECK_EQ(why, SHORTAGE_NUMA_NODE);
	ask.nodes = 0;
	CHECK(headroom_memory(&h, &ask, &why) > numa_left(&h.numa, 1));
	CHECK_EQ(why, SHORTAGE_HOST_MEMORY);
	end();
}

static void what_is_there_is_not_all_locked(void)
{
	struct headroom_ask ask = { .nodes = 2 };
	const uint64_t reserve = 32768 * MIB / 50;
	enum shortage why;

	begin();
	CHECK_EQ(numa_pinnable(&h.numa, 2, 0, true), 1300 * MIB - reserve);
	CHECK_EQ(numa_pinnable(&h.numa, 2, 0, false), UINT64_MAX); /* nothing can go to swap: locked or not is the same */
	put("sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: %d kB\nNode 1 MemFree: %d kB\nNode 1 Active(anon): %d kB\n", 32768 << 10,
	    1000 << 10, 600 << 10);
	CHECK_EQ(numa_pinnable(&h.numa, 2, 8192 * MIB, false), 1600 * MIB - reserve);
	CHECK_EQ(numa_pinnable(&h.numa, 2, 8192 * MIB, true), 1600 * MIB - reserve);
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapFree: %d kB\n", 64 << 20, 32 << 20, 8 << 20);
	CHECK_EQ(headroom_pinnable(&h, &ask, false, &why), 1600 * MIB - reserve);
	CHECK_EQ(why, SHORTAGE_NUMA_NODE);
	end();
}

static void a_bound_mapping_is_known(void)
{
	char *p = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned long node0 = 1;
	struct numa n;

	CHECK(p != MAP_FAILED);
	numa_init(&n);
	numa_open(&n, "");
	if (n.online == 1) { /* with several, a cpuset may bind this process already */
		CHECK_EQ(numa_bound(&n, (uintptr_t)p), 0);
		if (syscall(SYS_mbind, p, 4096, MPOL_BIND, &node0, 64UL, 0))
			fprintf(stderr, "this kernel binds no memory: not tested\n");
		else
			CHECK_EQ(numa_bound(&n, (uintptr_t)p), 1);
		CHECK_EQ(numa_bound(&n, (uintptr_t)p + 4096), 0);
		CHECK(numa_left(&n, 1) > 0);
	}
	CHECK_EQ(numa_bound(&n, 0), 0); /* nothing is mapped there */
	numa_deinit(&n);
	munmap(p, 8192);
}

CHECK_MAIN(CASE(a_node_has_what_is_free_less_a_reserve), CASE(the_node_is_tighter_than_the_host),
	   CASE(what_is_there_is_not_all_locked), CASE(a_bound_mapping_is_known))
