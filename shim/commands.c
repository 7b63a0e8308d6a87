/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The command table of the control socket, and the events. */
#include "commands_inside.h"
#include "monitor.h"

#include <errno.h>

struct argument {
	const char *name;
	json_type type;
	enum { OPTIONAL, REQUIRED, OR_NEXT /* this or the next one */ } need;
};

enum { ARGUMENTS_MAX = 7, LEASE_MAX_S = 60 };

struct command {
	const char *name;
	command_fn *run;
	struct argument arguments[ARGUMENTS_MAX + 1]; /* ends with an empty one */
};

/* Changes what @arguments say of @wish. Returns false with an error in @r. */
static bool change_wish(struct json_object *arguments, struct wish *wish, struct qmp_reply *r)
{
	struct json_object *size = NULL, *all = NULL, *order = NULL, *prefault = NULL;

	json_object_object_get_ex(arguments, "size", &size);
	json_object_object_get_ex(arguments, "all", &all);
	json_object_object_get_ex(arguments, "order", &order);
	json_object_object_get_ex(arguments, "prefault", &prefault);

	wish->all = all && json_object_get_boolean(all);
	if (wish->all && size)
		qmp_fail(r, NULL, "Parameters 'size' and 'all' are mutually exclusive");
	else if (!wish->all && !size)
		qmp_fail(r, NULL, "Parameter 'size' is missing");
	else if (size && json_object_get_int64(size) < 0)
		qmp_fail(r, NULL, "Parameter 'size' expects a non-negative number of bytes");
	else if (order && !read_order(json_object_get_string(order), &wish->order))
		qmp_fail(r, NULL, "Parameter 'order' does not accept value '%s'", json_object_get_string(order));
	else if (!read_number(arguments, "hold-budget", HOLD_BUDGET_MIN_US, HOLD_BUDGET_MAX_US, &wish->hold_budget_us))
		qmp_fail(r, NULL, "Parameter 'hold-budget' expects a number of microseconds from %d to %d",
			 HOLD_BUDGET_MIN_US, HOLD_BUDGET_MAX_US);
	else if (!read_number(arguments, "threads", 1, THREADS_MAX, &wish->threads))
		qmp_fail(r, NULL, "Parameter 'threads' expects a number from 1 to %d", THREADS_MAX);
	else if (!read_size(arguments, "host-reserve", &wish->host_reserve))
		qmp_fail(r, NULL, "Parameter 'host-reserve' expects a non-negative number of bytes");
	else {
		wish->lock_ram_size = json_object_get_uint64(size);
		if (prefault)
			wish->prefault = json_object_get_boolean(prefault);
		return true;
	}
	return false;
}

static void set_ram_minguarantee(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct wish wish;
	char text[SHORT_TEXT] = "";
	int err;

	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving");
		return;
	}
	c->look_now(c->opaque, true);
	read_status(c);
	wish = c->status.wish;
	if (!change_wish(arguments, &wish, r))
		return;
	err = locker_set(c->locker, &wish, text);
	if (!err) {
		r->value = json_object_new_object();
	} else if (err == -ESHUTDOWN) {
		qmp_fail(r, NULL, "%s", text);
	} else {
		const char *word = err == -ERANGE ? "range" : err == -EPERM ? "rlimit" : err == -ENODEV ? "no-ram" : "waiting";

		qmp_fail(r, NULL, "[%s] %s", word, text);
	}
}

/* Offers set_ram_minguarantee and query-ram-minguarantee in QEMU's own monitor too. */
static void ramlock_monitor(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	int err;

	(void)arguments;
	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving");
		return;
	}
	err = monitor_want(c->monitor);
	if (!err) {
		c->look_now(c->opaque, true); /* the bottom half that looks does it */
		err = monitor_want(c->monitor);
	}
	if (err)
		qmp_fail(r, NULL, "[monitor] %s", err == -ENOSYS ? "this QEMU does not export its monitor" :
								   "this QEMU has such commands by itself");
	else
		r->value = json_object_new_object();
}

/* A controller on the host tells what it sees of the cgroups that the process is in. */
static void set_headroom_limits(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	uint64_t bytes = 0;
	uint32_t seconds = 0;

	if (!read_size(arguments, "cgroup-left", &bytes)) {
		qmp_fail(r, NULL, "Parameter 'cgroup-left' expects a non-negative number of bytes");
		return;
	}
	if (!read_number(arguments, "valid-s", 1, LEASE_MAX_S, &seconds)) {
		qmp_fail(r, NULL, "Parameter 'valid-s' expects a number of seconds from 1 to %d", LEASE_MAX_S);
		return;
	}
	locker_lease(c->locker, bytes, seconds);
	r->value = json_object_new_object();
}

static command_fn query_commands;

