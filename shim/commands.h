/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The command table of the control socket, and the events. docs/protocol.md is the reference. */
#ifndef RAMLOCK_COMMANDS_H
#define RAMLOCK_COMMANDS_H

#include "locker.h"
#include "qmp.h"

struct json_object;

struct commands {
	struct locker *locker;
	/* Brings what is known of guest RAM up to date; what was found a moment ago will do unless @certain. */
	void (*look_now)(void *opaque, bool certain);
	/* Takes guest RAM from outside. Returns 0, or -EINVAL with the reason in @text. */
	int (*push)(void *opaque, struct ram_layout *l, char text[SHORT_TEXT]);
	void *opaque;
	bool at_once; /* these run on QEMU's main thread, which must not wait */
	const struct qmp_server *monitor; /* what serves the commands in QEMU's own monitor */
	bool symbols; /* this QEMU exports what is needed to find guest RAM */
	bool injected; /* rather than preloaded */
	const _Atomic uint64_t *started_ns; /* CLOCK_MONOTONIC at the end of the injection */
	int (*halt)(void *opaque); /* ends the lock thread; -EBUSY when it cannot for now */
	uint64_t base; /* where this object is loaded */
	bool eject; /* the shim is to leave when all is released */
	bool keep; /* ... or at once, with all left as it is */
	struct books books; /* scratch, as `status` */
	struct ram_layout layout; /* scratch */
	struct locker_status status; /* scratch: too large for a thread's stack */
};

/* The command whose request may be long: three lists of EXTENTS_MAX ranges, each of up to 40 bytes. */
#define COMMANDS_LONGEST "ramlock-adopt"

/* For struct qmp_server; @opaque is the struct commands. */
void commands_run(void *opaque, const char *command, struct json_object *arguments, struct qmp_reply *reply);

/* Calls @emit for every event that is due, with its data, which @emit takes over. */
void commands_events(struct commands *c, void (*emit)(void *opaque, const char *name, struct json_object *data),
		     void *opaque);

#endif
