/* SPDX-License-Identifier: GPL-2.0-or-later */
/* mlock() and munlock() of pages that are there walk them with mmap_lock held for writing: nobody gets in meanwhile. */
#include "fact.h"

/* How long a reader of mmap_lock waited, as a part of what the call took. */
static double kept_out(int (*call)(const void *, size_t), char *mem, size_t size, double *took)
{
	char *there = memory(PAGE);
	struct watcher reader = { .act = read_mmap_lock, .arg = there };
	double begin;

	touch(there, PAGE);
	watch(&reader);
	reader.longest = 0;
	begin = now();
	if (call(mem, size))
		cannot_ask("locking 1 GiB is not allowed");
	*took = now() - begin;
	watched(&reader);
	return reader.longest / *took;
}

int main(void)
{
	const size_t size = 1024 * MIB;
	char *mem = memory(size);
	double locking = 0, unlocking = 0, took, longest_lock = 0, longest_unlock = 0;

	if (madvise(mem, size, MADV_POPULATE_WRITE))
		touch(mem, size);
	/* A busy machine can keep the calls off their processor while nothing is held: one quiet round shows it. */
	for (int round = 0; round < 5 && (locking < 0.4 || unlocking < 0.4); round++) {
		double part = kept_out(mlock, mem, size, &took);

		if (part > locking)
			locking = part, longest_lock = took;
		part = kept_out(munlock, mem, size, &took);
		if (part > unlocking)
			unlocking = part, longest_unlock = took;
	}
	see(locking > 0.4, "mlock() took %.1f ms, a reader of mmap_lock waited %.0f %% of that", longest_lock * 1e3,
	    locking * 100);
	see(unlocking > 0.4, "munlock() took %.1f ms, a reader waited %.0f %% of that", longest_unlock * 1e3, unlocking * 100);
	return verdict();
}
