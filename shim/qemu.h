/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the shim knows of QEMU: functions looked up by name in the running process, every one optional. */
#ifndef RAMLOCK_QEMU_H
#define RAMLOCK_QEMU_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* What the owner of the shim is told about guest RAM; all are called on QEMU's main thread, under its big lock. */
struct qemu_watcher {
	void *opaque;
	/* RAM appeared or grew: look again, but not from inside this call. */
	void (*changed)(void *opaque);
	/*
	 * [gone] is about to be unmapped, or no RAM any more: must not be touched after the call returns. Returns whether some of
	 * it may be locked by us.
	 */
	bool (*removed)(void *opaque, struct range gone);
};

struct qemu {
	bool emulator; /* this process is a qemu-system-* */
	bool symbols; /* ... and exports what is needed to find guest RAM */
};

/* Looks up everything. Calls nothing of QEMU. */
void qemu_init(struct qemu *q);

/* Whether -daemonize is on the command line. */
bool qemu_daemonizes(void);

/* Whether -incoming is on the command line: QEMU was started as the target of a migration. */
bool qemu_is_incoming(void);

/* Whether QEMU's main loop exists, so that a bottom half can be scheduled. */
bool qemu_has_main_loop(void);

/* Runs @cb once on QEMU's main thread, under the big lock. Safe from any thread once qemu_has_main_loop(). */
void qemu_schedule(void (*cb)(void *opaque), void *opaque);

/* Bottom half only: whether the machine is complete, so that its RAM may be looked at. */
bool qemu_machine_ready(void);

/* Bottom half only: whether this VM is, or is going to be, the target of a postcopy migration. */
bool qemu_is_postcopy_target(void);

/* What may become of guest RAM without that QEMU tells. */
struct qemu_outlook {
	bool may_grow; /* there is a memory backend that is not plugged in */
	bool may_change; /* there is one that can be unplugged, or virtio-mem */
	/* virtio-mem whose guest wants to give some back, which it can when it is not locked. */
	struct {
		void *device;
		struct range host;
	} wanted[16];
	size_t n_wanted;
};

/*
 * Bottom half only: lists guest RAM. What a guest wants to give back is left out, unless it can although it is locked (@can_discard).
 * Returns 0, or -E2BIG when there are too many blocks.
 */
int qemu_walk(struct ram_layout *l, bool can_discard, struct qemu_outlook *outlook);

/* Bottom half only: nothing of @device, one of those wanted, is locked any more. */
void qemu_let_go(void *device);

/* Bottom half only, once: tells @w about every change of RAM from now on. Returns false when this QEMU cannot. */
bool qemu_watch(const struct qemu_watcher *w);

#endif
