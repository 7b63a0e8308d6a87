/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest RAM as a sorted list of blocks. Pure. */
#include "layout.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static const char *const backing_names[] = {
	[BACKING_ANONYMOUS] = "anonymous", [BACKING_FILE] = "file",	  [BACKING_MEMFD] = "memfd",
	[BACKING_SHMEM] = "shmem",	   [BACKING_HUGETLB] = "hugetlb",
};
static_assert(sizeof(backing_names) / sizeof(backing_names[0]) == BACKING_COUNT, "a name for each backing");

const char *backing_name(enum backing b)
{
	return backing_names[b];
}

const struct ram_block *layout_find(const struct ram_layout *l, struct range r)
{
	for (size_t i = 0; i < l->n; i++)
		if (r.start >= l->v[i].host.start && r.end <= l->v[i].host.end)
			return &l->v[i];
	return NULL;
}

bool layout_equal(const struct ram_layout *a, const struct ram_layout *b)
{
	if (a->n != b->n)
		return false;
	for (size_t i = 0; i < a->n; i++)
		if (strcmp(a->v[i].id, b->v[i].id) || a->v[i].host.start != b->v[i].host.start ||
		    a->v[i].host.end != b->v[i].host.end || a->v[i].page_size != b->v[i].page_size)
			return false;
	return true;
}

static int by_address(const void *a, const void *b)
{
	const struct ram_block *x = a, *y = b;

	return (x->host.start > y->host.start) - (x->host.start < y->host.start);
}

void layout_finish(struct ram_layout *l)
{
	qsort(l->v, l->n, sizeof(l->v[0]), by_address);
	l->total = 0;
	for (size_t i = 0; i < l->n; i++)
		l->total += range_size(l->v[i].host);
}
