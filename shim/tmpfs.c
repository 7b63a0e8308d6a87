/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Room in a tmpfs; Documentation/filesystems/tmpfs.rst of Linux. */
#include "tmpfs.h"

#include <sys/stat.h>
#include <sys/statfs.h>

static const uint64_t SECTOR = 512; /* st_blocks, stat(2) */

/*
 * Bytes that the blocks in the file of block @first may still need, or 0 when a block before it is in the same file: parts of
 * a virtio-mem device are, and then not all of the file is the guest's.
 */
static uint64_t absent_of(const struct ram_layout *l, size_t first, const struct stat *st)
{
	uint64_t size = 0, has = (uint64_t)st->st_blocks * SECTOR, absent;

	for (size_t i = 0; i < l->n; i++) {
		if (!l->v[i].tmpfs || l->v[i].fd != l->v[first].fd)
			continue;
		if (i < first)
			return 0;
		size += range_size(l->v[i].host);
	}
	absent = (uint64_t)st->st_size > has ? (uint64_t)st->st_size - has : 0;
	return absent < size ? absent : size;
}

struct tmpfs_room tmpfs_ask(const struct ram_layout *l, const struct ram_block *b)
{
	struct tmpfs_room room = { .left = UINT64_MAX };
	struct statfs fs;
	struct stat here, st;

	if (!b || !b->tmpfs || fstat(b->fd, &here) || fstatfs(b->fd, &fs) || !fs.f_blocks)
		return room; /* of no blocks: without a limit */
	room.left = (uint64_t)fs.f_bavail * (uint64_t)fs.f_bsize;
	for (size_t i = 0; i < l->n; i++)
		if (l->v[i].tmpfs && !fstat(l->v[i].fd, &st) && st.st_dev == here.st_dev)
			room.absent += absent_of(l, i, &st);
	return room;
}
