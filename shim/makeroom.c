/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A page that is charged to a memory cgroup at its limit has the kernel reclaim, and kill when that fails 16 times, though there may be
 * plenty to swap out: all of it was used just now, or its statistics are old (freshen.c). A huge page has it reclaim as
 * well, but when that fails, it fails (mem_cgroup_oom() in mm/memcontrol.c kills for no more than 8 pages at once). So a huge page is
 * allocated, and given back, before as much is populated: by MADV_COLLAPSE (Linux 6.1), since a page fault would go on with small
 * pages. docs/kernel-facts/full-cgroup-kills.c shows it.
 */
#include "makeroom.h"

#include "clock.h"
#include "pacer.h"
#include "syscalls.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

static const uint64_t AGAIN_NS = 10ULL * NS_PER_S;
static const uint64_t LONG_NS = 100 * NS_PER_MS;
enum { FAILURES_MAX = 8 };

void makeroom_init(struct makeroom *m)
{
	*m = (struct makeroom){ .page = NULL };
}

static void drop(struct makeroom *m)
{
	if (m->page)
		munmap(m->page, PACER_CHUNK);
	m->page = NULL;
}

void makeroom_deinit(struct makeroom *m)
{
	drop(m);
	makeroom_init(m);
}

static struct range range_of(const struct makeroom *m)
{
	return (struct range){ (uintptr_t)m->page, (uintptr_t)m->page + PACER_CHUNK };
}

/* Gives the memory back, but for one small page: MADV_COLLAPSE needs something to begin with. */
static bool empty(struct makeroom *m)
{
	/* mlockall() locks this too, and what is locked cannot be given back. */
	if (!sys_munlock(range_of(m)) && !madvise(m->page, PACER_CHUNK, MADV_DONTNEED) &&
	    !madvise(m->page, PACER_CHUNK, MADV_NOHUGEPAGE)) {
		*(volatile char *)m->page = 1;
		if (!madvise(m->page, PACER_CHUNK, MADV_HUGEPAGE))
			return true;
	}
	drop(m);
	return false;
}

static bool map(struct makeroom *m)
{
	const uint64_t size = 2 * (uint64_t)PACER_CHUNK;
	/* Closed at first: with mlockall(MCL_FUTURE) all of it would be populated. */
	char *start = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t before;

	if (start == MAP_FAILED)
		return false;
	before = -(uintptr_t)start % PACER_CHUNK;
	m->page = start + before;
	if (before)
		munmap(start, before);
	munmap(m->page + PACER_CHUNK, size - before - PACER_CHUNK);
	sys_munlock(range_of(m));
	madvise(m->page, PACER_CHUNK, MADV_DONTDUMP);
	if (!mprotect(m->page, PACER_CHUNK, PROT_READ | PROT_WRITE))
		return empty(m);
	drop(m);
	return false;
}

/* Returns 0 or an errno. */
static int collapse(struct makeroom *m)
{
	return madvise(m->page, PACER_CHUNK, MADV_COLLAPSE) ? errno : 0;
}

int makeroom(struct makeroom *m)
{
	uint64_t began = now_ns();
	int err;

	if (began < m->again_ns)
		return -ENOSYS;
	err = m->page || map(m) ? collapse(m) : EINVAL;
	if (m->page && (err == EINVAL || err == EAGAIN) && now_ns() - began < LONG_NS) {
		*(volatile char *)m->page = 1; /* it was swapped out, or is about to be */
		err = collapse(m);
	}
	if (!err && empty(m)) {
		m->worked = true;
		m->failures = 0;
		return 0;
	}
	if (err == EBUSY) {
		m->worked = true;
		return -EBUSY;
	}
	if (m->page && m->worked && (err == EAGAIN || err == EINVAL) && m->failures++ < FAILURES_MAX)
		return -EBUSY;
	/* The kernel cannot do it, or the host has no huge page free. */
	m->again_ns = now_ns() + AGAIN_NS;
	return -ENOSYS;
}
