/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Whether the lock thread knows that others run only while it sleeps, and who may wait for it. */
#include "clock.h"
#include "fd.h"
#include "rest.h"
#include "smallfile.h"
#include "tree.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { HOLD_NS = 500 * 1000 };

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

static atomic_uint asked, slept;
static atomic_bool over;

/* Goes to sleep as often as it is asked to, and never else. */
static void *sleeper(void *arg)
{
	while (!over) {
		if (slept == asked)
			continue;
		nanosleep(&(struct timespec){ 0, 1000 * 1000 }, NULL);
		slept++;
	}
	return arg;
}

static void have_it_sleep(void)
{
	asked++;
	while (slept != asked)
		;
}

static uint64_t rest_of(struct rest *rest, struct rest_view *view, uint64_t hold_ns)
{
	uint64_t began = now_ns();

	rest_after(rest, view, hold_ns);
	return now_ns() - began;
}

static void only_who_goes_to_sleep_may_wait(void)
{
	struct rest rest;
	struct rest_view view = { 0 };
	pthread_t thread;
	uint64_t took = 0;

	rest_init(&rest);
	over = false;
	CHECK(!pthread_create(&thread, NULL, sleeper, NULL));
	have_it_sleep();
	rest_look(&rest, &view);
	CHECK_EQ(view.seen_ns, 0);
	for (int i = 0; i < 100; i++) {
		rest_asleep(HOLD_NS); /* that is ours, and no other's */
		rest_of(&rest, &view, HOLD_NS);
		CHECK_EQ(view.seen_ns, 0);
	}

	have_it_sleep();
	CHECK(rest_of(&rest, &view, HOLD_NS) >= HOLD_NS / 25);
	CHECK(view.seen_ns);
	for (int i = 0; i < 10 && took < HOLD_NS / 10; i++) { /* unless it took more than 3 ms to come here */
		have_it_sleep();
		view.seen_ns = now_ns(); /* a moment ago */
		took = rest_of(&rest, &view, HOLD_NS);
	}
	CHECK(took >= HOLD_NS / 10);
	view.seen_ns = 0;
	rest_of(&rest, &view, HOLD_NS);
	CHECK_EQ(view.seen_ns, 0); /* it has gone to sleep no more */

	have_it_sleep();
	CHECK(rest_of(&rest, &view, 1000) >= 15 * 1000); /* a writer takes as long to come, however short the hold was */

	rest_always(&rest);
	for (int i = 0; i < 10; i++)
		CHECK(rest_of(&rest, &view, HOLD_NS) >= HOLD_NS / 25);
	over = true;
	pthread_join(thread, NULL);
	rest_deinit(&rest);
}

/* What one of our threads sleeps is no sleep of QEMU's to the other one, before that one has looked again. */
static void *rest_once(void *arg)
{
	struct rest *rest = arg;
	struct rest_view view = { 0 };

	rest_look(rest, &view);
	view.streak_left = 1;
	asked = 1;
	while (!slept)
		;
	rest_after(rest, &view, HOLD_NS);
	asked = 2;
	while (!over)
		;
	return arg;
}

static void our_threads_know_each_other(void)
{
	struct rest rest;
	struct rest_view view = { 0 };
	pthread_t thread;

	rest_init(&rest);
	over = false;
	asked = slept = 0;
	CHECK(!pthread_create(&thread, NULL, rest_once, &rest));
	while (asked != 1)
		;
	rest_look(&rest, &view);
	slept = 1;
	while (asked != 2)
		;
	rest_after(&rest, &view, HOLD_NS);
	CHECK_EQ(view.seen_ns, 0);
	over = true;
	pthread_join(thread, NULL);
	rest_deinit(&rest);
}

/* More and more gaps are slept as long as somebody wants this processor, and fewer when nobody does. */
static void who_wants_the_processor_has_it(void)
{
	struct rest rest;
	struct rest_view view = { 0 };

	rest_init(&rest);
	rest_look(&rest, &view);
	for (unsigned int left = 3; left; left--) {
		view.streak_left = left;
		CHECK(rest_of(&rest, &view, HOLD_NS) >= HOLD_NS / 25);
		CHECK_EQ(view.streak_left, left - 1);
	}
	view.streak = 64;
	for (int i = 0; i < 1000 && view.streak; i++) { /* nobody is there, now and then */
		view.streak_left = 0;
		rest_after(&rest, &view, HOLD_NS);
		CHECK(view.streak <= 64);
	}
	CHECK_EQ(view.streak, 0);
	rest_deinit(&rest);
}

CHECK_MAIN(CASE(a_real_time_policy_is_noticed), CASE(only_who_goes_to_sleep_may_wait), CASE(our_threads_know_each_other),
	   CASE(who_wants_the_processor_has_it))
