/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Who waits for mmap_lock for longer than some microseconds goes to sleep, and getrusage(RUSAGE_SELF) counts that for all threads
 * together, also while it sleeps; a thread that computes does not count. So where nobody has gone to sleep, nobody has begun to wait.
 */
#include "fact.h"

#include <sys/resource.h>

static atomic_bool over;

static void *compute(void *arg)
{
	while (!over)
		;
	return arg;
}

static void *map(void *arg)
{
	while (!over)
		write_mmap_lock(NULL);
	return arg;
}

static long sleeps(void)
{
	struct rusage usage;

	if (getrusage(RUSAGE_SELF, &usage))
		broken("getrusage");
	return usage.ru_nvcsw;
}

/* How often anybody goes to sleep while much is populated by this thread, and @other runs; up to the moment when that returns. */
static long sleeps_beside(void *(*other)(void *), char *mem, size_t size)
{
	pthread_t thread;
	long before;

	over = false;
	if (pthread_create(&thread, NULL, other, NULL))
		broken("pthread_create");
	usleep(1000);
	before = sleeps();
	for (size_t at = 0; at < size; at += 64 * MIB)
		if (madvise(mem + at, 64 * MIB, MADV_POPULATE_WRITE))
			cannot_ask("no MADV_POPULATE_WRITE in this kernel, or no memory");
	before = sleeps() - before;
	over = true;
	pthread_join(thread, NULL);
	madvise(mem, size, MADV_DONTNEED);
	return before;
}

int main(void)
{
	const size_t size = 256 * MIB;
	char *mem = memory(size);
	int waited = 0;
	long computing = 0;

	for (int round = 0; round < 10; round++) {
		computing += sleeps_beside(compute, mem, size);
		waited += sleeps_beside(map, mem, size) > 0;
	}
	see(!computing, "beside a thread that computes nobody went to sleep (%ld times in 10 rounds)", computing);
	see(waited > 5, "beside one that maps memory somebody did, in %d of 10 rounds", waited);
	return verdict();
}
