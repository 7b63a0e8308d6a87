/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Moves the guarantee away from memory that the guest has given back.
 *
 * Theory of operation: discards.c notes which pages QEMU has discarded. Where such pages were locked, the lock is given up,
 * because it would lock them again when the guest uses them again, and more than the guarantee would be locked. That is done for
 * whole chunks of 2 MiB, and for larger ones where the locked ranges would become too many: every range costs mappings,
 * and a guest that discards every other page would use up what a process may have. The thread then locks as much
 * elsewhere, by its ordinary steps, and leaves out what was given back: that would take it from the host again.
 */
#include "follow.h"

#include "discards.h"
#include "locker_inside.h"
#include "syscalls.h"

enum { RUNS_MAX = 128, AVOID_MAX = 64, PAGE = 4096 };
static const uint64_t GATHER_NS = 20 * NS_PER_MS; /* discards come in thousands */

void follow_wake(struct locker *l)
{
	if (!l->follows || !discards_pending())
		return;
	pthread_mutex_lock(&l->mutex);
	pthread_cond_signal(&l->wake);
	pthread_mutex_unlock(&l->mutex);
}

bool follow_is_pending(const struct locker *l)
{
	return l->follows && discards_pending();
}

uint64_t follow_deadline(const struct locker *l)
{
	if (!l->follows || !l->known)
		return UINT64_MAX;
	if (l->followed_layout != l->layout_generation)
		return 0;
	return discards_pending() ? l->follow_next_ns : UINT64_MAX;
}

bool follow_is_given_back(const struct locker *l, struct range r)
{
	struct range run;

	return l->follows && discards_next(r.start, &run) && run.start < r.end;
}

bool follow_trim(struct locker *l, struct range *r)
{
	const struct ram_block *b = layout_find(&l->layout, *r);
	struct range run;

	if (!l->follows || !b || !discards_next(r->start, &run) || run.start >= r->end)
		return true;
	r->end = r->start + (run.start - r->start) / b->page_size * b->page_size;
	l->plan_valid &= r->start < r->end;
	return l->plan_valid;
}

/* Has QEMU's discards come to us, in the layout as it is now. */
static void set_up(struct locker *l)
{
	static struct ram_layout layout; /* the thread's own copy */
	static struct extents ours;
	int err;

	l->followed_layout = l->layout_generation;
	layout = l->layout;
	ours = l->books.held;
	for (size_t i = 0; i < l->books.foreign.n; i++)
		extents_remove(&ours, l->books.foreign.v[i]);
	pthread_mutex_unlock(&l->mutex);
	discards_set_layout(&layout, l->maps);
	for (size_t i = 0; i < ours.n; i++)
		discards_set_ours(ours.v[i], true);
	err = discards_follow(l->discarded, l->opaque);
	pthread_mutex_lock(&l->mutex);
	l->follow_error = err;
}

/* How many ranges @e has when @r is taken out. */
static size_t count_without(const struct extents *e, struct range r)
{
	size_t n = 0;

	for (size_t i = 0; i < e->n; i++) {
		bool apart = e->v[i].end <= r.start || e->v[i].start >= r.end;

		n += apart ? 1 : (e->v[i].start < r.start) + (e->v[i].end > r.end);
	}
	return n;
}

/* The unit in which locks of a block are given up. */
static uint64_t unit_of(const struct ram_block *b)
{
	return b->page_size > DISCARDS_CHUNK ? b->page_size : DISCARDS_CHUNK;
}

/* @chunk, made larger until it is whole pages, and giving it up leaves few enough ranges. */
static struct range enlarge(const struct locker *l, const struct ram_block *b, struct range chunk)
{
	struct range r = { 0, 0 };

	for (uint64_t size = unit_of(b); !range_size(r) || count_without(&l->books.held, r) > RUNS_MAX; size *= 2) {
		r.start = chunk.start / size * size;
		r.end = r.start + size;
		if (r.start < b->host.start)
			r.start = b->host.start;
		if (r.end > b->host.end)
			r.end = b->host.end;
		if (r.start == b->host.start && r.end == b->host.end)
			break;
	}
	return r;
}

/* Gives up what is ours of @r, in a block such as @b; with the mutex given up meanwhile. */
static void give_up(struct locker *l, struct range r, const struct ram_block *b)
{
	const uint64_t unit = unit_of(b);
	const bool mergeable = b->mergeable;
	struct range part, foreign;
	uint64_t took;

	for (; extents_part(&l->books.held, r, &part); r.start = part.end) {
		if (extents_part(&l->books.foreign, part, &foreign)) {
			if (foreign.start == part.start) {
				part.end = foreign.end;
				continue;
			}
			part.end = foreign.start;
		}
		if (range_size(part) > unit)
			part.end = (part.start / unit + 1) * unit;
		if (books_full(&l->books))
			return; /* the next look tells */
		upkeep_begin_piece(l, part);
		took = now_ns();
		sys_munlock(part);
		took = now_ns() - took;
		merging_let_in(&l->stepper.merging, part, mergeable);
		upkeep_end_piece(l);
		if (layout_find(&l->layout, part)) /* or it was unplugged meanwhile */
			books_remove(&l->books, part);
		follow_changed(l, part);
		pthread_mutex_unlock(&l->mutex);
		rest_after(&l->stepper.rest, l->stepper.views, took);
		pthread_mutex_lock(&l->mutex);
	}
}

