/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The books: what is held, whose it is, and what is released first. */
#include "books.h"

#include <errno.h>
#include "check.h"

enum { PAGE = 4096, PAGES = 2000, CHUNK = 16 * PAGE };

static const uint64_t BASE = 0x7f0000000000;
static struct books books;
static struct ram_layout layout;

/* Two blocks side by side. */
static void begin(void)
{
	memset(&books, 0, sizeof(books));
	layout.n = 2;
	for (size_t i = 0; i < layout.n; i++) {
		uint64_t start = BASE + i * PAGES * PAGE;

		layout.v[i] = (struct ram_block){ .page_size = PAGE, .host = { start, start + PAGES * PAGE } };
	}
	layout_finish(&layout);
}

static struct range pages(uint64_t first, uint64_t n)
{
	return (struct range){ BASE + first * PAGE, BASE + (first + n) * PAGE };
}

/* The history holds each held byte once. */
static void check_history(void)
{
	static struct extents all;
	uint64_t sum = 0;

	extents_clear(&all);
	for (size_t i = 0; i < books.n_history; i++) {
		sum += range_size(books.history[i]);
		extents_add(&all, books.history[i]);
	}
	CHECK_EQ(sum, books.held.total);
	CHECK_EQ(all.total, books.held.total);
	CHECK_EQ(extents_overlap(&books.held, (struct range){ 0, UINT64_MAX }), books.held.total);
}

static void the_newest_goes_first(void)
{
	struct range r;
	bool foreign;

	begin();
	books_add(&books, pages(500, 100), false, false);
	books_add(&books, pages(10, 20), false, true);
	CHECK(books_newest(&books, &layout, 5 * PAGE + 1, CHUNK, &r, &foreign));
	CHECK_EQ(r.start, pages(25, 5).start);
	CHECK_EQ(r.end, pages(25, 5).end);
	CHECK(!foreign);
	books_remove(&books, r);
	CHECK_EQ(books.on_fault.total, 15 * PAGE);
	CHECK(books_newest(&books, &layout, UINT64_MAX, CHUNK, &r, &foreign));
	CHECK_EQ(r.end, pages(25, 0).end);
	CHECK(range_size(r) <= CHUNK);
	CHECK(!books_newest(&books, &layout, PAGE - 1, CHUNK, &r, &foreign));
	check_history();
}

static void ours_and_foreign_are_told_apart(void)
{
	struct range r;
	bool foreign;

	begin();
	books_add(&books, pages(16, 4), true, false);
	books_add(&books, pages(20, 4), false, false);
	books_add(&books, pages(24, 4), true, false);
	CHECK_EQ(books_in_vm_locked(&books, &layout), 4 * PAGE);
	for (int i = 0; i < 3; i++) {
		CHECK(books_newest(&books, &layout, UINT64_MAX, CHUNK, &r, &foreign));
		CHECK_EQ(foreign, i != 1);
		CHECK_EQ(range_size(r), 4 * PAGE);
		books_remove(&books, r);
	}
	CHECK_EQ(books.held.total, 0);
	CHECK_EQ(books.n_history, 0);
}

static void a_step_stays_within_a_block(void)
{
	struct range r;
	bool foreign;

	begin();
	books_add(&books, pages(PAGES - 3, 6), false, false);
	CHECK(books_newest(&books, &layout, UINT64_MAX, CHUNK, &r, &foreign));
	CHECK_EQ(r.start, layout.v[1].host.start);
	CHECK_EQ(range_size(r), 3 * PAGE);
}

