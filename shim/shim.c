/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Entry of the shim, and the thread that everything but locking happens on.
 *
 * Theory of operation: the dynamic loader runs enter() before QEMU's main(). In anything that is not a QEMU system
 * emulator nothing happens. Otherwise the control thread is started, which binds the control socket while the process
 * has the rights that it was started with (-runas and -chroot come later), starts the lock thread, and waits for
 * QEMU's main loop to exist; touching QEMU before that kills the VM. Then it schedules a bottom half, which looks whether
 * the machine is complete and lists guest RAM. If it is not, the control thread schedules another one after a while:
 * a bottom half never schedules itself.
 * A QEMU that does not export its symbols is never touched: there the controller tells what guest RAM is, which pushed.c
 * holds against the process's own mappings, on the control thread and, before it plans, on the lock thread.
 *
 * On QEMU's own threads runs only what is in this file below "On QEMU's main thread", and enter().
 *
 * -daemonize forks twice after enter(), and threads do not survive a fork. after_fork_in_child() starts them again,
 * but only where QEMU was not initialised at the fork: later forks are helpers that will exec.
 *
 * The threads block all signals, because QEMU relies on signals that are directed at its own threads, and never fork
 * or exec, for which QEMU's sandbox would kill the process.
 */
#include "commands.h"
#include "config.h"
#include "control.h"
#include "headroom.h"
#include "locker.h"
#include "pushed.h"
#include "qemu.h"

#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum {
	/* Until the main loop exists, which takes QEMU 10 to 100 ms. */
	POLL_FAST_MS = 2,
	POLL_FAST_TIMES = 1000,
	POLL_SLOW_MS = 50,
	/* Until the machine is complete; with -preconfig that is for the operator to say. */
	LOOK_AGAIN_MIN_MS = 20,
	LOOK_AGAIN_MAX_MS = 1000,
	LOOK_NOW_MS = 100, /* the longest that a command waits for QEMU's main loop */
	DRAIN_MS = 5000, /* the longest that a leaving shim waits for a client to read its replies */
	SLOW_LOOK_MS = 5000, /* between looks for what nobody tells of */
	BUSY_MS = 500, /* for so long, commands do not wait again for a main loop that was busy */
	STACK_BYTES = 256 << 10, /* with -overcommit mem-lock=on all of it gets locked */
};

static struct shim {
	struct config config;
	struct qemu qemu;
	struct locker locker;
	struct pushed pushed; /* guest RAM, where QEMU cannot be asked */
	struct commands commands;
	struct qmp_server server;
	struct control control;
	pthread_mutex_t binding; /* so that a process that exits at once leaves no socket behind */
	bool leaving; /* the process exits: bind nothing more */
	atomic_bool active; /* this process is a QEMU that we serve */
	bool watching; /* QEMU tells us about changes of RAM; main thread only */
	atomic_bool dirty; /* guest RAM should be looked at again */
	atomic_bool scheduled; /* a bottom half that looks is on its way */
	atomic_bool known; /* guest RAM was listed */
	atomic_bool may_change; /* ... and may become less, or more, without a word */
	pthread_mutex_t looking; /* with `looked`: for waiting until a look has ended */
	pthread_cond_t looked;
	unsigned int forks; /* since enter() */
	bool begun; /* QEMU's main loop was seen; this and what follows: control thread only */
	unsigned int polls;
	unsigned int pause_ms; /* before guest RAM is looked at again */
	int64_t looked_ms; /* when a command last waited for a look */
	int64_t look_at_ms; /* when that will be; 0: not decided */
	pthread_t lock_thread;
	bool halted; /* lock_thread was joined */
	bool has_stderr; /* descriptor 2 is standard error: known only when preloaded */
	bool injected;
	bool daemonizes; /* -daemonize is on the command line; only when preloaded */
	uint64_t started_ns; /* CLOCK_MONOTONIC at the end of ramlock_start() */
} shim;

/*
 * Says something on standard error; if that is what descriptor 2 is: where QEMU was started without one, it is something of
 * QEMU's own by now, perhaps a disk. A reader that has gone must not end QEMU, which ignores SIGPIPE only later.
 */
