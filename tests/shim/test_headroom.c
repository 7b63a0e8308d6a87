/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is left, read from trees of files as the kernel shows them. */
#include "check.h"
#include "headroom.h"
#include "tree.h"

static const uint64_t MIB = 1 << 20;
static struct headroom h;
static struct headroom_ask ask; /* for the usual reserve, of any node, at time 0 */

/* A host with 64 GiB, 8 GiB of it available, and no swap. */
static void begin(void)
{
	tree_begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemFree: 1 kB\nMemAvailable: %d kB\nSwapFree: 0 kB\n", 64 << 20, 8 << 20);
	put("proc/self/status", "Name:\tqemu\nCapEff:\t0000000000000000\nVmLck:\t    1024 kB\n");
	put("proc/self/cgroup", "0::/\n");
}

static uint64_t left(enum shortage *why)
{
	uint64_t bytes;

	headroom_init(&h);
	headroom_open(&h, root);
	bytes = headroom_memory(&h, &ask, why);
	headroom_deinit(&h);
	return bytes;
}

static void end(void)
{
	tree_end();
}

static const char v1_mount[] = "35 31 0:32 %s /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
static const char v2_mount[] = "40 31 0:37 %s /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n";

/* A v2 cgroup directory; sizes in MiB. */
static void put_v2(const char *dir, int limit, int usage)
{
	char name[PATH_MAX];

	snprintf(name, sizeof(name), "%s/cgroup.procs", dir);
	put(name, "1\n");
	snprintf(name, sizeof(name), "%s/memory.max", dir);
	put(name, "%lld\n", limit * (long long)MIB);
	snprintf(name, sizeof(name), "%s/memory.current", dir);
	put(name, "%lld\n", usage * (long long)MIB);
}

static void the_host_keeps_a_reserve(void)
{
	enum shortage why;

	begin();
	/* 2 % of 64 GiB is more than 512 MiB. */
	CHECK_EQ(left(&why), 8192 * MIB - 64 * 1024 * MIB / 50);
	CHECK_EQ(why, SHORTAGE_HOST_MEMORY);
	ask.reserve = 3 * 1024 * MIB;
	CHECK_EQ(left(&why), 5 * 1024 * MIB);
	ask.reserve = 0;
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\n", 8 << 20, 400 << 10);
	CHECK_EQ(left(&why), 0);
	headroom_init(&h);
	headroom_open(&h, root);
	CHECK_EQ(headroom_reserve(&h, 0), 512 * MIB); /* 2 % of 8 GiB is less */
	CHECK_EQ(headroom_reserve(&h, 700 * MIB), 700 * MIB);
	CHECK_EQ(headroom_reserve(&h, 1), 128 * MIB); /* so that nobody can have the host killed */
	headroom_deinit(&h);
	end();
}

static void what_cannot_be_read_is_not_there(void)
{
	enum shortage why;
	char path[PATH_MAX];

	begin();
	put("proc/meminfo", "nonsense");
	CHECK_EQ(left(&why), 0);
	end();
	begin();
	put("proc/self/cgroup", "5:cpu,memory:/vm\n"); /* but nothing is mounted */
	CHECK_EQ(left(&why), 0);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	end();
	begin();
	put("proc/self/mountinfo", v2_mount, "/");
	put("sys/fs/cgroup/cgroup.procs", "1\n");
	put("sys/fs/cgroup/vm/memory.max", "%d\n", 1 << 30);
	put("proc/self/cgroup", "0::/vm\n"); /* no memory.current */
	CHECK_EQ(left(&why), 0);
	end();
	begin();
	snprintf(path, sizeof(path), "%s/proc/self/cgroup", root);
	unlink(path);
	CHECK(left(&why) > 0); /* a kernel without cgroups */
	snprintf(path, sizeof(path), "%s/proc/self/status", root);
	unlink(path);
	CHECK_EQ(left(&why), 0); /* no /proc at all */
	end();
}

