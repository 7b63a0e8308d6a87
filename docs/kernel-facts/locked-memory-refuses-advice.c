/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Advice that would take pages away is EINVAL on locked memory, even on a range that is locked in part only. */
#include "fact.h"

#define ADVICE(name) { name, #name }

int main(void)
{
	static const struct {
		int advice;
		const char *name;
	} refused[] = { ADVICE(MADV_DONTNEED), ADVICE(MADV_FREE), ADVICE(MADV_PAGEOUT), ADVICE(MADV_COLD), ADVICE(MADV_REMOVE) };
	const size_t size = MIB;
	char *private = memory(size);
	char *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	touch(private, size);
	touch(shared, size);
	for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
		char *mem = refused[i].advice == MADV_REMOVE ? shared : private;
		int err, free_err;

		munlock(mem, size);
		free_err = madvise(mem, PAGE, refused[i].advice) ? errno : 0;
		touch(mem, PAGE);
		if (lock_on_fault(mem + PAGE, size - PAGE))
			cannot_ask("locking is not allowed");
		err = madvise(mem + PAGE, PAGE, refused[i].advice) ? errno : 0;
		see(!free_err && err == EINVAL, "%s: unlocked %s, locked %s", refused[i].name, strerror(free_err), strerror(err));
	}
	see(resident(private, size) == size, "nothing was taken");
	return verdict();
}
