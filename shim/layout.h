/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest RAM as the shim knows it: QEMU's RAM blocks that the guest uses as main memory. */
#ifndef RAMLOCK_LAYOUT_H
#define RAMLOCK_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extents.h"

enum backing {
	BACKING_ANONYMOUS,
	BACKING_FILE,
	BACKING_MEMFD,
	BACKING_SHMEM,
	BACKING_HUGETLB,
	BACKING_COUNT,
};

struct ram_block {
	char id[256]; /* RAMBlock.idstr, e.g. "pc.ram" */
	struct range host; /* addresses in this process */
	uint64_t page_size; /* bytes; of the backing, so 2 MiB and more for hugetlb */
	enum backing backing;
	bool shared; /* a shared mapping of its backing */
	bool unreserved; /* huge pages that nobody has set aside for it: a guest that finds none left is killed */
	bool tmpfs; /* a shared mapping of a file in a tmpfs, of which `fd` is QEMU's descriptor */
	int fd;
	bool mergeable; /* QEMU has asked for its pages to be merged by KSM, as far as is known */
};

enum { RAM_BLOCKS_MAX = 256 };

struct ram_layout {
	struct ram_block v[RAM_BLOCKS_MAX]; /* ascending by host address */
	size_t n;
	uint64_t total; /* bytes in all of them: guest RAM */
	uint64_t left_out; /* bytes of plugged virtio-mem that are not to be locked now */
	bool private; /* there is RAM that the host cannot read, and that cannot be locked */
};

/* As in the protocol's "backing". */
const char *backing_name(enum backing b);

/* The block that @r lies in, or NULL when no block holds all of it. */
const struct ram_block *layout_find(const struct ram_layout *l, struct range r);

bool layout_equal(const struct ram_layout *a, const struct ram_layout *b);

/* Sorts by host address and sums up. */
void layout_finish(struct ram_layout *l);

#endif
