/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sorted, disjoint address ranges in a fixed array: no allocation, so nothing fails halfway. */
#ifndef RAMLOCK_EXTENTS_H
#define RAMLOCK_EXTENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A half-open range of addresses, [start, end). */
struct range {
	uint64_t start;
	uint64_t end;
};

static inline uint64_t range_size(struct range r)
{
	return r.end - r.start;
}

enum { EXTENTS_MAX = 1024 };

struct extents {
	struct range v[EXTENTS_MAX]; /* ascending; neighbours are merged */
	size_t n;
	uint64_t total; /* bytes in all of them */
};

void extents_clear(struct extents *e);

/* Adds [r.start, r.end); parts already there are kept once. Returns 0, or -ENOSPC and changes nothing. */
int extents_add(struct extents *e, struct range r);

/* Removes [r.start, r.end), whether or not it is there. Returns 0, or -ENOSPC and changes nothing. */
int extents_remove(struct extents *e, struct range r);

/* Bytes of @r that are in @e. */
uint64_t extents_overlap(const struct extents *e, struct range r);

/* The first part of @r that is not in @e. Returns false when there is none. */
bool extents_gap(const struct extents *e, struct range r, struct range *gap);

/* The first part of @r that is in @e. Returns false when there is none. */
bool extents_part(const struct extents *e, struct range r, struct range *part);

#endif
