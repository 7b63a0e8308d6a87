/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Threads may write, read from outside, map and reclaim memory while another one locks and unlocks it: no byte is ever wrong. Each writer
 * owns its slots and verifies before it writes again; the locks that make it so are the kernel's own.
 */
#include "fact.h"
#include <sys/uio.h>

enum { WRITERS = 3 };

static const size_t size = 64 * MIB;
static char *mem;
static atomic_bool stop;
static atomic_ulong wrong, verified, locked, unlocked, pageouts, copies, torn;

static uint64_t pattern(size_t i, uint64_t round)
{
	return (i + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ round;
}

/* A writer has every third word of each page: pages are shared between the writers, words are not. */
static void *write_main(void *arg)
{
	size_t slot = (size_t)(uintptr_t)arg * sizeof(uint64_t);
	uint64_t round = 0;

	while (!stop) {
		for (size_t i = slot; i < size; i += PAGE) {
			volatile uint64_t *word = (volatile uint64_t *)(mem + i);

			if (round && *word != pattern(i, round))
				wrong++;
			*word = pattern(i, round + 1);
			verified += round > 0;
		}
		round++;
	}
	return NULL;
}

/* As KVM's get_user_pages does: reaches the pages without the page tables of the reader. */
static void *read_main(void *unused)
{
	static uint64_t page[PAGE / sizeof(uint64_t)];
	unsigned int seed = 1;

	(void)unused;
	while (!stop) {
		size_t at = (size_t)rand_r(&seed) % (size / PAGE) * PAGE;
		struct iovec here = { page, PAGE }, there = { mem + at, PAGE };

		if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != (ssize_t)PAGE)
			torn++;
		copies++;
	}
	return NULL;
}

/* Reclaim: refused (EINVAL) where memory is locked, real where there is swap and it is not. */
static void *reclaim_main(void *unused)
{
	unsigned int seed = 2;

	(void)unused;
	while (!stop) {
		size_t at = (size_t)rand_r(&seed) % (size / MIB) * MIB;

		if (!madvise(mem + at, MIB, MADV_PAGEOUT))
			pageouts++;
		write_mmap_lock(NULL);
		usleep(200);
	}
	return NULL;
}

int main(void)
{
	pthread_t threads[WRITERS + 2];
	unsigned int seed = 3;
	double end = now() + 2;

	mem = memory(size);
	if (lock_on_fault(mem, size))
		cannot_ask("locking 64 MiB is not allowed");
	for (uintptr_t i = 0; i < WRITERS; i++)
		pthread_create(&threads[i], NULL, write_main, (void *)i);
	pthread_create(&threads[WRITERS], NULL, read_main, NULL);
	pthread_create(&threads[WRITERS + 1], NULL, reclaim_main, NULL);
	while (now() < end) {
		size_t from = (size_t)rand_r(&seed) % (size / PAGE), to = from + (size_t)rand_r(&seed) % (size / PAGE - from) + 1;
		char *start = mem + from * PAGE;
		size_t length = (to - from) * PAGE;

		if (rand_r(&seed) & 1) {
			if (!lock_on_fault(start, length) && !madvise(start, length, MADV_POPULATE_WRITE))
				locked++;
		} else if (!munlock(start, length))
			unlocked++;
	}
	stop = true;
	for (size_t i = 0; i < WRITERS + 2; i++)
		pthread_join(threads[i], NULL);
	see(locked && unlocked, "locked %lu times, unlocked %lu times, reclaimed %lu times", locked, unlocked, pageouts);
	see(copies && !torn, "pages read from outside: %lu, refused: %lu", copies, torn);
	see(verified && !wrong, "words verified: %lu, wrong: %lu", verified, wrong);
	return verdict();
}
