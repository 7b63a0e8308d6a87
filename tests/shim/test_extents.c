/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Extents against a plain bitmap that cannot be wrong. */
#include "check.h"
#include "extents.h"

#include <errno.h>

enum { UNITS = 400, ROUNDS = 20000 };

static void agrees_with_a_bitmap(void)
{
	static struct extents e;
	static unsigned char bitmap[UNITS];

	srand(1);
	extents_clear(&e);
	for (int round = 0; round < ROUNDS; round++) {
		uint64_t a = (uint64_t)(rand() % UNITS), b = a + (uint64_t)(rand() % 30);
		struct range r = { a, b < UNITS ? b : UNITS }, gap, part;
		uint64_t total = 0, overlap = 0, first_gap = r.end, first_part = r.end;
		size_t runs = 0;
		int add = rand() % 2;

		CHECK_EQ(add ? extents_add(&e, r) : extents_remove(&e, r), 0);
		memset(bitmap + r.start, add, r.end - r.start);

		a = (uint64_t)(rand() % UNITS);
		b = a + (uint64_t)(rand() % 60);
		r = (struct range){ a, b < UNITS ? b : UNITS };
		first_gap = first_part = r.end;
		for (uint64_t i = 0; i < UNITS; i++) {
			total += bitmap[i];
			runs += bitmap[i] && (i == 0 || !bitmap[i - 1]);
			if (i < r.start || i >= r.end)
				continue;
			overlap += bitmap[i];
			if (bitmap[i] && first_part == r.end)
				first_part = i;
			if (!bitmap[i] && first_gap == r.end)
				first_gap = i;
		}
		CHECK_EQ(e.total, total);
		CHECK_EQ(e.n, runs);
		CHECK_EQ(extents_overlap(&e, r), overlap);
		CHECK_EQ(extents_gap(&e, r, &gap), first_gap < r.end);
		if (first_gap < r.end) {
			CHECK_EQ(gap.start, first_gap);
			CHECK(gap.end == r.end || bitmap[gap.end]);
		}
		CHECK_EQ(extents_part(&e, r, &part), first_part < r.end);
		if (first_part < r.end) {
			CHECK_EQ(part.start, first_part);
			CHECK(part.end == r.end || !bitmap[part.end]);
		}
		if (check_failures)
			return;
	}
}

static void full_refuses_and_changes_nothing(void)
{
	static struct extents e;

	extents_clear(&e);
	for (uint64_t i = 0; i < EXTENTS_MAX; i++)
		CHECK_EQ(extents_add(&e, (struct range){ i * 10, i * 10 + 5 }), 0);
	CHECK_EQ(extents_add(&e, (struct range){ EXTENTS_MAX * 10, EXTENTS_MAX * 10 + 1 }), -ENOSPC);
	CHECK_EQ(extents_remove(&e, (struct range){ 1, 2 }), -ENOSPC);
	CHECK_EQ(e.n, EXTENTS_MAX);
	CHECK_EQ(e.total, EXTENTS_MAX * 5);
	/* Merging and trimming need no room. */
	CHECK_EQ(extents_add(&e, (struct range){ 5, 10 }), 0);
	CHECK_EQ(e.n, EXTENTS_MAX - 1);
	CHECK_EQ(extents_remove(&e, (struct range){ 0, 3 }), 0);
	CHECK_EQ(e.v[0].start, 3);
}

static void empty_ranges_do_nothing(void)
{
	static struct extents e;

	extents_clear(&e);
	CHECK_EQ(extents_add(&e, (struct range){ 5, 5 }), 0);
	CHECK_EQ(extents_add(&e, (struct range){ 6, 5 }), 0);
	CHECK_EQ(extents_remove(&e, (struct range){ 0, 100 }), 0);
	CHECK_EQ(e.n, 0);
}

static void the_whole_address_space(void)
{
	static struct extents e;

	extents_clear(&e);
	CHECK_EQ(extents_add(&e, (struct range){ 0, UINT64_MAX }), 0);
	CHECK_EQ(extents_remove(&e, (struct range){ 4096, 8192 }), 0);
	CHECK_EQ(e.n, 2);
	CHECK(e.total == UINT64_MAX - 4096);
}

CHECK_MAIN(CASE(agrees_with_a_bitmap), CASE(full_refuses_and_changes_nothing), CASE(empty_ranges_do_nothing),
	   CASE(the_whole_address_space))
