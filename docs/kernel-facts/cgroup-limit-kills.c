/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Locking more than the memory cgroup allows is no error code: the process is killed. So room is asked for beforehand. */
#include "group.h"
#include <signal.h>
#include <sys/wait.h>

/* Returns the signal that ended a child in the group which locked 64 MiB, 0 when it lived. */
static int try(bool on_fault, bool *locked)
{
	int status = 0, said[2];
	char answer = 0;
	pid_t child;

	if (pipe(said))
		broken("pipe");
	child = fork();
	if (!child) {
		char *mem = memory(64 * MIB);

		if (!group_enter())
			_exit(FACT_UNASKED);
		if ((on_fault ? lock_on_fault(mem, 64 * MIB) : mlock(mem, 64 * MIB)) == 0 && write(said[1], "l", 1) == 1)
			touch(mem, 64 * MIB);
		_exit(0);
	}
	close(said[1]);
	*locked = read(said[0], &answer, 1) == 1;
	close(said[0]);
	waitpid(child, &status, 0);
	if (WIFEXITED(status) && WEXITSTATUS(status) == FACT_UNASKED)
		cannot_ask("a process cannot be moved into a memory cgroup");
	return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

int main(void)
{
	bool locked;
	int by;

	group_make("33554432");
	by = try(false, &locked);
	see(by == SIGKILL && !locked, "limit 32 MiB, mlock() of 64 MiB: %s", by ? strsignal(by) : "lived");
	by = try(true, &locked);
	see(locked, "the same on fault: the call %s", locked ? "succeeded" : "failed");
	see(by == SIGKILL, "and then touching it: %s", by ? strsignal(by) : "lived");
	return verdict();
}
