/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The plugged parts of a virtio-mem device. */
#include "plugged.h"

#include <errno.h>
#include <string.h>

void plugged_clear(struct plugged *p)
{
	memset(p, 0, sizeof(*p));
}

static void find_least(struct plugged *p)
{
	p->least = 0;
	for (size_t i = 1; i < p->n; i++)
		if (range_size(p->v[i]) < range_size(p->v[p->least]))
			p->least = i;
}

int plugged_add(struct plugged *p, struct range part)
{
	const uint64_t odd = 0x9e3779b97f4a7c15; /* 2^64 over the golden ratio: spreads neighbours */

	if (part.start >= part.end || part.start < p->end)
		return -EINVAL;
	p->end = part.end;
	p->total += range_size(part);
	p->mark = (p->mark ^ part.start) * odd;
	p->mark = (p->mark ^ part.end) * odd;
	if (p->n && p->v[p->n - 1].end == part.start) {
		p->v[p->n - 1].end = part.end;
		find_least(p);
	} else if (p->n < PLUGGED_PARTS_MAX) {
		p->v[p->n++] = part;
		if (p->n == PLUGGED_PARTS_MAX)
			find_least(p);
	} else if (range_size(part) > range_size(p->v[p->least])) {
		p->left_out += range_size(p->v[p->least]);
		memmove(&p->v[p->least], &p->v[p->least + 1], (p->n - p->least - 1) * sizeof(p->v[0]));
		p->v[p->n - 1] = part;
		find_least(p);
	} else {
		p->left_out += range_size(part);
	}
	return 0;
}

bool plugged_may_lock(struct plugged_history *h, const struct plugged *p, uint64_t requested, unsigned int requests,
		      uint64_t now_ns)
{
	bool changed = !h->begun || p->mark != h->mark;
	bool asked = h->begun && requests != h->requests;

	h->begun = true;
	h->mark = p->mark;
	h->requests = requests;
	if (changed || (h->waits && h->told && asked)) {
		h->waits = false; /* it got what it asked for; perhaps all is plugged again as it was */
		h->told = false;
	} else if (asked && p->total) {
		h->waits = true;
		h->told = false;
		h->asked_ns = now_ns;
	} else if (now_ns - h->asked_ns > PLUGGED_PATIENCE_S * 1000000000ULL) {
		h->waits = false;
	}
	return !h->waits && requested >= p->total;
}
