/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The control socket: a UNIX socket server for several QMP sessions, in one thread. */
#ifndef RAMLOCK_CONTROL_H
#define RAMLOCK_CONTROL_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "config.h"
#include "qmp.h"

struct json_object;

enum {
	CLIENTS_MAX = 16,
	CLIENTS_RESERVED = 2, /* of these, for root and who started QEMU */
	ANCESTORS_MAX = 2, /* -daemonize forks twice */
};

struct client {
	int fd; /* -1: free */
	bool ended; /* the peer sends no more; close when its replies are out */
	bool writing; /* registered for EPOLLOUT */
	int64_t heard_ms; /* now_ms() of its last byte */
	struct qmp qmp;
};

struct control {
	const struct config *config;
	const struct qmp_server *server;
	int epoll;
	int wake; /* eventfd: another thread has news */
	int listener;
	bool listening, paused;
	int64_t resume_ms; /* when a paused listener is tried again */
	struct sockaddr_un address; /* of `listener`; empty path: not bound */
	struct stat file; /* what bind() made at `address` */
	pid_t owner; /* the process that bound it, and may remove it */
	pid_t ancestors[ANCESTORS_MAX]; /* processes that were this one before -daemonize: their sockets may be taken over */
	struct client clients[CLIENTS_MAX];
};

/* Creates what needs no path. Returns 0 or -errno. */
int control_init(struct control *c, const struct config *config, const struct qmp_server *server);

/* Closes everything, but leaves the socket's file to control_unlink(). For a fork's child. */
void control_deinit(struct control *c);

/*
 * Binds the socket and lets clients queue, while the process has the rights that it was started with. A socket there that
 * nobody listens to, or only an ancestor, is replaced. Returns 0 or -errno, with @warn told.
 */
int control_bind(struct control *c, void (*warn)(const char *fmt, ...));

/* Serves clients from now on. Returns 0 or -errno. */
int control_listen(struct control *c);

/* Removes the socket's file if this process made it and it is still the same. */
void control_unlink(struct control *c);

/* Whether all that was said to clients has been sent. */
bool control_drained(const struct control *c);

/* Makes control_wait() return. Any thread, and also QEMU's: it only writes to an eventfd. */
void control_poke(struct control *c);

/* Serves clients until poked or for @timeout_ms (-1: no limit). */
void control_wait(struct control *c, int timeout_ms);

/* Sends an event to every client that has negotiated. Takes over @data. @opaque is the struct control. */
void control_event(void *opaque, const char *name, struct json_object *data);

#endif
