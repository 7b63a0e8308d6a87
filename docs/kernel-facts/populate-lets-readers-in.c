/* SPDX-License-Identifier: GPL-2.0-or-later */
/* MADV_POPULATE_WRITE holds mmap_lock for reading: others that read-lock it go on, those that write-lock it wait. */
#include "fact.h"

int main(void)
{
	const size_t size = 512 * MIB;
	char *there = memory(PAGE);
	struct watcher reader;
	unsigned long before, during;
	double begin, took;

	touch(there, PAGE);
	/* A busy machine can keep the reader off its processor: one quiet round shows it. */
	for (int round = 0; round < 5; round++) {
		char *mem = memory(size);

		reader = (struct watcher){ .act = read_mmap_lock, .arg = there };
		/* No writer here: one that waits makes later readers wait too, see writer-waits-then-readers-wait.c. */
		watch(&reader);
		reader.longest = 0;
		before = reader.acts;
		begin = now();
		if (madvise(mem, size, MADV_POPULATE_WRITE))
			cannot_ask("no MADV_POPULATE_WRITE in this kernel, or no memory");
		took = now() - begin;
		during = reader.acts - before;
		watched(&reader);
		munmap(mem, size);
		if (during > 50 && reader.longest < took / 2)
			break;
	}
	see(during > 50, "%zu MiB populated in %.0f ms, readers of mmap_lock meanwhile: %lu times", size / MIB, took * 1e3, during);
	see(reader.longest < took / 2, "their longest wait: %.1f ms", reader.longest * 1e3);
	return verdict();
}
