/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A memory cgroup of a program's own, by either version of the interface; it is removed when the program ends. */
#ifndef GROUP_H
#define GROUP_H

#include "fact.h"
#include <sys/stat.h>

static char group[128];
static pid_t group_owner;

static bool group_put(const char *folder, const char *name, const char *value)
{
	char path[256];
	int fd;
	bool done;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	done = write(fd, value, strlen(value)) == (ssize_t)strlen(value);
	close(fd);
	return done;
}

/* Children end before, and the group is left only by the process that made it. */
static void group_remove(void)
{
	if (getpid() == group_owner)
		rmdir(group);
}

/* Makes a group that may hold @limit bytes, besides what it may have in swap. */
static void group_make(const char *limit)
{
	static const char *const roots[] = { "/sys/fs/cgroup/memory", "/sys/fs/cgroup" };

	group_owner = getpid();
	for (size_t i = 0; i < 2; i++) {
		snprintf(group, sizeof(group), "%s/kernel-facts-%d", roots[i], (int)getpid());
		if (mkdir(group, 0755))
			continue;
		if (group_put(group, "memory.limit_in_bytes", limit) || group_put(group, "memory.max", limit)) {
			atexit(group_remove);
			return;
		}
		rmdir(group);
	}
	cannot_ask("no memory cgroup can be made");
}

/* Moves this process, a child of the one that made the group, into it; false when that cannot be done. */
static bool group_enter(void)
{
	char pid[16];

	snprintf(pid, sizeof(pid), "%d", (int)getpid());
	return group_put(group, "cgroup.procs", pid);
}

#endif