static void the_tightest_ancestor_counts(void)
{
	enum shortage why;

	begin();
	put("proc/self/mountinfo", v2_mount, "/");
	put("sys/fs/cgroup/cgroup.procs", "1\n");
	put("proc/self/cgroup", "0::/machine/vm\n");
	put_v2("sys/fs/cgroup/machine", 3200, 2048);
	put("sys/fs/cgroup/machine/memory.stat", "anon 1\ninactive_anon 0\nactive_anon 0\ninactive_file %lld\n",
	    100 * (long long)MIB);
	put_v2("sys/fs/cgroup/machine/vm", 0, 2048);
	put("sys/fs/cgroup/machine/vm/memory.max", "max\n");
	CHECK_EQ(left(&why), (3200 - 2048 + 100 - 200) * MIB); /* a reserve of 1/16 */
	CHECK_EQ(why, SHORTAGE_CGROUP);
	/* memory.high throttles whoever is above it. */
	put("sys/fs/cgroup/machine/vm/memory.high", "%lld\n", 2400 * (long long)MIB);
	CHECK_EQ(left(&why), (2400 - 2048 - 150) * MIB);
	/* A level without the memory controller has no limit. */
	put("sys/fs/cgroup/machine/vm/deeper/cgroup.procs", "1\n");
	put("proc/self/cgroup", "0::/machine/vm/deeper\n");
	CHECK_EQ(left(&why), (2400 - 2048 - 150) * MIB);
	/* Over its limit already. */
	put_v2("sys/fs/cgroup/machine", 3200, 4096);
	CHECK_EQ(left(&why), 0);
	end();
}

static void version_one_counts_the_children(void)
{
	enum shortage why;

	begin();
	put("proc/self/mountinfo", v1_mount, "/");
	put("proc/self/cgroup", "9:cpuset:/x\n4:memory:/vm\n0::/\n");
	put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
	put("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n");
	put("sys/fs/cgroup/memory/memory.stat", "\n");
	put("sys/fs/cgroup/memory/vm/memory.limit_in_bytes", "%lld\n", 1024 * (long long)MIB);
	put("sys/fs/cgroup/memory/vm/memory.usage_in_bytes", "%lld\n", 800 * (long long)MIB);
	put("sys/fs/cgroup/memory/vm/memory.stat", "inactive_file 7\ntotal_inactive_file %lld\n", 50 * (long long)MIB);
	CHECK_EQ(left(&why), (1024 - 800 + 50 - 64) * MIB);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	/* With swap, half of the anonymous memory could make room; if the cgroup may swap. */
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapFree: %d kB\n", 64 << 20, 8 << 20, 1 << 20);
	put("sys/fs/cgroup/memory/vm/memory.stat", "total_inactive_anon %lld\ntotal_active_anon %lld\n",
	    300 * (long long)MIB, 100 * (long long)MIB);
	CHECK_EQ(left(&why), (1024 - 800 - 64) * MIB);
	put("sys/fs/cgroup/memory/vm/memory.memsw.limit_in_bytes", "%lld\n", 1000 * (long long)MIB);
	put("sys/fs/cgroup/memory/vm/memory.memsw.usage_in_bytes", "%lld\n", 700 * (long long)MIB);
	CHECK_EQ(left(&why), (1024 - 800 - 64 + 150) * MIB);
	end();
}

static uint64_t pinnable(bool of_file, enum shortage *why)
{
	uint64_t bytes;

	headroom_init(&h);
	headroom_open(&h, root);
	bytes = headroom_pinnable(&h, &ask, of_file, why);
	headroom_deinit(&h);
	return bytes;
}

static void what_can_be_evicted_is_not_all_locked(void)
{
	enum shortage why;

	begin();
	put("proc/self/mountinfo", v2_mount, "/");
	put("proc/self/cgroup", "0::/vm\n");
	put("sys/fs/cgroup/cgroup.procs", "1\n");
	put_v2("sys/fs/cgroup/vm", 1024, 1000);
	put("sys/fs/cgroup/vm/memory.stat", "inactive_anon %lld\nactive_anon %lld\ninactive_file %lld\nactive_file %lld\n",
	    300 * (long long)MIB, 400 * (long long)MIB, 10 * (long long)MIB, 20 * (long long)MIB);
	/* Without swap it stays there, locked or not; page cache does not. */
	CHECK_EQ(pinnable(false, &why), UINT64_MAX);
	CHECK_EQ(pinnable(true, &why), 0);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	/* With swap for 200 MiB of it, of page cache as much as leaves the reserve; of the rest as much as leaves the cushion. */
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapFree: %d kB\nActive(anon): %d kB\nInactive(anon): 0 kB\n", 64 << 20, 8 << 20,
	    8 << 20, 1 << 20);
	put("sys/fs/cgroup/vm/memory.swap.max", "%lld\n", 300 * (long long)MIB);
	put("sys/fs/cgroup/vm/memory.swap.current", "%lld\n", 100 * (long long)MIB);
	CHECK_EQ(pinnable(false, &why), (24 + 30 + 700 - (700 + 100) / 2) * MIB);
	CHECK_EQ(pinnable(true, &why), (24 + 30 + 200 - 64) * MIB);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	/* The host: 400 MiB are available, 2 % of 64 GiB are kept, and 1 GiB can go to swap. */
	put("sys/fs/cgroup/vm/memory.max", "max\n");
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapFree: %d kB\nActive(anon): %d kB\nInactive(anon): 0 kB\n", 64 << 20, 400 << 10,
	    8 << 20, 1 << 20);
	CHECK_EQ(pinnable(false, &why), 400 * MIB + 1024 * MIB - 64 * 1024 * MIB / 50);
	CHECK_EQ(why, SHORTAGE_HOST_MEMORY);
	/* Who knows what cannot be seen? */
	put("proc/self/cgroup", "0::/elsewhere/../vm\n");
	CHECK_EQ(pinnable(false, &why), 0);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	end();
}

