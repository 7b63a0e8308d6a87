/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Locking neighbours one after another leaves one mapping; locking every other piece leaves two mappings for each. */
#include "fact.h"

static size_t mappings(const char *mem, size_t size)
{
	FILE *f = fopen("/proc/self/maps", "re");
	uintptr_t start, end;
	char line[512];
	size_t n = 0;

	if (!f)
		broken("maps");
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start >= (uintptr_t)mem && end <= (uintptr_t)mem + size)
			n++;
	fclose(f);
	return n;
}

int main(void)
{
	const size_t piece = 64 * 1024, pieces = 64, size = pieces * piece;
	char *row = memory(size), *comb = memory(size);

	for (size_t i = 0; i < pieces; i++)
		if (lock_on_fault(row + i * piece, piece))
			cannot_ask("locking is not allowed");
	see(mappings(row, size) == 1, "%zu neighbours locked: %zu mapping", pieces, mappings(row, size));
	for (size_t i = 0; i < pieces; i += 2)
		lock_on_fault(comb + i * piece, piece);
	see(mappings(comb, size) == pieces, "every other of %zu locked: %zu mappings", pieces, mappings(comb, size));
	for (size_t i = 0; i < pieces; i += 2)
		munlock(comb + i * piece, piece);
	see(mappings(comb, size) == 1, "all unlocked again: %zu mapping", mappings(comb, size));
	return verdict();
}
