/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One step of locking or unlocking: the system calls, and what they came to. Knows no locker. */
#ifndef RAMLOCK_STEP_H
#define RAMLOCK_STEP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extents.h"
#include "headroom.h"
#include "hugepages.h"
#include "makeroom.h"
#include "merging.h"
#include "pacer.h"
#include "rest.h"
#include "tmpfs.h"
#include "workers.h"

enum { SHORT_TEXT = 256 };

enum step_kind {
	STEP_NONE,
	STEP_PLAN, /* decide which bytes come next */
	STEP_STUCK, /* there is no room in the books */
	STEP_SUSPENDED, /* this is not the time to touch guest RAM */
	/* These are carried out: */
	STEP_LOCK,
	STEP_POPULATE, /* an on-fault lock that should be populated now */
	STEP_UNLOCK,
	STEP_LET_GO, /* unlock what is no guest RAM any more, and may be unmapped by now */
	STEP_FORGET, /* release what was never ours */
};

struct step {
	enum step_kind kind;
	struct range r;
	uint64_t page_size; /* bytes, of the block */
	bool hugetlb;
	bool unreserved; /* huge pages that nobody has set aside for this */
	bool tmpfs; /* of a file in one */
	struct tmpfs_room room; /* in that, if so */
	bool of_file; /* page cache, which is given up without swap as long as it is not locked */
	bool shared; /* a shared mapping: its page cache is the memory itself */
	bool prefault;
	bool mergeable; /* QEMU has asked for merging by KSM */
	uint64_t host_reserve; /* bytes that are left for the host; 0: the usual */
	bool resident; /* planned, or known, to be in memory, all of it */
	bool fills; /* pages that are absent are filled because they lie between resident ones */
	unsigned int threads; /* that populate */
	/* What step_size() finds and decides. */
	uint64_t piece; /* bytes that one thread populates at a time */
	bool huge; /* to be unlocked: all of it is in huge pages */
	uint64_t present, swapped; /* bytes, of `looked` bytes */
	uint64_t looked;
};

/* Whether most of what a sized step populates is absent: what comes from swap becomes no huge pages. */
static inline bool step_is_absent(const struct step *s)
{
	return s->present + s->swapped < s->looked / 2;
}

/*
 * A step has 24 pieces for each thread, so that it is worth its other system calls and a wait for each other at its end;
 * or all those of one chunk. And one hold is the lock's.
 */
enum { PIECES_PER_THREAD = 24, HOLDS_MAX = PIECES_PER_THREAD * (WORKERS_MAX + 1) + PACER_CHUNK / PACER_CHUNK_MIN + 1 };

/* What a step came to. */
struct outcome {
	enum shortage shortage; /* SHORTAGE_NONE: done as far as `done` says */
	struct range done; /* what of the step's range is done; the rest is as it was */
	bool foreign; /* `done` was locked already, by somebody else */
	uint64_t filled; /* bytes that were absent, where the step fills */
	uint64_t holds[HOLDS_MAX]; /* how long each system call took, in ns */
	size_t n_holds;
	char text[SHORT_TEXT]; /* why not */
};

struct stepper {
	struct headroom headroom;
	struct makeroom makeroom;
	struct pace pace; /* the lock thread's alone */
	struct workers workers;
	atomic_bool cancel; /* the step in flight is to end after the system calls in flight */
	int pagemap; /* /proc/self/pagemap */
	struct merging merging;
	struct hugepages hugepages;
	uint64_t unreserved_absent; /* bytes in unreserved huge pages that the guest may still take */
	uint64_t unreserved_until_ns; /* CLOCK_MONOTONIC; that was counted, and is to be counted again then */
	uint64_t owed; /* bytes that are armed and absent: the guest will allocate them */
	uint64_t credit; /* bytes that headroom_memory() granted */
	uint64_t pin_credit; /* bytes that headroom_pinnable() granted */
	uint64_t pin_until_ns; /* CLOCK_MONOTONIC */
	uint64_t pin_nodes; /* as credit_nodes */
	uint64_t credit_until_ns; /* CLOCK_MONOTONIC */
	uint64_t credit_nodes; /* it is for memory of these NUMA nodes, as from numa_bound() */
	uint64_t freshen_ns; /* CLOCK_MONOTONIC: when cgroups_freshen() is due */
	atomic_flag freshening; /* a thread is at it */
	atomic_bool no_populate; /* the kernel is older than 5.14 */
	struct rest rest;
	struct rest_view views[WORKERS_MAX + 1]; /* the first is the lock thread's */
	uint64_t looked_ns; /* looks at pages took that long since the last rest from it */
	unsigned long look_rests; /* how many of those rests there were */
	bool isolates; /* the host has processors that are kept from the kernel's own work */
	bool fills_huge; /* what was absent became huge pages lately: so a piece is one of them at least */
};

void stepper_init(struct stepper *st);

/* Opens what can be opened, in the process that is to lock; @root as for headroom_open(). */
void stepper_open(struct stepper *st, const char *root);
void stepper_deinit(struct stepper *st);

/*
 * Makes the range of @s, of a kind from STEP_LOCK on, as small as the hold budget asks for: from its end where it is
 * unlocked, from its start else.
 */
void step_size(struct stepper *st, struct step *s);

/* Asks whether there is room for @s; makes it smaller where there is some. Returns false with the reason in @o. */
bool step_admit(struct stepper *st, struct step *s, struct outcome *o);

/* Carries out @s, which was admitted. */
void step_carry_out(struct stepper *st, const struct step *s, struct outcome *o);

/* The lock thread has looked at pages, which keeps mmap_lock too, for @ns: it rests now and then, asleep, and keeps cgroups fresh. */
void step_looked(struct stepper *st, uint64_t ns);

/* Calls cgroups_freshen() if that is due. Any thread of the step's may. */
void step_freshen(struct stepper *st);

#endif
