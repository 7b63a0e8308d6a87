/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A page that is charged to a memory cgroup at its limit has the kernel reclaim, and kill when that fails 16 times, though there may be
 * plenty to swap out: all of it was used just now, or its statistics are old (freshen.c). A huge page has it reclaim as
 * well, but when that fails, it fails (mem_cgroup_oom() in mm/memcontrol.c kills for no more than 8 pages at once). So a huge page is
 * allocated, and given back, before as much is populated: by MADV_COLLAPSE (Linux 6.1), since a page fault would go on with small
 * pages. docs/kernel-facts/full-cgroup-kills.c shows it.
 */
#include "makeroom.h"

#include "pacer.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

void makeroom_init(struct makeroom *m)
{
	*m = (struct makeroom){ .page = NULL };
}

void makeroom_deinit(struct makeroom *m)
{
	if (m->page)
		munmap(m->page, PACER_CHUNK);
	makeroom_init(m);
}

/* Gives the memory back, but for one small page: MADV_COLLAPSE needs something to begin with. */
static int empty(struct makeroom *m)
{
	if (madvise(m->page, PACER_CHUNK, MADV_DONTNEED) || madvise(m->page, PACER_CHUNK, MADV_NOHUGEPAGE))
		return -1;
	*(volatile char *)m->page = 1;
	return madvise(m->page, PACER_CHUNK, MADV_HUGEPAGE);
}

static bool map(struct makeroom *m)
{
	const uint64_t size = 2 * (uint64_t)PACER_CHUNK;
	char *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t before;

	if (start == MAP_FAILED)
		return false;
	before = -(uintptr_t)start % PACER_CHUNK;
	m->page = start + before;
	if (before)
		munmap(start, before);
	munmap(m->page + PACER_CHUNK, size - before - PACER_CHUNK);
	munlock(m->page, PACER_CHUNK); /* with mlockall(MCL_FUTURE) it is */
	madvise(m->page, PACER_CHUNK, MADV_DONTDUMP);
	madvise(m->page, PACER_CHUNK, MADV_DONTFORK);
	return !empty(m);
}

int makeroom(struct makeroom *m)
{
	int err;

	if (m->useless || (!m->page && !map(m))) {
		m->useless = true;
		return -ENOSYS;
	}
	err = madvise(m->page, PACER_CHUNK, MADV_COLLAPSE) ? errno : 0;
	if (err == EINVAL) { /* the small page was swapped out */
		*(volatile char *)m->page = 1;
		err = madvise(m->page, PACER_CHUNK, MADV_COLLAPSE) ? errno : 0;
	}
	m->works |= !err || err == EBUSY;
	if (err == EBUSY || (err == EINVAL && m->works))
		return -EBUSY;
	m->useless = err == EINVAL || (!err && empty(m));
	return err || m->useless ? -ENOSYS : 0;
}
