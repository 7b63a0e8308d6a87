/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Keeps the guarantee true.
 *
 * Theory of operation: locks and locked pages can be lost without anybody telling us. Every 5 s while something is held,
 * the lock thread looks. Three signs are cheap:
 *
 * - VmLck tells that a lock was taken away, though not which. Locking a range again costs 0.3 us when it is locked already,
 *   and VmLck grows where it was not: so finding and mending are one walk. While the VM is the target of a postcopy
 *   migration nothing may be locked, so QEMU is asked just before; then what is left of ours is let go instead.
 * - Pages under a lock of a shared mapping go when somebody punches a hole into its file. The page table tells; it
 *   is read in pieces of well below 100 us. Private memory can lose locked pages only by an operation that was made for
 *   it, so it is read too, but at most PRIVATE_BYTES at a time.
 * - KSM says whether it has merged anything. Only then pages are looked at, and the range is made unmergeable.
 *
 * What was lost is doubted (books_doubt) or dropped, and the thread's ordinary steps, with all their checks, repair it.
 */
#include "locker_inside.h"
#include "syscalls.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static const uint64_t PERIOD_NS = 5ULL * NS_PER_S;
static const uint64_t BUSY_NS = 1ULL * NS_PER_S; /* before QEMU's busy main loop is asked again */
static const uint64_t CHECK_WAIT_NS = 100 * NS_PER_MS;
static const uint64_t LONG_CALL_NS = 50 * NS_PER_US; /* after such a call, others are let in */
static const uint64_t PIECE = 32 << 20;
static const uint64_t CHUNK = 2 << 20;
static const uint64_t PRIVATE_BYTES = 8ULL << 30;

void upkeep_init(struct upkeep *u)
{
	*u = (struct upkeep){ .others = -1 };
}

/* Bytes of @e that VmLck counts: hugetlb is left out. */
static uint64_t counted(const struct locker *l, const struct extents *e)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < l->layout.n; i++)
		if (l->layout.v[i].backing != BACKING_HUGETLB)
			sum += extents_overlap(e, l->layout.v[i].host);
	return sum;
}

uint64_t upkeep_expected(const struct locker *l)
{
	return counted(l, &l->books.held);
}

uint64_t upkeep_deadline(struct locker *l)
{
	struct upkeep *u = &l->upkeep;

	if (!l->known)
		return UINT64_MAX;
	if (u->wanted)
		return 0;
	if (!l->books.held.total) {
		u->due_ns = 0;
		return UINT64_MAX;
	}
	if (!u->due_ns)
		u->due_ns = now_ns() + PERIOD_NS;
	return u->due_ns;
}

bool upkeep_is_due(const struct locker *l)
{
	/* What was given back is no loss: that goes first. */
	return l->known && !follow_is_pending(l) &&
	       (l->upkeep.wanted || (l->upkeep.due_ns && l->books.held.total && now_ns() >= l->upkeep.due_ns));
}

/* One walk over what is held; the lock thread's own. */
struct walk {
	bool relock; /* a lock is missing */
	bool merging; /* KSM is at work */
	uint64_t private_left; /* bytes of private memory that are still to be read */
	uint64_t next; /* the first that were not; 0: all were */
	struct losses lost;
	bool gone; /* what was looked at could not be locked again, and is unlocked now */
	struct extents doubtful; /* what is to be populated again */
};

static void let_others_in(struct locker *l, uint64_t took)
{
	if (took > LONG_CALL_NS)
		rest_after(&l->stepper.rest, l->stepper.views, took);
}

/* Takes our lock from @r. */
static void unlock(struct locker *l, struct range r, bool mergeable)
{
	for (uint64_t at = r.start; at < r.end; at += CHUNK) {
		uint64_t size = r.end - at < CHUNK ? r.end - at : CHUNK, began = now_ns();

		sys_munlock((struct range){ at, at + size });
		let_others_in(l, now_ns() - began);
	}
	merging_let_in(&l->stepper.merging, r, mergeable);
}

static uint64_t difference(int64_t large, int64_t small)
{
	return small >= 0 && large > small ? (uint64_t)(large - small) : 0;
}

