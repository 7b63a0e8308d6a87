/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The command table of the control socket, and the events. */
#include "commands.h"

#include <errno.h>
#include <json-c/json.h>
#include <string.h>
#include <unistd.h>

typedef void command_fn(struct commands *c, struct json_object *arguments, struct qmp_reply *r);

struct argument {
	const char *name;
	json_type type;
};

enum { ARGUMENTS_MAX = 7, LEASE_MAX_S = 60 };

struct command {
	const char *name;
	command_fn *run;
	struct argument arguments[ARGUMENTS_MAX + 1]; /* ends with an empty one */
};

static void add(struct json_object *o, const char *key, struct json_object *value)
{
	json_object_object_add(o, key, value);
}

static void add_string(struct json_object *o, const char *key, const char *value)
{
	add(o, key, json_object_new_string(value));
}

static void add_size(struct json_object *o, const char *key, uint64_t value)
{
	add(o, key, json_object_new_uint64(value));
}

static void add_bool(struct json_object *o, const char *key, bool value)
{
	add(o, key, json_object_new_boolean(value));
}

/* Adds {"reason", "desc"} as @key. */
static void add_reason(struct json_object *o, const char *key, const char *reason, const char *desc)
{
	struct json_object *why = json_object_new_object();

	add_string(why, "reason", reason);
	add_string(why, "desc", desc);
	add(o, key, why);
}

static const char *order_name(enum order order)
{
	return order == ORDER_ADDRESS ? "address" : "resident";
}

static bool read_order(const char *name, enum order *order)
{
	if (strcmp(name, "resident") && strcmp(name, "address"))
		return false;
	*order = !strcmp(name, "address") ? ORDER_ADDRESS : ORDER_RESIDENT;
	return true;
}

/* Reads the number @key, if it is there. Returns false when it is not one from @min to @max. */
static bool read_number(struct json_object *o, const char *key, int64_t min, int64_t max, uint32_t *out)
{
	struct json_object *value;

	if (!json_object_object_get_ex(o, key, &value))
		return true;
	if (!json_object_is_type(value, json_type_int) || json_object_get_int64(value) < min ||
	    json_object_get_int64(value) > max)
		return false;
	*out = (uint32_t)json_object_get_int64(value);
	return true;
}

/* Reads a number of bytes, if @name is there. Returns false when it is none. */
static bool read_size(struct json_object *o, const char *name, uint64_t *out)
{
	struct json_object *value = NULL;

	if (!json_object_object_get_ex(o, name, &value))
		return true;
	if (!json_object_is_type(value, json_type_int) || json_object_get_int64(value) < 0)
		return false;
	*out = json_object_get_uint64(value);
	return true;
}

static void set_ram_minguarantee(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *size = NULL, *all = NULL, *order = NULL, *prefault = NULL;
	struct wish wish;
	char text[SHORT_TEXT] = "";
	int err;

	json_object_object_get_ex(arguments, "size", &size);
	json_object_object_get_ex(arguments, "all", &all);
	json_object_object_get_ex(arguments, "order", &order);
	json_object_object_get_ex(arguments, "prefault", &prefault);

	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving");
		return;
	}
	c->look_now(c->opaque, true);
	locker_query(c->locker, &c->status);
	wish = c->status.wish;
	wish.all = all && json_object_get_boolean(all);
	if (wish.all && size) {
		qmp_fail(r, NULL, "Parameters 'size' and 'all' are mutually exclusive");
		return;
	}
	if (!wish.all && !size) {
		qmp_fail(r, NULL, "Parameter 'size' is missing");
		return;
	}
	if (size && json_object_get_int64(size) < 0) {
		qmp_fail(r, NULL, "Parameter 'size' expects a non-negative number of bytes");
		return;
	}
	wish.lock_ram_size = json_object_get_uint64(size); /* clamped when out of its range: above any guest RAM */
	if (order && !read_order(json_object_get_string(order), &wish.order)) {
		qmp_fail(r, NULL, "Parameter 'order' does not accept value '%.64s'", json_object_get_string(order));
		return;
	}
	if (prefault)
		wish.prefault = json_object_get_boolean(prefault);
	if (!read_number(arguments, "hold-budget", HOLD_BUDGET_MIN_US, HOLD_BUDGET_MAX_US, &wish.hold_budget_us)) {
		qmp_fail(r, NULL, "Parameter 'hold-budget' expects a number of microseconds from %d to %d",
			 HOLD_BUDGET_MIN_US, HOLD_BUDGET_MAX_US);
		return;
	}
	if (!read_number(arguments, "threads", 1, THREADS_MAX, &wish.threads)) {
		qmp_fail(r, NULL, "Parameter 'threads' expects a number from 1 to %d", THREADS_MAX);
		return;
	}

	if (!read_size(arguments, "host-reserve", &wish.host_reserve)) {
		qmp_fail(r, NULL, "Parameter 'host-reserve' expects a non-negative number of bytes");
		return;
	}

	err = locker_set(c->locker, &wish, text);
	if (err) {
		const char *word = err == -ERANGE ? "range" : err == -EPERM ? "rlimit" : err == -ENODEV ? "no-ram" : "waiting";

		qmp_fail(r, NULL, "[%s] %s", word, text);
		return;
	}
	c->launch_error[0] = '\0';
	r->value = json_object_new_object();
}

