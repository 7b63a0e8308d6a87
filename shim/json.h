/* SPDX-License-Identifier: GPL-2.0-or-later */
/* JSON as QEMU reads and writes it: text to json-c's objects and back (pure). */
#ifndef RAMLOCK_JSON_H
#define RAMLOCK_JSON_H

#include <stdbool.h>
#include <stddef.h>

struct json_object;

/*
 * Parses @text, one value whose tokens are well formed and which is nested no deeper than the stack allows (framing.h sees to
 * both). Returns false with the error in @desc: what QEMU says behind "JSON parse error, ". A null is NULL, as
 * everywhere in json-c. Strings are kept in modified UTF-8: a NUL character is C0 80, so that no string ends early.
 */
bool json_parse(const char *text, struct json_object **value, char *desc, size_t desc_size);

struct json_text {
	char *data;
	size_t size, capacity;
	size_t max; /* of `size` */
};

/* Appends @o as one line of ASCII, spaced as QEMU does it. Returns 0, -ENOBUFS or -ENOMEM; then nothing was appended. */
int json_write(struct json_text *text, struct json_object *o);

#endif
