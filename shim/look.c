/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the shim knows of guest RAM, and when it looks again.
 *
 * Theory of operation: the control thread schedules a bottom half on QEMU's main loop, which lists guest RAM if the machine is
 * complete; if it is not, the control thread schedules another one after a while. A QEMU that does not export its symbols is
 * never touched: there the controller tells what guest RAM is, which pushed.c holds against the process's own mappings.
 *
 * What is below "On QEMU's main thread" runs there: in bottom halves and RAM block notifiers, never waiting for more than
 * a step of the lock thread.
 */
#include "shim.h"

#include "clock.h"
#include "monitor.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

enum {
	/* Until the main loop exists, which takes QEMU 10 to 100 ms. */
	POLL_FAST_MS = 2,
	POLL_FAST_TIMES = 1000,
	POLL_SLOW_MS = 50,
	LOOK_NOW_MS = 100, /* the longest that a command waits for QEMU's main loop */
	SLOW_LOOK_MS = 5000, /* between looks for what nobody tells of */
	BUSY_MS = 500, /* for so long, commands do not wait again for a main loop that was busy */
};

/* ---- On QEMU's main thread ---- */

/* From QEMU's main thread: eject() may be closing the descriptor, whose number another thread may get. */
static void poke(struct shim *s)
{
	pthread_mutex_lock(&s->looking);
	if (s->control.wake >= 0)
		control_poke(&s->control);
	pthread_mutex_unlock(&s->looking);
}

/* The guest gave memory back. On any thread of QEMU's. */
void look_gave_back(void *opaque)
{
	struct shim *s = opaque;

	if (atomic_load(&s->active))
		poke(s);
}

static void ram_changed(void *opaque)
{
	struct shim *s = opaque;

	if (!atomic_load(&s->active))
		return; /* ejected: QEMU still calls, since a notifier may outlive us */
	atomic_store(&s->dirty, true);
	poke(s);
}

static bool ram_removed(void *opaque, struct range gone)
{
	struct shim *s = opaque;

	return atomic_load(&s->active) && locker_remove(&s->locker, gone);
}

/*
 * Sets the guarantee that QEMU was started with, just before guest RAM becomes known: nobody may see one without the other.
 */
static void launch_guarantee(struct shim *s, uint64_t ram)
{
	const struct guarantee *g = &s->config.guarantee;
	struct wish wish = { .order = s->config.order, .prefault = s->config.prefault,
			     .hold_budget_us = s->config.hold_budget_us, .threads = s->config.threads,
			     .host_reserve = s->config.host_reserve };
	char error[SHORT_TEXT];

	snprintf(error, sizeof(error), "%s", s->config.guarantee_error);
	wish.all = g->kind == GUARANTEE_ALL;
	wish.lock_ram_size = guarantee_resolve(g, ram);
	if (!wish.all && wish.lock_ram_size > ram) {
		snprintf(error, sizeof(error),
			 "the guarantee of %llu MiB at launch is above guest RAM, which is %llu MiB; none is set",
			 (unsigned long long)(wish.lock_ram_size >> 20), (unsigned long long)(ram >> 20));
		shim_warn("%s", error);
		wish.lock_ram_size = 0;
	}
	locker_set_launch(&s->locker, &wish, error);
}

static const char POSTCOPY[] = "this VM is the target of a postcopy migration";
static const char MAYBE_POSTCOPY[] =
	"this QEMU was started as the target of a migration, and cannot be asked whether that is over";

/* Lists guest RAM of a machine that is complete. */
static void list(struct shim *s)
{
	static struct ram_layout layout;
	struct qemu_outlook outlook;
	bool postcopy;

	atomic_store(&s->dirty, false);
	if (qemu_walk(&layout, locker_follows(&s->locker), &outlook))
		shim_warn("this VM has more RAM blocks than ramlock can hold; the others are left alone");
	postcopy = qemu_is_postcopy_target();
	locker_suspend(&s->locker, postcopy ? POSTCOPY : NULL);
	if (!locker_knows_ram(&s->locker))
		launch_guarantee(s, layout.total);
	locker_set_layout(&s->locker, &layout);
	/* QEMU tells neither of the end of a migration nor of a DIMM that is plugged or unplugged: look again, by and by. */
	if (postcopy || (outlook.may_grow && locker_wants_more(&s->locker)))
		atomic_store(&s->dirty, true);
	for (size_t i = 0; i < outlook.n_wanted; i++)
		if (locker_holds(&s->locker, outlook.wanted[i].host))
			atomic_store(&s->dirty, true);
		else
			qemu_let_go(outlook.wanted[i].device);
	atomic_store(&s->may_change, outlook.may_change);
}

/* A command in QEMU's own monitor is about to depend on guest RAM; QEMU has it only after a first look. */
void look_at_once(void *opaque, bool certain)
{
	struct shim *s = opaque;

	(void)certain;
	list(s);
	if (atomic_load(&s->dirty))
		poke(s);
}

/* The bottom half: lists guest RAM, if the machine is complete. */
static void look(void *opaque)
{
	struct shim *s = opaque;
	const struct qemu_watcher watcher = { s, ram_changed, ram_removed };

	if (!atomic_load(&s->active)) {
		monitor_settle();
		return;
	}
	if (!qemu_machine_ready()) {
		atomic_store(&s->dirty, true);
	} else {
		if (!s->watching)
			s->watching = qemu_watch(&watcher); /* calls ram_changed() for every block */
		list(s);
		monitor_settle();
	}
	pthread_mutex_lock(&s->looking);
	atomic_store(&s->scheduled, false);
	pthread_cond_broadcast(&s->looked);
	pthread_mutex_unlock(&s->looking);
	poke(s);
}

/* ---- The control thread ---- */

