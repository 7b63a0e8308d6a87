/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is asked of the lock thread: wishes, layouts, removals, a handover. Any thread but the locker's. */
#include "locker_inside.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const uint64_t REMOVE_WAIT_NS = 100 * NS_PER_MS;
static const uint64_t VFIO_SLACK = 1 << 30; /* besides guest RAM, all of which a device may have pinned */

/* Bytes of hugetlb blocks that are not held: locking them takes nothing from RLIMIT_MEMLOCK. */
static uint64_t free_hugetlb(const struct locker *l)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < l->layout.n; i++)
		if (l->layout.v[i].backing == BACKING_HUGETLB)
			sum += range_size(l->layout.v[i].host) - extents_overlap(&l->books.held, l->layout.v[i].host);
	return sum;
}

static int check_wish(const struct locker *l, const struct wish *w, uint64_t limit, int64_t vm_locked,
		      bool vfio, char text[SHORT_TEXT])
{
	uint64_t want = w->all ? l->layout.total : w->lock_ram_size;
	uint64_t counted, others, kept, need;

	if (l->closed) {
		snprintf(text, SHORT_TEXT, "the shim is leaving");
		return -ESHUTDOWN;
	}
	if (!want)
		return 0;
	if (!l->known) {
		snprintf(text, SHORT_TEXT, "guest RAM is not known yet");
		return -EAGAIN;
	}
	if (!l->layout.total) {
		snprintf(text, SHORT_TEXT, l->layout.private ?
					   "the RAM of this VM is private to the guest (guest_memfd), and cannot be locked" :
					   "this VM has no guest RAM");
		return -ENODEV;
	}
	if (want > l->layout.total) {
		snprintf(text, SHORT_TEXT, "size is above guest RAM, which is %" PRIu64 " bytes", l->layout.total);
		return -ERANGE;
	}
	if (limit == UINT64_MAX || want <= l->books.held.total)
		return 0;
	counted = books_in_vm_locked(&l->books, &l->layout);
	others = vm_locked > (int64_t)counted ? (uint64_t)vm_locked - counted : 0;
	need = want - l->books.held.total;
	/* What others have locked may be the very bytes that are needed: the thread will see. */
	kept = vfio && others < l->layout.total + VFIO_SLACK ? l->layout.total + VFIO_SLACK : others;
	if (need > free_hugetlb(l) + others && counted + kept + (need - free_hugetlb(l)) > limit) {
		snprintf(text, SHORT_TEXT,
			 "the locked-memory limit (RLIMIT_MEMLOCK) of QEMU is %" PRIu64 " bytes, and %" PRIu64
			 " are locked already%s", limit, counted + others,
			 kept > others ? " or kept for the devices of the host that it has (VFIO)" : "");
		return -EPERM;
	}
	return 0;
}

/* Says at once what the thread will find when it wakes: a query right after a change must not read "idle". */
static void expect_work(struct locker *l)
{
	uint64_t want = locker_target(l);

	atomic_store(&l->stepper.cancel, true);
	if (!l->known)
		return;
	if (l->books.held.total < want || (l->books.held.total == want && l->wish.prefault && l->books.on_fault.total))
		l->state = LOCKER_LOCKING;
	else if (l->books.held.total > want || l->books.gone.total)
		l->state = LOCKER_UNLOCKING;
	else if (l->state == LOCKER_SHORT || l->state == LOCKER_WAITING)
		l->state = LOCKER_LOCKING; /* until the thread has looked */
	pthread_cond_signal(&l->wake);
}

static void accept_wish(struct locker *l, const struct wish *w)
{
	l->wish = *w;
	l->wish.hold_budget_us = w->hold_budget_us ? w->hold_budget_us : HOLD_BUDGET_US;
	l->wish.threads = w->threads ? w->threads : 1;
	l->launch_error[0] = '\0';
	l->generation++;
	pacer_reset(&l->pacer);
	l->began_ns = l->progress_ns = now_ns();
	l->ended_ns = 0;
	l->done_bytes = l->filled = 0;
	l->rate = l->rate_bytes = 0;
	l->rate_ns = l->began_ns;
	l->retry_ns = RETRY_MIN_NS;
	expect_work(l);
}

void locker_suspend(struct locker *l, const char *why)
{
	pthread_mutex_lock(&l->mutex);
	if (l->suspended != why) {
		l->suspended = why;
		l->layout_generation++; /* what was planned, or waited for, is to be thought over */
		expect_work(l);
	}
	pthread_mutex_unlock(&l->mutex);
}

