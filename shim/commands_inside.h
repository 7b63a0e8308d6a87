/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the files of the commands share: commands.c (the table, setting, events), query.c (what is told), blocks.c (guest RAM
 * as the controller says it is) and handover.c (leaving and taking over).
 */
#ifndef RAMLOCK_COMMANDS_INSIDE_H
#define RAMLOCK_COMMANDS_INSIDE_H

#include <json-c/json.h>
#include <string.h>

#include "commands.h"

/* Runs a command; @arguments have the types of the table. */
typedef void command_fn(struct commands *c, struct json_object *arguments, struct qmp_reply *r);

command_fn query_ram_minguarantee, query_ram_blocks, query_version, query_ramlock;
command_fn set_ram_blocks;
command_fn ramlock_eject, ramlock_adopt, ramlock_follow_discards;

static inline void read_status(struct commands *c)
{
	if (c->at_once)
		locker_peek(c->locker, &c->status);
	else
		locker_query(c->locker, &c->status);
}

static inline void add(struct json_object *o, const char *key, struct json_object *value)
{
	json_object_object_add(o, key, value);
}

static inline void add_string(struct json_object *o, const char *key, const char *value)
{
	add(o, key, json_object_new_string(value));
}

static inline void add_size(struct json_object *o, const char *key, uint64_t value)
{
	add(o, key, json_object_new_uint64(value));
}

static inline void add_bool(struct json_object *o, const char *key, bool value)
{
	add(o, key, json_object_new_boolean(value));
}

/* Adds {"reason", "desc"} as @key. */
static inline void add_reason(struct json_object *o, const char *key, const char *reason, const char *desc)
{
	struct json_object *why = json_object_new_object();

	add_string(why, "reason", reason);
	add_string(why, "desc", desc);
	add(o, key, why);
}

static inline const char *order_name(enum order order)
{
	return order == ORDER_ADDRESS ? "address" : "resident";
}

static inline bool read_order(const char *name, enum order *order)
{
	if (strcmp(name, "resident") && strcmp(name, "address"))
		return false;
	*order = !strcmp(name, "address") ? ORDER_ADDRESS : ORDER_RESIDENT;
	return true;
}

/* Reads the number @key, if it is there. Returns false when it is not one from @min to @max. */
static inline bool read_number(struct json_object *o, const char *key, int64_t min, int64_t max, uint32_t *out)
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
static inline bool read_size(struct json_object *o, const char *name, uint64_t *out)
{
	struct json_object *value = NULL;

	if (!json_object_object_get_ex(o, name, &value))
		return true;
	if (!json_object_is_type(value, json_type_int) || json_object_get_int64(value) < 0)
		return false;
	*out = json_object_get_uint64(value);
	return true;
}

#endif