/* Locks @r again where it is not, or nothing of it. Returns how much was not. */
static uint64_t relock(struct locker *l, struct walk *w, struct range r, bool mergeable)
{
	int64_t before = headroom_vm_locked(&l->stepper.headroom);

	for (uint64_t at = r.start; at < r.end; at += CHUNK) {
		uint64_t size = r.end - at < CHUNK ? r.end - at : CHUNK, began = now_ns();

		if (sys_mlock2((struct range){ at, at + size }, MLOCK_ONFAULT)) {
			before = headroom_vm_locked(&l->stepper.headroom);
			unlock(l, r, mergeable);
			w->gone = true;
			return range_size(r) - difference(before, headroom_vm_locked(&l->stepper.headroom));
		}
		let_others_in(l, now_ns() - began);
	}
	return difference(headroom_vm_locked(&l->stepper.headroom), before);
}

/* Absent bytes of @r that were populated; @on_fault is what was not. */
static uint64_t lost_pages(const struct locker *l, const struct extents *on_fault, struct range r)
{
	uint64_t absent = audit_absent(l->stepper.pagemap, r);
	struct range part;

	if (!absent)
		return 0;
	for (; extents_part(on_fault, r, &part); r.start = part.end) {
		uint64_t expected = audit_absent(l->stepper.pagemap, part);

		absent -= expected < absent ? expected : absent;
	}
	return absent;
}

/* Finds the chunks of @r where pages are lost. */
static void find_lost_pages(const struct locker *l, struct walk *w, const struct extents *on_fault, struct range r)
{
	struct range chunk = { .start = r.start };

	if (!lost_pages(l, on_fault, r))
		return;
	for (; chunk.start < r.end; chunk.start = chunk.end) {
		uint64_t lost;

		chunk.end = (chunk.start / CHUNK + 1) * CHUNK;
		if (chunk.end > r.end)
			chunk.end = r.end;
		lost = follow_is_given_back(l, chunk) ? 0 : lost_pages(l, on_fault, chunk);
		w->lost.bytes[LOSS_DISCARDED] += lost;
		if (lost)
			extents_add(&w->doubtful, chunk);
	}
}

/* Keeps @r out of KSM; what is merged already is left to populating, which asks before it allocates. */
static void keep_out(struct locker *l, struct walk *w, struct range r)
{
	struct range chunk = { .start = r.start };

	if (extents_overlap(&l->stepper.merging.kept_out, r) == range_size(r))
		return;
	for (; chunk.start < r.end; chunk.start = chunk.end) {
		uint64_t merged, began;

		chunk.end = (chunk.start / CHUNK + 1) * CHUNK;
		if (chunk.end > r.end)
			chunk.end = r.end;
		merged = audit_merged(l->stepper.pagemap, chunk);
		w->lost.bytes[LOSS_MERGED] += merged;
		if (merged) {
			extents_add(&w->doubtful, chunk);
			continue;
		}
		began = now_ns();
		merging_keep_out(&l->stepper.merging, chunk);
		let_others_in(l, now_ns() - began);
	}
}

/* Looks at @r, held and in @b; without the mutex. */
static void look_at(struct locker *l, struct walk *w, const struct books *books, const struct ram_block *b, struct range r)
{
	bool hugetlb = b->backing == BACKING_HUGETLB;

	extents_clear(&w->doubtful);
	w->gone = false;
	if (w->relock && !hugetlb && !extents_overlap(&books->foreign, r)) {
		uint64_t missing = relock(l, w, r, b->mergeable);

		w->lost.bytes[LOSS_UNLOCKED] += missing;
		if (w->gone)
			return;
		if (missing)
			extents_add(&w->doubtful, r); /* it could go to swap meanwhile */
	}
	if (b->shared || hugetlb) {
		find_lost_pages(l, w, &books->on_fault, r);
	} else if (w->private_left >= range_size(r)) {
		w->private_left -= range_size(r);
		find_lost_pages(l, w, &books->on_fault, r);
	} else if (!w->next) {
		w->next = r.start;
	}
	if (w->merging && !b->shared && !hugetlb)
		keep_out(l, w, r);
}

void upkeep_begin_piece(struct locker *l, struct range r)
{
	l->in_flight = r;
	l->n_steps++;
	pthread_mutex_unlock(&l->mutex);
}

void upkeep_end_piece(struct locker *l)
{
	pthread_mutex_lock(&l->mutex);
	l->in_flight = (struct range){ 0, 0 };
	l->in_flight_gone = false; /* then the layout is another one, too */
	pthread_cond_broadcast(&l->step_done);
}