static void an_unplugged_block_leaves_the_books(void)
{
	static struct ram_layout now;

	begin();
	books_add(&books, pages(PAGES + 5, 6), true, true);
	books_add(&books, pages(0, 6), false, true);
	books_add(&books, pages(PAGES + 100, 6), false, false);
	now = layout;
	now.n = 1;
	layout_finish(&now);
	books_keep_layout(&books, &layout, &now);
	CHECK_EQ(books.held.total, 6 * PAGE);
	CHECK_EQ(books.foreign.total, 0);
	CHECK_EQ(books.on_fault.total, 6 * PAGE);
	/* What was ours there is to be unlocked, and counts as ours until then. */
	CHECK_EQ(books.gone.total, 6 * PAGE);
	CHECK_EQ(extents_overlap(&books.gone, pages(PAGES + 100, 6)), 6 * PAGE);
	CHECK_EQ(books_in_vm_locked(&books, &now), 12 * PAGE);
	/* Huge pages of hugetlbfs are never in VmLck, and not to be split. */
	begin();
	layout.v[1].backing = BACKING_HUGETLB;
	books_add(&books, pages(PAGES - 3, 6), false, false);
	now.n = 0;
	books_keep_layout(&books, &layout, &now);
	CHECK_EQ(books.held.total, 0);
	CHECK_EQ(books.gone.total, 3 * PAGE);
	check_history();
}

static void what_another_shim_held_is_taken_over(void)
{
	static struct books other;

	begin();
	memset(&other, 0, sizeof(other));
	books_add(&other, pages(0, 50), false, false);
	books_add(&other, pages(100, 50), false, true);
	books_add(&other, pages(200, 10), true, false);
	/* Here, meanwhile: found a part of it locked, and populated another part. */
	books_add(&books, pages(10, 10), true, false);
	books_add(&books, pages(140, 20), false, false);
	books_add(&books, pages(205, 5), true, false);
	CHECK_EQ(books_merge(&books, &other), 0);
	CHECK_EQ(books.held.total, (50 + 60 + 10) * PAGE);
	CHECK_EQ(books.foreign.total, 10 * PAGE);
	CHECK_EQ(extents_overlap(&books.foreign, pages(0, 50)), 0);
	CHECK_EQ(books.on_fault.total, 40 * PAGE);
	check_history();
}

/* As many ranges as books can hold are taken over by empty ones; where they would not fit, nothing changes. */
static void many_ranges_are_taken_over(void)
{
	static struct books other;

	begin();
	memset(&other, 0, sizeof(other));
	for (uint64_t i = 0; i < EXTENTS_MAX - 2; i++) {
		CHECK_EQ(extents_add(&other.held, pages(2 * i, 1)), 0);
		CHECK_EQ(extents_add(&other.on_fault, pages(2 * i, 1)), 0);
	}
	CHECK_EQ(books_merge(&books, &other), 0);
	CHECK_EQ(books.held.total, (EXTENTS_MAX - 2) * PAGE);
	CHECK_EQ(books.on_fault.total, (EXTENTS_MAX - 2) * PAGE);
	check_history();

	begin();
	for (uint64_t i = 0; i < 3; i++)
		books_add(&books, pages(100000 + 2 * i, 1), false, false);
	CHECK_EQ(books_merge(&books, &other), -ENOSPC);
	CHECK_EQ(books.held.total, 3 * PAGE);
	check_history();
}

static void random_work(void)
{
	struct range r;
	bool foreign;

	begin();
	srand(5);
	for (int i = 0; i < 50000 && !books_full(&books); i++) {
		r = pages((uint64_t)rand() % (2 * PAGES - 40), (uint64_t)rand() % 40);
		if (rand() % 2 && extents_gap(&books.held, r, &r))
			books_add(&books, r, rand() % 3 == 0, rand() % 3 == 0);
		else if (rand() % 20 == 0)
			books_remove(&books, r);
		else if (books_newest(&books, &layout, (uint64_t)rand() % (50 * PAGE), CHUNK, &r, &foreign)) {
			CHECK_EQ(extents_overlap(&books.held, r), range_size(r));
			CHECK_EQ(extents_overlap(&books.foreign, r), foreign ? range_size(r) : 0);
			CHECK(layout_find(&layout, r) != NULL);
			books_remove(&books, r);
		}
		check_history();
		if (check_failures)
			return;
	}
}

CHECK_MAIN(CASE(the_newest_goes_first), CASE(ours_and_foreign_are_told_apart), CASE(a_step_stays_within_a_block),
	   CASE(an_unplugged_block_leaves_the_books), CASE(what_another_shim_held_is_taken_over),
	   CASE(many_ranges_are_taken_over), CASE(random_work))
