/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The control socket.
 *
 * Theory of operation: one thread, epoll, no blocking call but epoll_wait(). A session's input is read 4 KiB at a time,
 * so that no client can keep the others waiting; its output is bounded by qmp.c, and a client that exceeds it is dropped.
 *
 * Who may connect is decided by SO_PEERCRED, the kernel's word; the file's mode is the first of the two doors.
 */
#include "control.h"

#include "clock.h"
#include "fd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 16, PAUSE_MS = 500 };

/* ---- The socket's file ---- */

/* Makes @dir if need be, and checks that nobody else can put a socket there. Returns 0 or -errno. */
static int prepare_directory(const char *dir, mode_t mode)
{
	struct stat st;

	if (mkdir(dir, mode)) {
		if (errno != EEXIST)
			return -errno;
	} else if (chmod(dir, mode)) { /* mkdir() obeys the umask */
		return -errno;
	}
	if (lstat(dir, &st))
		return -errno;
	if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & (S_IWGRP | S_IWOTH)))
		return -EPERM;
	return 0;
}

/* Whether somebody listens at @address; with his pid, as far as we can see it. */
static bool is_alive(const struct sockaddr_un *address, pid_t *listener)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	struct ucred peer = { .pid = 0 };
	socklen_t size = sizeof(peer);
	bool alive = true; /* when in doubt, take nothing away */

	*listener = 0;
	if (fd < 0)
		return alive;
	if (!connect(fd, (const struct sockaddr *)address, sizeof(*address))) {
		if (!getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size))
			*listener = peer.pid;
	} else {
		alive = errno != ECONNREFUSED;
	}
	close(fd);
	return alive;
}

/* Removes a socket that nobody listens to any more, or only a process that became us. Returns whether it did. */
static bool remove_stale(const struct sockaddr_un *address, const pid_t ancestors[ANCESTORS_MAX])
{
	struct stat st;
	pid_t listener;

	if (lstat(address->sun_path, &st) || !S_ISSOCK(st.st_mode))
		return false;
	if (is_alive(address, &listener)) {
		bool ours = false;

		for (size_t i = 0; i < ANCESTORS_MAX; i++)
			ours |= listener && listener == ancestors[i];
		if (!ours)
			return false;
	}
	return !unlink(address->sun_path);
}

/* Removes what processes left that were killed, or that lost the right to remove it (-runas, -chroot). */
static void sweep(const char *dir)
{
	static const pid_t none[ANCESTORS_MAX];
	DIR *d = opendir(dir);
	struct dirent *entry;

	while (d && (entry = readdir(d))) {
		struct sockaddr_un address = { .sun_family = AF_UNIX };
		char *end;
		long pid = strtol(entry->d_name, &end, 10);
		int n = snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s", dir, entry->d_name);

		if (pid > 0 && !strcmp(end, ".sock") && n > 0 && (size_t)n < sizeof(address.sun_path) &&
		    kill((pid_t)pid, 0) && errno == ESRCH)
			remove_stale(&address, none);
	}
	if (d)
		closedir(d);
}

/* The usual place: docs/protocol.md, "Where the socket is". */
static int usual_path(char *path, size_t size)
{
	const char *runtime = getenv("XDG_RUNTIME_DIR");
	char dir[PATH_MAX];
	struct stat st;
	mode_t mode = 0700;
	int err, n;

	if (geteuid() == 0) {
		snprintf(dir, sizeof(dir), "/run/ramlock");
		mode = 0755;
	} else if (runtime && *runtime == '/') {
		snprintf(dir, sizeof(dir), "%s/ramlock", runtime);
	} else {
		snprintf(dir, sizeof(dir), "/run/user/%u", (unsigned int)geteuid());
		if (!stat(dir, &st) && st.st_uid == geteuid())
			snprintf(dir, sizeof(dir), "/run/user/%u/ramlock", (unsigned int)geteuid());
		else
			snprintf(dir, sizeof(dir), "/tmp/ramlock-%u", (unsigned int)geteuid());
	}
	n = snprintf(path, size, "%s/%d.sock", dir, (int)getpid());
	if (n < 0 || (size_t)n >= size)
		return -ENAMETOOLONG;
	err = prepare_directory(dir, mode);
	if (!err)
		sweep(dir);
	return err;
}