static void schedule_look(struct shim *s)
{
	if (!atomic_exchange(&s->scheduled, true))
		qemu_schedule(look, s);
}

/* ---- Guest RAM of a QEMU that does not export its symbols; the control thread, and the lock thread before it plans ---- */

/* Forgets what is not what the controller took for guest RAM any more. */
static void look_at_pushed(struct shim *s)
{
	if (s->qemu.symbols || !locker_knows_ram(&s->locker))
		return;
	pthread_mutex_lock(&s->pushed.mutex);
	if (pushed_look(&s->pushed))
		locker_set_layout(&s->locker, &s->pushed.layout);
	pthread_mutex_unlock(&s->pushed.mutex);
}

/* The lock thread is about to plan. */
void look_before_plan(void *opaque)
{
	look_at_pushed(opaque);
}

/* Takes guest RAM from the controller. Returns 0, or -EINVAL with the reason in @text. */
int look_push(void *opaque, struct ram_layout *l, char text[SHORT_TEXT])
{
	static_assert((int)SHORT_TEXT >= (int)PUSHED_TEXT, "room for the reason");
	struct shim *s = opaque;
	int err;

	pthread_mutex_lock(&s->pushed.mutex);
	err = pushed_accept(&s->pushed, l, text);
	if (!err) {
		/* A locked page cannot be discarded, which a migration to here may have to do: better none than lost ones. */
		locker_suspend(&s->locker, qemu_is_incoming() ? MAYBE_POSTCOPY : NULL);
		if (!locker_knows_ram(&s->locker))
			launch_guarantee(s, s->pushed.layout.total);
		locker_set_layout(&s->locker, &s->pushed.layout);
		atomic_store(&s->may_change, s->pushed.layout.n > 1); /* one block is machine RAM, which stays */
		}
	pthread_mutex_unlock(&s->pushed.mutex);
	return err;
}

/* Has QEMU asked, by way of its main loop. Returns false when that is busy for too long. Any thread of ours. */
bool look_and_wait(void *opaque)
{
	struct shim *s = opaque;
	uint64_t deadline;
	bool done;

	if (!s->qemu.symbols) {
		look_at_pushed(s);
		return true;
	}
	deadline = now_ns() + (uint64_t)LOOK_NOW_MS * NS_PER_MS;
	schedule_look(s);
	pthread_mutex_lock(&s->looking);
	while (atomic_load(&s->scheduled))
		if (clock_wait(&s->looked, &s->looking, deadline))
			break;
	done = !atomic_load(&s->scheduled);
	pthread_mutex_unlock(&s->looking);
	return done;
}

/*
 * Looks at guest RAM before a command that depends on it: QEMU tells of RAM blocks that come and go, but not of a memory
 * backend that is plugged or unplugged as a DIMM. A main loop that is busy is not waited for: what was known must do.
 */
void look_now(void *opaque, bool certain)
{
	struct shim *s = opaque;
	bool done;

	if (!locker_knows_ram(&s->locker) || now_ms() < s->looked_ms + (certain ? 0 : LOOK_AGAIN_MIN_MS))
		return; /* a flood of queries is no flood of bottom halves, nor of waits */
	done = look_and_wait(s);
	s->looked_ms = now_ms() + (done ? 0 : BUSY_MS);
}

/* Looks at guest RAM now and then while something is locked that may go without a word. Returns as look_when_due(). */
static int look_now_and_then(struct shim *s, void (*look_again)(struct shim *s))
{
	int64_t now = now_ms();

	if (!atomic_load(&s->may_change) || !locker_has_guarantee(&s->locker)) {
		s->look_at_ms = 0;
		return -1;
	}
	if (!s->look_at_ms)
		s->look_at_ms = now + SLOW_LOOK_MS;
	if (now >= s->look_at_ms) {
		s->look_at_ms = now + SLOW_LOOK_MS;
		look_again(s);
	}
	return (int)(s->look_at_ms - now);
}

/* Does what is due about finding guest RAM. Returns how long to wait for the next time, in ms; -1: until poked. */
int look_when_due(struct shim *s)
{
	int64_t now = now_ms();

	if (!s->qemu.symbols) {
		if (!s->daemonizes || s->forks >= 2)
			control_listen(&s->control);
		return look_now_and_then(s, look_at_pushed);
	}
	if (!s->begun) {
		if (!qemu_has_main_loop())
			return s->polls++ < POLL_FAST_TIMES ? POLL_FAST_MS : POLL_SLOW_MS;
		s->begun = true;
		control_listen(&s->control);
		schedule_look(s);
		return -1;
	}
	if (!atomic_load(&s->dirty)) {
		s->pause_ms = LOOK_AGAIN_MIN_MS;
		return look_now_and_then(s, schedule_look);
	}
	/* The pause lets QEMU go on, and gathers the changes that come together. */
	if (!s->look_at_ms || s->look_at_ms > now + s->pause_ms)
		s->look_at_ms = now + s->pause_ms;
	if (now < s->look_at_ms)
		return (int)(s->look_at_ms - now);
	s->look_at_ms = 0;
	s->pause_ms = s->pause_ms * 2 < LOOK_AGAIN_MAX_MS ? s->pause_ms * 2 : LOOK_AGAIN_MAX_MS;
	schedule_look(s);
	return -1;
}

void look_init(struct shim *s)
{
	pthread_mutex_init(&s->looking, NULL);
	clock_cond_init(&s->looked);
	s->begun = false;
	s->polls = 0;
	s->look_at_ms = 0;
	s->pause_ms = LOOK_AGAIN_MIN_MS;
	atomic_store(&s->dirty, false);
	atomic_store(&s->scheduled, false);
	atomic_store(&s->may_change, false);
}
