/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A fork()ed child has none of the locks, the parent keeps them; a page that the parent writes to after it is locked again. */
#include "fact.h"
#include <sys/wait.h>

int main(void)
{
	const size_t size = MIB;
	char *mem = memory(size);
	int status, go[2];
	pid_t child;

	touch(mem, size);
	if (mlock(mem, size))
		cannot_ask("locking is not allowed");
	if (pipe(go))
		broken("pipe");
	child = fork();
	if (!child) {
		char c;

		close(go[1]);
		if (read(go[0], &c, 1) < 0)
			_exit(2);
		_exit(vm_lck() == 0 ? 0 : 1);
	}
	mem[0] = 42; /* while the child shares the page: this copies it */
	see(page_mlocked(mem), "the parent's copy of a page that it wrote to is locked");
	see(vm_lck() == size, "the parent has %zu KiB under lock", vm_lck() / 1024);
	close(go[1]);
	waitpid(child, &status, 0);
	see(status == 0, "the child has nothing under lock");
	return verdict();
}
