/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the files of the locker share: locker.c (the thread), wish.c (what is asked of it) and status.c (what it tells). */
#ifndef RAMLOCK_LOCKER_INSIDE_H
#define RAMLOCK_LOCKER_INSIDE_H

#include "clock.h"
#include "follow.h"
#include "locker.h"

/* The pause before a short guarantee is tried again, at first. */
enum { RETRY_MIN_NS = NS_PER_S };

/* The bytes that should be held now; with the mutex. */
uint64_t locker_target(const struct locker *l);

/* Whether what began with these generations is to end early: by a new wish, other RAM, or the end; with the mutex. */
bool locker_has_other_work(const struct locker *l, uint64_t generation, uint64_t layout_generation);

/* The next piece of what is locked and no guest RAM any more. Returns false when there is none. */
bool locker_next_gone(const struct locker *l, struct range *r);

/* Has clients told of @event; with the mutex. */
void locker_raise_event(struct locker *l, enum locker_event event);

#endif
