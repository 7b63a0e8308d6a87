/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A page that came back from swap into a locked mapping has no mark of its own yet: reclaim sets it when it meets the page, because the
 * mapping is locked. It is as safe as a marked one: under real pressure everything else is swapped out, and it is not.
 */
#include "group.h"
#include <sys/wait.h>

static void child_main(void)
{
	const size_t size = 16 * MIB, others = 64 * MIB;
	char *mem = memory(size), *other = memory(others);
	size_t marked = 0;

	if (!group_enter())
		cannot_ask("a process cannot be moved into a memory cgroup");
	touch(mem, size);
	swap_out(mem, size);
	if (lock_on_fault(mem, size) || madvise(mem, size, MADV_POPULATE_WRITE))
		cannot_ask("locking 16 MiB is not allowed");
	for (size_t i = 0; i < size; i += PAGE)
		marked += page_mlocked(mem + i);
	printf("       marked after coming back: %zu of %zu pages\n", marked, size / PAGE);
	for (int round = 0; round < 3; round++)
		touch(other, others);
	see(smaps_field(other, others, "Swap") > others / 4, "pressure: of the rest %zu MiB are in swap",
	    smaps_field(other, others, "Swap") / MIB);
	see(smaps_field(mem, size, "Swap") == 0 && resident(mem, size) == size, "of what is locked %zu MiB are in swap",
	    smaps_field(mem, size, "Swap") / MIB);
	exit(verdict());
}

int main(void)
{
	int status;

	if (proc_field("/proc/meminfo", "SwapFree") < 100 * MIB)
		cannot_ask("this machine has no swap");
	group_make("50331648");
	fflush(stdout);
	if (!fork())
		child_main();
	wait(&status);
	if (!WIFEXITED(status)) {
		see(false, "killed by signal %d", WTERMSIG(status));
		return verdict();
	}
	return WEXITSTATUS(status);
}
