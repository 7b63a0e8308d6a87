/* SPDX-License-Identifier: GPL-2.0-or-later */
/* RLIMIT_MEMLOCK is charged the whole range at once, also for an on-fault lock of memory that nobody has touched. */
#include "fact.h"
#include <sys/resource.h>

int main(void)
{
	const struct rlimit limit = { .rlim_cur = MIB, .rlim_max = MIB };
	char *mem = memory(4 * MIB);
	int err;

	if (setrlimit(RLIMIT_MEMLOCK, &limit))
		cannot_ask("the limit cannot be lowered");
	if (getuid() == 0 && setresuid(65534, 65534, 65534))
		cannot_ask("root has CAP_IPC_LOCK and cannot become another user");
	err = -lock_on_fault(mem, MIB);
	see(!err, "limit 1 MiB, 1 MiB on fault: %s", strerror(err));
	err = -lock_on_fault(mem + 2 * MIB, PAGE);
	see(err == ENOMEM, "one page more: %s", strerror(err));
	munlock(mem, MIB);
	err = -lock_on_fault(mem, 2 * MIB);
	see(err == ENOMEM, "2 MiB, nothing of it resident: %s", strerror(err));
	return verdict();
}
