/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The control socket over real sockets, served by a real thread. */
#include "check.h"
#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static struct config config;
static struct control control;
static atomic_bool stop;
static pthread_t thread;
static char dir[64];
static char warning[512];

static void note(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(warning, sizeof(warning), fmt, ap);
	va_end(ap);
}

static void run(void *opaque, const char *command, struct json_object *arguments, struct qmp_reply *reply)
{
	(void)opaque, (void)command;
	reply->value = json_object_get(arguments);
}

static const struct qmp_server server = { run, NULL, NULL };

static void *serve(void *arg)
{
	(void)arg;
	while (!atomic_load(&stop))
		control_wait(&control, -1);
	return NULL;
}

static void configure(const char *name)
{
	memset(&config, 0, sizeof(config));
	config.owner = getuid();
	snprintf(config.socket, sizeof(config.socket), "%s/%s", dir, name);
}

static void begin(void)
{
	snprintf(dir, sizeof(dir), "/tmp/ramlock-test-XXXXXX");
	CHECK(mkdtemp(dir));
	configure("socket");
	CHECK_EQ(control_init(&control, &config, &server), 0);
	CHECK_EQ(control_bind(&control, note), 0);
	CHECK_EQ(control_listen(&control), 0);
	atomic_store(&stop, false);
	if (pthread_create(&thread, NULL, serve, NULL))
		abort();
}

static void end(void)
{
	atomic_store(&stop, true);
	control_poke(&control);
	pthread_join(thread, NULL);
	control_unlink(&control);
	control_deinit(&control);
	CHECK_EQ(rmdir(dir), 0); /* nothing is left behind */
}

static int connect_to(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval deadline = { .tv_sec = 10 };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		close(fd);
		return -1;
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof(deadline));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &deadline, sizeof(deadline));
	return fd;
}

/* Reads one line; empty at the end of the file, or when nothing comes for 10 s. */
static const char *read_line(int fd)
{
	static char line[4096];
	size_t n = 0;

	while (n < sizeof(line) - 1 && recv(fd, line + n, 1, 0) == 1)
		if (line[n++] == '\n')
			break;
	line[n] = '\0';
	return line;
}

