/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plugged parts of a virtio-mem device, and whether they may be locked now. Pure.
 *
 * A guest gives virtio-mem memory back by asking the device, and QEMU then discards it, which the kernel refuses for locked
 * memory: QEMU answers "busy", and the guest asks again after 50 s or more. So memory that the guest is about to
 * give back must not be locked. That it is shows in two ways: less is requested than is plugged, or the guest has asked for
 * something and nothing has changed, as when it starts anew and wants to begin with nothing plugged.
 */
#ifndef RAMLOCK_PLUGGED_H
#define RAMLOCK_PLUGGED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extents.h"

enum { PLUGGED_PARTS_MAX = 128 };

/* Plugged parts as offsets in the device's memory, the largest of them where there are too many. */
struct plugged {
	struct range v[PLUGGED_PARTS_MAX];
	size_t n;
	size_t least; /* the smallest in a full `v` */
	uint64_t end; /* of the part added last */
	uint64_t total; /* bytes that are plugged */
	uint64_t left_out; /* ... of these in parts that found no place */
	uint64_t mark; /* differs where the parts do */
};

void plugged_clear(struct plugged *p);

/* Adds a part, above those that were added before. Returns 0, or -EINVAL when it is not. */
int plugged_add(struct plugged *p, struct range part);

/* What a device has shown so far. */
struct plugged_history {
	bool begun;
	uint64_t mark; /* as in struct plugged */
	unsigned int requests; /* the guest's; counts up, and wraps */
	bool waits; /* the guest asked in vain; until something changes */
	uint64_t asked_ns; /* when that was seen */
	bool told; /* nothing is locked any more, and the guest was told to ask again */
};

/* A guest asks again after 300 s at most: what it wanted for longer than that it does not want any more. */
enum { PLUGGED_PATIENCE_S = 660 };

/* Whether the parts may be locked, after a look that found @p, @requested bytes, and @requests of the guest. */
bool plugged_may_lock(struct plugged_history *h, const struct plugged *p, uint64_t requested, unsigned int requests,
		      uint64_t now_ns);

#endif
