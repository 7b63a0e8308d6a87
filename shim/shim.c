/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Entry of the shim, and the thread that everything but locking happens on.
 *
 * Theory of operation: the dynamic loader runs enter() before QEMU's main(). In anything that is not a QEMU system
 * emulator nothing happens. Otherwise the control thread is started, which binds the control socket while the process
 * has the rights that it was started with (-runas and -chroot come later), starts the lock thread, and waits for
 * QEMU's main loop to exist; touching QEMU before that kills the VM. Then it finds guest RAM, see look.c.
 *
 * On QEMU's own threads runs only what is below "Entry" here, and "On QEMU's main thread" in look.c.
 *
 * -daemonize forks twice after enter(), and threads do not survive a fork. after_fork_in_child() starts them again,
 * but only where QEMU was not initialised at the fork: later forks are helpers that will exec.
 *
 * The threads block all signals, because QEMU relies on signals that are directed at its own threads, and never fork
 * or exec, for which QEMU's sandbox would kill the process.
 */
#include "shim.h"

#include "clock.h"
#include "discards.h"
#include "follow.h"
#include "monitor.h"

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
	DRAIN_MS = 5000, /* the longest that a leaving shim waits for a client to read its replies */
	STACK_BYTES = 256 << 10, /* with -overcommit mem-lock=on all of it gets locked */
};

static struct shim shim;

/*
 * Where QEMU was started without standard error, descriptor 2 is something of its own by now, perhaps a disk. A reader that has gone must not end QEMU, which ignores SIGPIPE only later.
 */
void shim_warn(const char *fmt, ...)
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

/* ---- The control thread ---- */

/* The lock thread has news. Called with the locker's mutex held. */
static void locker_news(void *opaque)
{
	control_poke(&((struct shim *)opaque)->control);
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
	monitor_want(NULL);
	/* Twice, as a look may be under way that is past this. If QEMU's main loop is too busy now, it takes the commands away later. */
	for (int i = 0; i < 2 && monitor_is_offered(); i++)
		look_and_wait(s);
	discards_unfollow();
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
		s->commands.symbols = s->monitor_commands.symbols = s->qemu.symbols;
	}
	stepper_open(&s->locker.stepper, "");
	pushed_open(&s->pushed);
	s->locker.maps = s->pushed.maps;
	if (s->injected && s->config.monitor)
		monitor_want(&s->monitor_server); /* from here on commands may run, if a former shim's are still there */
	pthread_mutex_lock(&s->binding);
	if (!s->leaving)
		err = control_bind(&s->control, shim_warn); /* without a socket a launch guarantee still holds */
	pthread_mutex_unlock(&s->binding);
	s->halted = true;
	if (!err || !s->injected) {
		err = start_thread(locker_run, &s->locker, &s->lock_thread);
		s->halted = err;
		if (err)
			shim_warn("cannot start the lock thread: %s; this VM has no guarantee", strerror(-err));
	}
	if (err) {
		eject(s); /* what cannot be reached, or cannot work, is not to stay: so that it can be injected again */
		return NULL;
	}
	do {
		int pause = look_when_due(s);

		if (s->commands.eject && (pause < 0 || pause > LOOK_AGAIN_MAX_MS))
			pause = LOOK_AGAIN_MAX_MS;
		control_wait(&s->control, pause);
		follow_wake(&s->locker);
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
	Dl_info self;
	int err;

	pthread_mutex_init(&s->binding, NULL);
	look_init(s);
	s->halted = false;
	/*
	 * Half a megabyte, which QEMU's main thread would wait for: the first time it is zeroes that nobody has touched.
	 */
	if (s->used) {
		memset(&s->locker, 0, sizeof(s->locker));
		memset(&s->pushed, 0, sizeof(s->pushed));
		memset(&s->commands, 0, sizeof(s->commands));
		memset(&s->monitor_commands, 0, sizeof(s->monitor_commands));
	}
	s->used = true;
	locker_init(&s->locker, locker_news, s);
	s->locker.look = look_before_plan;
	s->locker.refresh = look_and_wait;
	s->locker.discarded = look_gave_back;
	atomic_store(&s->locker.follows, s->config.follow_discards);
	pushed_init(&s->pushed);
	s->commands.locker = &s->locker;
	s->commands.symbols = s->qemu.symbols;
	s->commands.look_now = look_now;
	s->commands.push = look_push;
	s->commands.halt = halt;
	s->commands.opaque = s;
	s->commands.injected = s->injected;
	s->commands.started_ns = &s->started_ns;
	s->commands.base = dladdr(s, &self) ? (uint64_t)(uintptr_t)self.dli_fbase : 0;
	s->commands.monitor = &s->monitor_server;
	s->server = (struct qmp_server){ commands_run, &s->commands, COMMANDS_LONGEST };
	s->monitor_commands.locker = &s->locker;
	s->monitor_commands.symbols = s->qemu.symbols;
	s->monitor_commands.look_now = look_at_once;
	s->monitor_commands.opaque = s;
	s->monitor_commands.at_once = true;
	s->monitor_server = (struct qmp_server){ commands_run, &s->monitor_commands, COMMANDS_LONGEST };
	atomic_store(&s->active, true);
	err = control_init(&s->control, &s->config, &s->server);
	if (!err)
		err = start_thread(control_run, s, NULL);
	if (err) {
		control_deinit(&s->control);
		atomic_store(&s->active, false);
		shim_warn("cannot start: %s; this VM has no guarantee", strerror(-err));
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
	config_from_environment(&s->config, shim_warn);
	if (s->config.monitor && monitor_want(&s->monitor_server) == -ENOSYS)
		shim_warn("this QEMU does not export its monitor: RAMLOCK_MONITOR has no effect there");
	if (pthread_atfork(NULL, NULL, after_fork_in_child)) {
		shim_warn("cannot follow forks: this VM has no guarantee");
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
	config_from_text(&s->config, config, shim_warn);
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