int locker_set(struct locker *l, const struct wish *wish, char text[SHORT_TEXT])
{
	uint64_t limit = headroom_memlock_limit(&l->stepper.headroom);
	int64_t vm_locked = headroom_vm_locked(&l->stepper.headroom);
	bool vfio = limit != UINT64_MAX && headroom_has_vfio(l->stepper.headroom.cgroups.root);
	int err;

	pthread_mutex_lock(&l->mutex);
	err = check_wish(l, wish, limit, vm_locked, vfio, text);
	if (!err)
		accept_wish(l, wish);
	pthread_mutex_unlock(&l->mutex);
	return err;
}

void locker_close(struct locker *l, bool release)
{
	const struct wish none = { .prefault = true };

	pthread_mutex_lock(&l->mutex);
	l->closed = true;
	if (release)
		accept_wish(l, &none);
	pthread_mutex_unlock(&l->mutex);
}

void locker_reopen(struct locker *l)
{
	pthread_mutex_lock(&l->mutex);
	l->closed = false;
	pthread_mutex_unlock(&l->mutex);
}

void locker_lease(struct locker *l, uint64_t left, unsigned int seconds)
{
	headroom_lease(&l->stepper.headroom, left, now_ns() + (uint64_t)seconds * NS_PER_S);
	pthread_mutex_lock(&l->mutex);
	l->look_again = true;
	pthread_cond_signal(&l->wake);
	pthread_mutex_unlock(&l->mutex);
}

void locker_set_launch(struct locker *l, const struct wish *wish, const char *error)
{
	pthread_mutex_lock(&l->mutex);
	accept_wish(l, wish);
	snprintf(l->launch_error, sizeof(l->launch_error), "%s", error);
	pthread_mutex_unlock(&l->mutex);
}

void locker_set_layout(struct locker *l, const struct ram_layout *layout)
{
	pthread_mutex_lock(&l->mutex);
	if (!l->known || !layout_equal(&l->layout, layout)) {
		books_keep_layout(&l->books, &l->layout, layout);
		l->layout = *layout;
		l->known = true;
		l->layout_generation++;
		expect_work(l);
	}
	l->layout.left_out = layout->left_out;
	l->layout.private = layout->private;
	pthread_mutex_unlock(&l->mutex);
}

static bool overlap(struct range a, struct range b)
{
	return a.start < b.end && b.start < a.end;
}

bool locker_remove(struct locker *l, struct range gone)
{
	uint64_t deadline = now_ns() + REMOVE_WAIT_NS;
	bool known = false, ours;

	pthread_mutex_lock(&l->mutex);
	ours = extents_overlap(&l->books.held, gone) > extents_overlap(&l->books.foreign, gone) ||
	       extents_overlap(&l->books.gone, gone);
	for (size_t i = 0; i < l->layout.n; i++) {
		struct ram_block *b = &l->layout.v[i];

		if (!overlap(b->host, gone))
			continue;
		known = true;
		if (b->host.start < gone.start)
			b->host.end = gone.start; /* the block shrinks */
		else
			memmove(b, b + 1, (--l->layout.n - i--) * sizeof(*b));
	}
	if (known) {
		layout_finish(&l->layout);
		l->layout_generation++;
		books_remove(&l->books, gone);
		expect_work(l);
	}
	extents_remove(&l->books.gone, gone);
	l->in_flight_gone |= overlap(l->in_flight, gone);
	while (overlap(l->in_flight, gone)) /* also where it was unplugged before, and is being let go */
		if (clock_wait(&l->step_done, &l->mutex, deadline) == ETIMEDOUT)
			break;
	pthread_mutex_unlock(&l->mutex);
	return ours;
}

void locker_follow(struct locker *l)
{
	pthread_mutex_lock(&l->mutex);
	atomic_store(&l->follows, true);
	pthread_cond_signal(&l->wake);
	pthread_mutex_unlock(&l->mutex);
}

bool locker_follows(struct locker *l)
{
	bool yes;

	pthread_mutex_lock(&l->mutex);
	yes = l->follows && !l->follow_error;
	pthread_mutex_unlock(&l->mutex);
	return yes;
}

