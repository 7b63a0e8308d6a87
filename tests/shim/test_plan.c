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

enum { LOOK_MAX = 3000 }; /* pages that one call looks at */

static int residency(void *opaque, struct range r, struct range *runs, size_t max, uint64_t *upto)
{
	uint64_t page = (r.start - BASE) / PAGE, end = (r.end - BASE) / PAGE;
	size_t n = 0;

	if (opaque)
		return -ECANCELED;
	if (end > page + LOOK_MAX)
		end = page + LOOK_MAX;
	for (; page < end; page++) {
		uint64_t at = BASE + page * PAGE;

		if (!resident[page])
			continue;
		if (n && runs[n - 1].end == at)
			runs[n - 1].end += PAGE;
		else if (n == max)
			break;
		else
			runs[n++] = (struct range){ at, at + PAGE };
	}
	*upto = BASE + page * PAGE;
	return (int)n;
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
	CHECK(plan.resident && !plan.fills);
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
	make_layout(2 * MIB);
	layout.v[0].host.end = BASE + 60 * (uint64_t)(2 * MIB);
	layout_finish(&layout);
	make_resident(100, 512 * 4);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, 1, residency, NULL), 0);
	CHECK_EQ(planned(), 2 * MIB);
	CHECK_EQ((plan.runs[0].start - BASE) % (2 * MIB), 0);
	plan_address(&plan, &layout, &locked, 11 * (uint64_t)MIB);
	CHECK_EQ(planned(), 12 * MIB);
}

static void the_smallest_gaps_are_filled(void)
{
	uint64_t covered = 0;

	/* 1,000 runs of ten pages: gaps of one page, but for each fifth, which is of 20. */
	make_layout(PAGE);
	for (unsigned int i = 0, at = 0; i < 1000; i++) {
		make_resident(at, 10);
		at += 10 + (i % 5 == 4 ? 20 : 1);
	}
	CHECK_EQ(plan_resident(&plan, &layout, &locked, UINT64_MAX / 2, residency, NULL), 0);
	CHECK(plan.n <= PLAN_EXTENTS_MAX && plan.n >= 200);
	CHECK(plan.fills && !plan.resident);
	for (unsigned int page = 0; page < PAGES; page++)
		for (size_t i = 0; i < plan.n && resident[page]; i++) {
			uint64_t at = BASE + (uint64_t)page * PAGE;

			covered += at >= plan.runs[i].start && at < plan.runs[i].end;
		}
	CHECK_EQ(covered, 10000);
	/* 744 gaps have to go: a page each. */
	CHECK_EQ(planned(), (10000 + 744) * (uint64_t)PAGE);
}

static void scattered_pages_stay_few_runs(void)
{
	make_layout(PAGE);
	srand(5);
	for (unsigned int i = 0; i < PAGES; i++)
		resident[i] = (unsigned char)(rand() & 1);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, UINT64_MAX / 2, residency, NULL), 0);
	CHECK(plan.n <= PLAN_EXTENTS_MAX);
	/* What is locked counts too. */
	for (unsigned int i = 0; i < 200; i++)
		extents_add(&locked, (struct range){ BASE + (uint64_t)i * 2 * PAGE, BASE + ((uint64_t)i * 2 + 1) * PAGE });
	CHECK_EQ(plan_resident(&plan, &layout, &locked, UINT64_MAX / 2, residency, NULL), 0);
	CHECK(plan.n <= PLAN_EXTENTS_MAX - 200);
	for (size_t i = 0; i < plan.n; i++)
		CHECK_EQ(extents_overlap(&locked, plan.runs[i]), 0);
}

static void few_runs_have_no_gaps(void)
{
	make_layout(PAGE);
	for (unsigned int i = 0; i < PLAN_EXTENTS_MAX; i++)
		make_resident(i * 3, 2);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, UINT64_MAX / 2, residency, NULL), 0);
	CHECK_EQ(plan.n, PLAN_EXTENTS_MAX);
	CHECK(plan.resident && !plan.fills);
}

static void a_plan_is_used_up_bit_by_bit(void)
{
	struct range r;

	make_layout(PAGE);
	plan_clear(&plan);
	plan.runs[plan.n++] = (struct range){ BASE, BASE + 2 * PAGE };
	plan.runs[plan.n++] = (struct range){ BASE + 4 * PAGE, BASE + 5 * PAGE };
	CHECK(plan_peek(&plan, &layout, &r));
	CHECK(plan_peek(&plan, &layout, &r)); /* a look takes nothing */
	CHECK_EQ(r.start, BASE);
	plan_advance(&plan, BASE + PAGE);
	CHECK(plan_peek(&plan, &layout, &r));
	CHECK_EQ(r.start, BASE + PAGE);
	plan_advance(&plan, BASE + 2 * PAGE);
	CHECK(plan_peek(&plan, &layout, &r));
	CHECK_EQ(r.start, BASE + 4 * PAGE);
	plan_advance(&plan, BASE + 5 * PAGE);
	CHECK(!plan_peek(&plan, &layout, &r));
}

static void an_unplugged_block_is_skipped(void)
{
	struct range r;

	make_layout(PAGE);
	plan_address(&plan, &layout, &locked, MIB);
	layout.n = 0;
	CHECK(!plan_peek(&plan, &layout, &r));
}

static void a_plan_can_be_called_off(void)
{
	int other = 1;

	make_layout(PAGE);
	CHECK_EQ(plan_resident(&plan, &layout, &locked, MIB, residency, &other), -ECANCELED);
}

CHECK_MAIN(CASE(resident_pages_come_first), CASE(the_longest_runs_win), CASE(no_more_than_needed),
	   CASE(what_is_locked_is_left_out), CASE(huge_pages_stay_whole), CASE(the_smallest_gaps_are_filled),
	   CASE(scattered_pages_stay_few_runs), CASE(few_runs_have_no_gaps), CASE(a_plan_is_used_up_bit_by_bit),
	   CASE(an_unplugged_block_is_skipped), CASE(a_plan_can_be_called_off))