/* A controller on the host tells what it sees of the cgroups that the process is in. */
static void set_headroom_limits(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *left = NULL;
	uint64_t bytes = 0;
	uint32_t seconds = 0;

	json_object_object_get_ex(arguments, "cgroup-left", &left);
	if (!left || !read_size(arguments, "cgroup-left", &bytes)) {
		qmp_fail(r, NULL, "Parameter 'cgroup-left' expects a non-negative number of bytes");
		return;
	}
	if (!read_number(arguments, "valid-s", 1, LEASE_MAX_S, &seconds) || !seconds) {
		qmp_fail(r, NULL, "Parameter 'valid-s' expects a number of seconds from 1 to %d", LEASE_MAX_S);
		return;
	}
	locker_lease(c->locker, bytes, seconds);
	r->value = json_object_new_object();
}

static struct json_object *block_object(const struct ram_block *b)
{
	struct json_object *o = json_object_new_object();

	add_string(o, "id", b->id);
	add_size(o, "host", b->host.start);
	add_size(o, "size", range_size(b->host));
	add_size(o, "page-size", b->page_size);
	add_string(o, "backing", backing_name(b->backing));
	return o;
}

static void add_waiting(struct json_object *o, const struct commands *c)
{
	if (c->symbols)
		add_reason(o, "waiting", "starting", "the VM is still being set up");
	else
		add_reason(o, "waiting", "no-symbols",
			   "this QEMU does not export its symbols, so guest RAM has to be found from outside: "
			   "run `ramlock set` or `ramlock status` for it");
}

/* Adds the sum of @losses as @key. */
static void add_losses(struct json_object *o, const char *key, const struct losses *losses)
{
	uint64_t sum = 0;

	for (int i = 0; i < LOSS_COUNT; i++)
		sum += losses->bytes[i];
	add_size(o, key, sum);
}

static void query_ram_minguarantee(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct locker_status *s = &c->status;
	struct json_object *o = json_object_new_object(), *blocks = json_object_new_array();

	(void)arguments;
	c->look_now(c->opaque, false);
	locker_query(c->locker, s);
	add_size(o, "requested", s->requested);
	add_bool(o, "all", s->wish.all);
	add_size(o, "locked", s->locked);
	add_size(o, "armed", s->armed);
	add_size(o, "foreign", s->foreign);
	add_string(o, "state", locker_state_name(s->state));
	add_size(o, "ram", s->ram);
	if (s->left_out)
		add_size(o, "left-out", s->left_out);
	add_string(o, "order", order_name(s->wish.order));
	add_bool(o, "prefault", s->wish.prefault);
	add_size(o, "hold-budget", s->wish.hold_budget_us);
	add_size(o, "threads", s->wish.threads);
	add_size(o, "host-reserve", s->host_reserve);
	add_bool(o, "cgroups-seen", s->cgroups_seen);
	add_size(o, "generation", s->generation);
	for (size_t i = 0; i < s->n_blocks; i++) {
		struct json_object *block = block_object(&s->blocks[i].block);

		add_size(block, "locked", s->blocks[i].locked);
		json_object_array_add(blocks, block);
	}
	add(o, "blocks", blocks);
	add_string(o, "source", c->symbols ? "qemu" : "controller");
	add_size(o, "step-max-us", s->step_max_us);
	add_size(o, "step-p99-us", s->step_p99_us);
	add_size(o, "rate", s->rate);
	if (s->state == LOCKER_LOCKING || s->state == LOCKER_UNLOCKING)
		add_size(o, "eta-s", s->eta_s);
	add_size(o, "extents", s->extents);
	add_losses(o, "lost", &s->lost);
	add_losses(o, "repaired", &s->repaired);
	add_size(o, "gap-filled", s->filled);
	if (s->memlock_limit != UINT64_MAX)
		add_size(o, "memlock-limit", s->memlock_limit);
	if (s->state == LOCKER_SHORT)
		add_reason(o, "short", shortage_name(s->shortage), s->short_text);
	if (s->state == LOCKER_WAITING)
		add_waiting(o, c);
	if (c->launch_error[0])
		add_string(o, "launch-error", c->launch_error);
	r->value = o;
}

