/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Making room where there is some: that it kills nobody where there is none, docs/kernel-facts/full-cgroup-kills.c shows. */
#include "check.h"
#include "makeroom.h"
#include "pacer.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

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

/* mlockall() locks whatever is mapped. (Not called here: the sanitizer has terabytes mapped.) */
static void it_may_have_been_locked(void)
{
	struct makeroom m;

	makeroom_init(&m);
	if (!makeroom(&m)) {
		CHECK_EQ(syscall(SYS_mlock2, m.page, PACER_CHUNK, 0), 0);
		CHECK_EQ(makeroom(&m), 0);
		CHECK_EQ(resident(&m), 1);
	}
	makeroom_deinit(&m);
}

CHECK_MAIN(CASE(room_is_given_back), CASE(it_may_have_been_locked))
