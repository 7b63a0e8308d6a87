/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One step of locking or unlocking: the system calls. Whether there is room for it is in admit.c, how much it is in sizing.c.
 *
 * A step locks with mlock2(MLOCK_ONFAULT), which only marks the mapping and walks the pages that are there, and then
 * populates with MADV_POPULATE_WRITE, which holds mmap_lock for reading. A plain mlock() of absent pages would do the
 * same with worse holds. When both have returned 0, the pages were seen resident under a lock.
 *
 * Each of these system calls is sized to take about the hold budget (step_size). Locking and populating the same bytes
 * can differ by orders of magnitude, so a range is locked at once and populated in pieces, with a rest between them, by
 * one thread or several; it is at least a huge page, because a page that lies across the end of a lock cannot be huge.
 */
#include "step.h"

#include "clock.h"
#include "fd.h"
#include "residency.h"
#include "smallfile.h"
#include "syscalls.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

enum { PAGE = 4096, LANE = 4 * PACER_CHUNK, LOOKED_NS = 300 * 1000, SHORT_NS = 50 * 1000 };

static void *address(struct range r)
{
	return (void *)(uintptr_t)r.start;
}

/* Whether anything in @r is locked: MS_INVALIDATE fails then, and does nothing else on Linux. It looks at mappings, not at pages. */
static bool any_locked(struct range r)
{
	return syscall(SYS_msync, address(r), range_size(r), MS_ASYNC | MS_INVALIDATE) && errno == EBUSY;
}

/* The beginning of @r that is either locked already, all of it but at most PACER_CHUNK, or not locked at all. */
static struct range find_alike(struct range r, bool *locked)
{
	uint64_t at = r.start + PAGE, end = r.end;

	*locked = false;
	if (!any_locked(r))
		return r;
	*locked = any_locked((struct range){ r.start, at });
	if (*locked) {
		while (at < end && at - r.start < PACER_CHUNK && any_locked((struct range){ at, at + PAGE }))
			at += PAGE;
		return (struct range){ r.start, at };
	}
	while (end - at > PAGE) { /* nothing before `at` is locked, something before `end` is */
		uint64_t middle = at + (end - at) / 2 / PAGE * PAGE;

		if (any_locked((struct range){ at, middle }))
			end = middle;
		else
			at = middle;
	}
	return (struct range){ r.start, at };
}

static void explain_rlimit(struct outcome *o, uint64_t limit)
{
	o->shortage = SHORTAGE_RLIMIT;
	snprintf(o->text, sizeof(o->text), "the locked-memory limit (RLIMIT_MEMLOCK) of QEMU is %" PRIu64 " KiB",
		 limit / 1024);
}

/* Makes the pages of @r resident and writable. Returns 0 or -errno. */
static int populate(struct stepper *st, struct range r)
{
	int advice = MADV_POPULATE_WRITE;

	while (!st->no_populate) {
		if (!madvise(address(r), range_size(r), advice))
			return 0;
		if ((errno == EFAULT || errno == EINVAL) && advice == MADV_POPULATE_WRITE) {
			advice = MADV_POPULATE_READ; /* a mapping that may not be written, or a kernel that knows neither */
		} else if (errno == EINVAL) {
			st->no_populate = true;
			/* Then mmap_lock is held for writing instead, and the kernel may not know how to hand it over. */
			rest_always(&st->rest);
		} else if (errno != EINTR && errno != EAGAIN) {
			return -errno;
		}
	}
	return -sys_mlock2(r, 0);
}

static void explain_errno(struct stepper *st, int err, const struct step *s, const char *doing, struct outcome *o)
{
	uint64_t limit = headroom_memlock_limit(&st->headroom);
	int64_t locked = headroom_vm_locked(&st->headroom); /* negative: nobody knows */

	if (limit != UINT64_MAX &&
	    (err == EPERM || (err == ENOMEM && locked >= 0 && (uint64_t)locked + range_size(s->r) > limit))) {
		explain_rlimit(o, limit);
		return;
	}
	if (s->hugetlb && (err == ENOMEM || err == EFAULT)) { /* mlock2() allocates them too, and splits no mapping */
		o->shortage = SHORTAGE_KERNEL;
		snprintf(o->text, sizeof(o->text), "no more huge pages of %" PRIu64 " KiB are free for QEMU", s->page_size / 1024);
		return;
	}
	if (s->shared && err == EFAULT) { /* where a guest that writes would be killed (SIGBUS) */
		o->shortage = SHORTAGE_KERNEL;
		snprintf(o->text, sizeof(o->text), "the file or file system of guest RAM has no more room");
		return;
	}
	o->shortage = err == ENOMEM ? SHORTAGE_MAP_COUNT : SHORTAGE_KERNEL;
	snprintf(o->text, sizeof(o->text), "%s: %s", doing, strerror(err));
}

