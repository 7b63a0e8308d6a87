/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which pages of this process are in memory. */
#include "residency.h"

#include "pagemap.h"

#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, HUGE = 2 << 20, RUNS = 64 };
static const uint64_t PIECE = 64 << 20, REACH = 256 << 20; /* what does not count, but has page tables, takes its time as well */

static const struct {
	uint64_t mask, inverted; /* pages of all these categories; of these not to be in them */
} categories[] = {
	[RESIDENCY_PRESENT] = { CATEGORY_PRESENT | CATEGORY_ZERO, CATEGORY_ZERO },
	[RESIDENCY_SWAPPED] = { CATEGORY_SWAPPED, 0 },
	[RESIDENCY_HUGE] = { CATEGORY_HUGE, 0 },
	[RESIDENCY_ABSENT] = { CATEGORY_PRESENT, CATEGORY_PRESENT },
};

int residency_scan(int pagemap, enum residency_kind kind, struct range r, struct range *runs, size_t max, uint64_t *upto)
{
	const uint64_t end = range_size(r) < REACH ? r.end : r.start + REACH;
	struct pagemap_region v[RUNS];
	struct pagemap_scan s = {
		.size = sizeof(s),
		.start = r.start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)v,
		.vec_len = max < RUNS ? max : RUNS,
		.max_pages = kind == RESIDENCY_ABSENT ? 0 : PIECE / PAGE,
		.category_mask = categories[kind].mask,
		.category_inverted = categories[kind].inverted,
		.return_mask = categories[kind].mask & ~CATEGORY_ZERO,
	};
	int n = pagemap < 0 ? -1 : ioctl(pagemap, PAGEMAP_SCAN_CALL, &s);

	if (n < 0 || s.walk_end <= r.start)
		return -1;
	for (int i = 0; i < n; i++)
		runs[i] = (struct range){ v[i].start, v[i].end };
	*upto = s.walk_end < end ? s.walk_end : end;
	return n;
}

size_t residency_list(int pagemap, enum residency_kind kind, struct range r, struct range *runs, size_t max,
		      uint64_t *upto)
{
	unsigned char vec[4096];
	size_t n = 0;
	uint64_t pages;
	int found = residency_scan(pagemap, kind, r, runs, max, upto);

	if (found >= 0)
		return (size_t)found;
	*upto = r.end;
	if (kind != RESIDENCY_PRESENT)
		return 0;
	pages = range_size(r) / PAGE < sizeof(vec) ? range_size(r) / PAGE : sizeof(vec);
	if (mincore((void *)(uintptr_t)r.start, pages * PAGE, vec))
		memset(vec, 0, sizeof(vec)); /* unmapped meanwhile: there is nothing */
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t at = r.start + i * PAGE;

		if (!(vec[i] & 1))
			continue;
		if (n && runs[n - 1].end == at) {
			runs[n - 1].end += PAGE;
		} else if (n == max) {
			*upto = at;
			return n;
		} else {
			runs[n++] = (struct range){ at, at + PAGE };
		}
	}
	*upto = r.start + pages * PAGE;
	return n;
}

uint64_t residency_count(int pagemap, enum residency_kind kind, struct range r, uint64_t enough)
{
	uint64_t sum = 0;

	while (r.start < r.end && sum < enough) {
		struct range runs[RUNS];
		size_t n = residency_list(pagemap, kind, r, runs, RUNS, &r.start);

		for (size_t i = 0; i < n; i++)
			sum += range_size(runs[i]);
	}
	return sum;
}

uint64_t residency_huge_end(int pagemap, struct range r, uint64_t enough)
{
	uint64_t at = r.end, piece = HUGE; /* at first, because mostly all is huge or nothing */

	while (at > r.start && r.end - at < enough) {
		uint64_t from = at - r.start > piece ? at - piece : r.start, upto;
		struct range runs[RUNS]; /* there cannot be as many */
		size_t n = residency_list(pagemap, RESIDENCY_HUGE, (struct range){ from, at }, runs, RUNS, &upto);

		if (!n || runs[n - 1].end != at)
			break;
		at = runs[n - 1].start;
		if (at > from)
			break;
		piece = PIECE;
	}
	return r.end - at;
}
