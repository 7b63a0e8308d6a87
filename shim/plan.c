/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which bytes of guest RAM to lock next. Pure: what is resident comes from the caller. */
#include "plan.h"

#include <stdlib.h>

static uint64_t round_up(uint64_t v, uint64_t to)
{
	return (v + to - 1) / to * to;
}

static uint64_t round_down(uint64_t v, uint64_t to)
{
	return v / to * to;
}

void plan_clear(struct plan *p)
{
	p->n = 0;
	p->next = 0;
	p->resident = p->fills = false;
}

enum { FOUND_MAX = 2 * PLAN_EXTENTS_MAX };

/* A run of resident pages, and of gaps between them that are to be filled. */
struct found_run {
	struct range r;
	bool fills;
};

/* The runs found so far, ascending. */
struct found {
	struct found_run v[FOUND_MAX];
	size_t n;
	size_t max; /* of what may be left in the end */
};

static int smaller_first(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* Whether the gap between two runs is guest RAM of one block, and nothing in it is locked. */
static bool may_fill(const struct found_run *a, const struct found_run *b, const struct ram_layout *l,
		     const struct extents *locked)
{
	return layout_find(l, (struct range){ a->r.start, b->r.end }) &&
	       !extents_overlap(locked, (struct range){ a->r.end, b->r.start });
}

/* Fills the smallest gaps within blocks until @max runs are left, or no gap is. */
static void fill_gaps(struct found *f, const struct ram_layout *l, const struct extents *locked)
{
	uint64_t gaps[FOUND_MAX], most;
	size_t n = 0, excess, kept = 0;

	if (f->n <= f->max)
		return;
	for (size_t i = 1; i < f->n; i++)
		if (may_fill(&f->v[i - 1], &f->v[i], l, locked))
			gaps[n++] = f->v[i].r.start - f->v[i - 1].r.end;
	if (!n)
		return;
	qsort(gaps, n, sizeof(gaps[0]), smaller_first);
	excess = f->n - f->max;
	most = gaps[excess < n ? excess - 1 : n - 1];
	for (size_t i = 1; i < f->n; i++) {
		struct found_run *last = &f->v[kept];

		if (excess && f->v[i].r.start - last->r.end <= most && may_fill(last, &f->v[i], l, locked)) {
			last->r.end = f->v[i].r.end;
			last->fills = true;
			excess--;
		} else {
			f->v[++kept] = f->v[i];
		}
	}
	f->n = kept + 1;
}

/* Adds the resident run @r, shrunk to whole pages of its block. */
static void add_run(struct found *f, const struct ram_layout *l, const struct extents *locked,
		    const struct ram_block *b, struct range r)
{
	r.start = b->host.start + round_up(r.start - b->host.start, b->page_size);
	r.end = b->host.start + round_down(r.end - b->host.start, b->page_size);
	if (r.start >= r.end)
		return;
	if (f->n == FOUND_MAX)
		fill_gaps(f, l, locked);
	if (f->n < FOUND_MAX)
		f->v[f->n++] = (struct found_run){ r, false };
}

static int scan_gap(struct found *f, const struct ram_layout *l, const struct extents *locked,
		    const struct ram_block *b, struct range gap, plan_residency_fn *residency, void *opaque)
{
	struct range open = { 0, 0 }; /* a run that may go on in the next piece */

	while (gap.start < gap.end) {
		struct range runs[PLAN_RUNS];
		int n = residency(opaque, gap, runs, PLAN_RUNS, &gap.start);

		if (n < 0)
			return n;
		for (int i = 0; i < n; i++) {
			if (open.end == runs[i].start && range_size(open)) {
				open.end = runs[i].end;
				continue;
			}
			if (range_size(open))
				add_run(f, l, locked, b, open);
			open = runs[i];
		}
	}
	if (range_size(open))
		add_run(f, l, locked, b, open);
	return 0;
}

/* Those that need no filling before the others, the longest first. */
static int cheaper_first(const void *a, const void *b)
{
	const struct found_run *x = a, *y = b;
	uint64_t xs = range_size(x->r), ys = range_size(y->r);

	return x->fills != y->fills ? x->fills - y->fills : (xs < ys) - (xs > ys);
}

static int by_address(const void *a, const void *b)
{
	const struct range *x = a, *y = b;

	return (x->start > y->start) - (x->start < y->start);
}

/* Appends as much of @r as is still needed. Returns what is needed after that. */
static uint64_t append(struct plan *p, const struct ram_layout *l, struct range r, uint64_t need)
{
	uint64_t want = round_up(need, layout_find(l, r)->page_size);

	if (range_size(r) > want)
		r.end = r.start + want;
	p->runs[p->n++] = r;
	return need > range_size(r) ? need - range_size(r) : 0;
}

int plan_resident(struct plan *p, const struct ram_layout *l, const struct extents *locked, uint64_t need,
		  plan_residency_fn *residency, void *opaque)
{
	static struct found f; /* only the lock thread plans */

	plan_clear(p);
	f.n = 0;
	f.max = locked->n < PLAN_EXTENTS_MAX ? PLAN_EXTENTS_MAX - locked->n : 0;
	for (size_t i = 0; i < l->n && f.max; i++) {
		struct range rest = l->v[i].host, gap;

		for (; extents_gap(locked, rest, &gap); rest.start = gap.end) {
			int err = scan_gap(&f, l, locked, &l->v[i], gap, residency, opaque);

			if (err)
				return err;
		}
	}
	fill_gaps(&f, l, locked);
	qsort(f.v, f.n, sizeof(f.v[0]), cheaper_first);
	for (size_t i = 0; i < f.n && i < f.max && need; i++) {
		need = append(p, l, f.v[i].r, need);
		p->fills |= f.v[i].fills;
	}
	qsort(p->runs, p->n, sizeof(p->runs[0]), by_address);
	p->resident = !p->fills;
	return 0;
}

void plan_address(struct plan *p, const struct ram_layout *l, const struct extents *locked, uint64_t need)
{
	plan_clear(p);
	for (size_t i = 0; i < l->n && need; i++) {
		struct range rest = l->v[i].host, gap;

		for (; need && p->n < PLAN_EXTENTS_MAX && extents_gap(locked, rest, &gap); rest.start = gap.end)
			need = append(p, l, gap, need);
	}
}

bool plan_peek(struct plan *p, const struct ram_layout *l, struct range *r)
{
	for (; p->next < p->n; p->next++) {
		*r = p->runs[p->next];
		if (r->start < r->end && layout_find(l, *r)) /* not unplugged since the plan was made */
			return true;
	}
	return false;
}

void plan_advance(struct plan *p, uint64_t end)
{
	p->runs[p->next].start = end;
}
