/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Step sizes, gaps and step times. Pure. */
#include "pacer.h"

#include <string.h>

enum { GAP_MIN_NS = 20 * 1000, GAP_MAX_NS = 1000 * 1000 };

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
	uint64_t gap = ns / 20;

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