/* The next piece of what is held from @at on: in one block, and all foreign or not at all. */
static bool next_piece(const struct locker *l, uint64_t at, struct range *r, const struct ram_block **b)
{
	struct range foreign;

	while (extents_part(&l->books.held, (struct range){ at, UINT64_MAX }, r)) {
		*b = layout_find(&l->layout, (struct range){ r->start, r->start + 1 });
		if (!*b) {
			at = r->end;
			continue;
		}
		if (r->end > (*b)->host.end)
			r->end = (*b)->host.end;
		if (r->end > (r->start / PIECE + 1) * PIECE)
			r->end = (r->start / PIECE + 1) * PIECE;
		if (extents_part(&l->books.foreign, *r, &foreign))
			r->end = foreign.start > r->start ? foreign.start : foreign.end;
		return true;
	}
	return false;
}

/* Walks over [from, to). Returns false when it was cut short: by a new wish, other RAM, or the end. */
static bool walk_over(struct locker *l, struct walk *w, uint64_t from, uint64_t to)
{
	static struct books books; /* as it was; only this thread adds to it */
	uint64_t generation = l->generation, layout_generation = l->layout_generation;
	const struct ram_block *found;
	struct range r;

	books = l->books;
	while (next_piece(l, from, &r, &found) && r.start < to) {
		const struct ram_block b = *found;
		uint64_t took = now_ns();

		if (follow_is_pending(l))
			return false;

		upkeep_begin_piece(l, r);
		look_at(l, w, &books, &b, r);
		took = now_ns() - took;
		upkeep_end_piece(l);
		for (size_t i = 0; i < w->doubtful.n; i++)
			books_doubt(&l->books, w->doubtful.v[i]);
		if (w->gone && (!layout_find(&l->layout, r) || books_full(&l->books)))
			return false; /* unplugged; or VmLck will tell */
		if (w->gone)
			books_remove(&l->books, r);
		pthread_mutex_unlock(&l->mutex);
		step_looked(&l->stepper, took);
		pthread_mutex_lock(&l->mutex);
		if (locker_has_other_work(l, generation, layout_generation))
			return false;
		from = r.end;
	}
	return true;
}

/* Drops what @e has of memory that VmLck counts from the books. */
static void drop(struct locker *l, const struct extents *e)
{
	static struct extents gone;

	gone = *e;
	for (size_t i = 0; i < l->layout.n; i++) {
		struct range rest = l->layout.v[i].host, part;

		if (l->layout.v[i].backing == BACKING_HUGETLB)
			continue;
		for (; extents_part(&gone, rest, &part); rest.start = part.end)
			books_remove(&l->books, part);
	}
	l->layout_generation++; /* what was planned is to be thought over */
}

/* Nothing may be locked now, and some of it is not any more: lets go the rest, so that no lock is without a book. */
static void let_go(struct locker *l)
{
	const struct ram_block *b;
	struct range r;

	for (uint64_t at = 0; next_piece(l, at, &r, &b); at = r.end) {
		bool mergeable = b->mergeable;

		if (b->backing == BACKING_HUGETLB || extents_overlap(&l->books.foreign, r))
			continue;
		upkeep_begin_piece(l, r);
		unlock(l, r, mergeable);
		upkeep_end_piece(l);
	}
	drop(l, &l->books.held);
}

static bool note(struct locker *l, const struct losses *lost)
{
	bool any = false;

	for (int i = 0; i < LOSS_COUNT; i++) {
		l->upkeep.lost.bytes[i] += lost->bytes[i];
		l->upkeep.outstanding.bytes[i] += lost->bytes[i];
		any |= lost->bytes[i] > 0;
	}
	return any;
}

/* VmLck, read with the mutex given up. */
static int64_t read_vm_locked(struct locker *l)
{
	int64_t vm_locked;

	pthread_mutex_unlock(&l->mutex);
	vm_locked = headroom_vm_locked(&l->stepper.headroom);
	pthread_mutex_lock(&l->mutex);
	return vm_locked;
}

/* Where foreign locks are gone, nobody can say which: none is counted on. Returns what was missing. */
static uint64_t drop_foreign(struct locker *l, int64_t vm_locked)
{
	uint64_t expected = upkeep_expected(l);

	if (vm_locked < 0 || (uint64_t)vm_locked >= expected)
		return 0;
	drop(l, &l->books.foreign);
	return expected - (uint64_t)vm_locked;
}

/* Finds out from QEMU, with the mutex given up, whether guest RAM may be locked. Returns false when it is too busy to say. */
static bool ask_qemu(struct locker *l)
{
	bool asked;

	if (!l->refresh)
		return true;
	pthread_mutex_unlock(&l->mutex);
	asked = l->refresh(l->opaque);
	pthread_mutex_lock(&l->mutex);
	return asked;
}

