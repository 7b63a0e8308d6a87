/* SPDX-License-Identifier: GPL-2.0-or-later */
/* VmLck is the length of the mappings under lock. It says nothing of what is resident: that has to be looked at. */
#include "fact.h"

int main(void)
{
	const size_t size = 64 * MIB;
	char *mem = memory(size);

	if (lock_on_fault(mem, size))
		cannot_ask("locking 64 MiB is not allowed");
	see(vm_lck() == size && !resident(mem, size), "on-fault: VmLck %zu MiB, resident %zu MiB", vm_lck() / MIB,
	    resident(mem, size) / MIB);
	touch(mem, size / 2);
	see(vm_lck() == size && resident(mem, size) == size / 2, "half touched: VmLck %zu MiB, resident %zu MiB",
	    vm_lck() / MIB, resident(mem, size) / MIB);
	return verdict();
}
