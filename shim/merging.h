/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Keeps locked memory out of KSM, which merges pages of the same content: a lock does not stop it, and the next write to
 * a merged page must allocate. QEMU asks for merging (mem-merge=on is its default).
 */
#ifndef RAMLOCK_MERGING_H
#define RAMLOCK_MERGING_H

#include <stdbool.h>

#include "extents.h"

struct merging {
	int run; /* /sys/kernel/mm/ksm/run */
	int merged; /* /proc/self/ksm_merging_pages, from Linux 5.19 */
	bool at_work; /* KSM merges, or has merged, as far as was seen */
	struct extents kept_out; /* what we have made unmergeable */
};

void merging_init(struct merging *m);

/* Opens what can be opened, in the process that is to lock; @root is "" but for tests. */
void merging_open(struct merging *m, const char *root);
void merging_deinit(struct merging *m);

/* Looks whether KSM is at work. What cannot be read counts as yes. */
void merging_look(struct merging *m);

/*
 * Keeps @r, locked private memory, out of KSM if that is at work. Copies what is merged in it, and holds mmap_lock for
 * writing meanwhile. Returns 0 or -errno.
 */
int merging_keep_out(struct merging *m, struct range r);

/* The same for @r that was locked just now: what was known of these addresses is void. */
int merging_lock(struct merging *m, struct range r);

/* Undoes that for @r, where it was @mergeable before. */
void merging_let_in(struct merging *m, struct range r, bool mergeable);

#endif
