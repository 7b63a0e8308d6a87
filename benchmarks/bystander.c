/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preloaded into QEMU beside the shim, for measurements only: locks memory in the usual ways, and watches who has to wait meanwhile.
 *
 * Theory of operation: one thread serves one client on the UNIX socket BYSTANDER_SOCKET, a line in and a line out. Locking on
 * QEMU's main thread is done from a bottom half there, as QEMU's own locking would be. Two watchers run when told to: one maps and
 * unmaps a page (a writer of mmap_lock), one reads a page of guest RAM by process_vm_readv (get_user_pages, as for KVM).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { PAGE = 4096, MAX_RANGES = 8192, MAX_SAMPLES = 1 << 18 };

struct watcher {
	pthread_t thread;
	void (*act)(void);
	size_t n;
	float samples[MAX_SAMPLES]; /* seconds */
};

struct range {
	char *start;
	size_t size;
};

static struct range ranges[MAX_RANGES]; /* what lock, discard and the others work on */
static size_t n_ranges;
static char *looked_at; /* a page of guest RAM that is always resident */
static atomic_bool watching;

static double now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void rest(double seconds)
{
	struct timespec t = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };

	nanosleep(&t, NULL);
}

static void map_and_unmap(void)
{
	void *mem = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem != MAP_FAILED)
		munmap(mem, PAGE);
}

static void read_guest(void)
{
	static char page[PAGE];
	struct iovec here = { page, PAGE }, there = { looked_at, PAGE };

	if (looked_at)
		process_vm_readv(getpid(), &here, 1, &there, 1, 0);
}

static struct watcher mapper = { .act = map_and_unmap }, reader = { .act = read_guest };

static void *watcher_main(void *opaque)
{
	struct watcher *w = opaque;

	prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
	while (watching) {
		double begin = now(CLOCK_MONOTONIC);

		w->act();
		if (w->n < MAX_SAMPLES)
			w->samples[w->n++] = (float)(now(CLOCK_MONOTONIC) - begin);
		rest(1e-3);
	}
	return NULL;
}

static int compare(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

/* "count longest,next,...": the count, and the highest fiftieth of the samples, which is all that percentiles need. */
static void tell(FILE *out, struct watcher *w)
{
	size_t keep = w->n / 50 + 1;

	qsort(w->samples, w->n, sizeof(w->samples[0]), compare);
	fprintf(out, " %zu ", w->n);
	for (size_t i = 0; i < keep && i < w->n; i++)
		fprintf(out, "%s%.7f", i ? "," : "", (double)w->samples[w->n - 1 - i]);
}

/* What can be done to the ranges. Each returns 0 or an errno. */
static int do_lock(void)
{
	for (size_t i = 0; i < n_ranges; i++)
		if (mlock(ranges[i].start, ranges[i].size))
			return errno;
	return 0;
}

static int do_unlock(void)
{
	for (size_t i = 0; i < n_ranges; i++)
		if (munlock(ranges[i].start, ranges[i].size))
			return errno;
	return 0;
}

static int advise(int advice)
{
	for (size_t i = 0; i < n_ranges; i++)
		if (madvise(ranges[i].start, ranges[i].size, advice))
			return errno;
	return 0;
}

static int do_discard(void)
{
	return advise(MADV_DONTNEED);
}

static int do_populate(void)
{
	return advise(MADV_POPULATE_WRITE);
}

/* A quarter of each page is such that it cannot be compressed, so that swap has some work with it. */
static int do_fill(void)
{
	uint64_t x = 88172645463325252;

	for (size_t i = 0; i < n_ranges; i++)
		for (size_t page = 0; page < ranges[i].size; page += PAGE)
			for (size_t at = 0; at < PAGE / 4; at += sizeof(x)) {
				x ^= x << 13, x ^= x >> 7, x ^= x << 17;
				memcpy(ranges[i].start + page + at, &x, sizeof(x));
			}
	return 0;
}

static int do_pageout(void)
{
	return advise(MADV_PAGEOUT);
}

static const struct {
	const char *name;
	int (*work)(void);
} works[] = { { "lock", do_lock },	    { "unlock", do_unlock }, { "discard", do_discard },
	      { "populate", do_populate }, { "fill", do_fill },	     { "pageout", do_pageout } };

/* One work on some thread: how long it took in all, and how much processor time. */
struct job {
	int (*work)(void);
	int err;
	double wall, cpu;
	atomic_bool done;
};

static void job_run(void *opaque)
{
	struct job *job = opaque;
	double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);

	job->err = job->work();
	job->wall = now(CLOCK_MONOTONIC) - wall;
	job->cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
	job->done = true;
}

static void *job_main(void *opaque)
{
	job_run(opaque);
	return NULL;
}