/* How long a system call took. */
struct hold {
	uint64_t wall, cpu; /* ns */
};

static struct hold hold_begin(void)
{
	return (struct hold){ now_ns(), clock_ns(CLOCK_THREAD_CPUTIME_ID) };
}

static void hold_end(struct hold *h)
{
	h->cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID) - h->cpu;
	h->wall = now_ns() - h->wall;
}

/* ---- Populating, in pieces and by several threads ---- */

struct piecework {
	struct stepper *st;
	const struct step *s;
	atomic_size_t next; /* the piece to be taken next */
	atomic_size_t n_done;
	atomic_int err; /* the first failure, as errno */
	size_t n; /* pieces */
	size_t threads, lane; /* see piece_of() */
	size_t turns; /* n, rounded up to whole lanes */
	bool done[HOLDS_MAX];
	struct hold holds[HOLDS_MAX];
};

static size_t divide(size_t a, size_t b)
{
	return (a + b - 1) / b;
}

static struct range piece_at(const struct step *s, size_t i)
{
	struct range r = { s->r.start + i * s->piece, s->r.start + (i + 1) * s->piece };

	if (r.end > s->r.end)
		r.end = s->r.end;
	return r;
}

/*
 * Each thread has some pieces for itself that lie next to each other, its lane: neighbours would wait for the lock of the page table
 * that they share. The piece that comes at @turn:
 */
static size_t piece_of(const struct piecework *w, size_t turn)
{
	size_t all = w->lane * w->threads, at = turn % all;

	return turn - at + at % w->threads * w->lane + at / w->threads;
}

/* Lanes of the same length, so that the threads end together, and of at most LANE bytes. */
static void find_lanes(struct piecework *w)
{
	size_t longest = w->s->piece < LANE ? (size_t)(LANE / w->s->piece) : 1;
	size_t rounds = divide(w->n, longest * w->threads);

	assert(rounds);
	w->lane = divide(w->n, rounds * w->threads);
	w->turns = rounds * w->lane * w->threads;
}

static void do_pieces(void *arg, unsigned int number)
{
	struct piecework *w = arg;
	const struct step *s = w->s;
	struct rest_view *view = &w->st->views[number];
	size_t turn;

	if (number)
		rest_look(&w->st->rest, view); /* it has waited for the others */
	while (!atomic_load(&w->err) && (turn = atomic_fetch_add(&w->next, 1)) < w->turns) {
		size_t i = piece_of(w, turn);
		int err;

		if (i >= w->n)
			continue;
		if (turn && atomic_load(&w->st->cancel)) /* one has to be done, or nothing would ever be */
			break;
		step_freshen(w->st);
		w->holds[i] = hold_begin();
		err = -populate(w->st, piece_at(s, i));
		hold_end(&w->holds[i]);
		w->done[i] = !err;
		if (err)
			atomic_store(&w->err, err);
		else if (atomic_fetch_add(&w->n_done, 1) + 1 < w->n)
			rest_after(&w->st->rest, view, w->holds[i].wall);
	}
	if (number)
		rest_foresee_sleep(&w->st->rest, view);
}

/* What populating @bytes of @s tells: of the kind of page that most of the time went to. */
static void learn_populate(struct stepper *st, const struct step *s, uint64_t bytes, const struct hold *sum)
{
	double looked = s->looked ? (double)s->looked : 1;
	double swapped = (double)s->swapped / looked, present = (double)s->present / looked;

	if (s->resident || present > 0.95)
		pace_learn(&st->pace, PACE_CONFIRM, bytes, sum->wall, sum->cpu);
	else if (swapped > 0.1)
		pace_learn(&st->pace, PACE_SWAP_IN, (uint64_t)((double)bytes * swapped), sum->wall, sum->cpu);
	else
		pace_learn(&st->pace, PACE_FILL, (uint64_t)((double)bytes * (1 - present)), sum->wall, sum->cpu);
}

/* Looks whether what was absent has become huge pages: at the first that could be one. */
static void note_huge(struct stepper *st, const struct step *s, uint64_t end)
{
	uint64_t start = (s->r.start + PACER_CHUNK - 1) / PACER_CHUNK * PACER_CHUNK;

	if (s->page_size < PACER_CHUNK && step_is_absent(s) && start + PACER_CHUNK <= end)
		st->fills_huge = residency_count(st->pagemap, RESIDENCY_HUGE, (struct range){ start, start + PACER_CHUNK }, 1);
}

