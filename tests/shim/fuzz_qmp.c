/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Any bytes for a QMP session. The first byte says in which pieces they come. What comes out has to be ASCII lines that are
 * JSON, the same in whichever pieces; and then the same bytes are given to the real commands.
 */
#include "commands.h"
#include "fuzz.h"
#include "pushed.h"
#include "qmp.h"

#include <errno.h>
#include <json-c/json.h>

static struct locker locker;
static struct commands commands;

static void note(void *opaque)
{
	(void)opaque;
}

static void look(void *opaque, bool certain)
{
	(void)opaque, (void)certain;
}

/* As far as no mapping is asked. */
static int push(void *opaque, struct ram_layout *l, char text[SHORT_TEXT])
{
	const char *wrong = pushed_sort(l);

	(void)opaque;
	snprintf(text, SHORT_TEXT, "%s", wrong ? wrong : "");
	if (!wrong)
		locker_set_layout(&locker, l);
	return wrong ? -EINVAL : 0;
}

static int halt(void *opaque)
{
	(void)opaque;
	return -EBUSY;
}

static void begin(void)
{
	static const _Atomic uint64_t never;

	locker_init(&locker, note, NULL);
	commands = (struct commands){
		.locker = &locker, .look_now = look, .push = push, .started_ns = &never, .halt = halt
	};
}

static void echo(void *opaque, const char *command, struct json_object *arguments, struct qmp_reply *reply)
{
	(void)opaque;
	if (strcmp(command, "echo"))
		qmp_fail(reply, "CommandNotFound", "The command %s has not been found", command);
	else
		reply->value = json_object_get(arguments);
}

static void must_be_lines(const struct json_text *out)
{
	size_t line = 0;

	for (size_t i = 0; i < out->size; i++) {
		struct json_object *o;
		char desc[256];

		if (out->data[i] != '\r') {
			must(out->data[i] >= ' ' && out->data[i] <= '~');
			continue;
		}
		out->data[i] = '\0';
		must(json_parse(out->data + line, &o, desc, sizeof(desc)) && json_object_is_type(o, json_type_object));
		json_object_put(o);
		out->data[i++] = '\r';
		must(i < out->size && out->data[i] == '\n');
		line = i + 1;
	}
	must(line == out->size);
}

/* Says it all in pieces of @piece bytes, with all said before negotiation too; returns the session. */
static struct qmp session(const struct qmp_server *server, const char *data, size_t size, size_t piece)
{
	static const char hello[] = "\xff{\"execute\":\"qmp_capabilities\"}";
	struct qmp q;
	int err;

	must(!qmp_init(&q, server));
	err = qmp_feed(&q, hello, sizeof(hello) - 1);
	for (size_t i = 0; i < size && !err; i += piece)
		err = qmp_feed(&q, data + i, size - i < piece ? size - i : piece);
	must(!err || err == -ENOBUFS);
	must(q.out.size <= QMP_OUTPUT_MAX && q.in.size <= QMP_LONG_MAX + 2);
	return q;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	static const struct qmp_server echoing = { echo, NULL, "long" };
	static const struct qmp_server real = { commands_run, &commands, COMMANDS_LONGEST };
	const char *data = (const char *)bytes + 1;
	struct qmp whole, pieces;

	if (!size)
		return 0;
	whole = session(&echoing, data, size - 1, size);
	pieces = session(&echoing, data, size - 1, 1 + bytes[0] % 64u);
	must_be_lines(&whole.out);
	must(whole.out.size == pieces.out.size && !memcmp(whole.out.data, pieces.out.data, whole.out.size));
	qmp_deinit(&whole);
	qmp_deinit(&pieces);

	if (!commands.locker)
		begin();
	commands.eject = false;
	whole = session(&real, data, size - 1, size);
	must_be_lines(&whole.out);
	must(!qmp_event(&whole, "E", json_object_new_object()) || whole.out.size > QMP_OUTPUT_MAX / 2);
	qmp_deinit(&whole);
	return 0;
}
