/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * While one call populates much, whoever maps memory waits for a good part of it; and once a writer waits, readers of mmap_lock queue
 * behind it. So one large call on a thread of its own stalls others all the same: work has to be done in small pieces.
 */
#include "fact.h"

static double longest_wait(size_t piece, double *reader_wait, double *took)
{
	const size_t size = 512 * MIB;
	char *mem = memory(size), *there = memory(PAGE);
	struct watcher writer = { .act = write_mmap_lock }, reader = { .act = read_mmap_lock, .arg = there };
	double begin;

	touch(there, PAGE);
	watch(&writer);
	watch(&reader);
	writer.longest = reader.longest = 0;
	begin = now();
	for (size_t at = 0; at < size; at += piece) {
		if (madvise(mem + at, piece, MADV_POPULATE_WRITE))
			cannot_ask("no MADV_POPULATE_WRITE in this kernel, or no memory");
		if (piece < size)
			usleep(20);
	}
	*took = now() - begin;
	watched(&writer);
	watched(&reader);
	munmap(mem, size);
	*reader_wait = reader.longest;
	return writer.longest;
}

int main(void)
{
	double whole = 0, pieces = 0, reader_whole = 0, reader_pieces = 0, took, reader, wait;

	for (int round = 0; round < 3; round++) {
		wait = longest_wait(512 * MIB, &reader, &took);
		whole += wait / took / 3;
		reader_whole += reader / took / 3;
		wait = longest_wait(2 * MIB, &reader, &took);
		pieces += wait / took / 3;
		reader_pieces += reader / took / 3;
	}
	see(whole > 0.2, "a writer waited %.0f %% of one large call", whole * 100);
	see(reader_whole > 0.2, "a reader behind it waited %.0f %% of it", reader_whole * 100);
	see(pieces < whole / 4, "in pieces of 2 MiB a writer waited %.1f %% of the whole", pieces * 100);
	see(reader_pieces < reader_whole / 4, "and a reader %.1f %%", reader_pieces * 100);
	return verdict();
}