static int bind_listener(struct control *c)
{
	const struct sockaddr *address = (const struct sockaddr *)&c->address;

	c->listener = fd_above_stdio(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
	if (c->listener < 0)
		return -errno;
	/* bind() gives the file the mode of the socket less the umask: at no time is it open to others. */
	if (fchmod(c->listener, 0600))
		return -errno;
	if (bind(c->listener, address, sizeof(c->address)) &&
	    (errno != EADDRINUSE || !remove_stale(&c->address, c->ancestors) || bind(c->listener, address, sizeof(c->address))))
		return -errno;
	/*
	 * Listening at once, though nobody is served before QEMU is up: a socket that does not listen looks as if it were left
	 * over, and another VM that was given the same path would take it.
	 */
	if (listen(c->listener, BACKLOG))
		return -errno;
	if (c->config->has_allow_uid && chmod(c->address.sun_path, 0666))
		return -errno;
	return lstat(c->address.sun_path, &c->file) ? -errno : 0;
}

/* Whether bind() has worked, though something after it has not. */
static bool is_bound(const struct control *c)
{
	struct sockaddr_un name = { 0 };
	socklen_t size = sizeof(name);

	return !getsockname(c->listener, (struct sockaddr *)&name, &size) && name.sun_path[0];
}

int control_bind(struct control *c, void (*warn)(const char *fmt, ...))
{
	int err = 0;

	c->address.sun_family = AF_UNIX;
	if (c->config->socket[0])
		strcpy(c->address.sun_path, c->config->socket);
	else
		err = usual_path(c->address.sun_path, sizeof(c->address.sun_path));
	if (!err)
		err = bind_listener(c);
	if (err) {
		warn("no control socket at '%s': %s", c->address.sun_path, strerror(-err));
		if (err != -EADDRINUSE && c->listener >= 0 && is_bound(c))
			unlink(c->address.sun_path);
		fd_close(c->listener);
		c->listener = -1;
		return err;
	}
	c->owner = getpid();
	return 0;
}

static bool is_ours(const struct control *c)
{
	struct stat st;

	return !lstat(c->address.sun_path, &st) && st.st_dev == c->file.st_dev && st.st_ino == c->file.st_ino &&
	       st.st_ctim.tv_sec == c->file.st_ctim.tv_sec && st.st_ctim.tv_nsec == c->file.st_ctim.tv_nsec;
}

void control_unlink(struct control *c)
{
	if (c->owner == getpid() && is_ours(c))
		unlink(c->address.sun_path);
	c->owner = 0;
}

/* ---- The loop ---- */

int control_init(struct control *c, const struct config *config, const struct qmp_server *server)
{
	struct epoll_event ev = { .events = EPOLLIN };
	pid_t ancestors[ANCESTORS_MAX];

	memcpy(ancestors, c->ancestors, sizeof(ancestors));
	memset(c, 0, sizeof(*c));
	memcpy(c->ancestors, ancestors, sizeof(ancestors));
	c->config = config;
	c->server = server;
	c->listener = -1;
	for (size_t i = 0; i < CLIENTS_MAX; i++)
		c->clients[i].fd = -1;
	c->epoll = fd_above_stdio(epoll_create1(EPOLL_CLOEXEC));
	c->wake = fd_above_stdio(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	ev.data.ptr = &c->wake;
	if (c->epoll < 0 || c->wake < 0 || epoll_ctl(c->epoll, EPOLL_CTL_ADD, c->wake, &ev))
		return -errno;
	return 0;
}

void control_deinit(struct control *c)
{
	for (size_t i = 0; i < CLIENTS_MAX; i++)
		if (c->clients[i].fd >= 0) {
			close(c->clients[i].fd);
			qmp_deinit(&c->clients[i].qmp);
		}
	fd_close(c->listener);
	fd_close(c->wake);
	fd_close(c->epoll);
	c->listener = c->wake = c->epoll = -1;
}

/* Takes new clients, or none for a while. */
static int watch_listener(struct control *c, bool on)
{
	struct epoll_event ev = { .events = on ? EPOLLIN : 0, .data.ptr = &c->listener };

	return epoll_ctl(c->epoll, EPOLL_CTL_MOD, c->listener, &ev) ? -errno : 0;
}

int control_listen(struct control *c)
{
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = &c->listener };

	if (c->listener < 0)
		return -EBADF;
	if (c->listening)
		return 0;
	if (epoll_ctl(c->epoll, EPOLL_CTL_ADD, c->listener, &ev))
		return -errno;
	c->listening = true;
	return 0;
}

bool control_drained(const struct control *c)
{
	for (size_t i = 0; i < CLIENTS_MAX; i++)
		if (c->clients[i].fd >= 0 && c->clients[i].qmp.out.size)
			return false;
	return true;
}

void control_poke(struct control *c)
{
	static const uint64_t one = 1;

	/* A full counter means that it has been poked already. */
	if (write(c->wake, &one, sizeof(one)) < 0)
		return;
}

static void drop(struct control *c, struct client *client)
{
	close(client->fd); /* which leaves epoll too */
	client->fd = -1;
	qmp_deinit(&client->qmp);
	if (c->paused) {
		c->paused = false;
		watch_listener(c, true);
	}
}

/* Sends what can be sent now. Returns false when the client is gone. */
static bool flush(struct control *c, struct client *client)
{
	struct epoll_event ev = { .data.ptr = client };
	bool writing;

	while (client->qmp.out.size) {
		ssize_t n = send(client->fd, client->qmp.out.data, client->qmp.out.size, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			break;
		if (n < 0) {
			drop(c, client);
			return false;
		}
		qmp_sent(&client->qmp, (size_t)n);
	}
	writing = client->qmp.out.size;
	if (!writing && client->ended) {
		drop(c, client);
		return false;
	}
	if (writing == client->writing && !client->ended)
		return true;
	client->writing = writing;
	ev.events = (client->ended ? 0 : EPOLLIN) | (writing ? EPOLLOUT : 0);
	epoll_ctl(c->epoll, EPOLL_CTL_MOD, client->fd, &ev);
	return true;
}

/* Whether the peer may connect, by the kernel's word. */
static bool may_connect(const struct config *config, int fd, bool *privileged)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size))
		return false;
	*privileged = peer.uid == 0 || peer.uid == config->owner;
	return *privileged || (config->has_allow_uid && peer.uid == config->allow_uid);
}

