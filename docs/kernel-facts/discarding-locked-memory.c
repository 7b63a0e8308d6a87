/* SPDX-License-Identifier: GPL-2.0-or-later */
/* MADV_DONTNEED_LOCKED does take locked pages; the range stays under lock, and what is touched again is locked again. */
#include "fact.h"

int main(void)
{
	const size_t size = MIB;
	char *mem = memory(size);

	touch(mem, size);
	if (mlock(mem, size))
		cannot_ask("locking is not allowed");
	if (madvise(mem, size, MADV_DONTNEED_LOCKED))
		cannot_ask("no MADV_DONTNEED_LOCKED in this kernel (before 5.18)");
	see(!resident(mem, size), "resident after it: %zu KiB", resident(mem, size) / 1024);
	see(vm_lck() == size, "under lock all the same: %zu KiB", vm_lck() / 1024);
	see(mem[3 * PAGE] == 0, "a page that was taken reads as zeros");
	mem[3 * PAGE] = 1;
	see(page_mlocked(mem + 3 * PAGE), "a page that is touched again is locked");
	return verdict();
}
