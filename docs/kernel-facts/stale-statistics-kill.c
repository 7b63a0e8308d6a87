/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * In a memory cgroup at its limit the kernel can kill although swap is free and there is plenty to swap out: reclaim goes by statistics that
 * are up to some seconds old (since Linux 6.12), holds the list of inactive pages for long enough when it is empty, and scans nothing.
 * Locked memory, which makes that list shorter, brings it about within seconds. Reading memory.stat brings the statistics up
 * to date, and the same goes well. Kernels with the multi-generational LRU (lru_gen) do not go by that list.
 */
#include "group.h"

#include <sys/resource.h>
#include <sys/wait.h>

static const size_t LOCKED = 128 * MIB, USED = 160 * MIB, PIECE = 64 * 1024;

static void *use(void *mem)
{
	for (;;)
		touch(mem, USED);
	return NULL;
}

/* Locks half of what the group may have, while a thread uses more than the rest: some of that is always in swap. */
static int share_too_little(double seconds)
{
	double end = now() + seconds;
	char *locked, *used;
	pthread_t user;

	if (!group_enter())
		return FACT_UNASKED;
	locked = memory(LOCKED);
	used = memory(USED);
	touch(used, USED);
	touch(locked, LOCKED);
	if (pthread_create(&user, NULL, use, used))
		return FACT_UNASKED;
	usleep(500 * 1000);
	for (size_t at = 0; at < LOCKED; at += PIECE) {
		if (lock_on_fault(locked + at, PIECE) || madvise(locked + at, PIECE, MADV_POPULATE_WRITE))
			return FACT_UNASKED;
		usleep(100);
	}
	while (now() < end)
		usleep(1000);
	return FACT_HOLDS;
}

/* Whether that is killed, with memory.stat read all the time or not at all. */
static bool killed(bool reads, double seconds)
{
	char path[256], text[16384];
	int status, fd;
	pid_t child;

	snprintf(path, sizeof(path), "%s/memory.stat", group);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	child = fork();
	if (fd < 0 || child < 0)
		broken("memory.stat");
	if (!child)
		_exit(share_too_little(seconds));
	while (!waitpid(child, &status, WNOHANG)) {
		if (reads && pread(fd, text, sizeof(text), 0) < 0)
			broken("memory.stat");
		usleep(1000);
	}
	close(fd);
	if (!WIFSIGNALED(status) && WEXITSTATUS(status))
		cannot_ask("memory cannot be locked in the group");
	return WIFSIGNALED(status);
}

int main(void)
{
	bool any = false;

	if (proc_field("/proc/meminfo", "SwapFree") < 2 * USED)
		cannot_ask("too little swap");
	group_make("256M");
	setpriority(PRIO_PROCESS, 0, -10);
	for (int i = 0; i < 3 && !any; i++)
		any = killed(false, 6);
	if (!any)
		cannot_ask("this kernel does not kill there");
	see(true, "killed, with swap free and 160 MiB in use to swap out");
	see(!killed(true, 6), "not killed while somebody reads memory.stat");
	return verdict();
}
