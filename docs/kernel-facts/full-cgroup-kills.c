/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * In a memory cgroup at its limit the kernel can kill although swap is free and there is plenty to swap out. Here a program locks half of
 * what its group may have, piece by piece, while a thread uses more than the other half.
 *
 * One cause: reclaim goes by statistics that are up to some seconds old (since Linux 6.12), holds the list of inactive pages for long
 * enough when it is empty, and scans nothing. Reading memory.stat brings them up to date, and the same goes well. (Kernels with the
 * multi-generational LRU do not go by that list.) Another: all of it was used just now. But for a huge page, which has
 * the kernel reclaim as well, it does not kill: MADV_COLLAPSE fails.
 */
#include "group.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

static const size_t LOCKED = 128 * MIB, USED = 160 * MIB, PIECE = 64 * 1024, HUGE = 2 * MIB;

/* Shared with the child. */
static struct {
	int refused; /* huge pages */
	bool began; /* what it has was swapped out, and all went well */
} *seen;

struct way {
	bool reads; /* somebody reads memory.stat all the time */
	bool huge; /* room is made by a huge page before each piece */
	int pause; /* turns of a loop between two pages that are used */
	double seconds;
};

struct use {
	char *mem;
	int pause;
};

static void *use(void *opaque)
{
	const struct use *u = opaque;

	for (;;)
		for (size_t i = 0; i < USED; i += PAGE) {
			((volatile char *)u->mem)[i]++;
			for (volatile int n = 0; n < u->pause; n++)
				;
		}
	return NULL;
}

/* Leaves one small page of a huge one's room. */
static bool empty(char *mem)
{
	if (madvise(mem, HUGE, MADV_DONTNEED) || madvise(mem, HUGE, MADV_NOHUGEPAGE))
		return false;
	*mem = 1;
	return !madvise(mem, HUGE, MADV_HUGEPAGE);
}

/* Whether a huge page could be had, and given back. */
static bool make_room(char *mem)
{
	static bool works;
	int err = madvise(mem, HUGE, MADV_COLLAPSE) ? errno : 0;

	if (err == EINVAL) { /* the small page was swapped out */
		*(volatile char *)mem = 1;
		err = madvise(mem, HUGE, MADV_COLLAPSE) ? errno : 0;
	}
	works |= !err;
	if (err == ENOMEM || (err == EINVAL && !works))
		_exit(FACT_UNASKED);
	seen->refused += err == EBUSY;
	return !err && empty(mem);
}

static void share_too_little(const struct way *way)
{
	static struct use u;
	char *locked, *room;
	pthread_t user;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (!group_enter())
		_exit(FACT_UNASKED);
	locked = memory(LOCKED);
	u = (struct use){ memory(USED), way->pause };
	room = memory(2 * HUGE);
	room += HUGE - (uintptr_t)room % HUGE;
	touch(u.mem, USED);
	touch(locked, LOCKED);
	if (!empty(room) || pthread_create(&user, NULL, use, &u))
		_exit(FACT_UNASKED);
	usleep(500 * 1000);
	if (!smaps_field(u.mem, USED, "Swap") && !smaps_field(locked, LOCKED, "Swap"))
		_exit(FACT_UNASKED);
	seen->began = true;
	for (size_t at = 0; at < LOCKED; at += PIECE) {
		while (way->huge && !make_room(room))
			usleep(20000);
		if (lock_on_fault(locked + at, PIECE) || madvise(locked + at, PIECE, MADV_POPULATE_WRITE))
			_exit(FACT_UNASKED);
		usleep(100);
	}
	for (;;)
		pause();
}

/* Whether the kernel kills there, within so many seconds. */
static bool killed(struct way way)
{
	const double end = now() + way.seconds;
	char path[256], text[16384];
	bool ended = false;
	int status, fd;
	pid_t child;

	snprintf(path, sizeof(path), "%s/memory.stat", group);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	seen->began = false;
	child = fork();
	if (fd < 0 || child < 0)
		broken("memory.stat");
	if (!child)
		share_too_little(&way);
	while (now() < end && !(ended = waitpid(child, &status, WNOHANG) == child)) {
		if (way.reads && pread(fd, text, sizeof(text), 0) < 0)
			break;
		usleep(1000);
	}
	close(fd);
	if (!ended) {
		kill(child, SIGKILL);
		waitpid(child, &status, 0);
	} else if (!seen->began || !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
		cannot_ask("memory cannot be locked, or huge pages not be had, in the group");
	}
	usleep(50000); /* until its memory is not charged any more */
	return ended;
}

/* Whether it kills in one of so many tries. */
static bool kills(struct way way, int tries)
{
	while (tries-- > 0)
		if (killed(way))
			return true;
	return false;
}

int main(void)
{
	if (proc_field("/proc/meminfo", "SwapFree") < 2 * USED)
		cannot_ask("too little swap");
	seen = mmap(NULL, sizeof(*seen), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (seen == MAP_FAILED)
		broken("mmap");
	group_make("256M");
	setpriority(PRIO_PROCESS, 0, -10);
	if (!kills((struct way){ .pause = 300, .seconds = 4 }, 3))
		cannot_ask("this kernel does not kill there");
	see(true, "killed, with swap free and 160 MiB that could be swapped out");
	/* It can still be too late, though seldom. */
	see(!killed((struct way){ .pause = 300, .reads = true, .seconds = 4 }) ||
	    !killed((struct way){ .pause = 300, .reads = true, .seconds = 4 }), "not killed while somebody reads memory.stat");
	if (kills((struct way){ .seconds = 4 }, 3)) {
		bool spared = !killed((struct way){ .huge = true, .seconds = 4 }) || !killed((struct way){ .huge = true, .seconds = 4 });

		if (seen->refused)
			see(spared, "not killed where a huge page has to be had first: that was refused, %d times", seen->refused);
	}
	return verdict();
}
