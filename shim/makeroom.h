/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Makes room in the memory cgroups, without a risk that the kernel kills for it. */
#ifndef RAMLOCK_MAKEROOM_H
#define RAMLOCK_MAKEROOM_H

#include <stdbool.h>
#include <stdint.h>

/* A huge page's worth of address space, for nothing but this. */
struct makeroom {
	char *page; /* NULL: not mapped yet */
	bool worked; /* so this kernel can do it */
	int failures; /* in a row, that say that it cannot */
	uint64_t again_ns; /* CLOCK_MONOTONIC: not to be tried before */
};

void makeroom_init(struct makeroom *m);
void makeroom_deinit(struct makeroom *m);

/*
 * Has the kernel reclaim until 2 MiB (PACER_CHUNK) can be allocated in the process's memory cgroups. Returns 0 when so much was, which others
 * may take, too; -EBUSY when it cannot reclaim that now, which it may find out only after a second; -ENOSYS when it cannot be asked: before
 * Linux 6.1, or where the host has no huge page free.
 */
int makeroom(struct makeroom *m);

#endif