static void query_ram_blocks(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *blocks = json_object_new_array();

	(void)arguments;
	c->look_now(c->opaque, false);
	locker_query(c->locker, &c->status);
	for (size_t i = 0; i < c->status.n_blocks; i++) {
		struct json_object *block = block_object(&c->status.blocks[i].block);

		add_string(block, "source", c->symbols ? "qemu" : "controller");
		json_object_array_add(blocks, block);
	}
	r->value = blocks;
}

static bool read_backing(const char *name, enum backing *backing)
{
	for (*backing = 0; *backing < BACKING_COUNT; (*backing)++)
		if (!strcmp(name, backing_name(*backing)))
			return true;
	return false;
}

static bool get_size(struct json_object *o, const char *key, uint64_t *value)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v) || !json_object_is_type(v, json_type_int))
		return false;
	/* Clamped at both ends, which no address, and no size that fits behind one, is. */
	*value = json_object_get_int64(v) < 0 ? UINT64_MAX : json_object_get_uint64(v);
	return true;
}

static bool read_block(struct json_object *o, struct ram_block *b)
{
	struct json_object *id, *backing;
	uint64_t size;

	*b = (struct ram_block){ .shared = false };
	if (!json_object_is_type(o, json_type_object) || !json_object_object_get_ex(o, "id", &id) ||
	    !json_object_object_get_ex(o, "backing", &backing) || !json_object_is_type(id, json_type_string) ||
	    !json_object_is_type(backing, json_type_string) || !get_size(o, "host", &b->host.start) ||
	    !get_size(o, "size", &size) || !get_size(o, "page-size", &b->page_size) ||
	    (size_t)json_object_get_string_len(id) >= sizeof(b->id) ||
	    !read_backing(json_object_get_string(backing), &b->backing) ||
	    __builtin_add_overflow(b->host.start, size, &b->host.end))
		return false;
	strcpy(b->id, json_object_get_string(id));
	return true;
}

/* Guest RAM of a QEMU that does not export its symbols, as the controller has found it. */
static void set_ram_blocks(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *blocks = NULL;
	struct ram_layout *l = &c->layout;
	char text[SHORT_TEXT];

	json_object_object_get_ex(arguments, "blocks", &blocks);
	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving");
		return;
	}
	if (c->symbols) {
		qmp_fail(r, NULL, "[symbols] this QEMU exports its symbols: guest RAM is found from inside");
		return;
	}
	if (!blocks) {
		qmp_fail(r, NULL, "Parameter 'blocks' is missing");
		return;
	}
	if (json_object_array_length(blocks) > RAM_BLOCKS_MAX) {
		qmp_fail(r, NULL, "[maps] there are more than %d blocks", RAM_BLOCKS_MAX);
		return;
	}
	l->n = json_object_array_length(blocks);
	for (size_t i = 0; i < l->n; i++)
		if (!read_block(json_object_array_get_idx(blocks, i), &l->v[i])) {
			qmp_fail(r, NULL, "Parameter 'blocks' expects what query-ram-blocks returns; item %zu is not",
				 i);
			return;
		}
	if (c->push(c->opaque, l, text))
		qmp_fail(r, NULL, "[maps] %s", text);
	else
		r->value = json_object_new_object();
}

