/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How often the kernel's statistics are brought up to date, read from trees of files; that it helps, tests/qemu/test_pressure.py shows. */
#include "cgroup.h"
#include "check.h"
#include "clock.h"
#include "tree.h"

#include <string.h>

static const uint64_t MIB = 1 << 20;
static const uint64_t NEVER = UINT64_MAX, RECLAIMING = 20 * NS_PER_MS, UNHURRIED = 100 * NS_PER_MS, LEAST = 2 * NS_PER_MS;
static struct cgroups c;

static void put_number(const char *name, uint64_t n)
{
	put(name, "%llu\n", (unsigned long long)n);
}

/* What is used of a v2 cgroup of 1 GiB, and how often it was at that limit. */
static void put_usage(uint64_t usage, int events)
{
	put_number("sys/fs/cgroup/vm/memory.current", usage);
	put("sys/fs/cgroup/vm/memory.events", "low 0\nhigh 7\nmax %d\noom 0\n", events);
}

static void put_anon(uint64_t inactive, uint64_t active)
{
	put("sys/fs/cgroup/vm/memory.stat", "anon 1\ninactive_anon %llu\nactive_anon %llu\n", (unsigned long long)inactive,
	    (unsigned long long)active);
}

static void begin(void)
{
	tree_begin();
	put("proc/self/cgroup", "0::/vm\n");
	put("proc/self/mountinfo", "40 31 0:37 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n");
	put("sys/fs/cgroup/vm/cgroup.procs", "1\n");
	put_number("sys/fs/cgroup/vm/memory.max", 1024 * MIB);
	put_usage(1020 * MIB, 1);
	put_anon(200 * MIB, 300 * MIB);
	cgroups_init(&c);
	cgroups_open(&c, root);
}

static void end(void)
{
	cgroups_deinit(&c);
	tree_end();
}

/* What it says when nothing else keeps this process waiting: it is not to cost too much. */
static uint64_t least(void)
{
	struct cgroups before = c;
	uint64_t soonest = NEVER;

	for (int i = 0; i < 50; i++) {
		uint64_t here;

		memcpy(c.levels, before.levels, sizeof(c.levels));
		here = cgroups_freshen(&c);
		if (here < soonest)
			soonest = here;
	}
	return soonest;
}

/* As if it had been at its limit some seconds ago. */
static void later(void)
{
	c.levels[0].at_limit_ns -= 2 * NS_PER_S;
}

static void at_the_limit_it_is_as_often_as_the_list_can_be_emptied(void)
{
	begin();
	CHECK_EQ(least(), 200 * MIB / 16);
	put_usage(1020 * MIB, 2);
	put_anon(80 * MIB, 100 * MIB);
	CHECK_EQ(least(), 80 * MIB / 16);
	put_usage(1020 * MIB, 3);
	put_anon(0, 96 * 12 * MIB); /* it can be filled by then */
	CHECK_EQ(least(), 96 * MIB / 16);
	put_usage(1020 * MIB, 4);
	put_anon(4 * MIB, 0);
	CHECK_EQ(least(), LEAST);
	CHECK_EQ(least(), LEAST); /* it may be about to reclaim again */
	later();
	CHECK_EQ(least(), UNHURRIED);
	put_usage(1020 * MIB, 5);
	put("sys/fs/cgroup/vm/memory.stat", "inactive_anon 1\nactive_anon 1\ninactive_file %d\nactive_file %d\n", 40 << 20, 40 << 20);
	CHECK_EQ(least(), UNHURRIED);
	put_usage(1020 * MIB, 6);
	put("sys/fs/cgroup/vm/memory.stat", "inactive_anon 1\nactive_anon 1\ninactive_file %d\n", 1 << 30);
	CHECK_EQ(least(), 1024 * MIB / 4);
	put_usage(1020 * MIB, 7);
	put("sys/fs/cgroup/vm/memory.stat", "inactive_anon %d\nactive_anon 1\ninactive_file %d\nfile_mapped %d\n", 256 << 20, 1 << 30, 1 << 30);
	CHECK_EQ(least(), 256 * MIB / 16); /* in use, for all one knows */
	end();
}

