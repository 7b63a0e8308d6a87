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

struct plan {
	struct range runs[PLAN_EXTENTS_MAX];
	size_t n;
	size_t next; /* the run that plan_take() cuts from */
};

/*
 * Tells which pages of [start, start + len) are resident: bit 0 of vec[i] for the i-th 4 KiB page, as mincore(2) does.
 * Returns 0 or -errno; -ECANCELED when the plan is not wanted any more.
 */
typedef int plan_residency_fn(void *opaque, uint64_t start, uint64_t len, unsigned char *vec);

void plan_clear(struct plan *p);

/*
 * Plans up to @need bytes of resident pages that are not in @locked: the longest runs first, so that the locked
 * extents stay below PLAN_EXTENTS_MAX, then in address order. Looks at most PLAN_PIECE bytes per call of @residency.
 * Returns 0 or what @residency returned.
 */
enum { PLAN_PIECE = 64 << 20 };
int plan_resident(struct plan *p, const struct ram_layout *l, const struct extents *locked, uint64_t need,
		  plan_residency_fn *residency, void *opaque);

/* Plans up to @need bytes that are not in @locked, in address order. */
void plan_address(struct plan *p, const struct ram_layout *l, const struct extents *locked, uint64_t need);

/*
 * Cuts the next chunk, at most @chunk bytes and, where it can, ending at a multiple of @chunk so that huge pages stay
 * whole. @chunk is a power of two, and raised to the page size of the block. Returns false when the plan is used up.
 */
bool plan_take(struct plan *p, const struct ram_layout *l, uint64_t chunk, struct range *out);

#endif
