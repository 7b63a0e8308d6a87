/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Memory of hugetlbfs cannot be swapped or reclaimed anyway: mlock() returns 0 and VmLck counts nothing. */
#include "fact.h"

static const char pool[] = "/proc/sys/vm/nr_hugepages";
static char former[32];

static bool put(const char *value)
{
	int fd = open(pool, O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, value, strlen(value)) > 0;

	if (fd >= 0)
		close(fd);
	return done;
}

static void put_back(void)
{
	put(former);
}

int main(void)
{
	const size_t size = 2 * MIB;
	int fd = open(pool, O_RDONLY | O_CLOEXEC);
	char value[32], *mem;
	int err;

	if (fd < 0 || read(fd, former, sizeof(former) - 1) <= 0)
		cannot_ask("no hugetlbfs in this kernel");
	close(fd);
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	if (mem == MAP_FAILED) {
		snprintf(value, sizeof(value), "%ld", strtol(former, NULL, 10) + 1);
		if (!put(value))
			cannot_ask("no huge page is free, and only root can add one");
		atexit(put_back);
		mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
		if (mem == MAP_FAILED)
			cannot_ask("no huge page of 2 MiB to be had");
	}
	err = mlock(mem, size) ? errno : 0;
	see(!err, "mlock() of a huge page: %s", strerror(err));
	see(vm_lck() == 0, "VmLck: %zu KiB", vm_lck() / 1024);
	see(smaps_field(mem, size, "Private_Hugetlb") == size, "resident: %zu KiB",
	    smaps_field(mem, size, "Private_Hugetlb") / 1024);
	munmap(mem, size);
	return verdict();
}