__attribute__((format(printf, 1, 2))) static void warn(const char *fmt, ...)
{
	const struct timespec at_once = { 0 };
	sigset_t pipe, before;
	char text[512];
	va_list ap;

	if (!shim.has_stderr)
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	sigemptyset(&pipe);
	sigaddset(&pipe, SIGPIPE);
	pthread_sigmask(SIG_BLOCK, &pipe, &before);
	if (dprintf(STDERR_FILENO, "ramlock: %s\n", text) < 0 && errno == EPIPE)
		sigtimedwait(&pipe, NULL, &at_once);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* ---- On QEMU's main thread ---- */

/* From QEMU's main thread: eject() may be closing the descriptor, whose number another thread may get. */
static void poke(struct shim *s)
{
	pthread_mutex_lock(&s->looking);
	if (s->control.wake >= 0)
		control_poke(&s->control);
	pthread_mutex_unlock(&s->looking);
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

	if (s->config.guarantee_error[0])
		snprintf(s->commands.launch_error, sizeof(s->commands.launch_error), "%s", s->config.guarantee_error);
	wish.all = g->kind == GUARANTEE_ALL;
	wish.lock_ram_size = guarantee_resolve(g, ram);
	if (!wish.all && wish.lock_ram_size > ram) {
		snprintf(s->commands.launch_error, sizeof(s->commands.launch_error),
			 "the guarantee of %llu MiB at launch is above guest RAM, which is %llu MiB; none is set",
			 (unsigned long long)(wish.lock_ram_size >> 20), (unsigned long long)(ram >> 20));
		warn("%s", s->commands.launch_error);
		wish.lock_ram_size = 0;
	}
	locker_set_launch(&s->locker, &wish);
}

static const char POSTCOPY[] = "this VM is the target of a postcopy migration";
static const char MAYBE_POSTCOPY[] =
	"this QEMU was started as the target of a migration, and cannot be asked whether that is over";

/* The bottom half: lists guest RAM, if the machine is complete. */
static void look(void *opaque)
{
	static struct ram_layout layout;
	struct shim *s = opaque;
	struct qemu_outlook outlook;
	bool postcopy;
	const struct qemu_watcher watcher = { s, ram_changed, ram_removed };

	if (!atomic_load(&s->active))
		return;
	if (!qemu_machine_ready()) {
		atomic_store(&s->dirty, true);
	} else {
		if (!s->watching)
			s->watching = qemu_watch(&watcher); /* calls ram_changed() for every block */
		atomic_store(&s->dirty, false);
		if (qemu_walk(&layout, &outlook))
			warn("this VM has more RAM blocks than ramlock can hold; the others are left alone");
		postcopy = qemu_is_postcopy_target();
		locker_suspend(&s->locker, postcopy ? POSTCOPY : NULL);
		if (!atomic_load(&s->known))
			launch_guarantee(s, layout.total);
		locker_set_layout(&s->locker, &layout);
		atomic_store(&s->known, true);
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
	pthread_mutex_lock(&s->looking);
	atomic_store(&s->scheduled, false);
	pthread_cond_broadcast(&s->looked);
	pthread_mutex_unlock(&s->looking);
	poke(s);
}

/* ---- The control thread ---- */

/* The lock thread has news. Called with the locker's mutex held. */
static void locker_news(void *opaque)
{
	control_poke(&((struct shim *)opaque)->control);
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void schedule_look(struct shim *s)
{
	if (!atomic_exchange(&s->scheduled, true))
		qemu_schedule(look, s);
}

/* ---- Guest RAM of a QEMU that does not export its symbols; the control thread, and the lock thread before it plans ---- */

/* Forgets what is not what the controller took for guest RAM any more. */
static void look_at_pushed(struct shim *s)
{
	if (s->qemu.symbols || !atomic_load(&s->known))
		return;
	pthread_mutex_lock(&s->pushed.mutex);
	if (pushed_look(&s->pushed))
		locker_set_layout(&s->locker, &s->pushed.layout);
	pthread_mutex_unlock(&s->pushed.mutex);
}

/* The lock thread is about to plan. */
static void before_plan(void *opaque)
{
	look_at_pushed(opaque);
}

/* Takes guest RAM from the controller. Returns 0, or -EINVAL with the reason in @text. */
static int push(void *opaque, struct ram_layout *l, char text[SHORT_TEXT])
{
	static_assert((int)SHORT_TEXT >= (int)PUSHED_TEXT, "room for the reason");
	struct shim *s = opaque;
	int err;

	pthread_mutex_lock(&s->pushed.mutex);
	err = pushed_accept(&s->pushed, l, text);
	if (!err) {
		/* A locked page cannot be discarded, which a migration to here may have to do: better none than lost ones. */
		locker_suspend(&s->locker, qemu_is_incoming() ? MAYBE_POSTCOPY : NULL);
		if (!atomic_load(&s->known))
			launch_guarantee(s, s->pushed.layout.total);
		locker_set_layout(&s->locker, &s->pushed.layout);
		atomic_store(&s->may_change, s->pushed.layout.n > 1); /* one block is machine RAM, which stays */
		atomic_store(&s->known, true);
	}
	pthread_mutex_unlock(&s->pushed.mutex);
	return err;
}

/* Has QEMU asked, by way of its main loop. Returns false when that is busy for too long. Any thread of ours. */
static bool look_and_wait(void *opaque)
{
	struct shim *s = opaque;
	struct timespec deadline;
	bool done;

	if (!s->qemu.symbols) {
		look_at_pushed(s);
		return true;
	}
	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_nsec += LOOK_NOW_MS * 1000000;
	if (deadline.tv_nsec >= 1000000000) {
		deadline.tv_sec++;
		deadline.tv_nsec -= 1000000000;
	}
	schedule_look(s);
	pthread_mutex_lock(&s->looking);
	while (atomic_load(&s->scheduled))
		if (pthread_cond_timedwait(&s->looked, &s->looking, &deadline))
			break;
	done = !atomic_load(&s->scheduled);
	pthread_mutex_unlock(&s->looking);
	return done;
}

/*
 * Looks at guest RAM before a command that depends on it: QEMU tells of RAM blocks that come and go, but not of a memory
 * backend that is plugged or unplugged as a DIMM. A main loop that is busy is not waited for: what was known must do.
 */
static void look_now(void *opaque, bool certain)
{
	struct shim *s = opaque;
	bool done;

	if (!atomic_load(&s->known) || now_ms() < s->looked_ms + (certain ? 0 : LOOK_AGAIN_MIN_MS))
		return; /* a flood of queries is no flood of bottom halves, nor of waits */
	done = look_and_wait(s);
	s->looked_ms = now_ms() + (done ? 0 : BUSY_MS);
}

/* Looks at guest RAM now and then while something is locked that may go without a word. Returns as find_ram(). */
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
static int find_ram(struct shim *s)
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

/* Starts a thread that blocks all signals. It is to be joined when @thread is given. Returns 0 or -errno. */
static int start_thread(void *(*run)(void *), void *arg, pthread_t *thread)
{
	pthread_attr_t attr;
	pthread_t detached;
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, thread ? PTHREAD_CREATE_JOINABLE : PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(thread ? thread : &detached, &attr, run, arg);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attr);
	return -err;
}

/* Ends the lock thread, after its step in flight. Returns 0, or -EBUSY when that step takes long: then it goes on. */
static int halt(void *opaque)
{
	struct shim *s = opaque;
	int err;

	if (s->halted)
		return 0;
	err = locker_stop(&s->locker);
	if (err)
		return err;
	s->halted = true;
	pthread_join(s->lock_thread, NULL);
	return 0;
}

/* Whether nothing is left to be done before we go. A lock thread that hangs keeps us here, and serving. */
static bool may_leave(struct shim *s)
{
	return s->commands.eject && (s->commands.keep || (locker_is_released(&s->locker) && !halt(s)));
}

/* Takes back all that was started, once the lock thread is no more; the object stays mapped, since QEMU's notifier and atfork handlers point into it. */
static void eject(struct shim *s)
{
	pthread_mutex_lock(&s->binding);
	control_unlink(&s->control);
	pthread_mutex_unlock(&s->binding);
	pthread_mutex_lock(&s->looking);
	control_deinit(&s->control);
	pthread_mutex_unlock(&s->looking);
	stepper_deinit(&s->locker.stepper);
	pushed_deinit(&s->pushed);
	atomic_store(&s->active, false); /* ramlock_start() may come from now on */
}

static void *control_run(void *arg)
{
	struct shim *s = arg;
	int err = 0;

	prctl(PR_SET_NAME, "ramlock-ctl");
	if (s->injected) {
		/* Not on QEMU's main thread: it takes a lookup in every library of QEMU for each symbol. */
		qemu_init(&s->qemu);
		s->commands.symbols = s->qemu.symbols;
	}
	stepper_open(&s->locker.stepper, "");
	pushed_open(&s->pushed);
	pthread_mutex_lock(&s->binding);
	if (!s->leaving)
		err = control_bind(&s->control, warn); /* without a socket a launch guarantee still holds */
	pthread_mutex_unlock(&s->binding);
	s->halted = true;
	if (!err || !s->injected) {
		err = start_thread(locker_run, &s->locker, &s->lock_thread);
		s->halted = err;
		if (err)
			warn("cannot start the lock thread: %s; this VM has no guarantee", strerror(-err));
	}
	if (err) {
		eject(s); /* what cannot be reached, or cannot work, is not to stay: so that it can be injected again */
		return NULL;
	}
	do {
		int pause = find_ram(s);

		if (s->commands.eject && (pause < 0 || pause > LOOK_AGAIN_MAX_MS))
			pause = LOOK_AGAIN_MAX_MS;
		control_wait(&s->control, pause);
		commands_events(&s->commands, control_event, &s->control);
	} while (!may_leave(s));
	/* What was handed over is in the reply alone: let it go out. */
	for (int64_t until = now_ms() + DRAIN_MS; !control_drained(&s->control) && now_ms() < until;)
		control_wait(&s->control, LOOK_AGAIN_MIN_MS);
	eject(s);
	return NULL;
}

/* ---- Entry, on QEMU's main thread: before main(), or in a ppoll() of its that was interrupted ---- */

static int start(struct shim *s)
{
	pthread_condattr_t attr;
	Dl_info self;
	int err;

	pthread_mutex_init(&s->binding, NULL);
	pthread_mutex_init(&s->looking, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&s->looked, &attr);
	pthread_condattr_destroy(&attr);
	s->begun = s->halted = false;
	s->polls = 0;
	s->look_at_ms = 0;
	s->pause_ms = LOOK_AGAIN_MIN_MS;
	atomic_store(&s->dirty, false);
	atomic_store(&s->scheduled, false);
	atomic_store(&s->known, false);
	atomic_store(&s->may_change, false);
	locker_init(&s->locker, locker_news, s);
	s->locker.look = before_plan;
	s->locker.refresh = look_and_wait;
	pushed_init(&s->pushed);
	memset(&s->commands, 0, sizeof(s->commands));
	s->commands.locker = &s->locker;
	s->commands.symbols = s->qemu.symbols;
	s->commands.look_now = look_now;
	s->commands.push = push;
	s->commands.halt = halt;
	s->commands.opaque = s;
	s->commands.injected = s->injected;
	s->commands.started_ns = &s->started_ns;
	s->commands.base = dladdr(s, &self) ? (uint64_t)(uintptr_t)self.dli_fbase : 0;
	s->server = (struct qmp_server){ commands_run, &s->commands };
	atomic_store(&s->active, true);
	err = control_init(&s->control, &s->config, &s->server);
	if (!err)
		err = start_thread(control_run, s, NULL);
	if (err) {
		control_deinit(&s->control);
		atomic_store(&s->active, false);
		warn("cannot start: %s; this VM has no guarantee", strerror(-err));
	}
	return err;
}

static void after_fork_in_child(void)
{
	struct shim *s = &shim;

	if (!atomic_exchange(&s->active, false))
		return;
	/* The threads, and what they were about, stayed with the parent. */
	s->control.owner = 0;
	if (s->forks < ANCESTORS_MAX)
		s->control.ancestors[s->forks] = getppid();
	s->forks++;
	if (s->qemu.symbols ? qemu_has_main_loop() : !s->daemonizes || s->forks > 2)
		return;
	stepper_deinit(&s->locker.stepper);
	pushed_deinit(&s->pushed);
	control_deinit(&s->control);
	start(s);
}

static const char *base_name(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

/* Takes this object's own entry out of LD_PRELOAD, so that QEMU's helpers start without it. */
static void leave_preload(void)
{
	const char *list = getenv("LD_PRELOAD");
	char *rest, *copy, *save, *entry;
	Dl_info self;

	if (!list || !dladdr(&shim, &self))
		return;
	rest = calloc(1, strlen(list) + 1);
	copy = strdup(list);
	for (entry = rest && copy ? strtok_r(copy, ": ", &save) : NULL; entry; entry = strtok_r(NULL, ": ", &save)) {
		if (!strcmp(base_name(entry), base_name(self.dli_fname)))
			continue;
		if (*rest)
			strcat(rest, ":");
		strcat(rest, entry);
	}
	if (rest && copy && *rest)
		setenv("LD_PRELOAD", rest, 1);
	else if (rest && copy)
		unsetenv("LD_PRELOAD");
	free(copy);
	free(rest);
}

/* Whether this process has all of glibc's libraries that the shim needs. Those are weak, see glibc.h. */
static bool has_libraries(void)
{
	return dladdr && dlsym && pthread_attr_setstacksize && pthread_condattr_setclock && pthread_create && pthread_join &&
	       pthread_sigmask;
}

/* Whether LD_PRELOAD names this object, so that its constructor is the one to start it. */
static bool is_preloaded(void)
{
	const char *list = getenv("LD_PRELOAD");
	Dl_info self;

	return list && dladdr(&shim, &self) && strstr(list, base_name(self.dli_fname));
}

__attribute__((constructor)) static void enter(void)
{
	struct shim *s = &shim;

	if (!has_libraries() || !is_preloaded())
		return; /* ramlock_start() will come */
	qemu_init(&s->qemu);
	if (!s->qemu.emulator)
		return;
	s->has_stderr = fcntl(STDERR_FILENO, F_GETFD) >= 0;
	leave_preload();
	s->daemonizes = qemu_daemonizes();
	config_from_environment(&s->config, warn);
	if (pthread_atfork(NULL, NULL, after_fork_in_child)) {
		warn("cannot follow forks: this VM has no guarantee");
		return;
	}
	start(s);
}

/*
 * Starts an injected shim; @config is lines of RAMLOCK_NAME=VALUE. The trampoline calls it on QEMU's main thread, in a
 * ppoll() that was interrupted, perhaps under the big lock: it touches nothing of QEMU and never waits.
 * Returns 0, -EALREADY when this object serves the process already, or -errno.
 */
__attribute__((visibility("default"))) int ramlock_start(const char *config);

__attribute__((visibility("default"))) int ramlock_start(const char *config)
{
	static bool follows_forks;
	struct shim *s = &shim;
	int err;

	if (atomic_load(&s->active))
		return -EALREADY;
	if (!has_libraries())
		return -ENOSYS;
	config_from_text(&s->config, config, warn);
	if (!follows_forks && pthread_atfork(NULL, NULL, after_fork_in_child))
		return -ENOMEM;
	follows_forks = true;
	s->injected = true;
	s->started_ns = 0;
	err = start(s);
	s->started_ns = now_ns();
	return err;
}

__attribute__((destructor)) static void leave(void)
{
	struct shim *s = &shim;

	if (!atomic_load(&s->active))
		return;
	pthread_mutex_lock(&s->binding);
	s->leaving = true;
	control_unlink(&s->control);
	pthread_mutex_unlock(&s->binding);
}