static void who_swaps_keeps_a_cushion(void)
{
	enum shortage why;

	begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapTotal: %d kB\nSwapFree: %d kB\n", 64 << 20, 8 << 20, 4 << 20,
	    4 << 20);
	put("proc/self/mountinfo", v1_mount, "/");
	put("proc/self/cgroup", "4:memory:/vm\n");
	put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
	put("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n");
	put("sys/fs/cgroup/memory/memory.stat", "\n");
	put("sys/fs/cgroup/memory/vm/memory.limit_in_bytes", "%lld\n", 400 * (long long)MIB);
	put("sys/fs/cgroup/memory/vm/memory.usage_in_bytes", "%lld\n", 400 * (long long)MIB);
	put("sys/fs/cgroup/memory/vm/memory.stat", "total_inactive_anon %lld\ntotal_active_anon %lld\n", 200 * (long long)MIB,
	    140 * (long long)MIB);
	/* 340 MiB can be evicted, 160 are in swap: at least 250 have to stay so. */
	put("sys/fs/cgroup/memory/vm/memory.memsw.limit_in_bytes", "9223372036854771712\n");
	put("sys/fs/cgroup/memory/vm/memory.memsw.usage_in_bytes", "%lld\n", 560 * (long long)MIB);
	CHECK_EQ(pinnable(false, &why), 90 * MIB);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	CHECK_EQ(left(&why), 90 * MIB);
	put("sys/fs/cgroup/memory/vm/memory.memsw.usage_in_bytes", "%lld\n", 800 * (long long)MIB);
	CHECK_EQ(pinnable(false, &why), 0);
	CHECK_EQ(left(&why), 0);
	/* Where nobody tells what the cgroup has in swap, it is taken to be able to swap, but not to make room by it. */
	put("sys/fs/cgroup/memory/vm/memory.memsw.usage_in_bytes", "%s", "");
	put("sys/fs/cgroup/memory/vm/memory.memsw.limit_in_bytes", "%s", "");
	CHECK_EQ(left(&why), 0);
	end();

	/* The host: 1 GiB can be evicted and 8 GiB are in swap, of which 1 GiB is in memory as well. */
	begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapTotal: %d kB\nSwapFree: %d kB\nSwapCached: %d kB\nActive(anon): %d kB\n",
	    64 << 20, 4 << 20, 16 << 20, 8 << 20, 1 << 20, 1 << 20);
	CHECK_EQ(left(&why), (5 - 4) * 1024 * MIB);
	CHECK_EQ(why, SHORTAGE_HOST_MEMORY);
	CHECK_EQ(pinnable(false, &why), (5 - 4) * 1024 * MIB);
	end();
}

static void a_container_sees_its_part_of_the_tree(void)
{
	enum shortage why;

	begin();
	put("proc/self/mountinfo", v1_mount, "/docker/abc");
	put("proc/self/cgroup", "4:memory:/docker/abc\n");
	put("sys/fs/cgroup/memory/memory.limit_in_bytes", "%lld\n", 1024 * (long long)MIB);
	put("sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n");
	CHECK_EQ(left(&why), 960 * MIB);
	/* A cgroup below it that cannot be seen could have any limit. */
	put("proc/self/cgroup", "4:memory:/docker/abc/sub\n");
	CHECK_EQ(left(&why), 0);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	/* And so could one beside it. */
	put("proc/self/cgroup", "4:memory:/docker/abcdef\n");
	CHECK_EQ(left(&why), 0);
	end();
}

