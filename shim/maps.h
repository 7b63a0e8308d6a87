/* SPDX-License-Identifier: GPL-2.0-or-later */
/* /proc/PID/maps, line by line. */
#ifndef RAMLOCK_MAPS_H
#define RAMLOCK_MAPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extents.h"

/* One mapping. */
struct mapping {
	struct range r;
	char permissions[5]; /* "rw-p" */
	uint64_t offset; /* in the file, in bytes */
	uint64_t device; /* makedev() of the file's; 0: no file */
	uint64_t inode;
	char path[64]; /* the beginning of it; empty: no file and no name */
};

/* Reads one line, without its newline. Returns 0, or -EINVAL when it is none of such a file. */
int mapping_parse(const char *line, struct mapping *m);

/*
 * Calls @each for every mapping in the open file @fd, ascending, until it returns false. Reads in small pieces, so that the
 * kernel holds mmap_lock only for short. Returns 0, -EINVAL when it makes no sense, -E2BIG above a million mappings, or
 * another -errno.
 */
int maps_walk(int fd, bool (*each)(const struct mapping *m, void *opaque), void *opaque);

#endif