bool locker_wants_more(struct locker *l)
{
	bool more;

	pthread_mutex_lock(&l->mutex);
	more = l->wish.all || l->wish.lock_ram_size > l->layout.total;
	pthread_mutex_unlock(&l->mutex);
	return more;
}

bool locker_holds(struct locker *l, struct range r)
{
	bool yes;

	pthread_mutex_lock(&l->mutex);
	yes = extents_overlap(&l->books.held, r) || extents_overlap(&l->books.gone, r) || overlap(l->in_flight, r);
	pthread_mutex_unlock(&l->mutex);
	return yes;
}

bool locker_knows_ram(struct locker *l)
{
	bool known;

	pthread_mutex_lock(&l->mutex);
	known = l->known;
	pthread_mutex_unlock(&l->mutex);
	return known;
}

bool locker_has_guarantee(struct locker *l)
{
	bool yes;

	pthread_mutex_lock(&l->mutex);
	yes = l->wish.all || l->wish.lock_ram_size;
	pthread_mutex_unlock(&l->mutex);
	return yes;
}

bool locker_is_released(struct locker *l)
{
	bool released;

	pthread_mutex_lock(&l->mutex);
	released = !range_size(l->in_flight) && !l->books.held.total && !l->books.gone.total && !l->wish.all && !l->wish.lock_ram_size;
	pthread_mutex_unlock(&l->mutex);
	return released;
}

void locker_give(struct locker *l, struct books *books, struct wish *wish)
{
	struct step s = { .kind = STEP_LET_GO };

	pthread_mutex_lock(&l->mutex);
	/* What is no guest RAM is not handed over; the thread has ended, so it is unlocked here. */
	while (locker_next_gone(l, &s.r)) {
		struct outcome o;
		uint64_t took = now_ns();

		upkeep_begin_piece(l, s.r);
		step_carry_out(&l->stepper, &s, &o);
		took = now_ns() - took;
		upkeep_end_piece(l);
		extents_remove(&l->books.gone, s.r);
		pthread_mutex_unlock(&l->mutex);
		rest_after(&l->stepper.rest, l->stepper.views, took);
		pthread_mutex_lock(&l->mutex);
	}
	*books = l->books;
	*wish = l->wish;
	pthread_mutex_unlock(&l->mutex);
}

/* Whether every range of @e consists of whole pages of one block of @layout, and of ranges of @within if given. */
static bool is_guest_ram(const struct extents *e, const struct ram_layout *layout, const struct extents *within)
{
	for (size_t i = 0; i < e->n; i++) {
		struct range rest = e->v[i];

		if (within && extents_overlap(within, rest) != range_size(rest))
			return false;
		while (rest.start < rest.end) { /* blocks may lie side by side */
			const struct ram_block *b = layout_find(layout, (struct range){ rest.start, rest.start + 1 });
			uint64_t end;

			if (!b)
				return false;
			end = rest.end < b->host.end ? rest.end : b->host.end;
			if ((rest.start - b->host.start) % b->page_size || (end - b->host.start) % b->page_size)
				return false;
			rest.start = end;
		}
	}
	return true;
}

int locker_adopt(struct locker *l, const struct books *books, const struct wish *wish)
{
	uint64_t deadline = now_ns() + REMOVE_WAIT_NS;
	int64_t vm_locked = headroom_vm_locked(&l->stepper.headroom);
	int err = 0;

	pthread_mutex_lock(&l->mutex);
	l->layout_generation++; /* the step in flight is the last of its plan */
	atomic_store(&l->stepper.cancel, true);
	while (range_size(l->in_flight) && !err)
		err = clock_wait(&l->step_done, &l->mutex, deadline) == ETIMEDOUT ? -EBUSY : 0;
	if (!err && (!l->known || !is_guest_ram(&books->held, &l->layout, NULL) ||
		     !is_guest_ram(&books->foreign, &l->layout, &books->held) ||
		     !is_guest_ram(&books->on_fault, &l->layout, &books->held) ||
		     vm_locked < (int64_t)books_in_vm_locked(books, &l->layout)))
		err = -EINVAL;
	if (!err && books_merge(&l->books, books))
		err = -EBUSY;
	if (!err) {
		/* A wish that came meanwhile is the newer one. */
		const struct wish newer = l->wish;

		accept_wish(l, newer.all || newer.lock_ram_size ? &newer : wish);
	}
	pthread_mutex_unlock(&l->mutex);
	return err;
}
