/* SPDX-License-Identifier: GPL-2.0-or-later */
/* mlock() over a hole or over PROT_NONE is ENOMEM, yet what lies before the hole is locked then: a failure has to be undone. */
#include "fact.h"

int main(void)
{
	const size_t size = MIB;
	char *mem = memory(size);
	int err;

	munmap(mem + size / 2, PAGE);
	err = mlock(mem, size) ? errno : 0;
	if (err == EPERM)
		cannot_ask("locking is not allowed");
	see(err == ENOMEM, "over a hole: %s", strerror(err));
	see(vm_lck() == size / 2, "VmLck has grown by %zu KiB", vm_lck() / 1024);
	munlockall();

	mem = memory(size);
	mprotect(mem + size / 2, size / 2, PROT_NONE);
	err = mlock(mem, size) ? errno : 0;
	see(err == ENOMEM, "over PROT_NONE: %s", strerror(err));
	see(vm_lck() == size, "VmLck has grown by %zu KiB, the closed pages too", vm_lck() / 1024);
	munlockall();
	err = -lock_on_fault(mem, size);
	see(!err && vm_lck() == size, "on-fault over PROT_NONE: %s, VmLck %zu KiB", strerror(err), vm_lck() / 1024);
	return verdict();
}
