/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Step sizes, gaps and step times. Pure. */
#include "pacer.h"

#include <string.h>

enum { GAP_MIN_NS = 1000, GAP_MAX_NS = 1000 * 1000 };

static const uint64_t ATTOS_PER_NS = 1000 * 1000 * 1000;
/* Below this the time is the system call's, not the bytes'. */
static const uint64_t COST_MIN = 1;

/* First guesses, on the slow side: a step that is too short harms nobody. In attoseconds per byte; 10^9 is 1 GB/s. */
static const uint64_t first_costs[PACE_KINDS] = {
	[PACE_LOCK] = 80 * 1000 * 1000,
	[PACE_MARK] = 1000 * 1000,
	[PACE_UNLOCK] = 80 * 1000 * 1000,
	[PACE_UNLOCK_HUGE] = 2 * 1000 * 1000,
	[PACE_CONFIRM] = 40 * 1000 * 1000,
	[PACE_FILL] = 1000 * 1000 * 1000,
	[PACE_SWAP_IN] = 8ULL * 1000 * 1000 * 1000,
};

void pace_init(struct pace *p)
{
	p->budget_ns = 500 * 1000;
	memcpy(p->cost, first_costs, sizeof(p->cost));
	memset(p->seen, 0, sizeof(p->seen));
}

uint64_t pace_bytes(const struct pace *p, enum pace_kind kind)
{
	const uint64_t max = kind == PACE_MARK	      ? PACER_CHUNK_MAX_ABSENT :
			     kind == PACE_UNLOCK_HUGE ? PACER_CHUNK_MAX_HUGE :
							PACER_CHUNK_MAX;
	uint64_t bytes = p->budget_ns * ATTOS_PER_NS / p->cost[kind];

	if (bytes < PACER_CHUNK_MIN)
		return PACER_CHUNK_MIN;
	return bytes < max ? bytes : max;
}

uint64_t pace_expect(const struct pace *p, enum pace_kind kind, uint64_t bytes)
{
	return (uint64_t)((double)bytes * (double)p->cost[kind] / (double)ATTOS_PER_NS);
}

static uint64_t middle(uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t low = a < b ? a : b, high = a < b ? b : a;

	return c < low ? low : c > high ? high : c;
}

void pace_learn(struct pace *p, enum pace_kind kind, uint64_t bytes, uint64_t wall_ns, uint64_t cpu_ns)
{
	const double per_byte = bytes ? (double)ATTOS_PER_NS / (double)bytes : 0;
	uint64_t wall = (uint64_t)((double)wall_ns * per_byte), cpu = (uint64_t)((double)cpu_ns * per_byte);
	uint64_t *before = p->seen[kind], cost = p->cost[kind], seen;

	if (bytes < PACER_CHUNK_MIN)
		return; /* that tells more of the system call than of the bytes */
	seen = before[1] ? middle(before[0], before[1], wall) : cpu;
	if (cpu > seen)
		seen = cpu;
	before[0] = before[1];
	before[1] = wall;
	if (seen > cost)
		cost = seen / 4 < cost ? seen : cost * 4;
	else
		cost = cost / 2 + seen / 2;
	p->cost[kind] = cost > COST_MIN ? cost : COST_MIN;
}

/* Values below 4 have a bucket each; above, the two bits below the highest one choose among four. */
static unsigned int bucket_of(uint64_t us)
{
	unsigned int log, bucket;

	if (us < 4)
		return (unsigned int)us;
	log = 63 - (unsigned int)__builtin_clzll(us);
	bucket = 4 * (log - 1) + (unsigned int)((us >> (log - 2)) & 3);
	return bucket < PACER_BUCKETS ? bucket : PACER_BUCKETS - 1;
}

static uint64_t bucket_top(unsigned int bucket)
{
	unsigned int log = bucket / 4 + 1;

	if (bucket < 4)
		return bucket;
	return ((uint64_t)(4 + bucket % 4 + 1) << (log - 2)) - 1;
}

void pacer_reset(struct pacer *p)
{
	memset(p, 0, sizeof(*p));
}

void pacer_record(struct pacer *p, uint64_t ns)
{
	uint64_t us = ns / 1000;

	if (us > p->max_us)
		p->max_us = us;
	p->count++;
	p->buckets[bucket_of(us)]++;
}

uint64_t pacer_gap(uint64_t ns)
{
	uint64_t gap = ns / 25;

	if (gap < GAP_MIN_NS)
		return GAP_MIN_NS;
	return gap < GAP_MAX_NS ? gap : GAP_MAX_NS;
}

uint64_t pacer_p99_us(const struct pacer *p)
{
	uint64_t above = p->count / 100; /* that many steps may have been longer */
	unsigned int i = PACER_BUCKETS;

	if (!p->count)
		return 0;
	while (i-- > 0) {
		if (p->buckets[i] > above)
			break;
		above -= p->buckets[i];
	}
	return bucket_top(i) < p->max_us ? bucket_top(i) : p->max_us;
}

void step_times_record(struct step_times *t, uint64_t ns)
{
	t->count++;
	t->sum_ns += ns;
	for (unsigned int i = 0; i < STEP_TIMES; i++)
		if (ns <= 1000ULL << i) {
			t->buckets[i]++;
			return;
		}
}
