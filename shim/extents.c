/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sorted, disjoint address ranges. Pure: no threads, no system calls. */
#include "extents.h"

#include <errno.h>
#include <string.h>

/* Index of the first extent that ends after @at: the first that can contain or follow it. */
static size_t first_after(const struct extents *e, uint64_t at)
{
	size_t lo = 0, hi = e->n;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (e->v[mid].end > at)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

/* Replaces @old extents at @i by the @new ones of @with; the caller has checked the capacity. */
static void splice(struct extents *e, size_t i, size_t old, const struct range *with, size_t new)
{
	memmove(&e->v[i + new], &e->v[i + old], (e->n - i - old) * sizeof(e->v[0]));
	if (new)
		memcpy(&e->v[i], with, new * sizeof(e->v[0]));
	e->n = e->n - old + new;
}

void extents_clear(struct extents *e)
{
	e->n = 0;
	e->total = 0;
}

int extents_add(struct extents *e, struct range r)
{
	struct range merged = r;
	uint64_t had = 0;
	size_t i, j;

	if (r.start >= r.end)
		return 0;
	/* An extent that ends exactly where @r starts is a neighbour to merge with. */
	i = r.start ? first_after(e, r.start - 1) : 0;
	for (j = i; j < e->n && e->v[j].start <= r.end; j++) {
		had += range_size(e->v[j]);
		if (e->v[j].start < merged.start)
			merged.start = e->v[j].start;
		if (e->v[j].end > merged.end)
			merged.end = e->v[j].end;
	}
	if (i == j && e->n == EXTENTS_MAX)
		return -ENOSPC;
	splice(e, i, j - i, &merged, 1);
	e->total += range_size(merged) - had;
	return 0;
}

int extents_remove(struct extents *e, struct range r)
{
	struct range rest[2];
	size_t i, j, n = 0;
	uint64_t had = 0, keep = 0;

	if (r.start >= r.end)
		return 0;
	i = first_after(e, r.start);
	for (j = i; j < e->n && e->v[j].start < r.end; j++)
		had += range_size(e->v[j]);
	if (i == j)
		return 0;
	if (e->v[i].start < r.start)
		rest[n++] = (struct range){ e->v[i].start, r.start };
	if (e->v[j - 1].end > r.end)
		rest[n++] = (struct range){ r.end, e->v[j - 1].end };
	if (n > j - i && e->n == EXTENTS_MAX)
		return -ENOSPC;
	for (size_t k = 0; k < n; k++)
		keep += range_size(rest[k]);
	splice(e, i, j - i, rest, n);
	e->total -= had - keep;
	return 0;
}

uint64_t extents_overlap(const struct extents *e, struct range r)
{
	uint64_t sum = 0;

	for (size_t i = first_after(e, r.start); i < e->n && e->v[i].start < r.end; i++) {
		uint64_t start = e->v[i].start > r.start ? e->v[i].start : r.start;
		uint64_t end = e->v[i].end < r.end ? e->v[i].end : r.end;

		sum += end - start;
	}
	return sum;
}

bool extents_gap(const struct extents *e, struct range r, struct range *gap)
{
	uint64_t at = r.start;

	for (size_t i = first_after(e, at); i < e->n && e->v[i].start < r.end; i++) {
		if (e->v[i].start > at) {
			*gap = (struct range){ at, e->v[i].start };
			return true;
		}
		at = e->v[i].end;
	}
	if (at >= r.end)
		return false;
	*gap = (struct range){ at, r.end };
	return true;
}

bool extents_part(const struct extents *e, struct range r, struct range *part)
{
	size_t i = first_after(e, r.start);

	if (r.start >= r.end || i == e->n || e->v[i].start >= r.end)
		return false;
	part->start = e->v[i].start > r.start ? e->v[i].start : r.start;
	part->end = e->v[i].end < r.end ? e->v[i].end : r.end;
	return true;
}
