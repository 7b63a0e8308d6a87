/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The books of the lock thread: which bytes count for the guarantee, and in what order they came. Pure. */
#ifndef RAMLOCK_BOOKS_H
#define RAMLOCK_BOOKS_H

#include <stdbool.h>

#include "extents.h"
#include "layout.h"

struct books {
	struct extents held; /* what counts for the guarantee: locked by us, or found locked */
	struct extents foreign; /* the part of `held` that was locked already: never unlocked */
	struct extents on_fault; /* the part of `held` that was not populated */
	struct extents gone; /* locked by us, and no guest RAM any more: to be unlocked; in VmLck all of it */
	struct range history[EXTENTS_MAX]; /* `held` in the order of locking, the newest last */
	size_t n_history;
};

/* Whether one more change could find no room. Plans keep far below that. */
bool books_full(const struct books *b);

/* Enters @r, which is not held yet. Only when not books_full(). */
void books_add(struct books *b, struct range r, bool foreign, bool on_fault);

/* @r, which is held on-fault, has been populated. */
void books_populated(struct books *b, struct range r);

/* What is held of @r may not be there any more: from now on it counts as not populated. */
void books_doubt(struct books *b, struct range r);

/* Takes @r out, wherever it is. Only when not books_full(). */
void books_remove(struct books *b, struct range r);

/* Guest RAM was @was and is @now: what is no guest RAM any more is no longer held, and what of it we locked is `gone`. */
void books_keep_layout(struct books *b, const struct ram_layout *was, const struct ram_layout *now);

/*
 * Takes over what @other, of another shim in this process, held: what was its own is ours now, also where it had been
 * found locked, and so taken for foreign, meanwhile. The order of locking is lost. Returns 0, or -ENOSPC and changes
 * nothing.
 */
int books_merge(struct books *b, const struct books *other);

/*
 * The newest bytes to release: whole pages of one block, at most @excess and at most @chunk (a power of two) unless the
 * page is larger, and either all ours or all foreign, as *foreign says. Returns false when @excess is less than a page.
 */
bool books_newest(const struct books *b, const struct ram_layout *l, uint64_t excess, uint64_t chunk, struct range *r,
		  bool *foreign);

/* Locked by us, `gone` included, and counted by the kernel in VmLck, which leaves out hugetlb. */
uint64_t books_in_vm_locked(const struct books *b, const struct ram_layout *l);

#endif