static void a_move_to_another_cgroup_is_noticed(void)
{
	enum shortage why;

	begin();
	put("proc/self/mountinfo", v2_mount, "/");
	put("sys/fs/cgroup/cgroup.procs", "1\n");
	put("proc/self/cgroup", "0::/wide\n");
	put_v2("sys/fs/cgroup/wide", 4096, 0);
	put_v2("sys/fs/cgroup/tight", 128, 0);
	headroom_init(&h);
	headroom_open(&h, root);
	CHECK_EQ(headroom_memory(&h, &ask, &why), (4096 - 256) * MIB);
	put("proc/self/cgroup", "0::/tight\n");
	CHECK_EQ(headroom_memory(&h, &ask, &why), 64 * MIB);
	put("proc/self/cgroup", "0::/gone\n");
	CHECK_EQ(headroom_memory(&h, &ask, &why), 0);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	headroom_deinit(&h);
	end();
}

static void the_locked_memory_limit(void)
{
	begin();
	headroom_init(&h);
	headroom_open(&h, root);
	CHECK_EQ(headroom_vm_locked(&h), MIB);
	CHECK(headroom_memlock_limit(&h) > 0);
	headroom_deinit(&h);
	put("proc/self/status", "CapEff:\t0000000000004000\n");
	headroom_init(&h);
	headroom_open(&h, root);
	CHECK(headroom_memlock_limit(&h) == UINT64_MAX); /* CAP_IPC_LOCK */
	CHECK(headroom_vm_locked(&h) < 0);
	headroom_deinit(&h);
	end();
}

static void a_controller_tells_what_cannot_be_seen(void)
{
	enum shortage why;
	char text[256];

	begin();
	put("proc/self/cgroup", "5:cpu,memory:/vm\n"); /* nothing is mounted here */
	headroom_init(&h);
	headroom_open(&h, root);
	ask.now_ns = 1000;
	CHECK_EQ(headroom_memory(&h, &ask, &why), 0);
	headroom_explain(&h, why, 0, text, sizeof(text));
	CHECK_CONTAINS(text, "cannot be read");
	headroom_lease(&h, 300 * MIB, 2000);
	CHECK_EQ(headroom_memory(&h, &ask, &why), 300 * MIB);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	headroom_explain(&h, why, 300 * MIB, text, sizeof(text));
	CHECK_CONTAINS(text, "300 MiB");
	headroom_spend(&h, 200 * MIB);
	CHECK_EQ(headroom_memory(&h, &ask, &why), 100 * MIB);
	headroom_spend(&h, 200 * MIB);
	CHECK_EQ(headroom_memory(&h, &ask, &why), 0);
	headroom_lease(&h, UINT64_MAX, 2000);
	CHECK(headroom_memory(&h, &ask, &why) > 300 * MIB);
	CHECK_EQ(why, SHORTAGE_HOST_MEMORY);
	ask.now_ns = 2000; /* it has ended */
	CHECK_EQ(headroom_memory(&h, &ask, &why), 0);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	headroom_deinit(&h);

	/* Never weaker than what is seen here, whichever is the tighter. */
	put("proc/self/mountinfo", v2_mount, "/");
	put("proc/self/cgroup", "0::/vm\n");
	put("sys/fs/cgroup/cgroup.procs", "1\n");
	put_v2("sys/fs/cgroup/vm", 1024, 0);
	headroom_init(&h);
	headroom_open(&h, root);
	headroom_lease(&h, 2048 * MIB, 3000);
	CHECK_EQ(headroom_memory(&h, &ask, &why), 960 * MIB);
	headroom_lease(&h, 100 * MIB, 3000);
	CHECK_EQ(headroom_memory(&h, &ask, &why), 100 * MIB);
	ask.now_ns = 3000; /* there is more than can be seen, and nobody tells it any more */
	CHECK_EQ(headroom_memory(&h, &ask, &why), 0);
	headroom_explain(&h, why, 0, text, sizeof(text));
	CHECK_CONTAINS(text, "cannot be read");
	headroom_deinit(&h);
	ask.now_ns = 0;
	end();
}

