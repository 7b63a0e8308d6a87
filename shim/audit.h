/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the kernel says about locked memory: pages that are not there, pages that were merged. Knows no locker. */
#ifndef RAMLOCK_AUDIT_H
#define RAMLOCK_AUDIT_H

#include <stdbool.h>
#include <stdint.h>

#include "extents.h"

/* How locked memory can be lost; as in the protocol's "cause". */
enum loss {
	LOSS_UNLOCKED, /* somebody took the lock away */
	LOSS_DISCARDED, /* somebody took the pages away from under the lock */
	LOSS_MERGED, /* the kernel shares the pages with others that have the same content (KSM) */
	LOSS_COUNT,
};

const char *loss_name(enum loss loss);

/*
 * Bytes of @r that are not in memory, or not mapped here, so that no lock holds them. @pagemap is /proc/self/pagemap; without
 * it mincore(2) must do, which does not see all of it. Holds mmap_lock for reading, about 2 us for each MiB.
 */
uint64_t audit_absent(int pagemap, struct range r);

/* The first run of pages of @r that are in memory and mapped here. Returns false when there is none, or no telling. */
bool audit_next_present(int pagemap, struct range r, struct range *run);

/*
 * Bytes of @r that are there for good, so that a write allocates nothing: in a @shared mapping all that is there, else what
 * is anonymous and mapped here alone. 0 when @pagemap cannot be read.
 */
uint64_t audit_owned(int pagemap, struct range r, bool shared);

/* Bytes of @r, in a private anonymous mapping, that are there and shared with others. Without @pagemap none is seen. */
uint64_t audit_merged(int pagemap, struct range r);

#endif
