/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the lock thread tells: its status and its events. Any thread but the locker's. */
#include "locker_inside.h"

#include <string.h>
#include <sys/mman.h>

/* Bytes of @r that are on-fault locked and not resident. */
uint64_t locker_count_absent(const struct extents *on_fault, struct range r)
{
	unsigned char vec[4096];
	uint64_t absent = 0;
	struct range part;

	for (; extents_part(on_fault, r, &part); r.start = part.end) {
		for (uint64_t at = part.start; at < part.end; at += sizeof(vec) * 4096) {
			uint64_t rest = part.end - at;
			uint64_t pages = rest / 4096 < sizeof(vec) ? rest / 4096 : sizeof(vec);

			if (mincore((void *)(uintptr_t)at, pages * 4096, vec))
				memset(vec, 0, sizeof(vec));
			for (uint64_t i = 0; i < pages; i++)
				absent += (vec[i] & 1) ? 0 : 4096;
		}
	}
	return absent;
}

/* The part of a status that the mutex guards. */
static void copy_status(const struct locker *l, struct locker_status *s, struct extents *on_fault)
{
	uint64_t end = l->ended_ns ? l->ended_ns : now_ns();
	uint64_t want = locker_target(l);
	uint64_t left = want > l->books.held.total ? want - l->books.held.total : l->books.held.total - want;

	s->wish = l->wish;
	s->generation = l->generation;
	s->state = l->state;
	s->shortage = l->shortage;
	memcpy(s->short_text, l->short_text, sizeof(s->short_text));
	s->requested = l->wish.all ? l->layout.total : l->wish.lock_ram_size;
	s->ram = l->layout.total;
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
	s->rate = end > l->began_ns ? (uint64_t)((double)l->done_bytes * NS_PER_S / (double)(end - l->began_ns)) : 0;
	s->eta_s = s->rate ? (left + s->rate - 1) / s->rate : 0;
	/* A step in flight may have been counted by the kernel already. */
	s->foreign = books_in_vm_locked(&l->books, &l->layout) + range_size(l->in_flight);
	*on_fault = l->books.on_fault;
}

/* Completes @s with what is asked of the kernel, without the mutex. */
static void ask_kernel(const struct locker *l, struct locker_status *s, const struct extents *on_fault)
{
	int64_t vm_locked = headroom_vm_locked(&l->stepper.headroom);

	s->foreign = vm_locked > (int64_t)s->foreign ? (uint64_t)vm_locked - s->foreign : 0;
	s->memlock_limit = headroom_memlock_limit(&l->stepper.headroom);
	s->locked = 0;
	for (size_t i = 0; i < s->n_blocks; i++) {
		s->blocks[i].locked -= locker_count_absent(on_fault, s->blocks[i].block.host);
		s->locked += s->blocks[i].locked;
	}
}

void locker_query(struct locker *l, struct locker_status *s)
{
	struct extents on_fault;

	locker_check_books(l);
	pthread_mutex_lock(&l->mutex);
	copy_status(l, s, &on_fault);
	pthread_mutex_unlock(&l->mutex);
	ask_kernel(l, s, &on_fault);
}

unsigned int locker_take_events(struct locker *l, struct locker_status *s)
{
	struct extents on_fault;
	unsigned int events;

	pthread_mutex_lock(&l->mutex);
	events = l->events;
	l->events = 0;
	if (events)
		copy_status(l, s, &on_fault);
	pthread_mutex_unlock(&l->mutex);
	if (events)
		ask_kernel(l, s, &on_fault);
	return events;
}
