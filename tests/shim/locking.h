/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A lock thread on memory of this program, for all cases of a test. */
#ifndef RAMLOCK_LOCKING_H
#define RAMLOCK_LOCKING_H

#include "check.h"
#include "locker.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20, BLOCK = 64 * MIB, DEADLINE_S = 60 };

static struct locker locker;
static struct ram_layout layout;
static struct locker_status status;
static char text[SHORT_TEXT];

static inline void nothing_to_tell(void *opaque)
{
	(void)opaque;
}

/* Starts it the first time, with what @prepare, if given, makes of it before. Returns whether it was the first time. */
static inline bool locking_start(void (*notify)(void *opaque), void (*prepare)(void))
{
	static bool started;
	pthread_t thread;

	if (started)
		return false;
	started = true;
	locker_init(&locker, notify, NULL);
	stepper_open(&locker.stepper, "");
	if (prepare)
		prepare();
	if (pthread_create(&thread, NULL, locker_run, &locker)) /* which never ends */
		abort();
	return true;
}

static inline struct range range_at(const char *p, uint64_t size)
{
	return (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + size };
}

static inline uint64_t vm_locked(void)
{
	return (uint64_t)headroom_vm_locked(&locker.stepper.headroom);
}

/* Whether the guarantee is held, or known to be short; `status` is as told. */
static inline bool is_settled(void)
{
	locker_query(&locker, &status);
	return status.state == LOCKER_IDLE || status.state == LOCKER_SHORT;
}

static inline void wait_settled(enum locker_state state)
{
	time_t deadline = time(NULL) + DEADLINE_S;

	do
		usleep(1000);
	while (!is_settled() && time(NULL) < deadline);
	CHECK_EQ(status.state, state);
}

static inline void wait_idle(void)
{
	wait_settled(LOCKER_IDLE);
}

#endif
