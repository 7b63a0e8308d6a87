/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One step of locking or unlocking.
 *
 * A step locks with mlock2(MLOCK_ONFAULT), which only marks the mapping and walks the pages that are there, and then
 * populates with MADV_POPULATE_WRITE, which holds mmap_lock for reading. A plain mlock() of absent pages would do the
 * same with worse holds. When both have returned 0, the pages were seen resident under a lock.
 */
#include "step.h"

#include "fd.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

enum { PAGE = 4096 };
static const uint64_t CREDIT_NS = 50 * 1000 * 1000;

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void *address(struct range r)
{
	return (void *)(uintptr_t)r.start;
}

/*
 * System calls made directly: what counts is what the kernel did, and libc's functions can be interposed (a QEMU built
 * with a sanitizer has an mlock() and a munlock() that do nothing).
 */
static int sys_mlock2(struct range r, unsigned int flags)
{
	return syscall(SYS_mlock2, address(r), range_size(r), flags) ? errno : 0;
}

static int sys_munlock(struct range r)
{
	return syscall(SYS_munlock, address(r), range_size(r)) ? errno : 0;
}

static void explain_rlimit(struct outcome *o, uint64_t limit)
{
	o->shortage = SHORTAGE_RLIMIT;
	snprintf(o->text, sizeof(o->text), "the locked-memory limit (RLIMIT_MEMLOCK) of QEMU is %" PRIu64 " KiB",
		 limit / 1024);
}

/* Whether @cost bytes may be allocated for @s. */
static bool afford(struct stepper *st, const struct step *s, uint64_t cost, struct outcome *o)
{
	const struct headroom_ask ask = {
		.reserve = s->host_reserve,
		.nodes = numa_bound(&st->headroom.numa, s->r.start),
		.now_ns = now_ns(),
	};
	uint64_t left;
	enum shortage why;

	if (cost <= st->credit && ask.now_ns < st->credit_until_ns && ask.nodes == st->credit_nodes) {
		st->credit -= cost;
		headroom_spend(&st->headroom, cost);
		return true;
	}
	left = headroom_memory(&st->headroom, &ask, &why);
	left = left > st->owed ? left - st->owed : 0;
	st->credit = left / 8;
	st->credit_until_ns = ask.now_ns + CREDIT_NS;
	st->credit_nodes = ask.nodes;
	if (st->credit < cost)
		st->credit = left / 2 >= cost ? cost : 0;
	if (cost <= st->credit) {
		st->credit -= cost;
		headroom_spend(&st->headroom, cost);
		return true;
	}
	o->shortage = why;
	headroom_explain(&st->headroom, why, left, o->text, sizeof(o->text));
	return false;
}

/*
 * Bytes of @s that locking will allocate. Only pages that are certainly there cost nothing: pages of our own in anonymous
 * memory, or any in a shared mapping. mincore() is not enough: it also counts the zero page, which a write replaces,
 * and the page cache under a private mapping, which a write copies. The bits are those of /proc/PID/pagemap
 * (Documentation/admin-guide/mm/pagemap.rst); all but the frame number can be read without privilege.
 */
static uint64_t cost_of(const struct stepper *st, const struct step *s)
{
	const uint64_t present = 1ULL << 63, file = 1ULL << 61, exclusive = 1ULL << 56;
	uint64_t entries[512], cost = 0;

	for (uint64_t at = s->r.start; at < s->r.end;) {
		size_t pages = (size_t)((s->r.end - at) / PAGE);
		size_t want = (pages < 512 ? pages : 512) * sizeof(entries[0]);

		if (pread(st->pagemap, entries, want, (off_t)(at / PAGE * sizeof(entries[0]))) != (ssize_t)want)
			return range_size(s->r);
		for (size_t i = 0; i < want / sizeof(entries[0]); i++) {
			bool there = entries[i] & present;

			if (!there || (s->shared ? 0 : (entries[i] & file) || !(entries[i] & exclusive)))
				cost += PAGE;
		}
		at += want / sizeof(entries[0]) * PAGE;
	}
	return cost;
}

bool step_admit(struct stepper *st, const struct step *s, struct outcome *o)
{
	uint64_t cost;

	*o = (struct outcome){ .shortage = SHORTAGE_NONE };
	if ((s->kind != STEP_LOCK && s->kind != STEP_POPULATE) || s->hugetlb)
		return true;
	if (s->kind == STEP_LOCK && st->headroom.status < 0) {
		/* Then a lock of ours could not be told from another's, which must never be released. */
		o->shortage = SHORTAGE_KERNEL;
		snprintf(o->text, sizeof(o->text), "QEMU's /proc/self/status cannot be read");
		return false;
	}
	cost = cost_of(st, s);
	if (s->kind == STEP_POPULATE)
		st->owed = st->owed > cost ? st->owed - cost : 0; /* it was asked for when it was armed */
	if (!afford(st, s, cost, o)) {
		st->owed += s->kind == STEP_POPULATE ? cost : 0;
		return false;
	}
	if (s->kind == STEP_LOCK && !s->prefault)
		st->owed += cost;
	return true;
}

