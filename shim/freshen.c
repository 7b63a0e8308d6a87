/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Has the kernel know what it could swap out of a memory cgroup.
 *
 * Before it gives pages of the active list a chance to be swapped out, reclaim asks whether the inactive list is low
 * (inactive_is_low() in mm/vmscan.c). It asks the cgroup's statistics, which are up to some seconds old there (since Linux
 * 6.12: "memcg: use ratelimited stats flush in the reclaim"). Where the list has been emptied meanwhile, and next to no page cache is left,
 * it scans nothing at all, reclaims nothing, and kills, with swap free and all of the memory swappable. Memory that is locked
 * makes the lists shorter, so that this happens sooner: docs/kernel-facts/full-cgroup-kills.c shows it within seconds.
 *
 * Whoever reads memory.stat has the statistics brought up to date. So that is done as long as the cgroup is at its limit: as
 * often as the list could be emptied. The multi-generational LRU (lru_gen) does not ask that question.
 */
#include "cgroup.h"

#include "clock.h"
#include "smallfile.h"

#include <stdlib.h>

static const uint64_t ALLOCATED_PER_NS = 4; /* bytes, at most */
static const uint64_t SCANNED_PER_NS = 16; /* bytes, of pages that were used and are made active */
static const uint64_t LOOK_MIN_NS = 2 * NS_PER_MS;
static const uint64_t LOOK_NS = 20 * NS_PER_MS; /* ... while it reclaims */
static const uint64_t LOOK_IDLE_NS = 100 * NS_PER_MS;
static const uint64_t AT_LIMIT_NS = NS_PER_S; /* so long it counts as reclaiming */
static const uint64_t LOOK_MAX_NS = 5ULL * NS_PER_S;
/* Of a list of many gigabytes less than a tenth can be inactive and not be low. */
static const uint64_t INACTIVE_PART = 12;
static const uint64_t COST_PART = 20; /* of a processor is what this may take at most */
static const uint64_t FILE_PART = 16; /* less page cache than this part of the limit is soon gone */

static uint64_t between(uint64_t low, uint64_t x, uint64_t high)
{
	return x < low ? low : x < high ? x : high;
}

/* Whether it was at its limit a short time ago, or nobody knows. */
static bool is_at_limit(struct cgroup_level *level, uint64_t now)
{
	uint64_t before = level->n_events;
	char text[512];

	if (smallfile_read(level->events, text, sizeof(text)) ||
	    smallfile_value(text, level->v1 ? "" : "max ", 10, &level->n_events) || level->n_events != before)
		level->at_limit_ns = now;
	return level->at_limit_ns && now - level->at_limit_ns < AT_LIMIT_NS;
}

/* As cgroups_freshen(), for one of them. */
static uint64_t freshen(struct cgroup_level *level, uint64_t now)
{
	uint64_t limit, usage, free, inactive, anon, file;
	char stat[16384];

	if (cgroup_number(level->limit, &limit) || cgroup_number(level->usage, &usage) || limit == UINT64_MAX)
		return UINT64_MAX;
	free = limit > usage ? limit - usage : 0;
	if (free > cgroup_reserve(limit) / 4) {
		free /= ALLOCATED_PER_NS;
		return free < LOOK_MAX_NS ? between(LOOK_NS, free, LOOK_MAX_NS) : UINT64_MAX;
	}
	if (!is_at_limit(level, now) || smallfile_read(level->stat, stat, sizeof(stat)))
		return LOOK_IDLE_NS;
	file = cgroup_unmapped(stat, level->v1, false);
	if (file > limit / FILE_PART) /* that is reclaimed first */
		return between(LOOK_IDLE_NS, file / ALLOCATED_PER_NS, LOOK_MAX_NS);
	inactive = cgroup_stat(stat, level->v1, "inactive_anon");
	anon = inactive + cgroup_stat(stat, level->v1, "active_anon");
	if (inactive < anon / INACTIVE_PART)
		inactive = anon / INACTIVE_PART;
	return between(LOOK_MIN_NS, inactive / SCANNED_PER_NS, LOOK_NS);
}

uint64_t cgroups_freshen(struct cgroups *c)
{
	uint64_t soonest = UINT64_MAX, began = now_ns(), cost;
	char text[32];

	if (!smallfile_read(c->lru_gen, text, sizeof(text)) && strtoul(text, NULL, 16) & 1)
		return UINT64_MAX;
	cgroups_follow(c);
	for (unsigned int i = 0; i < c->n_levels; i++) {
		uint64_t here = freshen(&c->levels[i], began);

		if (here < soonest)
			soonest = here;
	}
	cost = (now_ns() - began) * COST_PART; /* with many processors and cgroups below, reading can take milliseconds */
	return soonest > cost ? soonest : cost;
}