/*
 * A place for a new client. Some are kept for those who own the VM; and where all are taken, such a one gets the place
 * of whoever has been silent for the longest time, so that nobody can lock them out.
 */
static struct client *find_place(struct control *c, bool privileged)
{
	struct client *silent = NULL, *place = NULL;
	size_t n_free = 0;

	for (size_t i = 0; i < CLIENTS_MAX; i++) {
		struct client *client = &c->clients[i];

		if (client->fd < 0) {
			n_free++;
			place = client;
		} else if (!silent || client->heard_ms < silent->heard_ms) {
			silent = client;
		}
	}
	if (!privileged)
		return n_free > CLIENTS_RESERVED ? place : NULL;
	if (!place) {
		drop(c, silent);
		place = silent;
	}
	return place;
}

static void accept_client(struct control *c)
{
	static const char full[] = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"too many clients\"}}\r\n";
	struct epoll_event ev = { .events = EPOLLIN };
	struct client *client;
	bool privileged;
	int fd = fd_above_stdio(accept4(c->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK));

	if (fd < 0) {
		if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
			/* It stays readable: do not spin, but try again when a client has gone, or after a while. */
			c->paused = true;
			c->resume_ms = now_ms() + PAUSE_MS;
			watch_listener(c, false);
		}
		return;
	}
	if (!may_connect(c->config, fd, &privileged)) {
		close(fd);
		return;
	}
	client = find_place(c, privileged);
	if (!client) {
		send(fd, full, sizeof(full) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		close(fd);
		return;
	}
	*client = (struct client){ .fd = fd, .heard_ms = now_ms() };
	ev.data.ptr = client;
	if (epoll_ctl(c->epoll, EPOLL_CTL_ADD, fd, &ev) || qmp_init(&client->qmp, c->server)) {
		drop(c, client);
		return;
	}
	flush(c, client);
}

static void read_client(struct control *c, struct client *client)
{
	char data[4096];
	ssize_t n = recv(client->fd, data, sizeof(data), MSG_DONTWAIT);

	if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK))
		return;
	if (n < 0 || (n > 0 && qmp_feed(&client->qmp, data, (size_t)n))) {
		drop(c, client);
		return;
	}
	client->ended = n == 0;
	client->heard_ms = now_ms();
	flush(c, client);
}

static void serve(struct control *c, struct client *client, uint32_t events)
{
	if (client->fd < 0)
		return; /* dropped earlier in this round */
	if (events & EPOLLIN)
		read_client(c, client);
	else if (events & (EPOLLHUP | EPOLLERR))
		drop(c, client);
	else if (events & EPOLLOUT)
		flush(c, client);
}

void control_wait(struct control *c, int timeout_ms)
{
	struct epoll_event ready[CLIENTS_MAX + 2];
	bool knocked = false;
	uint64_t count;
	int n;

	if (c->paused && (timeout_ms < 0 || timeout_ms > PAUSE_MS))
		timeout_ms = PAUSE_MS;
	n = epoll_wait(c->epoll, ready, CLIENTS_MAX + 2, timeout_ms);
	if (n < 0 && errno != EINTR)
		usleep(PAUSE_MS * 1000); /* cannot be; but do not spin in somebody's VM */
	if (c->paused && now_ms() >= c->resume_ms) {
		c->paused = false;
		watch_listener(c, true);
	}
	for (int i = 0; i < n; i++) {
		if (ready[i].data.ptr == &c->wake) {
			if (read(c->wake, &count, sizeof(count)) < 0)
				continue;
		} else if (ready[i].data.ptr == &c->listener) {
			knocked = true;
		} else {
			serve(c, ready[i].data.ptr, ready[i].events);
		}
	}
	/* Last: it may take the place of a client that there are events for in this round, which are not the new one's. */
	if (knocked)
		accept_client(c);
}

void control_event(void *opaque, const char *name, struct json_object *data)
{
	struct control *c = opaque;

	for (size_t i = 0; i < CLIENTS_MAX; i++) {
		struct client *client = &c->clients[i];

		if (client->fd < 0)
			continue;
		if (qmp_event(&client->qmp, name, json_object_get(data)))
			drop(c, client);
		else
			flush(c, client);
	}
	json_object_put(data);
}
