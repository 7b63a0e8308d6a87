/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How many bytes a step covers, how long to pause after it, and what the steps cost. Pure. */
#ifndef RAMLOCK_PACER_H
#define RAMLOCK_PACER_H

#include <stdint.h>

/* One huge page. Locks and unlocks end at its multiples, so that huge pages, present and future, stay whole. */
enum { PACER_CHUNK = 2 << 20 };

/*
 * Below the smallest chunk the system call itself is what takes the time; above the largest, one misjudgement would be
 * a long stall. Marking pages that are not there costs next to nothing, whatever their number, and a huge page costs
 * as much as a small one.
 */
enum { PACER_CHUNK_MIN = 64 << 10, PACER_CHUNK_MAX = 64 << 20 };
#define PACER_CHUNK_MAX_HUGE (1ULL << 30)
#define PACER_CHUNK_MAX_ABSENT (16ULL << 30)

/* What a byte can cost; orders of magnitude lie between them. */
enum pace_kind {
	PACE_LOCK, /* mlock2() of pages that are there: holds mmap_lock for writing, as the next three */
	PACE_MARK, /* ... of pages that are not */
	PACE_UNLOCK, /* munlock() of pages that are there */
	PACE_UNLOCK_HUGE, /* ... in huge pages, seen to be so: two orders of magnitude less */
	PACE_CONFIRM, /* populating pages that are there: holds mmap_lock for reading, as the next two */
	PACE_FILL, /* ... that are absent */
	PACE_SWAP_IN, /* ... that are in swap */
	PACE_KINDS,
};

/* What a byte costs, as learnt from the steps before. */
struct pace {
	uint64_t budget_ns; /* the hold budget: how long one system call may keep mmap_lock */
	uint64_t cost[PACE_KINDS]; /* in attoseconds per byte */
	uint64_t seen[PACE_KINDS][2]; /* of the last two steps; 0: there was none */
};

void pace_init(struct pace *p);

/* Bytes of @kind that fit in the hold budget, from PACER_CHUNK_MIN to PACER_CHUNK_MAX (for PACE_MARK: _ABSENT, for PACE_UNLOCK_HUGE: _HUGE). */
uint64_t pace_bytes(const struct pace *p, enum pace_kind kind);

/* How long @bytes of @kind should take, in nanoseconds. */
uint64_t pace_expect(const struct pace *p, enum pace_kind kind, uint64_t bytes);

/*
 * Learns that @bytes, mainly of @kind, took @wall_ns, of which this thread had the processor for @cpu_ns. A step that
 * was preempted took long for no reason of its own, so of the wall times the middle one of the last three counts;
 * processor time counts at once. Slower than thought is believed, but at most four times: so one mad figure is forgotten
 * after a few steps. Faster than thought is half believed.
 */
void pace_learn(struct pace *p, enum pace_kind kind, uint64_t bytes, uint64_t wall_ns, uint64_t cpu_ns);

/* Four buckets for each power of two of microseconds. */
enum { PACER_BUCKETS = 4 * 33 };

struct pacer {
	uint64_t max_us;
	uint64_t count;
	uint64_t buckets[PACER_BUCKETS];
};

void pacer_reset(struct pacer *p);

/* Notes a hold of @ns nanoseconds. */
void pacer_record(struct pacer *p, uint64_t ns);

/* Nanoseconds to leave mmap_lock alone after a hold of @ns, so that a waiting writer gets in: 4 % of it. */
uint64_t pacer_gap(uint64_t ns);

/* The 99th percentile of the holds in microseconds, at most 25 % too high; 0 before the first one. */
uint64_t pacer_p99_us(const struct pacer *p);

/* Of all steps since the start: one bucket for each power of two of microseconds, up to a second. */
enum { STEP_TIMES = 21 };

struct step_times {
	uint64_t count;
	uint64_t sum_ns;
	uint64_t buckets[STEP_TIMES]; /* [i]: took at most 2^i us, and more than those of [i - 1]; longer ones are in none */
};

void step_times_record(struct step_times *t, uint64_t ns);

#endif