/* QEMU 6.2 and newer. */
static bool run_on_main_thread(struct job *job)
{
	void *(*context)(void);
	void (*schedule)(void *, void (*)(void *), void *, const char *);

	*(void **)(void *)&context = dlsym(RTLD_DEFAULT, "qemu_get_aio_context");
	*(void **)(void *)&schedule = dlsym(RTLD_DEFAULT, "aio_bh_schedule_oneshot_full");
	if (!context || !schedule || !context())
		return false;
	schedule(context(), job_run, job, "bystander");
	while (!job->done)
		rest(1e-3);
	return true;
}

static void do_work(FILE *out, const char *name, const char *where)
{
	struct job job = { 0 };
	pthread_t thread;

	for (size_t i = 0; i < sizeof(works) / sizeof(works[0]); i++)
		if (!strcmp(name, works[i].name))
			job.work = works[i].work;
	if (!job.work) {
		fprintf(out, "error unknown %s\n", name);
	} else if (!strcmp(where, "main")) {
		if (!run_on_main_thread(&job))
			fprintf(out, "error this QEMU does not export its symbols\n");
	} else if (!pthread_create(&thread, NULL, job_main, &job)) {
		pthread_join(thread, NULL);
	}
	if (job.done && job.err)
		fprintf(out, "error %s: %s\n", name, strerror(job.err));
	else if (job.done)
		fprintf(out, "ok %.6f %.6f\n", job.wall, job.cpu);
}

/* Burns that part of a processor for so long, without touching memory, in slices as short as a lock step. Returns what it burnt, in seconds. */
static double spin(double wall, double duty)
{
	double end = now(CLOCK_MONOTONIC) + wall, began = now(CLOCK_THREAD_CPUTIME_ID), slice = 0.5e-3;

	prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
	while (now(CLOCK_MONOTONIC) < end) {
		double from = now(CLOCK_THREAD_CPUTIME_ID);

		while (now(CLOCK_THREAD_CPUTIME_ID) - from < slice)
			;
		if (duty < 0.99)
			rest(slice / duty - slice);
	}
	return now(CLOCK_THREAD_CPUTIME_ID) - began;
}

static void watch(void)
{
	mapper.n = reader.n = 0;
	watching = true;
	pthread_create(&mapper.thread, NULL, watcher_main, &mapper);
	pthread_create(&reader.thread, NULL, watcher_main, &reader);
}

static void stop_watching(FILE *out)
{
	watching = false;
	pthread_join(mapper.thread, NULL);
	pthread_join(reader.thread, NULL);
	fprintf(out, "ok");
	tell(out, &mapper);
	tell(out, &reader);
	fprintf(out, "\n");
}

static void serve(FILE *in, FILE *out)
{
	char line[256], verb[32], first[32], second[32];

	while (fgets(line, sizeof(line), in)) {
		int n = sscanf(line, "%31s %31s %31s", verb, first, second);

		if (n == 1 && !strcmp(verb, "forget")) {
			n_ranges = 0;
			fprintf(out, "ok\n");
		} else if (n == 3 && !strcmp(verb, "range") && n_ranges < MAX_RANGES) {
			ranges[n_ranges].start = (char *)(uintptr_t)strtoull(first, NULL, 0);
			ranges[n_ranges++].size = strtoull(second, NULL, 0);
			fprintf(out, "ok\n");
		} else if (n == 2 && !strcmp(verb, "look")) {
			looked_at = (char *)(uintptr_t)strtoull(first, NULL, 0);
			fprintf(out, "ok\n");
		} else if (n == 3 && !strcmp(verb, "spin")) {
			fprintf(out, "ok %.6f\n", spin(strtod(first, NULL), strtod(second, NULL)));
		} else if (n == 1 && !strcmp(verb, "watch")) {
			watch();
			fprintf(out, "ok\n");
		} else if (n == 1 && !strcmp(verb, "watched")) {
			stop_watching(out);
		} else if (n == 3 && !strcmp(verb, "do")) {
			do_work(out, first, second);
		} else {
			fprintf(out, "error what?\n");
		}
		fflush(out);
	}
}

static void *server_main(void *opaque)
{
	int listener = (int)(intptr_t)opaque;

	for (;;) {
		int fd = accept(listener, NULL, NULL);
		FILE *in, *out;

		if (fd < 0)
			return NULL;
		in = fdopen(fd, "r");
		out = fdopen(dup(fd), "w");
		if (in && out)
			serve(in, out);
		if (in)
			fclose(in);
		if (out)
			fclose(out);
	}
}

/* In a process that is not the emulator there is nothing to do. */
__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("BYSTANDER_SOCKET");
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	int fd = path && dlsym(RTLD_DEFAULT, "ram_list") ? socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
	sigset_t all, former;
	pthread_t thread;

	if (fd < 0 || strlen(path) >= sizeof(name.sun_path))
		return;
	strcpy(name.sun_path, path);
	if (bind(fd, (struct sockaddr *)&name, sizeof(name)) || listen(fd, 1))
		return;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &former);
	pthread_create(&thread, NULL, server_main, (void *)(intptr_t)fd);
	pthread_sigmask(SIG_SETMASK, &former, NULL);
}
