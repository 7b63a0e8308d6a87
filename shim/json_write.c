/* SPDX-License-Identifier: GPL-2.0-or-later */
/* JSON as QEMU writes it: ASCII, in one line. */
#include "json.h"
#include "utf8.h"

#include <errno.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int put(struct json_text *t, const char *data, size_t size)
{
	size_t capacity = t->capacity ? t->capacity : 1024;
	char *grown;

	if (size > t->max - t->size)
		return -ENOBUFS;
	while (capacity < t->size + size)
		capacity *= 2;
	if (capacity != t->capacity) {
		grown = realloc(t->data, capacity);
		if (!grown)
			return -ENOMEM;
		t->data = grown;
		t->capacity = capacity;
	}
	memcpy(t->data + t->size, data, size);
	t->size += size;
	return 0;
}

static int put_text(struct json_text *t, const char *text)
{
	return put(t, text, strlen(text));
}

/* Writes one character of a string. */
static int put_character(struct json_text *t, uint32_t code)
{
	static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
	const char *found = code ? strchr(from, code < 0x80 ? (int)code : 0x7f) : NULL;
	char out[16];

	if (found) {
		snprintf(out, sizeof(out), "\\%c", to[found - from]);
	} else if (code < 0x10000) {
		snprintf(out, sizeof(out), "\\u%04X", code);
	} else {
		code -= 0x10000;
		snprintf(out, sizeof(out), "\\u%04X\\u%04X", 0xd800 | code >> 10, 0xdc00 | (code & 0x3ff));
	}
	return put_text(t, out);
}

/* Bytes that are no characters become U+FFFD. */
static int put_string(struct json_text *t, const char *string)
{
	int err = put(t, "\"", 1);

	for (const unsigned char *p = (const unsigned char *)string; *p && !err;) {
		size_t plain = 0;
		int32_t code;

		while (p[plain] >= 0x20 && p[plain] < 0x7f && p[plain] != '"' && p[plain] != '\\')
			plain++;
		if (plain) {
			err = put(t, (const char *)p, plain);
			p += plain;
			continue;
		}
		code = utf8_decode(&p);
		err = put_character(t, code < 0 ? 0xfffd : (uint32_t)code);
	}
	return err ? err : put(t, "\"", 1);
}

static int put_number(struct json_text *t, struct json_object *o)
{
	char out[64];

	if (json_object_is_type(o, json_type_double) && isinf(json_object_get_double(o)))
		snprintf(out, sizeof(out), "%s", json_object_get_double(o) < 0 ? "-1e999" : "1e999"); /* `inf` is no JSON */
	else if (json_object_is_type(o, json_type_double))
		snprintf(out, sizeof(out), "%.17g", json_object_get_double(o));
	else if (json_object_get_int64(o) < 0)
		snprintf(out, sizeof(out), "%" PRId64, json_object_get_int64(o));
	else
		snprintf(out, sizeof(out), "%" PRIu64, json_object_get_uint64(o));
	return put_text(t, out);
}

static int put_value(struct json_text *t, struct json_object *o);

static int put_object(struct json_text *t, struct json_object *o)
{
	int err = put(t, "{", 1);
	const char *comma = "";

	json_object_object_foreach(o, key, value)
	{
		if (!err)
			err = put_text(t, comma);
		if (!err)
			err = put_string(t, key);
		if (!err)
			err = put(t, ": ", 2);
		if (!err)
			err = put_value(t, value);
		comma = ", ";
	}
	return err ? err : put(t, "}", 1);
}

static int put_array(struct json_text *t, struct json_object *o)
{
	int err = put(t, "[", 1);

	for (size_t i = 0; i < json_object_array_length(o) && !err; i++) {
		err = put_text(t, i ? ", " : "");
		if (!err)
			err = put_value(t, json_object_array_get_idx(o, i));
	}
	return err ? err : put(t, "]", 1);
}

static int put_value(struct json_text *t, struct json_object *o)
{
	switch (json_object_get_type(o)) {
	case json_type_object:
		return put_object(t, o);
	case json_type_array:
		return put_array(t, o);
	case json_type_string:
		return put_string(t, json_object_get_string(o));
	case json_type_boolean:
		return put_text(t, json_object_get_boolean(o) ? "true" : "false");
	case json_type_null:
		return put_text(t, "null");
	default:
		return put_number(t, o);
	}
}

int json_write(struct json_text *text, struct json_object *o)
{
	size_t before = text->size;
	int err = put_value(text, o);

	if (!err)
		err = put(text, "\r\n", 2);
	if (err)
		text->size = before;
	return err;
}
