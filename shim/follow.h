/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Moves the guarantee away from memory that the guest has given back. The lock thread's. */
#ifndef RAMLOCK_FOLLOW_H
#define RAMLOCK_FOLLOW_H

#include <stdbool.h>
#include <stdint.h>

#include "extents.h"

struct locker;

/* Nothing here does anything unless the locker's `follows` is set. All with the locker's mutex, except where it says otherwise. */

/* Wakes the lock thread if there is something to do. Any thread, without the mutex. */
void follow_wake(struct locker *l);

/* Whether there is something to do, if not at once. */
bool follow_is_pending(const struct locker *l);

/* When there is something to do, of CLOCK_MONOTONIC; UINT64_MAX: nothing. */
uint64_t follow_deadline(const struct locker *l);

/* Does it, with the mutex given up meanwhile. */
void follow_run(struct locker *l);

/* Whether some of @r was given back; the thread's own. */
bool follow_is_given_back(const struct locker *l, struct range r);

/*
 * Takes from @r, which was planned to be locked, what comes after a page that was given back since. Returns false, and has it planned
 * again, when nothing is left; the thread's own.
 */
bool follow_trim(struct locker *l, struct range *r);

/* @r is about to be locked: a discard from now on is one of locked memory. */
void follow_locking(struct locker *l, struct range r);

/* What is held of @r has changed. */
void follow_changed(struct locker *l, struct range r);

/* Forgets what was given back and is in use again. Without the mutex. */
void follow_tidy(struct locker *l);

/*
 * Adds to @taken what should not be locked because the guest has given it back: in few ranges, so perhaps a little more.
 * Without the mutex.
 */
void follow_avoid(struct locker *l, struct extents *taken);

/* Memory that is not locked would be of use, or would not. */
void follow_hunger(struct locker *l, bool hungry);

#endif
