/* SPDX-License-Identifier: GPL-2.0-or-later */
/* QEMU's memory backends, and what each is to the guest. */
#ifndef RAMLOCK_BACKENDS_H
#define RAMLOCK_BACKENDS_H

#include <stdbool.h>
#include <stddef.h>

#include "layout.h"

enum backend_use {
	BACKEND_MAIN, /* main memory: of the machine, of a NUMA node, or a DIMM */
	BACKEND_VIRTIO_MEM, /* main memory as far as it is plugged */
	BACKEND_PRIVATE, /* main memory that the host cannot read, of a confidential guest */
	BACKEND_OTHER, /* no main memory: an NVDIMM, memory shared between VMs, ... */
};

struct backend {
	void *object;
	void *mr; /* its MemoryRegion */
	const void *host; /* address in this process */
	enum backend_use use;
	bool mergeable; /* QEMU has asked for its pages to be merged by KSM */
	void *device; /* for virtio-mem */
	void *manager; /* its memory's RamDiscardManager, which knows what is plugged: the device itself before 11.1 */
};

struct backends {
	struct backend v[RAM_BLOCKS_MAX];
	size_t n;
	bool spare; /* there is one that is not plugged in */
	bool fixed; /* it is the machine's own, and no other */
};

/* Looks up QEMU's symbols. Calls nothing of QEMU. */
void backends_init(void);

/* Bottom half only: finds those that are mapped into the guest. */
void backends_find(struct backends *b);

/* The one whose memory begins at @host, or NULL. */
const struct backend *backends_at(const struct backends *b, const void *host);

#endif
