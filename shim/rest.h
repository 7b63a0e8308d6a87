/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How the lock thread leaves mmap_lock, and the processors, to others. Knows no locker and no step. */
#ifndef RAMLOCK_REST_H
#define RAMLOCK_REST_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct rest {
	int thread_stat; /* /proc/thread-self/stat of the lock thread; -1: not known */
	uint64_t policy_ns; /* CLOCK_MONOTONIC: when that is to be read again */
	bool real_time; /* the lock thread goes before others until it sleeps */
	bool policy_unknown; /* and so might do that */
	atomic_long n_own; /* how often our own threads have gone to sleep, as far as they have looked */
	atomic_ullong blind_until_ns; /* CLOCK_MONOTONIC: until then nobody looks who sleeps */
};

/* What one of our threads knows of QEMU's other ones, and of its processor. All zeroes at first. */
struct rest_view {
	long n_others, n_own; /* how often those, and this one, had gone to sleep when it last looked */
	uint64_t seen_ns; /* CLOCK_MONOTONIC: when it last saw that one of those had */
	unsigned int n_dear; /* to find that out took long so often in a row */
	unsigned int streak, streak_left; /* gaps that are slept because others want the processor: how many, and of those to come */
};

void rest_init(struct rest *r);
void rest_deinit(struct rest *r);

/* The calling thread is the lock thread from now on. */
void rest_begin(struct rest *r);

/* Looks, once a second at most, at the scheduling policy of the lock thread, which somebody may have changed. */
void rest_note_policy(struct rest *r);

/* Who has gone to sleep so far is not to count in the next gap. */
void rest_look(struct rest *r, struct rest_view *v);

/* The calling thread is about to go to sleep: to our others that is no sleep of QEMU's. */
void rest_foresee_sleep(struct rest *r, struct rest_view *v);

/* From now on somebody may wait after each hold. */
void rest_always(struct rest *r);

/* Leaves mmap_lock alone after a hold of @ns, if anybody may wait for it. Any of our threads of the same policy may, with a view of its own. */
void rest_after(struct rest *r, struct rest_view *v, uint64_t ns);

/* Does so whether anybody waits or not, and gives up the processor too. */
void rest_asleep(uint64_t ns);

/* Lets the kernel choose a processor for this thread, before long work: sleeps for a fifth of a millisecond. */
void rest_before_work(void);

#endif