static void what_is_locked_counts_against_what_was_told(void)
{
	enum shortage why;

	begin();
	put("proc/self/cgroup", "5:cpu,memory:/vm\n");
	headroom_init(&h);
	headroom_open(&h, root);
	headroom_lease(&h, 300 * MIB, 2000);
	CHECK_EQ(headroom_pinnable(&h, &ask, false, &why), UINT64_MAX); /* no swap: nothing can be evicted anyway */
	headroom_spend_pin(&h, 200 * MIB);
	CHECK_EQ(headroom_pinnable(&h, &ask, true, &why), 300 * MIB); /* page cache can */
	headroom_spend_pin(&h, 200 * MIB);
	CHECK_EQ(headroom_pinnable(&h, &ask, true, &why), 100 * MIB);
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapFree: %d kB\n", 64 << 20, 8 << 20, 1 << 20);
	CHECK_EQ(headroom_pinnable(&h, &ask, false, &why), 100 * MIB);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	headroom_deinit(&h);
	end();
}

static void put_maps(int lines)
{
	char name[PATH_MAX];
	FILE *f;

	put("proc/self/maps", "%s", "");
	snprintf(name, sizeof(name), "%s/proc/self/maps", root);
	f = fopen(name, "w");
	for (int i = 0; i < lines; i++)
		fprintf(f, "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n");
	fclose(f);
}

static uint64_t mappings(size_t ranges)
{
	uint64_t n;

	headroom_init(&h);
	headroom_open(&h, root);
	n = headroom_mappings(&h, ranges);
	headroom_deinit(&h);
	return n;
}

static void mappings_run_out_before_the_kernel_says_so(void)
{
	begin();
	put("proc/sys/vm/max_map_count", "8000\n");
	put_maps(500);
	CHECK_EQ(mappings(0), 1000); /* 1/8 for all of ours */
	CHECK_EQ(mappings(400), 200);
	CHECK_EQ(mappings(501), 0);
	put_maps(5900); /* QEMU has nearly 3/4 of them itself */
	CHECK_EQ(mappings(0), 100);
	put_maps(7000);
	CHECK_EQ(mappings(0), 0);
	end();
	begin(); /* nothing to be read: the kernel's usual number, half of it used */
	CHECK_EQ(mappings(0), 65530 / 8);
	end();
}

static void put_link(const char *name, const char *to)
{
	char path[PATH_MAX];

	put("proc/self/fd/.made", "%s", "");
	snprintf(path, sizeof(path), "%s/proc/self/fd/%s", root, name);
	unlink(path);
	CHECK(!symlink(to, path));
}

static void devices_of_the_host_are_noticed(void)
{
	static const char *const links[] = { "/dev/vfio/12", "/dev/vfio/devices/vfio0", "anon_inode:[vfio-device]", "/dev/iommu" };

	begin();
	CHECK(!headroom_has_vfio(root));
	put_link("3", "anon_inode:kvm-vm");
	put_link("4", "/dev/vfiox");
	CHECK(!headroom_has_vfio(root));
	for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++) {
		put_link("5", links[i]);
		CHECK(headroom_has_vfio(root));
	}
	end();
	CHECK(!headroom_has_vfio(""));
}

static void this_machine_can_be_read(void)
{
	enum shortage why;

	headroom_init(&h);
	headroom_open(&h, "");
	CHECK(headroom_vm_locked(&h) >= 0);
	CHECK(h.cgroups.known);
	headroom_memory(&h, &ask, &why);
	CHECK(headroom_mappings(&h, 0) > 0);
	headroom_deinit(&h);
}

CHECK_MAIN(CASE(the_host_keeps_a_reserve), CASE(what_cannot_be_read_is_not_there), CASE(the_tightest_ancestor_counts),
	   CASE(version_one_counts_the_children), CASE(what_can_be_evicted_is_not_all_locked),
	   CASE(who_swaps_keeps_a_cushion),
	   CASE(a_container_sees_its_part_of_the_tree),
	   CASE(a_move_to_another_cgroup_is_noticed), CASE(the_locked_memory_limit),
	   CASE(a_controller_tells_what_cannot_be_seen), CASE(what_is_locked_counts_against_what_was_told),
	   CASE(mappings_run_out_before_the_kernel_says_so),
	   CASE(devices_of_the_host_are_noticed), CASE(this_machine_can_be_read))