/* Populates @s from its start as far as it gets; *end is how far. Returns 0 or an errno. */
static int do_populate(struct stepper *st, const struct step *s, uint64_t *end, struct outcome *o)
{
	struct piecework w = { .st = st, .s = s };
	size_t n = (size_t)((range_size(s->r) + s->piece - 1) / s->piece), done = 0;
	uint64_t bytes = 0;
	struct hold sum = { 0, 0 };
	unsigned int helpers;

	w.n = n < HOLDS_MAX - 1 ? n : HOLDS_MAX - 1;
	helpers = workers_ready(&st->workers, (unsigned int)((w.n < s->threads ? w.n : s->threads) - 1));
	w.threads = helpers + 1;
	find_lanes(&w);
	workers_run(&st->workers, helpers, do_pieces, &w);
	for (size_t i = 0; i < w.n; i++) {
		if (!w.done[i])
			continue;
		done += done == i;
		o->holds[o->n_holds++] = w.holds[i].wall;
		bytes += range_size(piece_at(s, i));
		sum.wall += w.holds[i].wall;
		sum.cpu += w.holds[i].cpu;
	}
	learn_populate(st, s, bytes, &sum);
	*end = done ? piece_at(s, done - 1).end : s->r.start;
	note_huge(st, s, *end);
	return atomic_load(&w.err);
}

/* ---- Carrying out ---- */

/* Unlocks @s from @at on, which was locked and then not populated; but several threads may have got to a part of it. */
static void take_back(struct stepper *st, const struct step *s, uint64_t at, struct outcome *o)
{
	uint64_t bytes = pace_bytes(&st->pace, PACE_UNLOCK) / PACER_CHUNK * PACER_CHUNK;

	if (!bytes)
		bytes = PACER_CHUNK;
	while (at < s->r.end) {
		uint64_t end = (at + bytes) / PACER_CHUNK * PACER_CHUNK;
		struct hold hold;

		if (end > s->r.end || s->page_size > PACER_CHUNK)
			end = s->r.end;
		hold = hold_begin();
		if (sys_munlock((struct range){ at, end })) { /* a hole; or no mapping may be split, and the whole needs no split */
			end = s->r.end;
			sys_munlock((struct range){ at, end });
		}
		hold_end(&hold);
		if (o->n_holds < HOLDS_MAX)
			o->holds[o->n_holds++] = hold.wall;
		at = end;
		if (at < s->r.end && hold.wall > SHORT_NS)
			rest_after(&st->rest, st->views, hold.wall);
	}
}

static void do_lock(struct stepper *st, const struct step *whole, struct outcome *o)
{
	/* What is locked already is another's, so neither a failure nor a later release may unlock it. */
	bool foreign = false;
	const struct range r = whole->hugetlb ? whole->r : find_alike(whole->r, &foreign);
	struct step part = *whole, *s = &part;
	uint64_t size = range_size(r), end = r.end, present = s->present < size ? s->present : size;
	struct hold hold;
	int err;

	part.r = r;
	if (s->fills)
		o->filled = size - residency_count(st->pagemap, RESIDENCY_PRESENT, s->r, size);
	hold = hold_begin();
	err = sys_mlock2(s->r, MLOCK_ONFAULT);
	hold_end(&hold);
	if (err) {
		/* A failure can come after a part was locked: take that back. */
		if (!foreign && any_locked(s->r))
			take_back(st, s, s->r.start, o);
		explain_errno(st, err, s, "locking guest RAM", o);
		return;
	}
	o->holds[o->n_holds++] = hold.wall;
	if (s->resident)
		pace_learn(&st->pace, PACE_LOCK, size, hold.wall, hold.cpu);
	else if (present > size / 16)
		pace_learn(&st->pace, PACE_LOCK, present, hold.wall, hold.cpu);
	else
		pace_learn(&st->pace, PACE_MARK, size, hold.wall, hold.cpu);
	err = s->prefault ? do_populate(st, s, &end, o) : 0;
	if (end < s->r.end && !foreign)
		take_back(st, s, end, o);
	/* Populating has copied what was merged. */
	if (end > s->r.start && !s->shared) {
		int merging = -merging_lock(&st->merging, (struct range){ s->r.start, end });

		if (merging) {
			part.r.end = end;
			if (!foreign)
				take_back(st, s, s->r.start, o);
			end = s->r.start;
			err = merging;
		}
	}
	if (err)
		explain_errno(st, err, s, s->hugetlb ? "allocating huge pages" : "populating guest RAM", o);
	o->done = (struct range){ s->r.start, end };
	o->foreign = foreign;
}

