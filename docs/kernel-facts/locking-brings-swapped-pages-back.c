/* SPDX-License-Identifier: GPL-2.0-or-later */
/* An on-fault lock leaves swapped-out pages in swap; populating brings them back as they were. */
#include "fact.h"

int main(void)
{
	const size_t size = 16 * MIB;
	char *mem = memory(size);
	size_t wrong = 0;

	if (proc_field("/proc/meminfo", "SwapFree") < 2 * size)
		cannot_ask("this machine has no swap");
	touch(mem, size);
	swap_out(mem, size);
	if (lock_on_fault(mem, size))
		cannot_ask("locking 16 MiB is not allowed");
	see(smaps_field(mem, size, "Swap") > 0, "locked on fault, in swap: %zu KiB", smaps_field(mem, size, "Swap") / 1024);
	if (madvise(mem, size, MADV_POPULATE_WRITE))
		cannot_ask("no MADV_POPULATE_WRITE in this kernel");
	see(smaps_field(mem, size, "Swap") == 0 && resident(mem, size) == size, "populated: %zu KiB in swap, %zu resident",
	    smaps_field(mem, size, "Swap") / 1024, resident(mem, size) / 1024);
	for (size_t i = 0; i < size; i += PAGE)
		wrong += mem[i] != (char)(i / PAGE + 1);
	see(!wrong, "pages that are not as they were written: %zu", wrong);
	return verdict();
}
