/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Whether the lock thread knows that others run only while it sleeps. */
#include "fd.h"
#include "rest.h"
#include "smallfile.h"
#include "tree.h"

#include <sched.h>

/* The scheduling policy is field 41; the second is the thread's name, as it likes. */
static void a_real_time_policy_is_noticed(void)
{
	static const char *const names[] = { "qemu", "a) b (c) 1 1", "" };
	struct rest rest;

	tree_begin();
	rest_init(&rest);
	for (size_t i = 0; i < 3; i++)
		for (int policy = 0; policy <= 7; policy++) { /* 6: deadline, 7: one of BPF */
			char zeroes[37 * 2 + 1] = "";

			for (int field = 4; field <= 40; field++)
				strcat(zeroes, " 0");
			put("stat", "7 (%s) R%s %d 0 0\n", names[i], zeroes, policy);
			fd_close(rest.thread_stat);
			rest.thread_stat = smallfile_open(root, "stat");
			rest.policy_ns = 0;
			rest_note_policy(&rest);
			CHECK_EQ(rest.real_time, policy == SCHED_FIFO || policy == SCHED_RR || policy == 6);
			CHECK(!rest.policy_unknown);
		}
	fd_close(rest.thread_stat);
	rest.thread_stat = -1;
	rest.policy_ns = 0;
	rest_note_policy(&rest);
	CHECK(rest.policy_unknown);
	rest_begin(&rest);
	CHECK(!rest.real_time && !rest.policy_unknown); /* this thread */
	rest_deinit(&rest);
	tree_end();
}

CHECK_MAIN(CASE(a_real_time_policy_is_noticed))
