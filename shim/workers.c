/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Threads that help the lock thread. */
#include "workers.h"

#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

enum { STACK_BYTES = 64 << 10 }; /* with -overcommit mem-lock=on all of it gets locked */

void workers_init(struct workers *w)
{
	memset(w, 0, sizeof(*w));
	pthread_mutex_init(&w->mutex, NULL);
	pthread_cond_init(&w->work, NULL);
	pthread_cond_init(&w->done, NULL);
}

static void *work(void *arg)
{
	struct workers *w = arg;
	unsigned long seen = 0;
	unsigned int number;

	prctl(PR_SET_NAME, "ramlock-fill");
	prctl(PR_SET_TIMERSLACK, 1);
	pthread_mutex_lock(&w->mutex);
	number = w->n++;
	pthread_cond_signal(&w->done); /* start() waits for it */
	seen = w->jobs;
	for (;;) {
		while (!w->stop && (seen == w->jobs || number >= w->wanted))
			pthread_cond_wait(&w->work, &w->mutex);
		if (w->stop)
			break;
		seen = w->jobs;
		pthread_mutex_unlock(&w->mutex);
		w->run(w->arg, number + 1);
		pthread_mutex_lock(&w->mutex);
		if (!--w->busy)
			pthread_cond_signal(&w->done);
	}
	pthread_mutex_unlock(&w->mutex);
	return NULL;
}

/* Starts one more, with the mutex. Returns false when that cannot be. */
static bool start(struct workers *w)
{
	unsigned int before = w->n;
	pthread_attr_t attr;
	sigset_t all, old;
	int err;

	sigfillset(&all);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&w->threads[before], &attr, work, w);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	while (!err && w->n == before)
		pthread_cond_wait(&w->done, &w->mutex);
	return !err;
}

unsigned int workers_ready(struct workers *w, unsigned int helpers)
{
	unsigned int n;

	pthread_mutex_lock(&w->mutex);
	if (helpers > WORKERS_MAX)
		helpers = WORKERS_MAX;
	while (w->n < helpers && start(w))
		;
	n = helpers < w->n ? helpers : w->n;
	pthread_mutex_unlock(&w->mutex);
	return n;
}

void workers_run(struct workers *w, unsigned int helpers, void (*run)(void *arg, unsigned int number), void *arg)
{
	pthread_mutex_lock(&w->mutex);
	w->wanted = w->busy = helpers < w->n ? helpers : w->n;
	if (w->busy) {
		w->run = run;
		w->arg = arg;
		w->jobs++;
		pthread_cond_broadcast(&w->work);
	}
	pthread_mutex_unlock(&w->mutex);
	run(arg, 0);
	pthread_mutex_lock(&w->mutex);
	while (w->busy)
		pthread_cond_wait(&w->done, &w->mutex);
	pthread_mutex_unlock(&w->mutex);
}

void workers_stop(struct workers *w)
{
	pthread_mutex_lock(&w->mutex);
	w->stop = true;
	pthread_cond_broadcast(&w->work);
	pthread_mutex_unlock(&w->mutex);
	for (unsigned int i = 0; i < w->n; i++)
		pthread_join(w->threads[i], NULL);
	w->n = 0;
	w->stop = false;
}