static void do_unlock(struct stepper *st, const struct step *s, struct outcome *o)
{
	struct hold hold = hold_begin();
	int err = sys_munlock(s->r);

	hold_end(&hold);
	merging_let_in(&st->merging, s->r, s->mergeable);
	if (err) {
		explain_errno(st, err, s, "unlocking guest RAM", o);
		return;
	}
	o->holds[o->n_holds++] = hold.wall;
	if (s->huge)
		pace_learn(&st->pace, PACE_UNLOCK_HUGE, range_size(s->r), hold.wall, hold.cpu);
	else if (s->resident)
		pace_learn(&st->pace, PACE_UNLOCK, range_size(s->r), hold.wall, hold.cpu);
	o->done = s->r;
}

/* Unlocks @r; *longest is raised to what that took, in ns, if it is more. Returns 0 or an errno. */
static int munlock_timed(struct range r, uint64_t *longest)
{
	uint64_t took = now_ns();
	int err = sys_munlock(r);

	took = now_ns() - took;
	*longest = took > *longest ? took : *longest;
	return err;
}

/* Unlocks what is there of @s: munlock() stops at the first hole, so then each page is asked for. */
static void do_let_go(const struct step *s, struct outcome *o)
{
	uint64_t longest = 0;

	if (munlock_timed(s->r, &longest))
		for (uint64_t at = s->r.start; at < s->r.end; at += PAGE)
			munlock_timed((struct range){ at, at + PAGE }, &longest);
	o->holds[o->n_holds++] = longest;
}

void stepper_init(struct stepper *st)
{
	memset(st, 0, sizeof(*st));
	st->pagemap = -1;
	headroom_init(&st->headroom);
	makeroom_init(&st->makeroom);
	hugepages_init(&st->hugepages);
	merging_init(&st->merging);
	pace_init(&st->pace);
	rest_init(&st->rest);
	workers_init(&st->workers);
}

/* Whether a file has a list of processors that is not empty. */
static bool names_processors(const char *root, const char *name)
{
	int fd = smallfile_open(root, name);
	char text[4096];
	bool any = !smallfile_read(fd, text, sizeof(text)) && text[0] >= '0' && text[0] <= '9';

	fd_close(fd);
	return any;
}

void stepper_open(struct stepper *st, const char *root)
{
	headroom_open(&st->headroom, root);
	hugepages_open(&st->hugepages, root);
	merging_open(&st->merging, root);
	st->isolates = names_processors(root, "sys/devices/system/cpu/isolated") ||
		       names_processors(root, "sys/devices/system/cpu/nohz_full");
	st->pagemap = fd_above_stdio(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

void stepper_deinit(struct stepper *st)
{
	headroom_deinit(&st->headroom);
	makeroom_deinit(&st->makeroom);
	hugepages_deinit(&st->hugepages);
	merging_deinit(&st->merging);
	fd_close(st->pagemap);
	rest_deinit(&st->rest);
	stepper_init(st);
}

void step_carry_out(struct stepper *st, const struct step *s, struct outcome *o)
{
	uint64_t end = s->r.start;
	int err;

	*o = (struct outcome){ .shortage = SHORTAGE_NONE, .done = { s->r.start, s->r.start } };
	switch (s->kind) {
	case STEP_LOCK:
		do_lock(st, s, o);
		break;
	case STEP_POPULATE:
		err = do_populate(st, s, &end, o);
		if (end > s->r.start && !s->shared) {
			int merging = merging_keep_out(&st->merging, (struct range){ s->r.start, end });

			if (merging) {
				end = s->r.start;
				err = -merging;
			}
		}
		o->done.end = end;
		if (err)
			explain_errno(st, err, s, "populating guest RAM", o);
		break;
	case STEP_UNLOCK:
		do_unlock(st, s, o);
		break;
	case STEP_LET_GO:
		do_let_go(s, o);
		o->done = s->r;
		break;
	case STEP_FORGET:
		o->done = s->r;
		break;
	case STEP_NONE:
	case STEP_PLAN:
	case STEP_STUCK:
	case STEP_SUSPENDED:
		assert(!"nothing to carry out");
	}
}

void step_looked(struct stepper *st, uint64_t ns)
{
	st->looked_ns += ns;
	if (st->looked_ns < LOOKED_NS)
		return;
	rest_asleep(st->looked_ns);
	st->look_rests++;
	st->looked_ns = 0;
	step_freshen(st);
}

void step_freshen(struct stepper *st)
{
	uint64_t ns;

	if (atomic_flag_test_and_set(&st->freshening))
		return;
	if (now_ns() >= st->freshen_ns) {
		ns = cgroups_freshen(&st->headroom.cgroups);
		st->freshen_ns = ns == UINT64_MAX ? ns : now_ns() + ns;
	}
	atomic_flag_clear(&st->freshening);
}