static void say(int fd, const char *text)
{
	CHECK_EQ(send(fd, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

static int negotiate(void)
{
	int fd = connect_to(config.socket);

	CHECK(fd >= 0);
	CHECK_CONTAINS(read_line(fd), "QMP");
	say(fd, "{\"execute\":\"qmp_capabilities\"}");
	CHECK_CONTAINS(read_line(fd), "return");
	return fd;
}

static void the_file_is_private(void)
{
	struct stat st;

	begin();
	CHECK_EQ(lstat(config.socket, &st), 0);
	CHECK_EQ(st.st_mode, S_IFSOCK | 0600);
	end();
}

static void an_allowed_uid_can_reach_it(void)
{
	struct stat st;

	snprintf(dir, sizeof(dir), "/tmp/ramlock-test-XXXXXX");
	CHECK(mkdtemp(dir));
	configure("socket");
	config.has_allow_uid = true;
	config.allow_uid = 12345;
	CHECK_EQ(control_init(&control, &config, &server), 0);
	CHECK_EQ(control_bind(&control, note), 0);
	CHECK_EQ(lstat(config.socket, &st), 0);
	CHECK_EQ(st.st_mode, S_IFSOCK | 0666);
	control_unlink(&control);
	control_deinit(&control);
	CHECK_EQ(rmdir(dir), 0);
}

/* Connects as @uid, in a child, and returns whether a greeting came. */
static bool greeted_as(uid_t uid)
{
	int status;
	pid_t child = fork();

	if (child == 0) {
		int fd = setuid(uid) ? -1 : connect_to(config.socket);

		_exit(fd >= 0 && strstr(read_line(fd), "QMP") ? 0 : 1);
	}
	return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void the_kernel_says_who_may_connect(void)
{
	if (getuid()) {
		fprintf(stderr, "skipped: only root can connect as others\n");
		return;
	}
	begin();
	CHECK_EQ(chmod(dir, 0755), 0);
	CHECK_EQ(chmod(config.socket, 0666), 0); /* the mode alone does not decide */
	CHECK(greeted_as(0));
	CHECK(!greeted_as(12345));
	config.has_allow_uid = true;
	config.allow_uid = 12345;
	CHECK(greeted_as(12345));
	CHECK(!greeted_as(12346));
	CHECK_EQ(lstat(config.socket, &control.file), 0); /* chmod() changed it: say that it is still ours */
	end();
}

static void guests_cannot_lock_the_owner_out(void)
{
	int fds[CLIENTS_MAX - CLIENTS_RESERVED];

	if (getuid()) {
		fprintf(stderr, "skipped: only root can connect as others\n");
		return;
	}
	begin();
	CHECK_EQ(chmod(dir, 0755), 0);
	CHECK_EQ(chmod(config.socket, 0666), 0);
	CHECK_EQ(lstat(config.socket, &control.file), 0);
	config.has_allow_uid = true;
	config.allow_uid = 12345;
	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		fds[i] = negotiate();
	CHECK(!greeted_as(12345));
	CHECK(greeted_as(0));
	close(fds[0]);
	usleep(50000);
	CHECK(greeted_as(12345));
	for (size_t i = 1; i < sizeof(fds) / sizeof(fds[0]); i++)
		close(fds[i]);
	end();
}

static void many_clients_at_once(void)
{
	int fds[CLIENTS_MAX], extra;

	begin();
	for (size_t i = 0; i < CLIENTS_MAX; i++)
		fds[i] = negotiate();
	for (size_t i = CLIENTS_MAX; i-- > 0;) {
		char text[64];

		snprintf(text, sizeof(text), "{\"execute\":\"x\",\"id\":%zu}", i);
		say(fds[i], text);
		snprintf(text, sizeof(text), "\"id\": %zu", i);
		CHECK_CONTAINS(read_line(fds[i]), text);
		usleep(2000);
	}
	/* One more of the VM's owner takes the place of the one that was silent for the longest time. */
	extra = negotiate();
	CHECK_EQ(read_line(fds[CLIENTS_MAX - 1])[0], 0);
	say(fds[0], "{\"execute\":\"x\",\"id\":4711}");
	CHECK_CONTAINS(read_line(fds[0]), "4711");
	close(extra);
	for (size_t i = 0; i < CLIENTS_MAX; i++)
		close(fds[i]);
	for (int i = 0; i < 100; i++) /* places are given back */
		close(negotiate());
	end();
}

/* A process that has no descriptor left: who is connected is served, and others are as soon as there is one. */
static void no_descriptor_left_is_waited_out(void)
{
	struct rlimit former, none;
	int first, fds[64], n = 0, late;

	begin();
	first = negotiate();
	late = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &former), 0);
	none = former;
	none.rlim_cur = (rlim_t)late + 1;
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
	while (n < 64 && (fds[n] = dup(first)) >= 0)
		n++;
	CHECK(n < 64);
	{
		struct sockaddr_un address = { .sun_family = AF_UNIX };
		struct timeval deadline = { .tv_sec = 10 };

		snprintf(address.sun_path, sizeof(address.sun_path), "%s", config.socket);
		CHECK_EQ(connect(late, (struct sockaddr *)&address, sizeof(address)), 0);
		setsockopt(late, SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof(deadline));
	}
	for (int i = 0; i < 3; i++) {
		say(first, "{\"execute\":\"x\",\"id\":5}");
		CHECK_CONTAINS(read_line(first), "\"id\": 5");
		usleep(10000);
	}
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &former), 0);
	CHECK_CONTAINS(read_line(late), "QMP");
	while (n--)
		close(fds[n]);
	close(late);
	close(first);
	end();
}

/* Many that begin a request and never end it, each as long as it may be: bounded, and nobody else waits. */
static void requests_without_end_are_bounded(void)
{
	static char text[QMP_LONG_MAX * 2];
	int fds[CLIENTS_MAX - 1], other;

	begin();
	memset(text, 'x', sizeof(text));
	memcpy(text, "{\"execute\":\"", 12);
	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		fds[i] = negotiate();
		CHECK_EQ(send(fds[i], text, sizeof(text), MSG_NOSIGNAL), sizeof(text));
	}
	other = negotiate();
	say(other, "{\"execute\":\"x\",\"id\":5}");
	CHECK_CONTAINS(read_line(other), "\"id\": 5");
	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		CHECK_CONTAINS(read_line(fds[i]), "limit exceeded");
		say(fds[i], "\xff{\"execute\":\"x\",\"id\":6}");
		CHECK_CONTAINS(read_line(fds[i]), "stray");
		CHECK_CONTAINS(read_line(fds[i]), "\"id\": 6");
		close(fds[i]);
	}
	close(other);
	end();
}