static void query_version(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	(void)c, (void)arguments;
	r->value = qmp_version();
}

static void query_ramlock(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	(void)arguments;
	r->value = json_object_new_object();
	add_string(r->value, "version", RAMLOCK_VERSION);
	add_size(r->value, "pid", (uint64_t)getpid());
	add_size(r->value, "base", c->base);
	add_string(r->value, "entry", c->injected ? "injected" : "preloaded");
	if (c->injected)
		add_size(r->value, "started-ns", *c->started_ns);
}

static void add_extents(struct json_object *o, const char *key, const struct extents *e)
{
	struct json_object *list = json_object_new_array();

	for (size_t i = 0; i < e->n; i++) {
		struct json_object *pair = json_object_new_array();

		json_object_array_add(pair, json_object_new_uint64(e->v[i].start));
		json_object_array_add(pair, json_object_new_uint64(range_size(e->v[i])));
		json_object_array_add(list, pair);
	}
	add(o, key, list);
}

/* Gives what ramlock-adopt takes, and leaves with everything still locked. */
static void give(struct commands *c, struct qmp_reply *r)
{
	struct json_object *books, *wish_object;
	struct wish wish;

	if (c->halt(c->opaque)) {
		c->eject = false;
		qmp_fail(r, NULL, "[busy] the lock thread is in a step that takes long: try again");
		return;
	}
	books = json_object_new_object();
	wish_object = json_object_new_object();
	locker_give(c->locker, &c->books, &wish);
	add_extents(books, "held", &c->books.held);
	add_extents(books, "foreign", &c->books.foreign);
	add_extents(books, "on-fault", &c->books.on_fault);
	add_size(wish_object, "size", wish.lock_ram_size);
	add_bool(wish_object, "all", wish.all);
	add_string(wish_object, "order", order_name(wish.order));
	add_bool(wish_object, "prefault", wish.prefault);
	add_size(wish_object, "hold-budget", wish.hold_budget_us);
	add_size(wish_object, "threads", wish.threads);
	add_size(wish_object, "host-reserve", wish.host_reserve);
	r->value = json_object_new_object();
	add(r->value, "books", books);
	add(r->value, "wish", wish_object);
	c->keep = true;
}

/* Answers first; the shim leaves when the guarantee has been released, or at once with "keep". */
static void ramlock_eject(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	const struct wish none = { .prefault = true };
	struct json_object *keep = NULL;
	char text[SHORT_TEXT];

	json_object_object_get_ex(arguments, "keep", &keep);
	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving already");
		return;
	}
	c->eject = true;
	if (keep && json_object_get_boolean(keep)) {
		give(c, r);
		return;
	}
	locker_set(c->locker, &none, text); /* nothing is never refused */
	r->value = json_object_new_object();
}

/* Reads [[start, size], ...]; a missing list is an empty one. */
static bool read_extents(struct json_object *books, const char *key, struct extents *e)
{
	struct json_object *list = NULL;

	extents_clear(e);
	if (!json_object_object_get_ex(books, key, &list))
		return true;
	if (!json_object_is_type(list, json_type_array))
		return false;
	for (size_t i = 0; i < json_object_array_length(list); i++) {
		struct json_object *pair = json_object_array_get_idx(list, i), *start, *size;
		struct range r;

		if (!json_object_is_type(pair, json_type_array) || json_object_array_length(pair) != 2)
			return false;
		start = json_object_array_get_idx(pair, 0);
		size = json_object_array_get_idx(pair, 1);
		if (!json_object_is_type(start, json_type_int) || !json_object_is_type(size, json_type_int))
			return false;
		r.start = json_object_get_uint64(start);
		if (__builtin_add_overflow(r.start, json_object_get_uint64(size), &r.end) || extents_overlap(e, r) ||
		    extents_add(e, r))
			return false;
	}
	return true;
}