static uint64_t find_missing(const struct locker *l, int64_t vm_locked)
{
	return vm_locked < 0 ? 0 : difference((int64_t)upkeep_expected(l), vm_locked);
}

/* VmLck less what is ours of it, -1 when not known. */
static int64_t find_others(const struct locker *l, int64_t vm_locked)
{
	return vm_locked < 0 ? -1 : vm_locked - (int64_t)books_in_vm_locked(&l->books, &l->layout);
}

static void look(struct locker *l, struct walk *w)
{
	struct upkeep *u = &l->upkeep;
	uint64_t layout_generation = l->layout_generation, missing;
	int64_t vm_locked = read_vm_locked(l), others;

	if (layout_generation != l->layout_generation || l->books.gone.total)
		return; /* RAM that goes takes its lock with it */
	missing = find_missing(l, vm_locked);
	if (missing && !ask_qemu(l)) {
		u->due_ns = now_ns() + BUSY_NS;
		return;
	}
	others = find_others(l, vm_locked);
	if (l->suspended) {
		missing = find_missing(l, vm_locked); /* it may have been RAM that went */
		w->lost.bytes[LOSS_UNLOCKED] += missing;
		if (missing)
			let_go(l);
		return;
	}
	w->relock = missing || (u->others >= 0 && others != u->others);
	if (!walk_over(l, w, u->cursor, UINT64_MAX) || !walk_over(l, w, 0, u->cursor)) {
		u->wanted |= missing && follow_is_pending(l);
		return;
	}
	u->cursor = w->next;
	if (w->relock) {
		layout_generation = l->layout_generation;
		vm_locked = read_vm_locked(l);
		if (layout_generation != l->layout_generation)
			return;
		w->lost.bytes[LOSS_UNLOCKED] += drop_foreign(l, vm_locked);
		others = find_others(l, vm_locked);
	}
	u->others = others;
}

void upkeep_run(struct locker *l)
{
	static struct walk w; /* only the lock thread walks */

	l->upkeep.wanted = false;
	l->upkeep.due_ns = 0;
	memset(&w, 0, sizeof(w));
	w.private_left = PRIVATE_BYTES;
	pthread_mutex_unlock(&l->mutex);
	merging_look(&l->stepper.merging);
	rest_note_policy(&l->stepper.rest);
	follow_tidy(l);
	pthread_mutex_lock(&l->mutex);
	w.merging = l->stepper.merging.at_work;
	look(l, &w);
	l->upkeep.looks++;
	pthread_cond_broadcast(&l->step_done);
	if (!note(l, &w.lost))
		return;
	if (l->state == LOCKER_IDLE)
		l->state = LOCKER_LOCKING;
	locker_raise_event(l, LOCKER_LOST);
}

void upkeep_settled(struct locker *l)
{
	struct upkeep *u = &l->upkeep;
	bool any = false;

	if (!l->books.held.total)
		u->outstanding = (struct losses){ 0 }; /* not repaired, but wanted no more */
	for (int i = 0; i < LOSS_COUNT; i++) {
		any |= u->outstanding.bytes[i] > 0;
		u->repaired.bytes[i] += u->outstanding.bytes[i];
		u->outstanding.bytes[i] = 0;
	}
	if (any)
		locker_raise_event(l, LOCKER_REPAIRED);
}

void upkeep_check(struct locker *l)
{
	uint64_t n_steps, looks, deadline = now_ns() + CHECK_WAIT_NS;
	int64_t vm_locked;
	bool busy;

	pthread_mutex_lock(&l->mutex);
	n_steps = l->n_steps;
	busy = range_size(l->in_flight) || l->books.gone.total;
	pthread_mutex_unlock(&l->mutex);
	if (busy)
		return;
	vm_locked = headroom_vm_locked(&l->stepper.headroom);
	pthread_mutex_lock(&l->mutex);
	if (n_steps == l->n_steps && vm_locked >= 0 && (uint64_t)vm_locked < upkeep_expected(l)) {
		l->upkeep.wanted = true;
		looks = l->upkeep.looks;
		pthread_cond_signal(&l->wake);
		while (!l->stop && looks == l->upkeep.looks)
			if (clock_wait(&l->step_done, &l->mutex, deadline) == ETIMEDOUT)
				break;
	}
	pthread_mutex_unlock(&l->mutex);
}
