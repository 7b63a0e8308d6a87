/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Memory that was only read is the kernel's zero page: mincore() calls it resident, populating for writing allocates it. Of the two,
 * only pagemap tells, by a page not being exclusively ours.
 */
#include "fact.h"

int main(void)
{
	const size_t size = 4 * MIB;
	char *mem = memory(size);
	unsigned char vec = 0;

	for (size_t i = 0; i < size; i += PAGE)
		(void)((volatile char *)mem)[i];
	mincore(mem, PAGE, &vec);
	see(vec & 1, "read only: mincore() says resident");
	see(smaps_field(mem, size, "Anonymous") == 0, "of its own: %zu KiB", smaps_field(mem, size, "Anonymous") / 1024);
	see(pagemap(mem) >> 63 & 1 && !(pagemap(mem) >> 56 & 1), "pagemap: present, not exclusive");
	if (madvise(mem, size, MADV_POPULATE_WRITE))
		cannot_ask("no MADV_POPULATE_WRITE in this kernel");
	see(smaps_field(mem, size, "Anonymous") == size, "populated: %zu KiB of its own",
	    smaps_field(mem, size, "Anonymous") / 1024);
	see(pagemap(mem) >> 56 & 1, "pagemap: exclusive");
	return verdict();
}
