/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One step of locking or unlocking: the system calls, and what they came to. Knows no locker. */
#ifndef RAMLOCK_STEP_H
#define RAMLOCK_STEP_H

#include <stdbool.h>
#include <stdint.h>

#include "extents.h"
#include "headroom.h"
#include "merging.h"

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
	bool hugetlb;
	bool shared; /* a shared mapping: its page cache is the memory itself */
	bool prefault;
	bool mergeable; /* QEMU has asked for merging by KSM */
	uint64_t host_reserve; /* bytes that are left for the host; 0: the usual */
};

/* What a step came to. */
struct outcome {
	enum shortage shortage; /* SHORTAGE_NONE: done. Otherwise nothing has changed */
	bool foreign; /* the range was locked already, by somebody else */
	char text[SHORT_TEXT]; /* why not */
};

struct stepper {
	struct headroom headroom;
	int pagemap; /* /proc/self/pagemap */
	struct merging merging;
	uint64_t owed; /* bytes that are armed and absent: the guest will allocate them */
	uint64_t credit; /* bytes that headroom_memory() granted */
	uint64_t credit_until_ns; /* CLOCK_MONOTONIC */
	uint64_t credit_nodes; /* it is for memory of these NUMA nodes, as from numa_bound() */
	bool others_lock; /* something in the process holds locks besides us */
	bool no_populate; /* the kernel is older than 5.14 */
};

uint64_t now_ns(void);

void stepper_init(struct stepper *st);

/* Opens what can be opened, in the process that is to lock; @root as for headroom_open(). */
void stepper_open(struct stepper *st, const char *root);
void stepper_deinit(struct stepper *st);

/* Asks whether there is room for @s, of a kind from STEP_LOCK on. Returns false with the reason in @o. */
bool step_admit(struct stepper *st, const struct step *s, struct outcome *o);

/* Carries out @s, which was admitted. */
void step_carry_out(struct stepper *st, const struct step *s, struct outcome *o);

#endif