/* Whether pages are missing of what is populated of @chunk. */
static bool has_holes(struct locker *l, struct range chunk)
{
	struct extents held = { .n = 0 };
	struct range part, r = chunk;
	bool holes = false;

	for (; extents_part(&l->books.held, r, &part); r.start = part.end)
		extents_add(&held, part);
	/* What is locked on fault alone has holes by design. */
	for (r = chunk; !l->wish.prefault && extents_part(&l->books.on_fault, r, &part); r.start = part.end)
		extents_remove(&held, part);
	pthread_mutex_unlock(&l->mutex);
	for (size_t i = 0; i < held.n && !holes; i++)
		holes = audit_absent(l->stepper.pagemap, held.v[i]) > 0;
	pthread_mutex_lock(&l->mutex);
	return holes;
}

void follow_run(struct locker *l)
{
	uint64_t held = l->books.held.total;
	struct range chunk;
	bool unlocked;

	if (l->followed_layout != l->layout_generation)
		set_up(l);
	if (!discards_pending())
		return;
	discards_begin();
	l->upkeep.wanted |= discards_take_unlocked_all();
	for (uint64_t at = 0; discards_take_chunk(at, &chunk, &unlocked); at = chunk.end) {
		const struct ram_block *b = layout_find(&l->layout, chunk);
		struct range part;

		if (l->stop)
			return;
		if (!b || !extents_part(&l->books.held, chunk, &part) || (!unlocked && !has_holes(l, chunk)))
			continue;
		b = layout_find(&l->layout, chunk); /* the mutex was given up */
		if (b)
			give_up(l, enlarge(l, b, chunk), b);
	}
	l->follow_next_ns = now_ns() + GATHER_NS;
	if (l->books.held.total >= held && !l->hungry)
		return;
	l->plan_valid = false;
	if (l->state == LOCKER_IDLE)
		l->state = LOCKER_LOCKING;
}

void follow_locking(struct locker *l, struct range r)
{
	if (l->follows)
		discards_set_ours(r, true);
}

void follow_changed(struct locker *l, struct range r)
{
	struct range chunk, part;

	if (!l->follows)
		return;
	for (chunk.start = r.start / DISCARDS_CHUNK * DISCARDS_CHUNK; chunk.start < r.end; chunk.start = chunk.end) {
		chunk.end = chunk.start + DISCARDS_CHUNK;
		discards_set_ours(chunk, extents_part(&l->books.held, chunk, &part) &&
						 !extents_overlap(&l->books.foreign, chunk));
	}
}

/* The pages of @r that are in memory were not given back for good. */
static void forget_present(const struct locker *l, struct range r)
{
	struct range present;

	for (; audit_next_present(l->stepper.pagemap, r, &present); r.start = present.end)
		discards_forget(present);
}

/* How many ranges what was given back makes, when gaps below @gap are filled; with @taken, adds them to it. */
static size_t gather_runs(uint64_t gap, struct extents *taken)
{
	struct range open = { 0, 0 }, run;
	size_t n = 0;

	for (uint64_t at = 0; discards_next(at, &run); at = run.end) {
		if (range_size(open) && run.start - open.end < gap) {
			open.end = run.end;
			continue;
		}
		if (range_size(open) && taken)
			extents_add(taken, open);
		n++;
		open = run;
	}
	if (range_size(open) && taken)
		extents_add(taken, open);
	return n;
}

void follow_tidy(struct locker *l)
{
	struct range run;

	for (uint64_t at = 0; l->follows && discards_next(at, &run); at = run.end)
		forget_present(l, run);
}

void follow_avoid(struct locker *l, struct extents *taken)
{
	uint64_t began = now_ns(), gap = PAGE;

	l->avoids = false;
	if (!l->follows)
		return;
	follow_tidy(l);
	while (gather_runs(gap, NULL) > AVOID_MAX)
		gap *= 4;
	l->avoids = gather_runs(gap, taken) > 0;
	/* Where this takes long, the guarantee gets at least as much time. */
	l->follow_next_ns = now_ns() + GATHER_NS + (now_ns() - began);
}

void follow_hunger(struct locker *l, bool hungry)
{
	if (!l->follows)
		return;
	l->hungry = hungry;
	discards_set_hungry(hungry);
}
