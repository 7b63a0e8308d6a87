/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is left, read from trees of files as the kernel shows them. */
#include "check.h"
#include "headroom.h"

#include <ftw.h>
#include <limits.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

static const uint64_t MIB = 1 << 20;
static char root[64];
static struct headroom h;

static void put(const char *name, const char *fmt, ...)
{
	char path[PATH_MAX];
	va_list ap;
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", root, name);
	for (char *slash = path + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = '\0';
		mkdir(path, 0755);
		*slash = '/';
	}
	f = fopen(path, "w");
	if (!f)
		abort();
	va_start(ap, fmt);
	vfprintf(f, fmt, ap);
	va_end(ap);
	fclose(f);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type, (void)ftw;
	return remove(path);
}

/* A host with 64 GiB, 8 GiB of it available, and no swap. */
static void begin(void)
{
	snprintf(root, sizeof(root), "/tmp/ramlock-test-XXXXXX");
	CHECK(mkdtemp(root));
	put("proc/meminfo", "MemTotal: %d kB\nMemFree: 1 kB\nMemAvailable: %d kB\nSwapFree: 0 kB\n", 64 << 20, 8 << 20);
	put("proc/self/status", "Name:\tqemu\nCapEff:\t0000000000000000\nVmLck:\t    1024 kB\n");
	put("proc/self/cgroup", "0::/\n");
}

static uint64_t left(enum shortage *why)
{
	uint64_t bytes;

	headroom_init(&h);
	headroom_open(&h, root);
	bytes = headroom_memory(&h, why);
	headroom_deinit(&h);
	return bytes;
}

static void end(void)
{
	nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void the_host_keeps_a_reserve(void)
{
	enum shortage why;

	begin();
	/* 2 % of 64 GiB is more than 512 MiB. */
	CHECK_EQ(left(&why), 8192 * MIB - 64 * 1024 * MIB / 50);
	CHECK_EQ(why, SHORTAGE_HOST_MEMORY);
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\n", 8 << 20, 400 << 10);
	CHECK_EQ(left(&why), 0);
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
	put("sys/fs/cgroup/cgroup.controllers", "memory\n");
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
	put("sys/fs/cgroup/cgroup.controllers", "memory\n");
	put("proc/self/cgroup", "0::/machine/vm\n");
	put("sys/fs/cgroup/machine/memory.max", "%lld\n", 3072 * (long long)MIB);
	put("sys/fs/cgroup/machine/memory.current", "%lld\n", 2048 * (long long)MIB);
	put("sys/fs/cgroup/machine/memory.stat", "anon 1\ninactive_anon 0\nactive_anon 0\ninactive_file %lld\n",
	    100 * (long long)MIB);
	put("sys/fs/cgroup/machine/vm/memory.max", "max\n");
	put("sys/fs/cgroup/machine/vm/memory.current", "%lld\n", 2048 * (long long)MIB);
	put("sys/fs/cgroup/machine/vm/memory.stat", "inactive_file 0\n");
	CHECK_EQ(left(&why), 1124 * MIB);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	/* Over its limit already. */
	put("sys/fs/cgroup/machine/memory.current", "%lld\n", 4096 * (long long)MIB);
	put("sys/fs/cgroup/machine/memory.stat", "inactive_file 0\n");
	CHECK_EQ(left(&why), 0);
	end();
}

static void version_one_counts_the_children(void)
{
	enum shortage why;

	begin();
	put("proc/self/cgroup", "9:cpuset:/x\n4:memory:/vm\n0::/\n");
	put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
	put("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n");
	put("sys/fs/cgroup/memory/memory.stat", "");
	put("sys/fs/cgroup/memory/vm/memory.limit_in_bytes", "%lld\n", 1024 * (long long)MIB);
	put("sys/fs/cgroup/memory/vm/memory.usage_in_bytes", "%lld\n", 900 * (long long)MIB);
	put("sys/fs/cgroup/memory/vm/memory.stat", "inactive_file 7\ntotal_inactive_file %lld\n", 50 * (long long)MIB);
	CHECK_EQ(left(&why), 174 * MIB);
	CHECK_EQ(why, SHORTAGE_CGROUP);
	/* With swap, half of the anonymous memory could make room. */
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapFree: %d kB\n", 64 << 20, 8 << 20, 1 << 20);
	put("sys/fs/cgroup/memory/vm/memory.stat", "total_inactive_anon %lld\ntotal_active_anon %lld\n",
	    300 * (long long)MIB, 100 * (long long)MIB);
	CHECK_EQ(left(&why), 324 * MIB);
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

static void this_machine_can_be_read(void)
{
	enum shortage why;

	headroom_init(&h);
	headroom_open(&h, "");
	CHECK(headroom_vm_locked(&h) >= 0);
	CHECK(h.cgroups_known);
	headroom_memory(&h, &why);
	headroom_deinit(&h);
}

CHECK_MAIN(CASE(the_host_keeps_a_reserve), CASE(what_cannot_be_read_is_not_there), CASE(the_tightest_ancestor_counts),
	   CASE(version_one_counts_the_children), CASE(the_locked_memory_limit), CASE(this_machine_can_be_read))
