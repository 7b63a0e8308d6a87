/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Locking a writable private mapping of a file copies all of it to anonymous memory: it costs its size, though cached. */
#include "fact.h"

int main(void)
{
	const size_t size = 4 * MIB;
	int fd = memfd_create("private-file", MFD_CLOEXEC);
	char *mem, *page = memory(PAGE);

	memset(page, 1, PAGE);
	for (size_t i = 0; i < size; i += PAGE)
		if (write(fd, page, PAGE) != (ssize_t)PAGE)
			broken("write");
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	if (mem == MAP_FAILED)
		broken("mmap");
	for (size_t i = 0; i < size; i += PAGE)
		(void)((volatile char *)mem)[i];
	see(smaps_field(mem, size, "Anonymous") == 0, "read: %zu KiB resident, %zu KiB of its own", resident(mem, size) / 1024,
	    smaps_field(mem, size, "Anonymous") / 1024);
	see(!(pagemap(mem) >> 63 & 1 && !(pagemap(mem) >> 61 & 1)), "pagemap calls them pages of a file");
	if (mlock(mem, size))
		cannot_ask("locking 4 MiB is not allowed");
	see(smaps_field(mem, size, "Anonymous") == size, "locked: %zu KiB of its own", smaps_field(mem, size, "Anonymous") / 1024);
	return verdict();
}