static bool read_wish(struct json_object *o, struct wish *wish)
{
	struct json_object *size, *all, *order, *prefault;

	if (!json_object_object_get_ex(o, "size", &size) || !json_object_object_get_ex(o, "all", &all) ||
	    !json_object_object_get_ex(o, "order", &order) || !json_object_object_get_ex(o, "prefault", &prefault) ||
	    !json_object_is_type(size, json_type_int) || json_object_get_int64(size) < 0 ||
	    !json_object_is_type(order, json_type_string))
		return false;
	wish->lock_ram_size = json_object_get_uint64(size);
	wish->all = json_object_get_boolean(all);
	wish->prefault = json_object_get_boolean(prefault);
	wish->hold_budget_us = wish->threads = 0;
	wish->host_reserve = 0; /* the usual, from a shim that does not know these */
	return read_order(json_object_get_string(order), &wish->order) &&
	       read_number(o, "hold-budget", HOLD_BUDGET_MIN_US, HOLD_BUDGET_MAX_US, &wish->hold_budget_us) &&
	       read_number(o, "threads", 1, THREADS_MAX, &wish->threads) &&
	       read_size(o, "host-reserve", &wish->host_reserve);
}

/* Takes over what "ramlock-eject keep" of another shim in this process returned. */
static void ramlock_adopt(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *books = NULL, *wish_object = NULL;
	struct books *b = &c->books;
	struct wish wish;
	int err;

	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving");
		return;
	}
	json_object_object_get_ex(arguments, "books", &books);
	json_object_object_get_ex(arguments, "wish", &wish_object);
	if (!books || !wish_object || !read_wish(wish_object, &wish) || !read_extents(books, "held", &b->held) ||
	    !read_extents(books, "foreign", &b->foreign) || !read_extents(books, "on-fault", &b->on_fault)) {
		qmp_fail(r, NULL, "Parameters 'books' and 'wish' expect what ramlock-eject returned");
		return;
	}
	memcpy(b->history, b->held.v, b->held.n * sizeof(b->held.v[0])); /* the order of locking is lost */
	b->n_history = b->held.n;
	c->look_now(c->opaque, true);
	err = locker_adopt(c->locker, b, &wish);
	if (err)
		qmp_fail(r, NULL, err == -EBUSY ? "[busy] the lock thread is at work: try again" :
						  "[range] these are not locked parts of guest RAM");
	else
		r->value = json_object_new_object();
}

static command_fn query_commands;

static const struct command table[] = {
	{ "set_ram_minguarantee",
	  set_ram_minguarantee,
	  { { "size", json_type_int },
	    { "all", json_type_boolean },
	    { "order", json_type_string },
	    { "prefault", json_type_boolean },
	    { "hold-budget", json_type_int },
	    { "threads", json_type_int },
	    { "host-reserve", json_type_int } } },
	{ "set-headroom-limits",
	  set_headroom_limits,
	  { { "cgroup-left", json_type_int }, { "valid-s", json_type_int } } },
	{ "query-ram-minguarantee", query_ram_minguarantee, { { 0 } } },
	{ "query-ram-blocks", query_ram_blocks, { { 0 } } },
	{ "set-ram-blocks", set_ram_blocks, { { "blocks", json_type_array } } },
	{ "query-ramlock", query_ramlock, { { 0 } } },
	{ "ramlock-eject", ramlock_eject, { { "keep", json_type_boolean } } },
	{ "ramlock-adopt", ramlock_adopt, { { "books", json_type_object }, { "wish", json_type_object } } },
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

/* Checks the arguments as QEMU checks its own. Returns false with an error in @r. */
static bool check_arguments(const struct command *command, struct json_object *arguments, struct qmp_reply *r)
{
	json_object_object_foreach(arguments, key, value)
	{
		const struct argument *a = command->arguments;

		while (a->name && strcmp(a->name, key))
			a++;
		if (!a->name) {
			qmp_fail(r, NULL, "Parameter '%.64s' is unexpected", key);
			return false;
		}
		if (!json_object_is_type(value, a->type)) {
			qmp_fail(r, NULL, "Invalid parameter type for '%s', expected: %s", key,
				 a->type == json_type_int ? "integer" : json_type_to_name(a->type));
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
	qmp_fail(reply, "CommandNotFound", "The command %.64s has not been found", command);
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
