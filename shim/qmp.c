/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One QMP session (https://www.qemu.org/docs/master/interop/qmp-spec.html): bytes in, bytes out.
 *
 * What is not said there, such as the words of errors and where input goes on after garbage, is as in QEMU's own monitor; the
 * tests hold the same conversations with both.
 */
#include "qmp.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { KEPT_MAX = 64 << 10 };

void qmp_fail(struct qmp_reply *reply, const char *error_class, const char *fmt, ...)
{
	va_list ap;

	reply->value = NULL;
	reply->error_class = error_class;
	va_start(ap, fmt);
	vsnprintf(reply->desc, sizeof(reply->desc), fmt, ap);
	va_end(ap);
}

struct json_object *qmp_version(void)
{
	struct json_object *version = json_object_new_object(), *numbers = json_object_new_object();
	int v[3] = { 0 };

	sscanf(RAMLOCK_VERSION, "%d.%d.%d", &v[0], &v[1], &v[2]);
	json_object_object_add(numbers, "major", json_object_new_int(v[0]));
	json_object_object_add(numbers, "minor", json_object_new_int(v[1]));
	json_object_object_add(numbers, "micro", json_object_new_int(v[2]));
	json_object_object_add(version, "qemu", numbers);
	json_object_object_add(version, "package", json_object_new_string("ramlock " RAMLOCK_VERSION));
	return version;
}

/* ---- Output ---- */

/* Takes over @o. Returns 0, -ENOBUFS or -ENOMEM. */
static int send_object(struct qmp *q, struct json_object *o)
{
	int err = json_write(&q->out, o);

	json_object_put(o);
	return err;
}

/* With the id, where the request has one, before the error as QEMU has it. Takes over @id. */
static int send_error(struct qmp *q, const struct qmp_reply *r, bool has_id, struct json_object *id)
{
	struct json_object *reply = json_object_new_object(), *error = json_object_new_object();

	if (has_id)
		json_object_object_add(reply, "id", id);
	json_object_object_add(error, "class", json_object_new_string(r->error_class ? r->error_class : "GenericError"));
	json_object_object_add(error, "desc", json_object_new_string(r->desc));
	json_object_object_add(reply, "error", error);
	return send_object(q, reply);
}

int qmp_event(struct qmp *q, const char *name, struct json_object *data)
{
	struct json_object *event, *stamp;
	struct timespec now;

	if (!q->negotiated) {
		json_object_put(data);
		return 0;
	}
	clock_gettime(CLOCK_REALTIME, &now);
	stamp = json_object_new_object();
	json_object_object_add(stamp, "seconds", json_object_new_int64(now.tv_sec));
	json_object_object_add(stamp, "microseconds", json_object_new_int64(now.tv_nsec / 1000));
	event = json_object_new_object();
	json_object_object_add(event, "event", json_object_new_string(name));
	json_object_object_add(event, "data", data);
	json_object_object_add(event, "timestamp", stamp);
	return send_object(q, event);
}

void qmp_sent(struct qmp *q, size_t n)
{
	struct json_text *out = &q->out;

	memmove(out->data, out->data + n, out->size - n);
	out->size -= n;
	if (!out->size && out->capacity > KEPT_MAX) { /* it is QEMU's memory */
		free(out->data);
		out->data = NULL;
		out->capacity = 0;
	}
}

/* ---- Input ---- */

int qmp_init(struct qmp *q, const struct qmp_server *server)
{
	struct json_object *greeting = json_object_new_object(), *qmp = json_object_new_object();

	*q = (struct qmp){ .server = server, .out = { .max = QMP_OUTPUT_MAX } };
	json_object_object_add(qmp, "version", qmp_version());
	json_object_object_add(qmp, "capabilities", json_object_new_array());
	json_object_object_add(greeting, "QMP", qmp);
	return send_object(q, greeting);
}

void qmp_deinit(struct qmp *q)
{
	framing_deinit(&q->in);
	free(q->out.data);
	*q = (struct qmp){ 0 };
}

/* Checks the arguments of qmp_capabilities as QEMU does. Returns the number of capabilities, or -1 with an error in @r. */
static int check_capabilities(struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *list = NULL;
	size_t n = 0;

	if (json_object_object_get_ex(arguments, "enable", &list)) {
		if (!json_object_is_type(list, json_type_array)) {
			qmp_fail(r, NULL, "Invalid parameter type for 'enable', expected: array");
			return -1;
		}
		n = json_object_array_length(list);
	}
	for (size_t i = 0; i < n; i++) {
		struct json_object *item = json_object_array_get_idx(list, i);

		if (!json_object_is_type(item, json_type_string)) {
			qmp_fail(r, NULL, "Invalid parameter type for 'enable[%zu]', expected: string", i);
			return -1;
		}
		if (strcmp(json_object_get_string(item), "oob")) {
			qmp_fail(r, NULL, "Parameter 'enable[%zu]' does not accept value '%s'", i,
				 json_object_get_string(item));
			return -1;
		}
	}
	json_object_object_foreach(arguments, key, value)
	{
		(void)value;
		if (strcmp(key, "enable")) {
			qmp_fail(r, NULL, "Parameter '%s' is unexpected", key);
			return -1;
		}
	}
	return (int)n;
}

static void negotiate(struct qmp *q, struct json_object *arguments, struct qmp_reply *r)
{
	int n = check_capabilities(arguments, r);

	if (n < 0)
		return;
	if (q->negotiated) {
		qmp_fail(r, "CommandNotFound", "Capabilities negotiation is already complete, command ignored");
		return;
	}
	if (n) {
		qmp_fail(r, NULL, "Capability oob not available");
		return;
	}
	q->negotiated = true;
	r->value = json_object_new_object();
}

/* Finds the members of a request. Returns false with an error in @r. */
static bool unpack(struct json_object *request, const char **command, struct json_object **arguments,
		   struct qmp_reply *r)
{
	*command = NULL;
	*arguments = NULL;
	json_object_object_foreach(request, key, value)
	{
		if (!strcmp(key, "execute")) {
			if (!json_object_is_type(value, json_type_string)) {
				qmp_fail(r, NULL, "QMP input member 'execute' must be a string");
				return false;
			}
			*command = json_object_get_string(value);
		} else if (!strcmp(key, "arguments")) {
			if (!json_object_is_type(value, json_type_object)) {
				qmp_fail(r, NULL, "QMP input member 'arguments' must be an object");
				return false;
			}
			*arguments = value;
		} else {
			qmp_fail(r, NULL, "QMP input member '%s' is unexpected", key);
			return false;
		}
	}
	if (!*command)
		qmp_fail(r, NULL, "QMP input lacks member 'execute'");
	return *command;
}

static void execute(struct qmp *q, struct json_object *request, struct qmp_reply *r)
{
	struct json_object *arguments, *none = NULL;
	const char *command;

	if (!unpack(request, &command, &arguments, r))
		return;
	if (!arguments)
		arguments = none = json_object_new_object();
	if (!strcmp(command, "qmp_capabilities"))
		negotiate(q, arguments, r);
	else if (!q->negotiated)
		qmp_fail(r, "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'");
	else
		q->server->run(q->server->opaque, command, arguments, r);
	json_object_put(none);
}

/* Answers what framing.c has found to be a request. */
static int answer(struct qmp *q, struct json_object *request, size_t size)
{
	struct qmp_reply r = { 0 };
	struct json_object *reply, *id = NULL, *command = NULL;
	bool has_id, may_be_long;

	if (!json_object_is_type(request, json_type_object)) {
		qmp_fail(&r, NULL, "QMP input must be a JSON object");
		return send_error(q, &r, false, NULL);
	}
	has_id = json_object_object_get_ex(request, "id", &id);
	json_object_get(id);
	json_object_object_del(request, "id");
	json_object_object_get_ex(request, "execute", &command);
	may_be_long = q->server->long_command && json_object_is_type(command, json_type_string) &&
		      !strcmp(json_object_get_string(command), q->server->long_command);
	if (size > QMP_REQUEST_MAX && !may_be_long)
		qmp_fail(&r, NULL, "JSON token size limit exceeded");
	else
		execute(q, request, &r);
	if (!r.value)
		return send_error(q, &r, has_id, id);
	reply = json_object_new_object();
	json_object_object_add(reply, "return", r.value);
	if (has_id)
		json_object_object_add(reply, "id", id);
	return send_object(q, reply);
}

static int parse(struct qmp *q)
{
	struct json_object *request;
	struct qmp_reply r;
	char desc[sizeof(r.desc) - sizeof("JSON parse error, ")];
	int err;

	if (!json_parse(q->in.text, &request, desc, sizeof(desc))) {
		qmp_fail(&r, NULL, "JSON parse error, %s", desc);
		return send_error(q, &r, false, NULL);
	}
	err = answer(q, request, q->in.size);
	json_object_put(request);
	return err;
}

/* Answers what the input came to, other than to FRAMING_MORE. */
static int take(struct qmp *q, enum framing_result result)
{
	struct qmp_reply r;

	if (result == FRAMING_REQUEST)
		return parse(q);
	if (result == FRAMING_NO_MEMORY)
		return -ENOMEM;
	if (result == FRAMING_STRAY)
		qmp_fail(&r, NULL, "JSON parse error, stray '%s'", q->in.text + q->in.token);
	else
		qmp_fail(&r, NULL, "JSON %s limit exceeded", result == FRAMING_TOO_DEEP ? "nesting depth" : "token size");
	return send_error(q, &r, false, NULL);
}

int qmp_feed(struct qmp *q, const char *data, size_t size)
{
	size_t max = q->server->long_command ? QMP_LONG_MAX : QMP_REQUEST_MAX, used;
	int err = 0;

	while (size && !err) {
		enum framing_result result = framing_feed(&q->in, data, size, &used, max, QMP_DEPTH_MAX);

		data += used, size -= used;
		if (result == FRAMING_MORE)
			break;
		err = take(q, result);
		framing_next(&q->in);
	}
	return err;
}
