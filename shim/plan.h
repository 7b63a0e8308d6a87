/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which bytes of guest RAM to lock next: resident pages first, in few contiguous runs. Pure. */
#ifndef RAMLOCK_PLAN_H
#define RAMLOCK_PLAN_H

#include <stdbool.h>

#include "extents.h"
#include "layout.h"

/*
 * Every locked run costs up to two more mappings (VMAs), and a process may have vm.max_map_count of them
 * (65,530 by default) for everything that QEMU does.
 */
enum { PLAN_EXTENTS_MAX = 256 };

/* Runs that one look lists at most. */
enum { PLAN_RUNS = 64 };

struct plan {
	struct range runs[PLAN_EXTENTS_MAX];
	size_t n;
	size_t next; /* the run that plan_peek() cuts from */
	bool resident; /* the runs hold resident pages alone */
	bool fills; /* the runs have gaps, filled so that there are not too many runs */
};

/*
 * Lists up to @max runs of resident pages of @r, from its start on, in ascending order; *upto is how far it looked.
 * Returns their number or -errno; -ECANCELED when the plan is not wanted any more.
 */
typedef int plan_residency_fn(void *opaque, struct range r, struct range *runs, size_t max, uint64_t *upto);

void plan_clear(struct plan *p);

/*
 * Plans up to @need bytes of resident pages that are not in @locked. Where they lie in more runs than are left of
 * PLAN_EXTENTS_MAX, the smallest gaps between them are filled. Runs that need no filling come first, then the longest.
 * Returns 0 or what @residency returned.
 */
int plan_resident(struct plan *p, const struct ram_layout *l, const struct extents *locked, uint64_t need,
		  plan_residency_fn *residency, void *opaque);

/* Plans up to @need bytes that are not in @locked, in address order. */
void plan_address(struct plan *p, const struct ram_layout *l, const struct extents *locked, uint64_t need);

/* The rest of the first run that is not used up. Returns false when there is none. */
bool plan_peek(struct plan *p, const struct ram_layout *l, struct range *r);

/* What lies before @end, in the run of plan_peek(), is done. */
void plan_advance(struct plan *p, uint64_t end);

#endif
