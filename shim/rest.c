/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Rests between holds of mmap_lock, and before work.
 *
 * Who waits for mmap_lock longer than some microseconds goes to sleep, and the kernel counts that: so where no thread of QEMU went to
 * sleep during a hold, nobody waits, and the next hold may begin at once. Most of those who sleep wait for something else (a timer, a
 * request), and so one of them is worth a short gap only. But one who goes to sleep in each hold has many calls to make that need
 * mmap_lock (QEMU's main loop and vCPUs do, with the big lock taken), and in a short gap gets one of them done: 36 ms for what is
 * done in 1 ms by itself. Then there has to be time for more of them.
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
#include <sys/resource.h>
#include <time.h>

#ifndef SCHED_DEADLINE
#define SCHED_DEADLINE 6
#endif

enum { LONG_GAP_NS = 50 * 1000, YIELD_LONG_NS = 100 * 1000, SLEEPS_MIN = 2, SLEEPS_MAX = 64, BEFORE_WORK_NS = 200 * 1000 };
/* The time for more than one call, as a part of the hold, and the most that is needed. */
enum { CROWD_PART = 5, CROWD_NS = 50 * 1000 };
/* With hundreds of threads the kernel takes long to count, and is asked now and then only. */
enum { COUNT_DEAR_NS = 20 * 1000, DEAR_COUNTS = 3, COUNT_AGAIN_NS = 100 * 1000 * 1000 };

static void sleep_ns(struct rest *r, uint64_t ns)
{
	struct timespec t = { 0, (long)ns };

	atomic_fetch_add(&r->n_sleeps, 1);
	nanosleep(&t, NULL);
}

/*
 * Whether a thread of this process went to sleep since @v was last asked for it. One that has waited for mmap_lock and is not on its
 * processor again counts already; our own gaps do not count.
 */
static bool have_slept(struct rest *r, struct rest_view *v)
{
	uint64_t began = now_ns(), now;
	struct rusage usage;
	long before = v->n_switches;

	if (began < atomic_load(&r->blind_until_ns))
		return true;
	if (getrusage(RUSAGE_SELF, &usage))
		return true;
	v->n_switches = usage.ru_nvcsw - atomic_load(&r->n_sleeps);
	now = now_ns();
	v->n_dear = now - began > COUNT_DEAR_NS ? v->n_dear + 1 : 0; /* a single one may have lost its processor */
	if (v->n_dear >= DEAR_COUNTS)
		atomic_store(&r->blind_until_ns, now + COUNT_AGAIN_NS);
	return v->n_switches > before;
}

void rest_init(struct rest *r)
{
	memset(r, 0, sizeof(*r));
	r->thread_stat = -1;
	r->sleeps = SLEEPS_MIN;
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

void rest_look(struct rest *r, struct rest_view *v)
{
	have_slept(r, v);
}

void rest_after(struct rest *r, struct rest_view *v, uint64_t ns)
{
	uint64_t gap = pacer_gap(ns), crowd = ns / CROWD_PART < CROWD_NS ? ns / CROWD_PART : CROWD_NS, until;
	bool before = v->slept, blind = now_ns() < atomic_load(&r->blind_until_ns), crowded;
	unsigned int left = atomic_load(&r->sleeps_left);

	v->slept = have_slept(r, v);
	crowded = v->slept && before && !blind;
	if (r->real_time || r->policy_unknown || gap > LONG_GAP_NS || left || blind || crowded) {
		sleep_ns(r, crowded && crowd > gap ? crowd : gap);
		if (left) /* unless another thread was here meanwhile */
			atomic_compare_exchange_strong(&r->sleeps_left, &left, left - 1);
		return;
	}
	/*
	 * Whoever waits for this processor may have it now, rather than in the midst of a hold. Sleeping would do that too, and
	 * costs more than the gap: with nobody else there, the processor goes to sleep as well, and wakes when the gap is
	 * long over. But where somebody wants all of it, who yields gets little of it: then it is slept, and looked again more and more seldom.
	 */
	until = now_ns() + gap;
	sched_yield();
	if (now_ns() > until + YIELD_LONG_NS) {
		unsigned int sleeps = atomic_load(&r->sleeps);

		atomic_store(&r->sleeps_left, sleeps);
		atomic_store(&r->sleeps, sleeps * 2 < SLEEPS_MAX ? sleeps * 2 : SLEEPS_MAX);
	} else {
		atomic_store(&r->sleeps, SLEEPS_MIN);
	}
	while (v->slept && now_ns() < until)
		relax();
}

void rest_asleep(struct rest *r, uint64_t ns)
{
	sleep_ns(r, pacer_gap(ns));
}

void rest_before_work(struct rest *r)
{
	/*
	 * Who is woken by somebody that is still at work on one processor is often put on the one of a vCPU, and shares it until its
	 * next sleep, though the other processor is idle as soon as the waker has answered.
	 */
	sleep_ns(r, BEFORE_WORK_NS);
}
