/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Threads that help the lock thread: started when first needed, asleep in between, ended together. */
#ifndef RAMLOCK_WORKERS_H
#define RAMLOCK_WORKERS_H

#include <pthread.h>
#include <stdbool.h>

enum { WORKERS_MAX = 15 };

struct workers {
	pthread_mutex_t mutex;
	pthread_cond_t work, done;
	pthread_t threads[WORKERS_MAX];
	unsigned int n; /* threads that run */
	unsigned int wanted; /* how many of them take part in the present job */
	unsigned int busy; /* of those, how many have not ended it */
	unsigned long jobs; /* counts them */
	void (*run)(void *arg, unsigned int number);
	void *arg;
	bool stop;
};

void workers_init(struct workers *w);

/*
 * Starts threads until there are @helpers. Returns how many there are, fewer where some cannot be started. They block all
 * signals, which QEMU directs at threads of its own.
 */
unsigned int workers_ready(struct workers *w, unsigned int helpers);

/*
 * Has run(arg, number) done by the caller, number 0, and by @helpers other threads at once, of those that are ready, each with a number of
 * its own from 1 on; returns when all have returned.
 */
void workers_run(struct workers *w, unsigned int helpers, void (*run)(void *arg, unsigned int number), void *arg);

/* Ends the threads. */
void workers_stop(struct workers *w);

#endif
