/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Keeps the guarantee true: notices what was lost of it behind our back, and has it repaired. */
#ifndef RAMLOCK_UPKEEP_H
#define RAMLOCK_UPKEEP_H

#include <stdbool.h>
#include <stdint.h>

#include "audit.h"

struct locker;

/* Bytes, by cause. */
struct losses {
	uint64_t bytes[LOSS_COUNT];
};

/* Guarded by the locker's mutex. */
struct upkeep {
	uint64_t due_ns; /* when to look again, of CLOCK_MONOTONIC; 0: not decided */
	bool wanted; /* somebody has seen a sign of a loss: look at once */
	uint64_t looks; /* counts looks that were completed */
	int64_t others; /* VmLck less what is ours of it, at the last look; -1: not known */
	uint64_t cursor; /* where to go on with memory that is not looked at every time */
	struct losses lost, repaired; /* since the start */
	struct losses outstanding; /* lost and not repaired */
	struct losses told_lost, told_repaired; /* `lost` and `repaired` as clients were told */
};

void upkeep_init(struct upkeep *u);

/* All below with the locker's mutex. */

/* What VmLck must show at least. */
uint64_t upkeep_expected(const struct locker *l);

/* When to wake for it: decides that if it is not. UINT64_MAX: never, as nothing is held. */
uint64_t upkeep_deadline(struct locker *l);

/* Whether it is time to look. */
bool upkeep_is_due(const struct locker *l);

/*
 * Looks, in bounded pieces with the mutex given up; the lock thread only. What was lost is in the books as unpopulated
 * or not held, so that the thread goes on with repairing it.
 */
void upkeep_run(struct locker *l);

/* Gives up the mutex for work on @r, for which a removal waits; and takes it again. The lock thread only. */
void upkeep_begin_piece(struct locker *l, struct range r);
void upkeep_end_piece(struct locker *l);

/* The guarantee is held: what was lost is repaired. */
void upkeep_settled(struct locker *l);

/* Any other thread, without the mutex: has a sign of a loss followed up, and waits for that, at most 100 ms. */
void upkeep_check(struct locker *l);

#endif