static void away_from_the_limit_it_is_when_that_can_be_reached(void)
{
	begin();
	put_usage(1024 * MIB - 64 * MIB, 9);
	CHECK_EQ(least(), RECLAIMING);
	put_usage(512 * MIB, 9);
	CHECK_EQ(least(), 512 * MIB / 4);
	put_number("sys/fs/cgroup/vm/memory.max", 64 * 1024 * MIB);
	CHECK_EQ(least(), NEVER);
	put("sys/fs/cgroup/vm/memory.max", "max\n");
	CHECK_EQ(least(), NEVER);
	end();
}

static void the_tightest_ancestor_counts(void)
{
	begin();
	put("proc/self/cgroup", "0::/vm/inner\n");
	put("sys/fs/cgroup/vm/inner/memory.max", "max\n");
	cgroups_follow(&c);
	put_anon(80 * MIB, 0);
	CHECK_EQ(least(), 80 * MIB / 16);
	end();
}

static void version_one_counts_its_failures(void)
{
	begin();
	put("proc/self/cgroup", "4:memory:/vm\n");
	put("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n");
	put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
	put_number("sys/fs/cgroup/memory/vm/memory.limit_in_bytes", 256 * MIB);
	put_number("sys/fs/cgroup/memory/vm/memory.usage_in_bytes", 250 * MIB);
	put("sys/fs/cgroup/memory/vm/memory.failcnt", "5\n");
	put("sys/fs/cgroup/memory/vm/memory.stat", "inactive_anon 0\ntotal_inactive_anon %d\ntotal_active_anon 0\n", 80 << 20);
	cgroups_follow(&c);
	CHECK_EQ(least(), 80 * MIB / 16);
	later();
	CHECK_EQ(least(), UNHURRIED);
	put("sys/fs/cgroup/memory/vm/memory.failcnt", "6\n");
	CHECK_EQ(least(), 80 * MIB / 16);
	end();
}

static void what_is_loose_is_that_of_the_tightest(void)
{
	begin();
	CHECK_EQ(cgroups_loose(&c, 32 * MIB), 4 * MIB);
	put("sys/fs/cgroup/vm/memory.stat", "inactive_file %d\n", 20 << 20);
	CHECK_EQ(cgroups_loose(&c, 32 * MIB), 14 * MIB);
	put("sys/fs/cgroup/vm/memory.stat", "inactive_file %d\nfile_mapped %d\n", 20 << 20, 16 << 20); /* in use, for all one knows */
	CHECK_EQ(cgroups_loose(&c, 32 * MIB), 6 * MIB);
	put("sys/fs/cgroup/vm/memory.stat", "inactive_file %d\n", 20 << 20);
	CHECK_EQ(cgroups_loose(&c, 2 * MIB), 4 * MIB); /* not looked for */
	put_usage(1030 * MIB, 1); /* its limit was lowered */
	CHECK_EQ(cgroups_loose(&c, 32 * MIB), 10 * MIB);
	put("sys/fs/cgroup/vm/memory.max", "max\n");
	CHECK_EQ(cgroups_loose(&c, 32 * MIB), NEVER);
	end();
}

static void another_kind_of_reclaim_needs_no_help(void)
{
	begin();
	cgroups_deinit(&c);
	put("sys/kernel/mm/lru_gen/enabled", "0x0007\n");
	cgroups_open(&c, root);
	CHECK_EQ(least(), NEVER);
	put("sys/kernel/mm/lru_gen/enabled", "0x0000\n");
	CHECK_EQ(least(), 200 * MIB / 16);
	end();
}

CHECK_MAIN(CASE(at_the_limit_it_is_as_often_as_the_list_can_be_emptied), CASE(away_from_the_limit_it_is_when_that_can_be_reached),
	   CASE(the_tightest_ancestor_counts), CASE(version_one_counts_its_failures), CASE(what_is_loose_is_that_of_the_tightest), CASE(another_kind_of_reclaim_needs_no_help))
