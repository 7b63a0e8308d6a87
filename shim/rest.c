/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Rests between holds of mmap_lock, and before work.
 *
 * A gap must be long enough for a writer that sleeps to be woken, to run and to try: 10 to 15 us where a processor is idle. A reader
 * that is back sooner overtakes it (rwsem_down_read_slowpath() steals the lock), for up to 8 ms, until the writer has the lock handed over.
 */
#include "rest.h"

#include "clock.h"
#include "fd.h"
#include "pacer.h"
#include "smallfile.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef SCHED_DEADLINE
#define SCHED_DEADLINE 6
#endif

enum { LONG_GAP_NS = 50 * 1000, YIELD_LONG_NS = 100 * 1000, SLEEPS = 32, SLEEP_EACH = 2, BEFORE_WORK_NS = 200 * 1000 };

static void sleep_ns(uint64_t ns)
{
	struct timespec t = { 0, (long)ns };

	nanosleep(&t, NULL);
}

void rest_init(struct rest *r)
{
	memset(r, 0, sizeof(*r));
	r->thread_stat = -1;
}

void rest_deinit(struct rest *r)
{
	fd_close(r->thread_stat);
	rest_init(r);
}

void rest_begin(struct rest *r)
{
	fd_close(r->thread_stat);
	r->thread_stat = smallfile_open("/proc/thread-self", "stat");
	r->policy_ns = 0;
	rest_note_policy(r);
}

void rest_note_policy(struct rest *r)
{
	/* Of sched_getscheduler() some of QEMU's sandboxes would kill us. Field 41 of 52; the second can have any character. */
	char text[1024], *at = NULL;
	int policy = SCHED_OTHER;

	if (now_ns() < r->policy_ns)
		return;
	r->policy_ns = now_ns() + NS_PER_S;
	if (!smallfile_read(r->thread_stat, text, sizeof(text)))
		at = strrchr(text, ')');
	for (int field = 2; at && field < 41; field++)
		at = strchr(at + 1, ' ');
	if (at)
		policy = atoi(at + 1);
	r->policy_unknown = !at;
	r->real_time = policy == SCHED_FIFO || policy == SCHED_RR || policy == SCHED_DEADLINE;
}

/* Tells the processor that this thread waits for another one. */
static void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

void rest_after(struct rest *r, uint64_t ns)
{
	uint64_t gap = pacer_gap(ns), until = now_ns() + gap;
	unsigned int n = atomic_fetch_add(&r->n_rests, 1), left = atomic_load(&r->sleeps_left);

	if (r->real_time || r->policy_unknown || gap > LONG_GAP_NS || left || n % SLEEP_EACH == 0) {
		sleep_ns(gap);
		if (left) /* unless another thread was here meanwhile */
			atomic_compare_exchange_strong(&r->sleeps_left, &left, left - 1);
		return;
	}
	/*
	 * Whoever waits for this processor may have it now, rather than in the midst of a hold. Sleeping would do that too, and
	 * costs more than the gap: with nobody else there, the processor goes to sleep as well, and wakes when the gap is
	 * long over. But where somebody wants all of it, who yields gets little of it: then it is slept, and looked again only now and then.
	 * And only a processor that nobody wants looks for those who wait for another one, so some gaps are slept anyway.
	 */
	sched_yield();
	if (now_ns() > until + YIELD_LONG_NS)
		atomic_store(&r->sleeps_left, SLEEPS);
	while (now_ns() < until)
		relax();
}

void rest_asleep(struct rest *r, uint64_t ns)
{
	atomic_fetch_add(&r->n_rests, 1);
	sleep_ns(pacer_gap(ns));
}

void rest_before_work(void)
{
	/*
	 * Who is woken by somebody that is still at work on one processor is often put on the one of a vCPU, and shares it until its
	 * next sleep, though the other processor is idle as soon as the waker has answered.
	 */
	sleep_ns(BEFORE_WORK_NS);
}
