/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the files of the entry share: shim.c (how the shim comes, works and goes) and look.c (what it knows of guest RAM). */
#ifndef RAMLOCK_SHIM_H
#define RAMLOCK_SHIM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "commands.h"
#include "config.h"
#include "control.h"
#include "locker.h"
#include "pushed.h"
#include "qemu.h"

enum {
	LOOK_AGAIN_MIN_MS = 20, /* until the machine is complete; with -preconfig that is for the operator to say */
	LOOK_AGAIN_MAX_MS = 1000,
};

struct shim {
	struct config config;
	bool used; /* it was started before: what follows is not zeroes */
	struct qemu qemu;
	struct locker locker;
	struct pushed pushed; /* guest RAM, where QEMU cannot be asked */
	struct commands commands;
	struct qmp_server server;
	struct commands monitor_commands; /* the same for QEMU's own monitor, with what is of no use there left out */
	struct qmp_server monitor_server;
	struct control control;
	pthread_mutex_t binding; /* so that a process that exits at once leaves no socket behind */
	bool leaving; /* the process exits: bind nothing more */
	atomic_bool active; /* this process is a QEMU that we serve */
	bool watching; /* QEMU tells us about changes of RAM; main thread only */
	atomic_bool dirty; /* guest RAM should be looked at again */
	atomic_bool scheduled; /* a bottom half that looks is on its way */
	atomic_bool may_change; /* guest RAM may become less, or more, without a word */
	pthread_mutex_t looking; /* with `looked`: for waiting until a look has ended */
	pthread_cond_t looked;
	unsigned int forks; /* since enter() */
	bool begun; /* QEMU's main loop was seen; this and what follows: control thread only */
	unsigned int polls;
	unsigned int pause_ms; /* before guest RAM is looked at again */
	int64_t looked_ms; /* when a command last waited for a look */
	int64_t look_at_ms; /* when that will be; 0: not decided */
	pthread_t lock_thread;
	bool halted; /* lock_thread was joined */
	bool has_stderr; /* descriptor 2 is standard error: known only when preloaded */
	bool injected;
	bool daemonizes; /* -daemonize is on the command line; only when preloaded */
	_Atomic uint64_t started_ns; /* CLOCK_MONOTONIC at the end of ramlock_start(), on QEMU's main thread */
};

/* Says something on standard error, if that is what descriptor 2 is. */
__attribute__((format(printf, 1, 2))) void shim_warn(const char *fmt, ...);

/* Nothing is known of guest RAM yet. */
void look_init(struct shim *s);

/* The guest gave memory back: wakes the control thread. On any thread of QEMU's. */
void look_gave_back(void *opaque);

/* Does what is due about finding guest RAM. Returns how long to wait for the next time, in ms; -1: until poked. Control thread. */
int look_when_due(struct shim *s);

/* For struct commands; @opaque is the struct shim. */
void look_now(void *opaque, bool certain);
void look_at_once(void *opaque, bool certain); /* on QEMU's main thread */
int look_push(void *opaque, struct ram_layout *l, char text[SHORT_TEXT]);

/* For struct locker. */
void look_before_plan(void *opaque);
bool look_and_wait(void *opaque);

#endif
