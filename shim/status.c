/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the lock thread tells: its status and its events. Any thread but the locker's. */
#include "discards.h"
#include "locker_inside.h"
#include "residency.h"

#include <string.h>

/* Bytes of @r that are on-fault locked and not resident. */
static uint64_t count_absent(const struct locker *l, const struct extents *on_fault, struct range r)
{
	uint64_t absent = 0;
	struct range part;

	for (; extents_part(on_fault, r, &part); r.start = part.end)
		absent += range_size(part) -
			  residency_count(l->stepper.pagemap, RESIDENCY_PRESENT, part, range_size(part));
	return absent;
}

/* The part of a status that the mutex guards. */
static void copy_status(const struct locker *l, struct locker_status *s, struct extents *on_fault)
{
	uint64_t end = l->ended_ns ? l->ended_ns : now_ns();
	uint64_t want = locker_target(l), lately;
	uint64_t left = want > l->books.held.total ? want - l->books.held.total : l->books.held.total - want;

	s->wish = l->wish;
	s->generation = l->generation;
	s->layout_generation = l->layout_generation;
	s->state = l->state;
	s->shortage = l->shortage;
	memcpy(s->short_text, l->short_text, sizeof(s->short_text));
	memcpy(s->launch_error, l->launch_error, sizeof(s->launch_error));
	s->requested = l->wish.all ? l->layout.total : l->wish.lock_ram_size;
	s->ram = l->layout.total;
	s->left_out = l->layout.left_out;
	s->armed = l->books.held.total;
	s->extents = l->books.held.n;
	s->n_blocks = l->layout.n;
	for (size_t i = 0; i < l->layout.n; i++)
		s->blocks[i] = (struct locker_block){
			.block = l->layout.v[i],
			.locked = extents_overlap(&l->books.held, l->layout.v[i].host),
		};
	s->step_max_us = l->pacer.max_us;
	s->step_p99_us = pacer_p99_us(&l->pacer);
	s->step_times = l->step_times;
	s->rate = end > l->began_ns ? (uint64_t)((double)l->done_bytes * NS_PER_S / (double)(end - l->began_ns)) : 0;
	if (l->wish.prefault && want >= l->books.held.total)
		left += l->books.on_fault.total; /* is populated last */
	lately = l->rate ? l->rate : s->rate;
	s->eta_s = lately ? (left + lately - 1) / lately : 0;
	s->filled = l->filled;
	/* A step in flight may have been counted by the kernel already. */
	s->foreign = books_in_vm_locked(&l->books, &l->layout) + range_size(l->in_flight);
	s->counted = range_size(l->in_flight) ? 0 : upkeep_expected(l);
	s->follows = l->follows && !l->follow_error;
	s->given_back = l->follows ? discards_total() : 0;
	s->lost = l->upkeep.lost;
	s->repaired = l->upkeep.repaired;
	*on_fault = l->books.on_fault;
}

/* Counts what is not resident of @on_fault, and keeps it for locker_peek(). Without the mutex. */
static void count(struct locker *l, struct locker_status *s, const struct extents *on_fault)
{
	for (size_t i = 0; i < s->n_blocks; i++)
		s->blocks[i].absent = count_absent(l, on_fault, s->blocks[i].block.host);
	if (!on_fault->total)
		return;
	pthread_mutex_lock(&l->mutex);
	l->counted.generation = s->generation;
	l->counted.layout = s->layout_generation;
	for (size_t i = 0; i < s->n_blocks; i++) {
		l->counted.absent[i] = s->blocks[i].absent;
		l->counted.of[i] = extents_overlap(on_fault, s->blocks[i].block.host);
	}
	pthread_mutex_unlock(&l->mutex);
}

/* Takes what is not resident from the last count; what was locked since then, or all if there was none, may be absent. With the mutex. */
static void recall(struct locker *l, struct locker_status *s, const struct extents *on_fault)
{
	bool counted = l->counted.generation == l->generation && l->counted.layout == l->layout_generation;

	for (size_t i = 0; i < s->n_blocks; i++) {
		uint64_t all = extents_overlap(on_fault, s->blocks[i].block.host), absent = all;

		if (counted)
			absent = l->counted.absent[i] + (all > l->counted.of[i] ? all - l->counted.of[i] : 0);
		s->blocks[i].absent = absent < all ? absent : all;
	}
	if (on_fault->total)
		locker_raise_event(l, LOCKER_COUNT);
}

/* Completes @s with what is asked of the kernel, without the mutex. */
static void ask_kernel(const struct locker *l, struct locker_status *s)
{
	int64_t vm_locked = headroom_vm_locked(&l->stepper.headroom);
	uint64_t missing;

	s->foreign = vm_locked > (int64_t)s->foreign ? (uint64_t)vm_locked - s->foreign : 0;
	s->memlock_limit = headroom_memlock_limit(&l->stepper.headroom);
	s->cgroups_seen = l->stepper.headroom.cgroups.known;
	s->host_reserve = headroom_reserve(&l->stepper.headroom, s->wish.host_reserve);
	s->locked = 0;
	missing = vm_locked < 0 || (uint64_t)vm_locked >= s->counted ? 0 : s->counted - (uint64_t)vm_locked;
	for (size_t i = 0; i < s->n_blocks; i++) {
		s->blocks[i].locked -= s->blocks[i].absent;
		/* Lost just now, and not looked into yet; of which block does not matter. */
		if (s->blocks[i].block.backing != BACKING_HUGETLB) {
			uint64_t here = missing < s->blocks[i].locked ? missing : s->blocks[i].locked;

			s->blocks[i].locked -= here;
			missing -= here;
		}
		s->locked += s->blocks[i].locked;
	}
}

void locker_query(struct locker *l, struct locker_status *s)
{
	struct extents on_fault;

	upkeep_check(l);
	pthread_mutex_lock(&l->mutex);
	copy_status(l, s, &on_fault);
	pthread_mutex_unlock(&l->mutex);
	count(l, s, &on_fault);
	ask_kernel(l, s);
}

void locker_peek(struct locker *l, struct locker_status *s)
{
	struct extents on_fault;

	pthread_mutex_lock(&l->mutex);
	copy_status(l, s, &on_fault);
	recall(l, s, &on_fault);
	pthread_mutex_unlock(&l->mutex);
	ask_kernel(l, s);
}

unsigned int locker_take_events(struct locker *l, struct locker_status *s)
{
	struct extents on_fault;
	unsigned int events;

	pthread_mutex_lock(&l->mutex);
	events = l->events;
	l->events = 0;
	/* What became of a value, or of RAM, that has been replaced since would be told as the new one's. That is announced in its turn. */
	if (l->announced != l->generation)
		events &= ~(unsigned int)(LOCKER_REACHED | LOCKER_WENT_SHORT);
	if (l->announced_layout != l->layout_generation)
		events &= ~(unsigned int)LOCKER_REACHED;
	for (int i = 0; i < LOSS_COUNT; i++) {
		s->news_lost.bytes[i] = l->upkeep.lost.bytes[i] - l->upkeep.told_lost.bytes[i];
		s->news_repaired.bytes[i] = l->upkeep.repaired.bytes[i] - l->upkeep.told_repaired.bytes[i];
	}
	if (events & LOCKER_LOST)
		l->upkeep.told_lost = l->upkeep.lost;
	if (events & LOCKER_REPAIRED)
		l->upkeep.told_repaired = l->upkeep.repaired;
	if (events)
		copy_status(l, s, &on_fault);
	pthread_mutex_unlock(&l->mutex);
	if (events) {
		count(l, s, &on_fault);
		ask_kernel(l, s);
	}
	return events;
}
