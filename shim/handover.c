/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * ramlock-eject and ramlock-adopt: how a shim leaves, and how another one in the same process takes over what it held; and
 * what whoever finds a shim may want of it besides.
 */
#include "commands_inside.h"

#include <errno.h>

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
		locker_reopen(c->locker);
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
void ramlock_eject(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *o = NULL;
	bool keep;

	keep = json_object_object_get_ex(arguments, "keep", &o) && json_object_get_boolean(o);
	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving already");
		return;
	}
	c->eject = true;
	locker_close(c->locker, !keep);
	if (keep)
		give(c, r);
	else
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

/* Answers at once; query-ram-minguarantee tells when it is so. */
void ramlock_follow_discards(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	(void)arguments;
	if (c->eject) {
		qmp_fail(r, NULL, "the shim is leaving");
		return;
	}
	locker_follow(c->locker);
	r->value = json_object_new_object();
}

/* Takes over what "ramlock-eject keep" of another shim in this process returned. */
void ramlock_adopt(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
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
	memset(b, 0, sizeof(*b));
	if (!read_wish(wish_object, &wish) || !read_extents(books, "held", &b->held) ||
	    !read_extents(books, "foreign", &b->foreign) || !read_extents(books, "on-fault", &b->on_fault)) {
		qmp_fail(r, NULL, "Parameters 'books' and 'wish' expect what ramlock-eject returned");
		return;
	}
	c->look_now(c->opaque, true);
	err = locker_adopt(c->locker, b, &wish);
	if (err)
		qmp_fail(r, NULL, err == -EBUSY ? "[busy] the lock thread is at work: try again" :
						  "[range] these are not locked parts of guest RAM");
	else
		r->value = json_object_new_object();
}
