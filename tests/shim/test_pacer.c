/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Step statistics and gaps. */
#include "check.h"
#include "pacer.h"

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void p99_is_at_most_a_quarter_too_high(void)
{
	enum { N = 5000 };
	static uint64_t us[N];
	struct pacer p;

	srand(2);
	for (int spread = 0; spread < 30; spread++) {
		uint64_t exact;

		pacer_reset(&p);
		for (int i = 0; i < N; i++) {
			us[i] = (uint64_t)rand() % (2ULL << spread);
			pacer_record(&p, us[i] * 1000);
		}
		qsort(us, N, sizeof(us[0]), ascending);
		exact = us[N - 1 - N / 100];
		CHECK(pacer_p99_us(&p) >= exact);
		CHECK(pacer_p99_us(&p) <= exact + exact / 4 + 1);
		CHECK_EQ(p.max_us, us[N - 1]);
	}
}

static void one_step_is_its_own_p99(void)
{
	struct pacer p;

	pacer_reset(&p);
	CHECK_EQ(pacer_p99_us(&p), 0);
	pacer_record(&p, 7123 * 1000);
	CHECK_EQ(pacer_p99_us(&p), 7123);
	CHECK_EQ(p.max_us, 7123);
}

static void a_step_of_hours_fits(void)
{
	struct pacer p;

	pacer_reset(&p);
	pacer_record(&p, UINT64_MAX);
	CHECK(p.max_us == UINT64_MAX / 1000);
	CHECK_EQ(p.buckets[PACER_BUCKETS - 1], 1);
}

static void the_gap_is_five_percent_within_bounds(void)
{
	CHECK_EQ(pacer_gap(0), 20 * 1000);
	CHECK_EQ(pacer_gap(2 * 1000 * 1000), 100 * 1000);
	CHECK_EQ(pacer_gap(10ULL * 1000 * 1000 * 1000), 1000 * 1000);
}

CHECK_MAIN(CASE(p99_is_at_most_a_quarter_too_high), CASE(one_step_is_its_own_p99), CASE(a_step_of_hours_fits),
	   CASE(the_gap_is_five_percent_within_bounds))
