/* SPDX-License-Identifier: GPL-2.0-or-later */
/* mlock2(MLOCK_ONFAULT) of absent memory allocates nothing and takes next to no time; pages are locked when touched. */
#include "fact.h"

int main(void)
{
	const size_t size = 256 * MIB;
	char *mem = memory(size), *other = memory(size);
	double on_fault, plain, begin = now();

	if (lock_on_fault(mem, size))
		cannot_ask("locking 512 MiB is not allowed");
	on_fault = now() - begin;
	see(vm_lck() == size, "under lock: %zu MiB of %zu", vm_lck() / MIB, size / MIB);
	see(!resident(mem, size), "resident: %zu MiB", resident(mem, size) / MIB);

	begin = now();
	if (mlock(other, size))
		cannot_ask("locking 512 MiB is not allowed");
	plain = now() - begin;
	see(on_fault * 20 < plain, "on-fault took %.3f ms, plain mlock() %.1f ms", on_fault * 1e3, plain * 1e3);

	mem[5 * PAGE] = 1;
	see(resident(mem, size) == PAGE, "one page touched: %zu KiB resident", resident(mem, size) / 1024);
	see(page_mlocked(mem + 5 * PAGE), "and that page is locked");
	return verdict();
}