static void replies_come_after_the_end_of_file(void)
{
	int fd;

	begin();
	fd = connect_to(config.socket);
	say(fd, "{\"execute\":\"qmp_capabilities\"}{\"execute\":\"a\",\"id\":1}{\"execute\":\"b\",\"id\":2}");
	shutdown(fd, SHUT_WR);
	CHECK_CONTAINS(read_line(fd), "QMP");
	CHECK_CONTAINS(read_line(fd), "return");
	CHECK_CONTAINS(read_line(fd), "\"id\": 1");
	CHECK_CONTAINS(read_line(fd), "\"id\": 2");
	CHECK_EQ(read_line(fd)[0], 0);
	close(fd);
	end();
}

static void a_client_that_reads_nothing_is_dropped(void)
{
	static const char request[] = "{\"execute\":\"x\",\"arguments\":{\"pad\":\"pppppppppppppppppppppppppp\"}}";
	int slow, quick;
	bool dropped = false;

	begin();
	slow = negotiate();
	quick = negotiate();
	for (int i = 0; i < 200000 && !dropped; i++) {
		dropped = send(slow, request, sizeof(request) - 1, MSG_NOSIGNAL) < 0;
		if (i % 1000 == 0) {
			say(quick, "{\"execute\":\"x\",\"id\":7}");
			CHECK_CONTAINS(read_line(quick), "\"id\": 7");
		}
	}
	CHECK(dropped);
	say(quick, "{\"execute\":\"x\",\"id\":8}");
	CHECK_CONTAINS(read_line(quick), "\"id\": 8");
	close(slow);
	close(quick);
	end();
}

static void half_a_request_keeps_nobody_waiting(void)
{
	int half, other;

	begin();
	half = negotiate();
	other = negotiate();
	say(half, "{\"execute\":\"x\",\"id\":");
	say(other, "{\"execute\":\"x\",\"id\":5}");
	CHECK_CONTAINS(read_line(other), "\"id\": 5");
	say(half, "6}");
	CHECK_CONTAINS(read_line(half), "\"id\": 6");
	close(half);
	close(other);
	end();
}

static void peers_that_vanish_do_no_harm(void)
{
	begin();
	for (int i = 0; i < 300; i++) {
		int fd = connect_to(config.socket);

		CHECK(fd >= 0);
		if (i % 3)
			send(fd, "{\"execute\":\"qmp_capabilities\"}{\"exec", 37, MSG_NOSIGNAL);
		close(fd);
	}
	close(negotiate());
	end();
}

static void a_stale_socket_is_replaced_but_nothing_else(void)
{
	static struct control other;
	struct stat st;
	int fd;

	begin();
	/* In use: left alone. */
	CHECK_EQ(control_init(&other, &config, &server), 0);
	CHECK_EQ(control_bind(&other, note), -EADDRINUSE);
	CHECK_CONTAINS(warning, "no control socket at");
	close(negotiate());
	control_deinit(&other);

	/* Bound, but nobody listens: what a killed process leaves. */
	end();
	CHECK_EQ(mkdir(dir, 0700), 0);
	CHECK_EQ(control_init(&other, &config, &server), 0);
	CHECK_EQ(control_bind(&other, note), 0);
	control_deinit(&other);
	CHECK_EQ(lstat(config.socket, &st), 0);
	CHECK_EQ(control_init(&control, &config, &server), 0);
	CHECK_EQ(control_bind(&control, note), 0);

	/* The former owner finds another file there, and leaves it. */
	other.owner = getpid();
	control_unlink(&other);
	CHECK_EQ(lstat(config.socket, &st), 0);
	control_unlink(&control);
	CHECK_EQ(lstat(config.socket, &st), -1);
	control_deinit(&control);

	/* Not a socket. */
	fd = open(config.socket, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	close(fd);
	CHECK_EQ(control_init(&control, &config, &server), 0);
	CHECK_EQ(control_bind(&control, note), -EADDRINUSE);
	CHECK_EQ(lstat(config.socket, &st), 0);
	control_deinit(&control);
	unlink(config.socket);
	CHECK_EQ(rmdir(dir), 0);
}

CHECK_MAIN(CASE(the_file_is_private), CASE(an_allowed_uid_can_reach_it), CASE(the_kernel_says_who_may_connect),
	   CASE(many_clients_at_once), CASE(guests_cannot_lock_the_owner_out), CASE(no_descriptor_left_is_waited_out),
	   CASE(requests_without_end_are_bounded), CASE(replies_come_after_the_end_of_file),
	   CASE(a_client_that_reads_nothing_is_dropped), CASE(half_a_request_keeps_nobody_waiting),
	   CASE(peers_that_vanish_do_no_harm), CASE(a_stale_socket_is_replaced_but_nothing_else))
