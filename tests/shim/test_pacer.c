/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Step statistics and gaps. */
#include "check.h"
#include "pacer.h"

#include <stdbool.h>

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

static void step_times_are_counted_by_powers_of_two(void)
{
	static const uint64_t ns[] = { 0, 1000, 1001, 2000, 1000ULL << 20, (1000ULL << 20) + 1, 1ULL << 60 };
	struct step_times t = { 0 };
	uint64_t in_buckets = 0;

	for (size_t i = 0; i < sizeof(ns) / sizeof(ns[0]); i++)
		step_times_record(&t, ns[i]);
	CHECK_EQ(t.count, 7);
	CHECK_EQ(t.buckets[0], 2);
	CHECK_EQ(t.buckets[1], 2);
	CHECK_EQ(t.buckets[STEP_TIMES - 1], 1);
	for (size_t i = 0; i < STEP_TIMES; i++)
		in_buckets += t.buckets[i];
	CHECK_EQ(in_buckets, 5);
	CHECK(t.sum_ns == 0 + 1000 + 1001 + 2000 + 2 * (1000ULL << 20) + 1 + (1ULL << 60));
}

static void the_gap_is_four_percent_within_bounds(void)
{
	CHECK_EQ(pacer_gap(0), 1000);
	CHECK_EQ(pacer_gap(2 * 1000 * 1000), 80 * 1000);
	CHECK_EQ(pacer_gap(10ULL * 1000 * 1000 * 1000), 1000 * 1000);
}

/* A made-up machine: what a byte of each kind costs, in attoseconds. */
static uint64_t truth[PACE_KINDS];

/* One step of @kind; its time is what it costs, and @preempted ns on top. Returns the bytes of it. */
static uint64_t step(struct pace *p, enum pace_kind kind, uint64_t preempted)
{
	uint64_t bytes = pace_bytes(p, kind);
	uint64_t ns = (uint64_t)((double)bytes * (double)truth[kind] / 1e9);

	pace_learn(p, kind, bytes, ns + preempted, ns);
	return bytes;
}

static bool is_about(uint64_t got, uint64_t want)
{
	return got > want / 2 && got < want * 2;
}

/* Bytes that fit in the budget. */
static uint64_t ideal(const struct pace *p, enum pace_kind kind)
{
	return (uint64_t)((double)p->budget_ns * 1e9 / (double)truth[kind]);
}

static void chunks_converge_to_the_budget(void)
{
	/* From 30 GB/s to 150 MB/s. */
	static const uint64_t costs[] = { 33000000, 120000000, 500000000, 1200000000, 6500000000 };
	struct pace p;

	for (size_t i = 0; i < sizeof(costs) / sizeof(costs[0]); i++)
		for (enum pace_kind kind = 0; kind < PACE_KINDS; kind++) {
			if (kind == PACE_MARK)
				continue;
			pace_init(&p);
			truth[kind] = costs[i];
			for (int j = 0; j < 12; j++)
				step(&p, kind, 0);
			CHECK(is_about(pace_bytes(&p, kind), ideal(&p, kind)));
			CHECK(is_about(pace_expect(&p, kind, pace_bytes(&p, kind)), p.budget_ns));
		}
}

static void one_kind_says_nothing_of_another(void)
{
	struct pace p, before;

	pace_init(&p);
	before = p;
	truth[PACE_SWAP_IN] = 20000000000;
	for (int i = 0; i < 20; i++)
		step(&p, PACE_SWAP_IN, 0);
	CHECK(p.cost[PACE_SWAP_IN] != before.cost[PACE_SWAP_IN]);
	for (enum pace_kind kind = 0; kind < PACE_KINDS; kind++)
		CHECK(kind == PACE_SWAP_IN || p.cost[kind] == before.cost[kind]);
}

