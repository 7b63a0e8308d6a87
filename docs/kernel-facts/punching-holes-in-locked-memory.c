/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A hole punched into a memory file takes its pages away though a mapping of them is locked; VmLck does not notice. */
#include "fact.h"

int main(void)
{
	const size_t size = MIB;
	int fd = memfd_create("hole", MFD_CLOEXEC);
	char *mem;

	if (ftruncate(fd, (off_t)size))
		broken("ftruncate");
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (mem == MAP_FAILED)
		broken("mmap");
	touch(mem, size);
	if (mlock(mem, size))
		cannot_ask("locking is not allowed");
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size / 2))
		broken("fallocate");
	see(resident(mem, size) == size / 2, "resident: %zu of %zu KiB", resident(mem, size) / 1024, size / 1024);
	see(vm_lck() == size, "VmLck: %zu KiB", vm_lck() / 1024);
	see(mem[0] == 0, "what was there is gone");
	return verdict();
}
