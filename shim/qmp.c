/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One QMP session (https://www.qemu.org/docs/master/interop/qmp-spec.html): bytes in, bytes out.
 *
 * Input is parsed incrementally, because clients need not end a request with a newline (qemu.qmp does not). After a
 * syntax error, input is skipped to the next newline, control byte or 0xFF, which no request contains unescaped.
 */
#include "qmp.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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

static int reserve(struct qmp *q, size_t more)
{
	size_t capacity = q->out_capacity ? q->out_capacity : 1024;
	char *out;

	if (q->out_size + more > QMP_OUTPUT_MAX)
		return -ENOBUFS;
	while (capacity < q->out_size + more)
		capacity *= 2;
	if (capacity == q->out_capacity)
		return 0;
	out = realloc(q->out, capacity);
	if (!out)
		return -ENOMEM;
	q->out = out;
	q->out_capacity = capacity;
	return 0;
}

/* Decodes one UTF-8 character of a string that json-c has validated or made itself. */
static const unsigned char *decode(const unsigned char *p, uint32_t *code)
{
	int more = *p >= 0xf0 ? 3 : *p >= 0xe0 ? 2 : 1;

	*code = *p++ & (0x3f >> more);
	while (more-- && (*p & 0xc0) == 0x80)
		*code = *code << 6 | (*p++ & 0x3f);
	return p;
}

/* Appends one line of ASCII: json-c writes UTF-8, and its non-ASCII is always inside strings. Takes over @o. */
static int send_object(struct qmp *q, struct json_object *o)
{
	const char *text = json_object_to_json_string_ext(o, JSON_C_TO_STRING_SPACED | JSON_C_TO_STRING_NOSLASHESCAPE);
	/* A character of 2 to 4 bytes becomes 6 or 12. */
	int err = text ? reserve(q, 3 * strlen(text) + 3) : -ENOMEM;

	if (!err) {
		char *out = q->out + q->out_size;

		for (const unsigned char *p = (const unsigned char *)text; *p;) {
			uint32_t code;

			if (*p < 0x80) {
				*out++ = (char)*p++;
				continue;
			}
			p = decode(p, &code);
			if (code >= 0x10000) {
				code -= 0x10000;
				out += sprintf(out, "\\u%04x", 0xd800 | (code >> 10));
				code = 0xdc00 | (code & 0x3ff);
			}
			out += sprintf(out, "\\u%04x", code);
		}
		*out++ = '\r';
		*out++ = '\n';
		q->out_size = (size_t)(out - q->out);
	}
	json_object_put(o);
	return err;
}

static int send_error(struct qmp *q, const struct qmp_reply *r, struct json_object *id)
{
	struct json_object *reply = json_object_new_object(), *error = json_object_new_object();

	json_object_object_add(error, "class", json_object_new_string(r->error_class ? r->error_class : "GenericError"));
	json_object_object_add(error, "desc", json_object_new_string(r->desc));
	json_object_object_add(reply, "error", error);
	if (id)
		json_object_object_add(reply, "id", json_object_get(id));
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
	memmove(q->out, q->out + n, q->out_size - n);
	q->out_size -= n;
}

/* ---- Input ---- */

int qmp_init(struct qmp *q, const struct qmp_server *server)
{
	struct json_object *greeting = json_object_new_object(), *qmp = json_object_new_object();

	*q = (struct qmp){ .server = server, .tokener = json_tokener_new_ex(QMP_DEPTH_MAX) };
	if (q->tokener)
		json_tokener_set_flags(q->tokener, JSON_TOKENER_STRICT | JSON_TOKENER_ALLOW_TRAILING_CHARS |
							   JSON_TOKENER_VALIDATE_UTF8);
	json_object_object_add(qmp, "version", qmp_version());
	json_object_object_add(qmp, "capabilities", json_object_new_array());
	json_object_object_add(greeting, "QMP", qmp);
	return q->tokener ? send_object(q, greeting) : (json_object_put(greeting), -ENOMEM);
}

void qmp_deinit(struct qmp *q)
{
	if (q->tokener) /* json-c before 0.17 does not take NULL */
		json_tokener_free(q->tokener);
	free(q->out);
	*q = (struct qmp){ 0 };
}

/* qmp_capabilities: {"enable": [...]} is optional, and we offer nothing to enable. */
static void negotiate(struct qmp *q, struct json_object *arguments, struct qmp_reply *r)
{
	json_object_object_foreach(arguments, key, value)
	{
		if (strcmp(key, "enable")) {
			qmp_fail(r, NULL, "Parameter '%s' is unexpected", key);
			return;
		}
		if (!json_object_is_type(value, json_type_array)) {
			qmp_fail(r, NULL, "Invalid parameter type for 'enable', expected: array");
			return;
		}
		if (json_object_array_length(value)) {
			qmp_fail(r, NULL, "Capability is not available: none is offered");
			return;
		}
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
		} else if (strcmp(key, "id")) {
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
	if (!strcmp(command, "qmp_capabilities")) {
		if (q->negotiated)
			qmp_fail(r, "CommandNotFound", "Capabilities negotiation is already complete, command ignored");
		else
			negotiate(q, arguments, r);
	} else if (!q->negotiated) {
		qmp_fail(r, "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'");
	} else {
		q->server->run(q->server->opaque, command, arguments, r);
	}
	json_object_put(none);
}

static int answer(struct qmp *q, struct json_object *request)
{
	struct qmp_reply r = { 0 };
	struct json_object *reply, *id = NULL;

	if (!json_object_is_type(request, json_type_object)) {
		qmp_fail(&r, NULL, "QMP input must be a JSON object");
		return send_error(q, &r, NULL);
	}
	json_object_object_get_ex(request, "id", &id);
	execute(q, request, &r);
	if (!r.value)
		return send_error(q, &r, id);
	reply = json_object_new_object();
	json_object_object_add(reply, "return", r.value);
	if (id)
		json_object_object_add(reply, "id", json_object_get(id));
	return send_object(q, reply);
}

static int syntax_error(struct qmp *q, const char *what)
{
	struct qmp_reply r;

	json_tokener_reset(q->tokener);
	q->request_size = 0;
	q->quote = 0;
	q->skipping = true;
	qmp_fail(&r, NULL, "JSON parse error, %s", what);
	return send_error(q, &r, NULL);
}

static bool is_space(char c)
{
	return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

/* Where input can begin again: a control byte (a newline is one) or 0xFF. */
static bool is_reset(char c)
{
	return (unsigned char)c < 0x20 || (unsigned char)c == 0xff;
}

/*
 * How many bytes of @data can be given to json-c, which accepts raw control bytes in strings: all up to one of those.
 * Advances @quote: the quote of the string that the input is in, or'ed with ESCAPED after a backslash there; 0 outside.
 */
static size_t before_bad_control(const char *data, size_t size, int *quote)
{
	enum { ESCAPED = 0x100 };

	for (size_t i = 0; i < size; i++) {
		char c = data[i];

		if (*quote && (unsigned char)c < 0x20)
			return i;
		if (*quote & ESCAPED)
			*quote &= ~ESCAPED;
		else if (*quote && c == '\\')
			*quote |= ESCAPED;
		else if (*quote && c == *quote)
			*quote = 0;
		else if (!*quote && (c == '"' || c == '\''))
			*quote = c;
	}
	return size;
}

int qmp_feed(struct qmp *q, const char *data, size_t size)
{
	int err = 0;

	while (size && !err) {
		enum json_tokener_error state;
		struct json_object *request;
		size_t part, used;
		int quote = q->quote;

		if (q->skipping) {
			q->skipping = !is_reset(*data);
			data++, size--;
			continue;
		}
		if (!q->request_size && (is_space(*data) || is_reset(*data))) {
			data++, size--; /* between requests */
			continue;
		}
		part = size < QMP_REQUEST_MAX - q->request_size ? size : QMP_REQUEST_MAX - q->request_size;
		if (!part) {
			err = syntax_error(q, "a request is longer than 128 KiB");
			continue;
		}
		part = before_bad_control(data, part, &quote);
		if (!part) {
			err = syntax_error(q, "a control byte in a string");
			continue;
		}
		request = json_tokener_parse_ex(q->tokener, data, (int)part);
		state = json_tokener_get_error(q->tokener);
		used = json_tokener_get_parse_end(q->tokener);
		if (state == json_tokener_continue) {
			q->request_size += part;
			q->quote = quote;
			data += part, size -= part;
			continue;
		}
		if (state != json_tokener_success) {
			/* The offending byte may be the very one that input can begin again with. */
			data += used, size -= used;
			err = syntax_error(q, state == json_tokener_error_depth ? "a request is nested too deeply" :
										   json_tokener_error_desc(state));
			continue;
		}
		data += used, size -= used;
		q->request_size = 0;
		q->quote = 0;
		err = answer(q, request);
		json_object_put(request);
	}
	return err;
}
