/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The books of the lock thread. Pure: no threads, no system calls. */
#include "books.h"

#include <errno.h>
#include <string.h>

bool books_full(const struct books *b)
{
	const size_t most = EXTENTS_MAX - 2;

	return b->held.n >= most || b->foreign.n >= most || b->on_fault.n >= most;
}

/* Forgets the order: by address instead. */
static void rebuild_history(struct books *b)
{
	b->n_history = b->held.n;
	memcpy(b->history, b->held.v, b->held.n * sizeof(b->held.v[0]));
}

void books_add(struct books *b, struct range r, bool foreign, bool on_fault)
{
	extents_add(&b->held, r);
	if (foreign)
		extents_add(&b->foreign, r);
	if (on_fault)
		extents_add(&b->on_fault, r);
	if (b->n_history && b->history[b->n_history - 1].end == r.start)
		b->history[b->n_history - 1].end = r.end;
	else if (b->n_history == EXTENTS_MAX)
		rebuild_history(b); /* which has @r */
	else
		b->history[b->n_history++] = r;
}

void books_populated(struct books *b, struct range r)
{
	extents_remove(&b->on_fault, r);
}

void books_doubt(struct books *b, struct range r)
{
	struct range part;

	for (; extents_part(&b->held, r, &part); r.start = part.end) {
		/* One place is kept for books_full(). When there is none, rather too much is doubted. */
		if (b->on_fault.n < EXTENTS_MAX - 3)
			extents_add(&b->on_fault, part);
		else
			b->on_fault = b->held;
	}
}

void books_remove(struct books *b, struct range r)
{
	struct range *newest = b->n_history ? &b->history[b->n_history - 1] : NULL;

	if (!extents_overlap(&b->held, r))
		return;
	extents_remove(&b->held, r);
	extents_remove(&b->foreign, r);
	extents_remove(&b->on_fault, r);
	if (!newest || newest->end != r.end || newest->start > r.start) {
		rebuild_history(b); /* not the newest: an unplug */
		return;
	}
	newest->end = r.start;
	if (newest->start == newest->end)
		b->n_history--;
}

/* @r is no guest RAM any more. */
static void let_go(struct books *b, const struct ram_layout *was, struct range r)
{
	struct range part, ours;

	for (struct range rest = r; extents_part(&b->held, rest, &part); rest.start = part.end) {
		const struct ram_block *block = layout_find(was, (struct range){ part.start, part.start + 1 });

		if (block && part.end > block->host.end) /* two blocks side by side */
			part.end = block->host.end;
		if (block && block->backing == BACKING_HUGETLB)
			continue;
		/* Where there is no room any more, it is told as another's. */
		for (struct range left = part; extents_gap(&b->foreign, left, &ours); left.start = ours.end)
			if (extents_add(&b->gone, ours))
				break;
	}
	books_remove(b, r);
}

void books_keep_layout(struct books *b, const struct ram_layout *was, const struct ram_layout *now)
{
	uint64_t at = 0;

	for (size_t i = 0; i < now->n; i++) {
		let_go(b, was, (struct range){ at, now->v[i].host.start });
		at = now->v[i].host.end;
	}
	let_go(b, was, (struct range){ at, UINT64_MAX });
}

/*
 * Whether @other surely finds room beside @b. Each range that is added is one more at most, and so is each one that is
 * taken out of another, or cut where others begin. Where nothing is, all finds room.
 */
static bool has_room(const struct books *b, const struct books *other)
{
	const size_t most = EXTENTS_MAX - 2, cut = b->foreign.n ? other->held.n : 0;

	return b->held.n + other->held.n <= most && b->foreign.n + cut + other->foreign.n <= most &&
	       b->on_fault.n + b->held.n + other->on_fault.n <= most;
}

int books_merge(struct books *b, const struct books *other)
{
	struct range gap, rest;

	if (!has_room(b, other))
		return -ENOSPC;
	for (size_t i = 0; i < other->held.n; i++) {
		rest = other->held.v[i];
		extents_remove(&b->foreign, rest);
		/* What was populated here since then stays so. */
		for (struct range part = rest; extents_gap(&b->held, part, &gap); part.start = gap.end) {
			struct range absent;

			for (; extents_part(&other->on_fault, gap, &absent); gap.start = absent.end)
				extents_add(&b->on_fault, absent);
		}
		extents_add(&b->held, rest);
	}
	for (size_t i = 0; i < other->foreign.n; i++)
		extents_add(&b->foreign, other->foreign.v[i]);
	rebuild_history(b);
	return 0;
}

bool books_newest(const struct books *b, const struct ram_layout *l, uint64_t excess, uint64_t chunk, struct range *r,
		  bool *foreign)
{
	const struct ram_block *block;
	struct range rest, part;

	if (!b->n_history)
		return false;
	*r = b->history[b->n_history - 1];
	block = layout_find(l, (struct range){ r->end - 1, r->end });
	if (!block || excess < block->page_size)
		return false;
	if (r->start < block->host.start) /* two blocks side by side */
		r->start = block->host.start;
	excess = excess / block->page_size * block->page_size;
	if (range_size(*r) > excess)
		r->start = r->end - excess;
	if (block->page_size > chunk)
		chunk = block->page_size;
	if (range_size(*r) > chunk)
		r->start = (r->end - 1) / chunk * chunk;
	/* Of ours and foreign parts that alternate, the last. */
	*foreign = false;
	for (rest = *r; extents_part(&b->foreign, rest, &part); rest.start = part.end) {
		*foreign = part.end == r->end;
		r->start = *foreign ? part.start : part.end;
	}
	return true;
}

uint64_t books_in_vm_locked(const struct books *b, const struct ram_layout *l)
{
	uint64_t sum = b->gone.total;

	for (size_t i = 0; i < l->n; i++)
		if (l->v[i].backing != BACKING_HUGETLB)
			sum += extents_overlap(&b->held, l->v[i].host) - extents_overlap(&b->foreign, l->v[i].host);
	return sum;
}
