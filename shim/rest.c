/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Rests between holds of mmap_lock, and before work.
 *
 * Who waits for mmap_lock longer than some microseconds goes to sleep (unless its holder has it for writing, and runs: then it spins, and
 * gets in at once), and the kernel counts that. So where no thread of QEMU has gone to sleep during a hold, nobody has begun to wait,
 * and the next hold may begin at once. Who waits since before, woken in the gap without a processor, tries when it has one, and then counts
 * again; and who has waited for 4 ms then has mmap_lock handed over the next time (Linux 5.3), as behind gaps of any length.
 *
 * Most of those who sleep wait for something else (a timer, a request), and so one of them is worth a short gap only. But where somebody
 * does so every few holds, it may be one that has many calls to make that need mmap_lock (QEMU's main loop and vCPUs do, with the big
 * lock taken), and gets one of them done in each short gap: 36 ms for what is done in 1 ms by itself. Then there has to be time for more.
 *
 * A gap must be long enough for a writer that sleeps to be woken, to run and to try: 10 to 15 us where a processor is idle. A reader
 * that is back sooner overtakes it (rwsem_down_read_slowpath() steals the lock).
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

enum { LONG_GAP_NS = 50 * 1000, YIELD_LONG_NS = 100 * 1000, BEFORE_WORK_NS = 200 * 1000 };
enum { STREAK_MIN = 2, STREAK_MAX = 64 };
/* As long as a writer needs. */
enum { GAP_MIN_NS = 15 * 1000 };
/* Seen twice within that time it is a crowd, which has that part of a hold, and that at most. */
enum { CROWD_WITHIN_NS = 3 * 1000 * 1000, CROWD_PART = 10, CROWD_MAX_NS = 50 * 1000 };
/* With hundreds of threads the kernel takes long to count: more than that part of a hold so often in a row, and it is not asked for a while. */
enum { DEAR_PART = 50, DEAR_MIN_NS = 2 * 1000, DEAR_LOOKS = 3, BLIND_NS = 100 * 1000 * 1000 };

/* Who has gone to sleep lately: since the last hold. */
enum sleepers { NOBODY, SOMEBODY, CROWD, NOT_KNOWN };

static void sleep_ns(uint64_t ns)
{
	struct timespec t = { 0, (long)ns };

	nanosleep(&t, NULL);
}

static enum sleepers look(struct rest *r, struct rest_view *v, uint64_t hold_ns)
{
	uint64_t began = now_ns(), dear = hold_ns / DEAR_PART, now;
	struct rusage all, own;
	long others;
	bool slept, lately;

	if (began < atomic_load(&r->blind_until_ns))
		return NOT_KNOWN;
	if (getrusage(RUSAGE_SELF, &all) || getrusage(RUSAGE_THREAD, &own)) { /* a filter of system calls forbids it */
		rest_always(r);
		return NOT_KNOWN;
	}
	atomic_fetch_add(&r->n_own, own.ru_nvcsw - v->n_own);
	v->n_own = own.ru_nvcsw;
	others = all.ru_nvcsw - atomic_load(&r->n_own);
	slept = others > v->n_others;
	v->n_others = others;
	now = now_ns();
	v->n_dear = now - began > (dear > DEAR_MIN_NS ? dear : DEAR_MIN_NS) ? v->n_dear + 1 : 0; /* one may have lost its processor */
	if (v->n_dear >= DEAR_LOOKS)
		atomic_store(&r->blind_until_ns, now + BLIND_NS);
	if (!slept)
		return NOBODY;
	lately = now - v->seen_ns < CROWD_WITHIN_NS;
	v->seen_ns = now;
	return lately ? CROWD : SOMEBODY;
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

void rest_look(struct rest *r, struct rest_view *v)
{
	uint64_t seen_ns = v->seen_ns;

	look(r, v, UINT64_MAX);
	v->seen_ns = seen_ns;
}

void rest_always(struct rest *r)
{
	atomic_store(&r->blind_until_ns, UINT64_MAX);
}

void rest_foresee_sleep(struct rest *r, struct rest_view *v)
{
	/* If it comes to none, the next look puts that right. */
	atomic_fetch_add(&r->n_own, 1);
	v->n_own++;
}

/*
 * Offers this processor to whoever waits for it, rather than in the midst of a hold. Sleeping would do that too, and costs more: with nobody
 * else there, the processor goes to sleep as well, and wakes when the gap is long over. But where somebody wants all of it, who
 * yields gets little of it: then the next gaps are slept, more and more of them as long as it is so.
 */
static void yield(struct rest_view *v)
{
	uint64_t began = now_ns();

	sched_yield();
	if (now_ns() - began > YIELD_LONG_NS) {
		v->streak = v->streak < STREAK_MAX / 2 ? v->streak * 2 : STREAK_MAX;
		if (v->streak < STREAK_MIN)
			v->streak = STREAK_MIN;
		v->streak_left = v->streak;
	} else {
		v->streak /= 2;
	}
}

void rest_after(struct rest *r, struct rest_view *v, uint64_t ns)
{
	enum sleepers sleepers = look(r, v, ns);
	uint64_t gap = pacer_gap(ns), until;
	bool asleep = r->real_time || r->policy_unknown || sleepers == NOT_KNOWN;

	if (sleepers == CROWD && gap < CROWD_MAX_NS) {
		gap = ns / CROWD_PART < CROWD_MAX_NS ? ns / CROWD_PART : CROWD_MAX_NS;
		asleep = true;
	}
	if (sleepers != NOBODY && gap < GAP_MIN_NS)
		gap = GAP_MIN_NS;
	if (v->streak_left) {
		v->streak_left--;
		asleep = true;
	}
	if (asleep || (sleepers != NOBODY && gap > LONG_GAP_NS)) {
		rest_foresee_sleep(r, v);
		sleep_ns(gap);
		return;
	}
	until = now_ns() + gap;
	yield(v);
	while (sleepers != NOBODY && now_ns() < until)
		relax();
}

void rest_asleep(uint64_t ns)
{
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
