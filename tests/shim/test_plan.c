/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Plans over made-up residency: the right bytes, few runs, whole pages. */
#include "check.h"
#include "plan.h"

#include <errno.h>

enum { PAGE = 4096, PAGES = 40000, MIB = 1 << 20 };

static const uint64_t BASE = 0x7f0000000000;
static unsigned char resident[PAGES];
static struct ram_layout layout;
static struct extents locked;
static struct plan plan;

static void make_layout(uint64_t page_size)
{
	memset(resident, 0, sizeof(resident));
	extents_clear(&locked);
	layout.n = 1;
	layout.v[0] = (struct ram_block){ .id = "pc.ram", .page_size = page_size };
	layout.v[0].host = (struct range){ BASE, BASE + (uint64_t)PAGES * PAGE };
	layout_finish(&layout);
}

static void make_resident(unsigned int first, unsigned int n)
{
	memset(resident + first, 1, n);
}

static int residency(void *opaque, uint64_t start, uint64_t len, unsigned char *vec)
{
	if (opaque)
		return -ECANCELED;
	CHECK(len <= PLAN_PIECE);
	memcpy(vec, resident + (start - BASE) / PAGE, len / PAGE);
	return 0;
}

static uint64_t planned(void)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < plan.n; i++)
		sum += range_size(plan.runs[i]);
	return sum;
}

static void resident_pages_come_first(void)
{
	make_layout(PAGE);
	make_resident(100, 50);
	make_resident(30000, 500);
	make_resident(16380, 20); /* across a piece */
	CHECK_EQ(plan_resident(&plan, &layout, &locked, (uint64_t)570 * PAGE, residency, NULL), 0);
	CHECK_EQ(plan.n, 3);
	CHECK_EQ(planned(), 570 * PAGE);
	for (size_t i = 0; i < plan.n; i++)
		for (uint64_t at = plan.runs[i].start; at < plan.runs[i].end; at += PAGE)
			CHECK(resident[(at - BASE) / PAGE]);
	CHECK(plan.runs[0].start < plan.runs[1].start && plan.runs[1].start < plan.runs[2].start);
}

static void the_longest_runs_win(void)
{
	make_layout(PAGE);
	for (unsigned int i = 0; i < 5000; i++)
		make_resident(i * 2, 1);
	make_resident(20000, 1000);
	make_resident(30000, 2000);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, (uint64_t)3000 * PAGE, residency, NULL), 0);
	CHECK_EQ(plan.n, 2);
	CHECK_EQ(planned(), 3000 * PAGE);
	/* Nothing is left but single pages: never more runs than the limit. */
	CHECK_EQ(plan_resident(&plan, &layout, &locked, (uint64_t)5000 * PAGE, residency, NULL), 0);
	CHECK_EQ(plan.n, PLAN_EXTENTS_MAX);
}

static void no_more_than_needed(void)
{
	make_layout(PAGE);
	make_resident(0, 1000);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, 5 * PAGE + 1, residency, NULL), 0);
	CHECK_EQ(planned(), 6 * PAGE);
	plan_address(&plan, &layout, &locked, 7 * PAGE - 1);
	CHECK_EQ(planned(), 7 * PAGE);
	CHECK_EQ(plan.runs[0].start, BASE);
}

static void what_is_locked_is_left_out(void)
{
	make_layout(PAGE);
	make_resident(0, 1000);
	extents_add(&locked, (struct range){ BASE + 10 * PAGE, BASE + 990 * PAGE });
	CHECK_EQ(plan_resident(&plan, &layout, &locked, UINT64_MAX / 2, residency, NULL), 0);
	CHECK_EQ(plan.n, 2);
	CHECK_EQ(planned(), 20 * PAGE);
	plan_address(&plan, &layout, &locked, UINT64_MAX / 2);
	CHECK_EQ(planned(), (PAGES - 980) * (uint64_t)PAGE);
}

static void huge_pages_stay_whole(void)
{
	struct range chunk;
	uint64_t taken = 0;

	make_layout(2 * MIB);
	layout.v[0].host.end = BASE + 60 * (uint64_t)(2 * MIB);
	layout_finish(&layout);
	make_resident(100, 512 * 4);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, 1, residency, NULL), 0);
	CHECK_EQ(planned(), 2 * MIB);
	CHECK_EQ((plan.runs[0].start - BASE) % (2 * MIB), 0);
	plan_address(&plan, &layout, &locked, 11 * (uint64_t)MIB);
	while (plan_take(&plan, &layout, PAGE, &chunk)) {
		CHECK_EQ(range_size(chunk), 2 * MIB);
		taken += range_size(chunk);
	}
	CHECK_EQ(taken, 12 * MIB);
}

static void chunks_are_cut_at_their_multiples(void)
{
	struct range chunk;

	make_layout(PAGE);
	plan_clear(&plan);
	plan.runs[plan.n++] = (struct range){ BASE + PAGE, BASE + 5 * (uint64_t)MIB };
	CHECK(plan_take(&plan, &layout, 2 * MIB, &chunk));
	CHECK_EQ(chunk.start, BASE + PAGE);
	CHECK_EQ(chunk.end, BASE + 2 * MIB);
	CHECK(plan_take(&plan, &layout, 2 * MIB, &chunk));
	CHECK_EQ(range_size(chunk), 2 * MIB);
	CHECK(plan_take(&plan, &layout, 2 * MIB, &chunk));
	CHECK_EQ(range_size(chunk), MIB);
	CHECK(!plan_take(&plan, &layout, 2 * MIB, &chunk));
}

static void an_unplugged_block_is_skipped(void)
{
	struct range chunk;

	make_layout(PAGE);
	plan_address(&plan, &layout, &locked, MIB);
	layout.n = 0;
	CHECK(!plan_take(&plan, &layout, 2 * MIB, &chunk));
}

static void a_plan_can_be_called_off(void)
{
	int other = 1;

	make_layout(PAGE);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, MIB, residency, &other), -ECANCELED);
}

CHECK_MAIN(CASE(resident_pages_come_first), CASE(the_longest_runs_win), CASE(no_more_than_needed),
	   CASE(what_is_locked_is_left_out), CASE(huge_pages_stay_whole), CASE(chunks_are_cut_at_their_multiples),
	   CASE(an_unplugged_block_is_skipped), CASE(a_plan_can_be_called_off))
