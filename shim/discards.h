/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest RAM that the guest gives back (balloon, free-page reporting, virtio-mem): QEMU's calls that discard it are
 * redirected to here, carried out also where the memory is locked by us, and noted for the lock thread.
 */
#ifndef RAMLOCK_DISCARDS_H
#define RAMLOCK_DISCARDS_H

#include <stdbool.h>
#include <stdint.h>

#include "extents.h"
#include "followed.h"
#include "layout.h"

/*
 * There is one of all this in a process, since a redirected call brings no context. All but the redirected calls themselves are
 * for the lock thread, except where it says otherwise.
 */

/*
 * Redirects QEMU's calls, and those of modules that were loaded since. @notify is called, on QEMU's threads, when there is
 * something to do: it must not block. Returns 0 or -errno.
 */
int discards_follow(void (*notify)(void *opaque), void *opaque);

/* Undoes that, and waits until no thread is in a redirected call, at most a second. Any thread, when the lock thread has ended. */
void discards_unfollow(void);

/* Follows the blocks of @l from now on; what was given back of other memory is forgotten. @maps is /proc/self/maps. */
void discards_set_layout(const struct ram_layout *l, int maps);

/* @r is locked by us, or is not: in whole chunks of DISCARDS_CHUNK. Before it is locked, and after it is unlocked. */
void discards_set_ours(struct range r, bool ours);

/* Whether memory that is not locked is to be told of too, because it may be had again. */
void discards_set_hungry(bool hungry);

/* Whether there is something to do. Any thread. */
bool discards_pending(void);

/* What came before is taken note of. */
void discards_begin(void);

/* Takes the sign that QEMU has unlocked all memory. */
bool discards_take_unlocked_all(void);

/*
 * Takes the next chunk at or after @from of which something was given back. *@unlocked says that it had to be unlocked for
 * that. Returns false when there is none.
 */
bool discards_take_chunk(uint64_t from, struct range *chunk, bool *unlocked);

/* The next run of pages at or after @from that were given back and not asked for again. Returns false when there is none. */
bool discards_next(uint64_t from, struct range *run);

/*
 * The pages of @r are in memory, so they are in use again. Does nothing while some thread is in a discard: they may be about
 * to go.
 */
void discards_forget(struct range r);

/* Bytes that were given back and not asked for again, as far as is known. Any thread. */
uint64_t discards_total(void);

#endif
