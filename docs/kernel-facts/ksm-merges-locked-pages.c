/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * KSM merges locked pages like any others (a write then has to allocate), and VmLck does not notice. MADV_UNMERGEABLE gives each page
 * its own copy again. Turns KSM on for a moment, and back.
 */
#include "fact.h"
#include <signal.h>

static const char *const knobs[] = { "/sys/kernel/mm/ksm/run", "/sys/kernel/mm/ksm/pages_to_scan",
				     "/sys/kernel/mm/ksm/sleep_millisecs" };
static char former[3][32];

static bool knob(int i, const char *value)
{
	int fd = open(knobs[i], O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, value, strlen(value)) > 0;

	if (fd >= 0)
		close(fd);
	return done;
}

static void put_back(void)
{
	for (int i = 0; i < 3; i++)
		knob(i, former[i]);
}

static void on_signal(int number)
{
	put_back();
	_exit(128 + number);
}

int main(void)
{
	static const char *const wanted[] = { "1", "20000", "10" };
	const size_t size = 16 * MIB;
	char *mem = memory(size);
	double deadline;

	for (int i = 0; i < 3; i++) {
		int fd = open(knobs[i], O_RDONLY | O_CLOEXEC);

		if (fd < 0 || read(fd, former[i], sizeof(former[i]) - 1) <= 0)
			cannot_ask("no KSM in this kernel");
		close(fd);
	}
	atexit(put_back);
	signal(SIGTERM, on_signal);
	signal(SIGINT, on_signal);
	for (int i = 0; i < 3; i++)
		if (!knob(i, wanted[i]))
			cannot_ask("only root can turn KSM on");
	memset(mem, 7, size);
	if (mlock(mem, size))
		cannot_ask("locking 16 MiB is not allowed");
	see(smaps_field(mem, size, "Pss") == size, "locked: %zu KiB of its own", smaps_field(mem, size, "Pss") / 1024);
	if (madvise(mem, size, MADV_MERGEABLE))
		cannot_ask("no KSM in this kernel");
	deadline = now() + 20;
	while (smaps_field(mem, size, "Pss") > size / 4 && now() < deadline)
		usleep(50000);
	see(smaps_field(mem, size, "Pss") <= size / 4, "equal pages merged: %zu KiB of its own",
	    smaps_field(mem, size, "Pss") / 1024);
	see(vm_lck() == size, "VmLck: %zu KiB", vm_lck() / 1024);
	madvise(mem, size, MADV_UNMERGEABLE);
	see(smaps_field(mem, size, "Pss") == size && page_mlocked(mem), "MADV_UNMERGEABLE: %zu KiB of its own, locked",
	    smaps_field(mem, size, "Pss") / 1024);
	return verdict();
}