static const struct command table[] = {
	{ "set_ram_minguarantee",
	  set_ram_minguarantee,
	  { { "size", json_type_int, OR_NEXT },
	    { "all", json_type_boolean, OPTIONAL },
	    { "order", json_type_string, OPTIONAL },
	    { "prefault", json_type_boolean, OPTIONAL },
	    { "hold-budget", json_type_int, OPTIONAL },
	    { "threads", json_type_int, OPTIONAL },
	    { "host-reserve", json_type_int, OPTIONAL } } },
	{ "set-headroom-limits",
	  set_headroom_limits,
	  { { "cgroup-left", json_type_int, REQUIRED }, { "valid-s", json_type_int, REQUIRED } } },
	{ "query-ram-minguarantee", query_ram_minguarantee, { { 0 } } },
	{ "query-ram-blocks", query_ram_blocks, { { 0 } } },
	{ "set-ram-blocks", set_ram_blocks, { { "blocks", json_type_array, REQUIRED } } },
	{ "query-ramlock", query_ramlock, { { 0 } } },
	{ "ramlock-monitor", ramlock_monitor, { { 0 } } },
	{ "ramlock-eject", ramlock_eject, { { "keep", json_type_boolean, OPTIONAL } } },
	{ "ramlock-adopt", ramlock_adopt, { { "books", json_type_object, REQUIRED }, { "wish", json_type_object, REQUIRED } } },
	{ "ramlock-follow-discards", ramlock_follow_discards, { { 0 } } },
	{ "query-version", query_version, { { 0 } } },
	{ "query-commands", query_commands, { { 0 } } },
};
enum { COMMANDS = sizeof(table) / sizeof(table[0]) };

static void add_command(struct json_object *list, const char *name)
{
	struct json_object *o = json_object_new_object();

	add_string(o, "name", name);
	json_object_array_add(list, o);
}

static void query_commands(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	(void)c, (void)arguments;
	r->value = json_object_new_array();
	add_command(r->value, "qmp_capabilities"); /* the session's own, see qmp.c */
	for (size_t i = 0; i < COMMANDS; i++)
		add_command(r->value, table[i].name);
}

static const struct argument *find_argument(const struct command *command, const char *name)
{
	for (const struct argument *a = command->arguments; a->name; a++)
		if (!strcmp(a->name, name))
			return a;
	return NULL;
}

static bool has(struct json_object *arguments, const char *name)
{
	return json_object_object_get_ex(arguments, name, NULL);
}

/* For QEMU, an integer that does not fit into 64 bits is none. */
static bool is_too_large(struct json_object *value)
{
	return json_object_is_type(value, json_type_int) && json_object_get_int64(value) > 0 &&
	       json_object_get_uint64(value) > INT64_MAX;
}

/*
 * Checks the arguments as QEMU checks its own: first those of the table in its order, then for others. Returns false with an
 * error in @r.
 */
static bool check_arguments(const struct command *command, struct json_object *arguments, struct qmp_reply *r)
{
	for (const struct argument *a = command->arguments; a->name; a++) {
		struct json_object *value;

		if (!json_object_object_get_ex(arguments, a->name, &value)) {
			if (a->need == OPTIONAL || (a->need == OR_NEXT && has(arguments, a[1].name)))
				continue;
			qmp_fail(r, NULL, "Parameter '%s' is missing", a->name);
			return false;
		}
		if (!json_object_is_type(value, a->type) || is_too_large(value)) {
			qmp_fail(r, NULL, "Invalid parameter type for '%s', expected: %s", a->name,
				 a->type == json_type_int ? "integer" : json_type_to_name(a->type));
			return false;
		}
	}
	json_object_object_foreach(arguments, key, value)
	{
		(void)value;
		if (!find_argument(command, key)) {
			qmp_fail(r, NULL, "Parameter '%s' is unexpected", key);
			return false;
		}
	}
	return true;
}

void commands_run(void *opaque, const char *command, struct json_object *arguments, struct qmp_reply *reply)
{
	for (size_t i = 0; i < COMMANDS; i++)
		if (!strcmp(table[i].name, command)) {
			if (check_arguments(&table[i], arguments, reply))
				table[i].run(opaque, arguments, reply);
			return;
		}
	qmp_fail(reply, "CommandNotFound", "The command %s has not been found", command);
}

/* One event for each cause. */
static void emit_losses(void (*emit)(void *opaque, const char *name, struct json_object *data), void *opaque,
			const char *name, const struct losses *losses)
{
	for (int i = 0; i < LOSS_COUNT; i++) {
		struct json_object *data;

		if (!losses->bytes[i])
			continue;
		data = json_object_new_object();
		add_size(data, "bytes", losses->bytes[i]);
		add_string(data, "cause", loss_name((enum loss)i));
		emit(opaque, name, data);
	}
}

void commands_events(struct commands *c, void (*emit)(void *opaque, const char *name, struct json_object *data),
		     void *opaque)
{
	static const struct {
		enum locker_event event;
		const char *name;
	} names[] = {
		{ LOCKER_PROGRESS, "RAM_MINGUARANTEE_PROGRESS" },
		{ LOCKER_REACHED, "RAM_MINGUARANTEE_REACHED" },
		{ LOCKER_WENT_SHORT, "RAM_MINGUARANTEE_SHORT" },
	};
	struct locker_status *s = &c->status;
	unsigned int events = locker_take_events(c->locker, s);

	if (events & LOCKER_LOST)
		emit_losses(emit, opaque, "RAM_MINGUARANTEE_LOST", &s->news_lost);
	if (events & LOCKER_REPAIRED)
		emit_losses(emit, opaque, "RAM_MINGUARANTEE_REPAIRED", &s->news_repaired);
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		struct json_object *data;

		if (!(events & names[i].event))
			continue;
		data = json_object_new_object();
		add_size(data, "requested", s->requested);
		add_size(data, "locked", s->locked);
		add_size(data, "armed", s->armed);
		add_size(data, "generation", s->generation);
		if (names[i].event == LOCKER_WENT_SHORT) {
			add_string(data, "reason", shortage_name(s->shortage));
			add_string(data, "desc", s->short_text);
		}
		emit(opaque, names[i].name, data);
	}
}
