/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Making room where there is some: that it kills nobody where there is none, docs/kernel-facts/full-cgroup-kills.c shows. */
#include "check.h"
#include "makeroom.h"
#include "pacer.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

static int resident(const struct makeroom *m)
{
	unsigned char there[PACER_CHUNK / 4096];
	int n = 0;

	CHECK_EQ(mincore(m->page, PACER_CHUNK, there), 0);
	for (size_t i = 0; i < sizeof(there); i++)
		n += there[i] & 1;
	return n;
}

static void room_is_given_back(void)
{
	struct makeroom m;

	makeroom_init(&m);
	for (int i = 0; i < 20; i++) {
		int err = makeroom(&m);

		if (err == -ENOSYS) {
			printf("MADV_COLLAPSE does not work here: not tested\n");
			break;
		}
		CHECK_EQ(err, 0);
		CHECK_EQ(resident(&m), 1);
	}
	makeroom_deinit(&m);
	CHECK(m.page == NULL);
}

/* As under QEMU's mem-lock=on. */
static void all_that_is_mapped_may_be_locked(void)
{
	struct makeroom m;

	if (mlockall(MCL_FUTURE))
		return;
	makeroom_init(&m);
	CHECK(makeroom(&m) != -EBUSY);
	if (m.page)
		CHECK_EQ(resident(&m), 1);
	makeroom_deinit(&m);
	munlockall();
}

CHECK_MAIN(CASE(room_is_given_back), CASE(all_that_is_mapped_may_be_locked))