static void a_change_for_the_worse_is_believed_at_once(void)
{
	struct pace p;
	int steps = 0;

	pace_init(&p);
	truth[PACE_FILL] = 120000000; /* huge pages ... */
	for (int i = 0; i < 12; i++)
		step(&p, PACE_FILL, 0);
	truth[PACE_FILL] = 1200000000; /* ... and then small ones */
	while (!is_about(pace_bytes(&p, PACE_FILL), ideal(&p, PACE_FILL)) && steps < 100) {
		step(&p, PACE_FILL, 0);
		steps++;
	}
	CHECK(steps <= 2);
}

static void preemption_does_not_make_it_collapse(void)
{
	struct pace p;
	uint64_t sum = 0, best;

	pace_init(&p);
	truth[PACE_LOCK] = 33000000;
	for (int i = 0; i < 20; i++)
		step(&p, PACE_LOCK, 0);
	best = ideal(&p, PACE_LOCK);
	/* One step in ten loses the processor for 10 ms. */
	srand(3);
	for (int i = 0; i < 1000; i++)
		sum += step(&p, PACE_LOCK, rand() % 10 ? 0 : 10000000);
	CHECK(sum / 1000 > best / 2);
	/* Once is forgotten soon. */
	for (int i = 0; i < 20; i++)
		step(&p, PACE_LOCK, 0);
	step(&p, PACE_LOCK, 10ULL * 1000 * 1000 * 1000);
	CHECK(pace_bytes(&p, PACE_LOCK) >= best / 5);
	for (int i = 0; i < 4; i++)
		step(&p, PACE_LOCK, 0);
	CHECK(is_about(pace_bytes(&p, PACE_LOCK), best));
}

static void chunks_stay_within_bounds(void)
{
	struct pace p;

	pace_init(&p);
	srand(9);
	for (int i = 0; i < 100000; i++) {
		enum pace_kind kind = (enum pace_kind)(rand() % PACE_KINDS);
		uint64_t wall = (uint64_t)rand() * (uint64_t)(rand() % 3 ? 1 : rand()), bytes;

		p.budget_ns = 50000 + (uint64_t)rand() % 100000000;
		pace_learn(&p, kind, (uint64_t)rand() * (uint64_t)(rand() % 100000), wall, wall / (uint64_t)(1 + rand() % 9));
		bytes = pace_bytes(&p, kind);
		CHECK(bytes >= PACER_CHUNK_MIN);
		CHECK(bytes <= (kind == PACE_MARK	 ? PACER_CHUNK_MAX_ABSENT :
				kind == PACE_UNLOCK_HUGE ? PACER_CHUNK_MAX_HUGE :
							   PACER_CHUNK_MAX));
	}
}

static void a_small_last_step_is_no_evidence(void)
{
	struct pace p, before;

	pace_init(&p);
	before = p;
	pace_learn(&p, PACE_LOCK, 4096, 5000, 5000);
	pace_learn(&p, PACE_LOCK, 0, 5000, 5000);
	CHECK_EQ(p.cost[PACE_LOCK], before.cost[PACE_LOCK]);
}

static void what_is_absent_is_marked_in_long_steps(void)
{
	const uint64_t tib = 1ULL << 40;
	uint64_t done = 0;
	struct pace p;
	int steps = 0;

	pace_init(&p);
	for (; done < tib; steps++) {
		uint64_t bytes = pace_bytes(&p, PACE_MARK);

		pace_learn(&p, PACE_MARK, bytes, 5000, 4000);
		done += bytes;
	}
	CHECK(steps < 100);
}

CHECK_MAIN(CASE(p99_is_at_most_a_quarter_too_high), CASE(one_step_is_its_own_p99), CASE(a_step_of_hours_fits),
	   CASE(the_gap_is_four_percent_within_bounds),
	   CASE(step_times_are_counted_by_powers_of_two), CASE(chunks_converge_to_the_budget),
	   CASE(one_kind_says_nothing_of_another), CASE(a_change_for_the_worse_is_believed_at_once),
	   CASE(preemption_does_not_make_it_collapse), CASE(chunks_stay_within_bounds),
	   CASE(a_small_last_step_is_no_evidence), CASE(what_is_absent_is_marked_in_long_steps))
