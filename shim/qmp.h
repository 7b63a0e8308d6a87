/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One QMP session: bytes in, bytes out. Knows no socket and no command. */
#ifndef RAMLOCK_QMP_H
#define RAMLOCK_QMP_H

#include <stdbool.h>
#include <stddef.h>

#include "framing.h"
#include "json.h"

enum {
	QMP_REQUEST_MAX = 64 << 10, /* bytes of one request, spaces between its tokens not counted */
	QMP_LONG_MAX = 128 << 10, /* ... of `long_command` */
	QMP_DEPTH_MAX = 32, /* levels of nesting */
	QMP_OUTPUT_MAX = 1 << 20, /* bytes that may wait for a slow reader */
};

/* What a command came to: a value to return, or an error. */
struct qmp_reply {
	struct json_object *value; /* NULL: an error */
	const char *error_class; /* NULL: GenericError */
	char desc[1024];
};

struct qmp_server {
	/* Runs @command; @arguments is an object, never NULL. */
	void (*run)(void *opaque, const char *command, struct json_object *arguments, struct qmp_reply *reply);
	void *opaque;
	const char *long_command; /* the one whose request may have QMP_LONG_MAX bytes; NULL: none */
};

struct qmp {
	const struct qmp_server *server;
	struct framing in; /* the request so far */
	struct json_text out; /* bytes for the peer */
	bool negotiated; /* qmp_capabilities was executed */
};

/* Returns 0, or -ENOMEM. The session begins with the greeting in `out`. */
int qmp_init(struct qmp *q, const struct qmp_server *server);
void qmp_deinit(struct qmp *q);

/* Takes bytes from the peer, runs what is complete and appends the replies. Returns 0, or -ENOBUFS or -ENOMEM: drop it. */
int qmp_feed(struct qmp *q, const char *data, size_t size);

/* Appends an event, when the session is negotiated. Takes over @data. Returns as qmp_feed(). */
int qmp_event(struct qmp *q, const char *name, struct json_object *data);

/* The first @n bytes of `out` have been sent. */
void qmp_sent(struct qmp *q, size_t n);

/* {"qemu": {"major", "minor", "micro"}, "package"}, as in the greeting. */
struct json_object *qmp_version(void);

/* Makes @reply an error. */
__attribute__((format(printf, 3, 4))) void qmp_fail(struct qmp_reply *reply, const char *error_class, const char *fmt,
						     ...);

#endif
