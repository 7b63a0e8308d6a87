/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * JSON as QEMU reads it.
 *
 * json-c holds the values, but does not parse them: QMP clients are told what is wrong in QEMU's words, QEMU takes strings in
 * single quotes, and json-c takes control bytes and clamps numbers.
 */
#include "json.h"
#include "utf8.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct parser {
	const char *at;
	char *desc;
	size_t desc_size;
};

__attribute__((format(printf, 2, 3))) static bool fail(struct parser *p, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(p->desc, p->desc_size, fmt, ap);
	va_end(ap);
	return false;
}

static char peek(struct parser *p)
{
	while (*p->at == ' ')
		p->at++;
	return *p->at;
}

static bool take(struct parser *p, char c)
{
	bool here = peek(p) == c;

	p->at += here;
	return here;
}

/* Reads `\uXXXX` at @s. */
static bool read_hex(const char *s, uint32_t *code)
{
	*code = 0;
	if (s[0] != '\\' || s[1] != 'u')
		return false;
	for (int i = 2; i < 6; i++) {
		static const char digits[] = "0123456789abcdef";
		const char *digit = s[i] ? strchr(digits, s[i] | 0x20) : NULL;

		if (!digit || (s[i] < '0' || (s[i] > '9' && s[i] < 'A')))
			return false;
		*code = *code << 4 | (uint32_t)(digit - digits);
	}
	return true;
}

/* Reads `\uXXXX`, or two of them that are a surrogate pair. */
static bool unescape_code(struct parser *p, const char **at, const char *quote, char **out)
{
	const char *s = *at, *end = s + 6;
	uint32_t code, low;
	bool good = read_hex(s, &code);

	if (good && code >= 0xd800 && code <= 0xdbff && read_hex(end, &low) && low >= 0xdc00 && low <= 0xdfff) {
		code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff));
		end += 6;
	}
	if (!good || !utf8_is_character(code)) {
		int size = (int)((end <= quote ? end : quote + 1) - s);

		return fail(p, "%.*s is not a valid Unicode character", size, s);
	}
	*at = end;
	*out = utf8_encode(*out, code);
	return true;
}

static bool unescape(struct parser *p, const char **at, const char *quote, char **out)
{
	static const char from[] = "\"'\\/bfnrt", to[] = "\"'\\/\b\f\n\r\t";
	const char *found;

	if ((*at)[1] == 'u')
		return unescape_code(p, at, quote, out);
	found = strchr(from, (*at)[1]);
	if (!found || !*found)
		return fail(p, "invalid escape sequence in string");
	*(*out)++ = to[found - from];
	*at += 2;
	return true;
}

/* Where the string ends whose first quote is at @s. */
static const char *find_quote(const char *s)
{
	const char *end = s + 1;

	while (*end != *s)
		end += *end == '\\' ? 2 : 1;
	return end;
}

/* Reads a string into memory that the caller frees. */
static bool parse_string(struct parser *p, char **string)
{
	const char *quote = find_quote(p->at++);
	char *out = malloc((size_t)(quote - p->at) + 1); /* no character gets longer by being decoded */

	*string = out;
	if (!out)
		return fail(p, "out of memory");
	while (p->at != quote) {
		const unsigned char *at = (const unsigned char *)p->at;

		if (*p->at == '\\') {
			if (!unescape(p, &p->at, quote, &out))
				return false;
		} else if (utf8_decode(&at) < 0) {
			return fail(p, "invalid UTF-8 sequence in string");
		} else {
			while (p->at != (const char *)at)
				*out++ = *p->at++;
		}
	}
	*out = '\0';
	p->at++;
	return true;
}

static bool parse_number(struct parser *p, struct json_object **value)
{
	const char *begin = p->at;
	size_t size = strspn(begin, "+-.0123456789eE");

	p->at += size;
	if (strspn(begin, "-0123456789") >= size) {
		errno = 0;
		*value = json_object_new_int64(strtoll(begin, NULL, 10));
		if (!errno)
			return true;
		json_object_put(*value);
		*value = NULL;
		errno = 0;
		if (*begin != '-') {
			*value = json_object_new_uint64(strtoull(begin, NULL, 10));
			if (!errno)
				return true;
			json_object_put(*value);
			*value = NULL;
		}
	}
	*value = json_object_new_double(strtod(begin, NULL));
	return true;
}

static bool parse_keyword(struct parser *p, struct json_object **value)
{
	size_t size = strspn(p->at, "abcdefghijklmnopqrstuvwxyz");
	const char *word = p->at;

	p->at += size;
	if (size == 4 && !strncmp(word, "true", size))
		*value = json_object_new_boolean(true);
	else if (size == 5 && !strncmp(word, "false", size))
		*value = json_object_new_boolean(false);
	else if (size != 4 || strncmp(word, "null", size))
		return fail(p, "invalid keyword '%.*s'", (int)size, word);
	return true;
}

static bool parse_value(struct parser *p, struct json_object **value);

static bool parse_pair(struct parser *p, struct json_object *o)
{
	struct json_object *value = NULL;
	char *key = NULL;
	bool good = false;

	if (peek(p) != '"' && peek(p) != '\'') {
		if (parse_value(p, &value))
			fail(p, "key is not a string in object");
		json_object_put(value);
		return false;
	}
	if (!parse_string(p, &key))
		;
	else if (!take(p, ':'))
		fail(p, "missing : in object pair");
	else if (!parse_value(p, &value))
		;
	else if (json_object_object_get_ex(o, key, NULL))
		fail(p, "duplicate key");
	else
		good = true;
	if (good)
		json_object_object_add(o, key, value);
	else
		json_object_put(value);
	free(key);
	return good;
}

static bool parse_object(struct parser *p, struct json_object **value)
{
	struct json_object *o = json_object_new_object();

	*value = o;
	if (take(p, '}'))
		return true;
	do {
		if (!parse_pair(p, o))
			return false;
	} while (take(p, ','));
	return take(p, '}') || fail(p, "expected separator in dict");
}

static bool parse_array(struct parser *p, struct json_object **value)
{
	struct json_object *list = json_object_new_array();

	*value = list;
	if (take(p, ']'))
		return true;
	do {
		struct json_object *item = NULL;

		if (!parse_value(p, &item)) {
			json_object_put(item);
			return false;
		}
		json_object_array_add(list, item);
	} while (take(p, ','));
	return take(p, ']') || fail(p, "expected separator in list");
}

/* On failure too, *@value is the caller's to put. */
static bool parse_value(struct parser *p, struct json_object **value)
{
	char c = peek(p), *string = NULL;
	bool good;

	*value = NULL;
	switch (c) {
	case '{':
		p->at++;
		return parse_object(p, value);
	case '[':
		p->at++;
		return parse_array(p, value);
	case '"':
	case '\'':
		good = parse_string(p, &string);
		if (good)
			*value = json_object_new_string(string);
		free(string);
		return good;
	default:
		if (c == '-' || (c >= '0' && c <= '9'))
			return parse_number(p, value);
		if (c >= 'a' && c <= 'z')
			return parse_keyword(p, value);
		return fail(p, "expecting value");
	}
}

bool json_parse(const char *text, struct json_object **value, char *desc, size_t desc_size)
{
	struct parser p = { .at = text, .desc = desc, .desc_size = desc_size };

	if (parse_value(&p, value))
		return true;
	json_object_put(*value);
	*value = NULL;
	return false;
}
