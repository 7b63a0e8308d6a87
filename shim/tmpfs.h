/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Room in a tmpfs, which is memory of a limited size: who writes to a page that finds none is killed (SIGBUS). */
#ifndef RAMLOCK_TMPFS_H
#define RAMLOCK_TMPFS_H

#include <stdint.h>

#include "layout.h"

/* Bytes. */
struct tmpfs_room {
	uint64_t left; /* UINT64_MAX without a limit */
	uint64_t absent; /* what the guest may still ask of it, in all blocks of @l that are there */
};

/* What the file system has that @b of @l lies in. What cannot be asked, as with @b NULL, has no limit. */
struct tmpfs_room tmpfs_ask(const struct ram_layout *l, const struct ram_block *b);

#endif
