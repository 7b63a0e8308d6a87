/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which bytes of guest RAM to lock next. Pure: what is resident comes from the caller. */
#include "plan.h"

#include <stdlib.h>

enum { PAGE = 4096 };

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
}

/* A min-heap of the longest runs seen so far: the shortest of them is at the top and leaves first. */
struct longest {
	struct range *v;
	size_t n;
	size_t max;
};

static void swap(struct range *a, struct range *b)
{
	struct range t = *a;

	*a = *b;
	*b = t;
}

static void longest_offer(struct longest *h, struct range r)
{
	size_t i;

	if (h->n < h->max) {
		i = h->n++;
		h->v[i] = r;
		while (i && range_size(h->v[i]) < range_size(h->v[(i - 1) / 2])) {
			swap(&h->v[i], &h->v[(i - 1) / 2]);
			i = (i - 1) / 2;
		}
		return;
	}
	if (!h->max || range_size(r) <= range_size(h->v[0]))
		return;
	h->v[0] = r;
	for (i = 0;;) {
		size_t least = i;

		for (size_t child = 2 * i + 1; child <= 2 * i + 2 && child < h->n; child++)
			if (range_size(h->v[child]) < range_size(h->v[least]))
				least = child;
		if (least == i)
			return;
		swap(&h->v[i], &h->v[least]);
		i = least;
	}
}

/* Offers the resident run [start, end), shrunk to whole pages of its block. */
static void offer_run(struct longest *h, const struct ram_block *b, uint64_t start, uint64_t end)
{
	struct range r = {
		.start = b->host.start + round_up(start - b->host.start, b->page_size),
		.end = b->host.start + round_down(end - b->host.start, b->page_size),
	};

	if (r.start < r.end)
		longest_offer(h, r);
}

/* Finds the resident runs in @gap, a part of @b. */
static int scan_gap(struct longest *h, const struct ram_block *b, struct range gap, plan_residency_fn *residency,
		    void *opaque)
{
	static unsigned char vec[PLAN_PIECE / PAGE]; /* only the lock thread plans */
	uint64_t run = 0; /* where the open run began; 0: none is open */

	for (uint64_t at = gap.start; at < gap.end; at += PLAN_PIECE) {
		uint64_t len = gap.end - at < PLAN_PIECE ? gap.end - at : PLAN_PIECE;
		int err = residency(opaque, at, len, vec);

		if (err)
			return err;
		for (uint64_t i = 0; i < len / PAGE; i++) {
			if ((vec[i] & 1) && !run) {
				run = at + i * PAGE;
			} else if (!(vec[i] & 1) && run) {
				offer_run(h, b, run, at + i * PAGE);
				run = 0;
			}
		}
	}
	if (run)
		offer_run(h, b, run, gap.end);
	return 0;
}

static int longer_first(const void *a, const void *b)
{
	uint64_t x = range_size(*(const struct range *)a), y = range_size(*(const struct range *)b);

	return (x < y) - (x > y);
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
	struct range found[PLAN_EXTENTS_MAX] = { { 0, 0 } };
	struct longest h = { .v = found, .max = locked->n < PLAN_EXTENTS_MAX ? PLAN_EXTENTS_MAX - locked->n : 0 };

	plan_clear(p);
	for (size_t i = 0; i < l->n && h.max; i++) {
		struct range rest = l->v[i].host, gap;

		for (; extents_gap(locked, rest, &gap); rest.start = gap.end) {
			int err = scan_gap(&h, &l->v[i], gap, residency, opaque);

			if (err)
				return err;
		}
	}
	qsort(found, h.n, sizeof(found[0]), longer_first);
	for (size_t i = 0; i < h.n && need; i++)
		need = append(p, l, found[i], need);
	qsort(p->runs, p->n, sizeof(p->runs[0]), by_address);
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

bool plan_take(struct plan *p, const struct ram_layout *l, uint64_t chunk, struct range *out)
{
	while (p->next < p->n) {
		struct range *r = &p->runs[p->next];
		const struct ram_block *b = layout_find(l, *r);

		if (!b) { /* unplugged since the plan was made */
			p->next++;
			continue;
		}
		if (b->page_size > chunk)
			chunk = b->page_size;
		*out = *r;
		if (range_size(*r) > chunk) {
			out->end = round_down(r->start + chunk, chunk);
			r->start = out->end;
		} else {
			p->next++;
		}
		return true;
	}
	return false;
}
