/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Locks do not nest: one munlock() undoes any number of mlock(), and munlockall() undoes everybody's. So the lock of another part of
 * the process must never be released, and ours can be lost behind our back.
 */
#include "fact.h"

int main(void)
{
	const size_t size = MIB;
	char *mem = memory(size);

	if (mlock(mem, size) || mlock(mem, size))
		cannot_ask("locking is not allowed");
	see(vm_lck() == size, "locked twice: VmLck %zu KiB", vm_lck() / 1024);
	munlock(mem, size);
	see(vm_lck() == 0, "unlocked once: VmLck %zu KiB", vm_lck() / 1024);
	mlock(mem, size);
	see(page_mlocked(mem), "locked again, the page has the mark");
	munlockall();
	see(vm_lck() == 0, "munlockall(): VmLck %zu KiB", vm_lck() / 1024);
	see(resident(mem, size) == size, "the pages are still there");
	see(!page_mlocked(mem), "but are free to be reclaimed");
	return verdict();
}
