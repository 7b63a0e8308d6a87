/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A writer of mmap_lock that finds it held for reading spins for about 10 us before it goes to sleep. So while memory is populated a few
 * pages at a time, whoever maps memory sleeps much less often than beside long calls, though the lock is as rarely free. (It can sleep many
 * times in one call: it is woken when the lock is let go of, and finds it held again.)
 */
#include "fact.h"

#include <sys/resource.h>

static void *map_a_page(void *opaque)
{
	atomic_bool *stop = opaque;
	struct rusage usage;
	unsigned long maps = 0;
	static double slept; /* for each call that takes mmap_lock */

	while (!*stop) {
		write_mmap_lock(NULL);
		maps += 2;
		for (double until = now() + 100e-6; now() < until;) /* does not sleep by itself */
			;
	}
	getrusage(RUSAGE_THREAD, &usage);
	slept = (double)usage.ru_nvcsw / (double)maps;
	return &slept;
}

/* How often a writer slept, for each of its calls. */
static double sleeps(size_t piece)
{
	const size_t size = 512 * MIB;
	char *mem = memory(size);
	atomic_bool stop = false;
	pthread_t writer;
	void *slept;

	if (pthread_create(&writer, NULL, map_a_page, &stop))
		broken("pthread_create");
	for (size_t at = 0; at < size; at += piece)
		if (madvise(mem + at, piece, MADV_POPULATE_WRITE))
			cannot_ask("no MADV_POPULATE_WRITE in this kernel, or no memory");
	stop = true;
	pthread_join(writer, &slept);
	munmap(mem, size);
	return *(double *)slept;
}

int main(void)
{
	double longer = 0, shorter = 0;
	bool asked = false;

	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		cannot_ask("with one processor nobody spins");
	for (int round = 0; round < 6 && !(asked && shorter < longer * 0.75); round++) {
		double beside_long = sleeps(MIB), beside_short = sleeps(4 * PAGE);

		if (beside_long <= 2)
			continue; /* the two hardly met */
		asked = true;
		longer = beside_long;
		shorter = beside_short;
	}
	if (!asked)
		cannot_ask("the two hardly meet: others have the processors");
	see(shorter < longer * 0.75, "a writer sleeps %.1f times a call beside calls of 1 MiB, and %.1f times beside calls of 16 KiB", longer, shorter);
	return verdict();
}
