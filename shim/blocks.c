/* SPDX-License-Identifier: GPL-2.0-or-later */
/* set-ram-blocks: guest RAM of a QEMU that does not export its symbols. */
#include "commands_inside.h"

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
void set_ram_blocks(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
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
