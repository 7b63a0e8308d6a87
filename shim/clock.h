/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The clock of the shim: CLOCK_MONOTONIC, which nobody sets. All times and deadlines are of it. */
#ifndef RAMLOCK_CLOCK_H
#define RAMLOCK_CLOCK_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

enum {
	NS_PER_US = 1000,
	NS_PER_MS = 1000 * 1000,
	NS_PER_S = 1000 * 1000 * 1000,
};

static inline uint64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

static inline uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static inline int64_t now_ms(void)
{
	return (int64_t)(now_ns() / NS_PER_MS);
}

/* Prepares @cond for clock_wait(). */
static inline void clock_cond_init(pthread_cond_t *cond)
{
	pthread_condattr_t attr;

	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(cond, &attr);
	pthread_condattr_destroy(&attr);
}

/* Waits on @cond until @deadline_ns. Returns ETIMEDOUT or 0. */
static inline int clock_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, uint64_t deadline_ns)
{
	const struct timespec t = { .tv_sec = (time_t)(deadline_ns / NS_PER_S), .tv_nsec = (long)(deadline_ns % NS_PER_S) };

	return pthread_cond_timedwait(cond, mutex, &t);
}

#endif
