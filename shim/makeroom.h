/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Makes room in the memory cgroups, without a risk that the kernel kills for it. */
#ifndef RAMLOCK_MAKEROOM_H
#define RAMLOCK_MAKEROOM_H

#include <stdbool.h>

/* A huge page's worth of address space, for nothing but this. */
struct makeroom {
	char *page; /* NULL: not mapped yet */
	bool works, useless; /* what is known of this kernel */
};

void makeroom_init(struct makeroom *m);
void makeroom_deinit(struct makeroom *m);

/*
 * Has the kernel reclaim until 2 MiB (PACER_CHUNK) can be allocated in the process's memory cgroups. Returns 0 when so much was, which others
 * may take, too; -EBUSY when it cannot reclaim that now, which it may find out only after a second; -ENOSYS when it cannot be asked.
 */
int makeroom(struct makeroom *m);

#endif
