/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which parts of virtio-mem are plugged, and when they may be locked. */
#include "check.h"
#include "plugged.h"

#include <errno.h>

enum { MIB = 1 << 20, PART = 2 * MIB };
static const uint64_t SECOND = 1000000000;

static struct plugged p;

/* @n parts of @size bytes, every @stride bytes. */
static void parts(size_t n, uint64_t size, uint64_t stride)
{
	plugged_clear(&p);
	for (size_t i = 0; i < n; i++)
		CHECK_EQ(plugged_add(&p, (struct range){ i * stride, i * stride + size }), 0);
}

static void neighbours_are_one_part(void)
{
	parts(1000, PART, PART);
	CHECK_EQ(p.n, 1);
	CHECK_EQ(range_size(p.v[0]), 1000ULL * PART);
	CHECK_EQ(p.total, 1000ULL * PART);
	CHECK_EQ(p.left_out, 0);
}

static void the_largest_find_a_place(void)
{
	parts(1000, PART, 2 * PART);
	CHECK_EQ(p.n, PLUGGED_PARTS_MAX);
	CHECK_EQ(p.total, 1000ULL * PART);
	CHECK_EQ(p.left_out, (1000ULL - PLUGGED_PARTS_MAX) * PART);
	for (uint64_t i = 0; i < 10; i++)
		CHECK_EQ(plugged_add(&p, (struct range){ (10000 + 10 * i) * PART, (10005 + 10 * i) * PART }), 0);
	CHECK_EQ(p.n, PLUGGED_PARTS_MAX);
	CHECK_EQ(p.left_out, (1010ULL - PLUGGED_PARTS_MAX) * PART);
	CHECK_EQ(p.total, 1050ULL * PART);
	for (size_t i = 1; i < p.n; i++)
		CHECK(p.v[i - 1].end <= p.v[i].start);
	for (size_t i = p.n - 10; i < p.n; i++)
		CHECK_EQ(range_size(p.v[i]), 5ULL * PART);
}

static void parts_come_in_order(void)
{
	parts(3, PART, 2 * PART);
	CHECK_EQ(plugged_add(&p, (struct range){ 0, PART }), -EINVAL);
	CHECK_EQ(plugged_add(&p, (struct range){ 5 * PART - 1, 6 * PART }), -EINVAL);
	CHECK_EQ(plugged_add(&p, (struct range){ 9 * PART, 9 * PART }), -EINVAL);
	CHECK_EQ(plugged_add(&p, (struct range){ 9 * PART, 8 * PART }), -EINVAL);
	CHECK_EQ(p.total, 3ULL * PART);
}

static bool look(struct plugged_history *h, size_t n, size_t requested, unsigned int requests, uint64_t seconds)
{
	parts(n, PART, PART);
	return plugged_may_lock(h, &p, (uint64_t)requested * PART, requests, seconds * SECOND);
}

static void growing_is_locked(void)
{
	struct plugged_history h = { .begun = false };

	CHECK(look(&h, 0, 0, 0, 1));
	CHECK(look(&h, 0, 8, 0, 2));
	CHECK(look(&h, 3, 8, 3, 3));
	CHECK(look(&h, 8, 8, 8, 4));
	CHECK(look(&h, 8, 8, 8, 1000));
}

static void shrinking_is_not(void)
{
	struct plugged_history h = { .begun = false };

	CHECK(look(&h, 8, 8, 8, 1));
	CHECK(!look(&h, 8, 4, 8, 2));
	CHECK(!look(&h, 8, 4, 9, 3));
	CHECK(!look(&h, 6, 4, 11, 4));
	CHECK(look(&h, 4, 4, 13, 5));
	/* A guest that cannot give it back keeps it unlocked. */
	CHECK(!look(&h, 4, 0, 13, 6));
	CHECK(!look(&h, 4, 0, 13, 10000));
}

static void a_guest_that_asks_in_vain_is_given_way(void)
{
	struct plugged_history h = { .begun = false };

	/* Known from the first look on: what was before does not matter. */
	CHECK(look(&h, 8, 8, 500, 1));
	CHECK(look(&h, 8, 8, 500, 2));
	/* It starts anew, and wants to begin with nothing. */
	CHECK(!look(&h, 8, 8, 1, 3));
	CHECK(!look(&h, 8, 8, 1, 4));
	CHECK(!look(&h, 8, 8, 2, 5)); /* before all was unlocked */
	CHECK(!h.told);
	h.told = true;
	CHECK(!look(&h, 8, 8, 2, 6));
	/* It got it, and all is plugged again. */
	CHECK(look(&h, 8, 8, 9, 7));
	CHECK(look(&h, 8, 8, 9, 8));
	/* Or it is seen half way. */
	CHECK(!look(&h, 8, 8, 1, 9));
	CHECK(look(&h, 3, 8, 5, 10));
	/* With nothing plugged, a question is about nothing. */
	CHECK(look(&h, 0, 0, 6, 11));
	CHECK(look(&h, 0, 0, 7, 12));
	/* One that never asks again has changed its mind. */
	CHECK(look(&h, 8, 8, 8, 20));
	CHECK(!look(&h, 8, 8, 9, 21));
	CHECK(!look(&h, 8, 8, 9, 21 + PLUGGED_PATIENCE_S));
	CHECK(look(&h, 8, 8, 9, 22 + PLUGGED_PATIENCE_S));
}

CHECK_MAIN(CASE(neighbours_are_one_part), CASE(the_largest_find_a_place), CASE(parts_come_in_order), CASE(growing_is_locked),
	   CASE(shrinking_is_not), CASE(a_guest_that_asks_in_vain_is_given_way))
