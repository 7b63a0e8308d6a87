/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which pages of this process are in memory. */
#ifndef RAMLOCK_RESIDENCY_H
#define RAMLOCK_RESIDENCY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extents.h"

enum residency_kind {
	RESIDENCY_PRESENT, /* pages of memory; the zero page is none */
	RESIDENCY_SWAPPED,
	RESIDENCY_HUGE, /* mapped as a whole huge page */
	RESIDENCY_ABSENT, /* not mapped here at all: the zero page is not absent */
};

/*
 * Lists runs of such pages in @r from its start on, at most @max, into @runs, by PAGEMAP_SCAN (Linux 6.7). *upto is how far
 * it looked: no further than 256 MiB, or 64 MiB of such pages (but absent ones). Returns how many runs there are, or -1 when the
 * kernel cannot tell.
 */
int residency_scan(int pagemap, enum residency_kind kind, struct range r, struct range *runs, size_t max, uint64_t *upto);

/*
 * The same where the kernel cannot tell: one call keeps mmap_lock, for reading, for no longer than 64 MiB of present pages
 * take, or 256 MiB of none. Then mincore(2) is asked, which takes the zero page for present and cannot tell what is of
 * another kind: nothing, then.
 */
size_t residency_list(int pagemap, enum residency_kind kind, struct range r, struct range *runs, size_t max,
		      uint64_t *upto);

/* Bytes of such pages in @r; stops counting once there are @enough. */
uint64_t residency_count(int pagemap, enum residency_kind kind, struct range r, uint64_t enough);

/*
 * Bytes at the end of @r that are mapped in huge pages without a break; stops once there are @enough. One call keeps mmap_lock,
 * for reading, for no longer than 64 MiB of small pages take, of which there are none but in the last piece looked at.
 */
uint64_t residency_huge_end(int pagemap, struct range r, uint64_t enough);

#endif