/* Makes the pages of @r resident and writable. Returns 0 or -errno. */
static int populate(struct stepper *st, struct range r)
{
	int advice = MADV_POPULATE_WRITE;

	while (!st->no_populate) {
		if (!madvise(address(r), range_size(r), advice))
			return 0;
		if ((errno == EFAULT || errno == EINVAL) && advice == MADV_POPULATE_WRITE)
			advice = MADV_POPULATE_READ; /* a mapping that may not be written, or a kernel that knows neither */
		else if (errno == EINVAL)
			st->no_populate = true;
		else if (errno != EINTR && errno != EAGAIN)
			return -errno;
	}
	return -sys_mlock2(r, 0);
}

static void explain_errno(struct stepper *st, int err, const struct step *s, const char *doing, struct outcome *o)
{
	uint64_t limit = headroom_memlock_limit(&st->headroom);
	int64_t locked = headroom_vm_locked(&st->headroom);

	if (limit != UINT64_MAX && (err == EPERM || (err == ENOMEM && (uint64_t)locked + range_size(s->r) > limit))) {
		explain_rlimit(o, limit);
		return;
	}
	o->shortage = err == ENOMEM ? SHORTAGE_MAP_COUNT : SHORTAGE_KERNEL;
	snprintf(o->text, sizeof(o->text), "%s: %s", doing, strerror(err));
}

static void do_lock(struct stepper *st, const struct step *s, struct outcome *o)
{
	uint64_t size = range_size(s->r);
	/* Where something holds locks besides us, VmLck tells whether it holds this range. */
	bool others = st->others_lock && !s->hugetlb;
	int64_t before, after;
	bool ours;
	int err;

	before = others ? headroom_vm_locked(&st->headroom) : 0;
	err = sys_mlock2(s->r, MLOCK_ONFAULT);
	if (err) {
		/* A failure can come after a part was locked: take that back, unless it may be another's. */
		if (!others)
			sys_munlock(s->r);
		explain_errno(st, err, s, "locking guest RAM", o);
		return;
	}
	after = others ? headroom_vm_locked(&st->headroom) : 0;
	ours = !others || after - before == (int64_t)size;
	err = s->prefault ? -populate(st, s->r) : 0;
	/* Populating has copied what was merged. */
	if (!err && !s->shared)
		err = -merging_lock(&st->merging, s->r);
	if (err) {
		if (ours)
			sys_munlock(s->r);
		explain_errno(st, err, s, s->hugetlb ? "allocating huge pages" : "populating guest RAM", o);
		return;
	}
	o->foreign = !ours;
}

static void do_populate(struct stepper *st, const struct step *s, struct outcome *o)
{
	int err = -populate(st, s->r);

	if (!err && !s->shared)
		err = -merging_keep_out(&st->merging, s->r);
	if (err)
		explain_errno(st, err, s, "populating guest RAM", o);
}

static void do_unlock(struct stepper *st, const struct step *s, struct outcome *o)
{
	int err = sys_munlock(s->r);

	merging_let_in(&st->merging, s->r, s->mergeable);
	if (err)
		explain_errno(st, err, s, "unlocking guest RAM", o);
}

/* Unlocks what is there of @s: munlock() stops at the first hole, so then each page is asked for. */
static void do_let_go(const struct step *s)
{
	if (!sys_munlock(s->r))
		return;
	for (uint64_t at = s->r.start; at < s->r.end; at += PAGE)
		sys_munlock((struct range){ at, at + PAGE });
}

void stepper_init(struct stepper *st)
{
	*st = (struct stepper){ .pagemap = -1 };
	headroom_init(&st->headroom);
	merging_init(&st->merging);
}

void stepper_open(struct stepper *st, const char *root)
{
	headroom_open(&st->headroom, root);
	merging_open(&st->merging, root);
	st->pagemap = fd_above_stdio(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

void stepper_deinit(struct stepper *st)
{
	headroom_deinit(&st->headroom);
	merging_deinit(&st->merging);
	fd_close(st->pagemap);
	stepper_init(st);
}

void step_carry_out(struct stepper *st, const struct step *s, struct outcome *o)
{
	*o = (struct outcome){ .shortage = SHORTAGE_NONE };
	switch (s->kind) {
	case STEP_LOCK:
		do_lock(st, s, o);
		break;
	case STEP_POPULATE:
		do_populate(st, s, o);
		break;
	case STEP_UNLOCK:
		do_unlock(st, s, o);
		break;
	case STEP_LET_GO:
		do_let_go(s);
		break;
	case STEP_FORGET:
		break;
	case STEP_NONE:
	case STEP_PLAN:
	case STEP_STUCK:
	case STEP_SUSPENDED:
		assert(!"nothing to carry out");
	}
}
