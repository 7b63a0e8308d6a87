/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Where a request ends in a stream of bytes.
 *
 * A request ends where its braces and its brackets are closed, and needs no newline. Its tokens are recognised on the way, so
 * that quoted braces do not count, and a byte that fits nowhere is noticed at once: then all since the last request is
 * dropped, and input is skipped up to a byte that can begin something new: a structural character, a control byte, 0xFE or
 * 0xFF. All that, the strings in single quotes and which byte ends a number are QEMU's rules, tested against its monitor.
 */
#include "framing.h"

#include <stdlib.h>
#include <string.h>

enum {
	AT_START, /* between tokens */
	IN_KEYWORD,
	IN_DOUBLE,
	IN_DOUBLE_ESCAPE,
	IN_SINGLE,
	IN_SINGLE_ESCAPE,
	AFTER_MINUS,
	AFTER_ZERO,
	IN_INTEGER,
	AFTER_POINT,
	IN_FRACTION,
	AFTER_E,
	AFTER_E_SIGN,
	IN_EXPONENT,
	RECOVERING,
	/* What a byte can mean, other than a state. */
	ENDS, /* it is the last one of its token */
	ENDED, /* the token ended before it */
	BAD,
};

enum { KEPT_MAX = 4096 };

static bool is_digit(unsigned char c)
{
	return c >= '0' && c <= '9';
}

static bool is_structural(unsigned char c)
{
	return c && strchr("{}[]:,", c);
}

static bool is_space(unsigned char c)
{
	return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static int begin_token(unsigned char c)
{
	if (is_structural(c))
		return ENDS;
	if (c >= 'a' && c <= 'z')
		return IN_KEYWORD;
	if (c >= '1' && c <= '9')
		return IN_INTEGER;
	switch (c) {
	case '"':
		return IN_DOUBLE;
	case '\'':
		return IN_SINGLE;
	case '-':
		return AFTER_MINUS;
	case '0':
		return AFTER_ZERO;
	default:
		return BAD;
	}
}

/* In a token that has no last byte of its own: any byte that is no @part of it ends it. */
static int goes_on(bool part, int state)
{
	return part ? state : ENDED;
}

static int in_string(unsigned char c, char quote, int state, int escape)
{
	if (c < 0x20 || c > 0xfd)
		return BAD;
	return c == (unsigned char)quote ? ENDS : c == '\\' ? escape : state;
}

static int advance(int state, unsigned char c)
{
	bool e = c == 'e' || c == 'E';

	switch (state) {
	case AT_START:
		return begin_token(c);
	case IN_KEYWORD:
		return goes_on(c >= 'a' && c <= 'z', IN_KEYWORD);
	case IN_DOUBLE:
		return in_string(c, '"', IN_DOUBLE, IN_DOUBLE_ESCAPE);
	case IN_DOUBLE_ESCAPE:
		return c < 0x20 || c > 0xfd ? BAD : IN_DOUBLE;
	case IN_SINGLE:
		return in_string(c, '\'', IN_SINGLE, IN_SINGLE_ESCAPE);
	case IN_SINGLE_ESCAPE:
		return c < 0x20 || c > 0xfd ? BAD : IN_SINGLE;
	case AFTER_MINUS:
		return c == '0' ? AFTER_ZERO : is_digit(c) ? IN_INTEGER : BAD;
	case AFTER_ZERO:
		return is_digit(c) ? BAD : goes_on(c == '.', AFTER_POINT);
	case IN_INTEGER:
		return is_digit(c) ? IN_INTEGER : e ? AFTER_E : goes_on(c == '.', AFTER_POINT);
	case AFTER_POINT:
		return is_digit(c) ? IN_FRACTION : BAD;
	case IN_FRACTION:
		return e ? AFTER_E : goes_on(is_digit(c), IN_FRACTION);
	case AFTER_E:
		if (c == '+' || c == '-')
			return AFTER_E_SIGN;
		return is_digit(c) ? IN_EXPONENT : BAD;
	case AFTER_E_SIGN:
		return is_digit(c) ? IN_EXPONENT : BAD;
	default: /* IN_EXPONENT */
		return goes_on(is_digit(c), IN_EXPONENT);
	}
}

static bool append(struct framing *f, char c)
{
	if (f->size + 2 > f->capacity) {
		size_t capacity = f->capacity ? 2 * f->capacity : 256;
		char *text = realloc(f->text, capacity);

		if (!text)
			return false;
		f->text = text;
		f->capacity = capacity;
	}
	f->text[f->size++] = c;
	f->text[f->size] = '\0';
	return true;
}

/* Counts a token that has ended; @c is its last byte. Returns whether the request has ended too. */
static bool end_token(struct framing *f, char c)
{
	f->braces += (c == '{') - (c == '}');
	f->brackets += (c == '[') - (c == ']');
	return f->braces < 0 || f->brackets < 0 || (!f->braces && !f->brackets);
}

static void reset(struct framing *f)
{
	f->braces = f->brackets = 0;
	f->skipping = false;
}

/* What to tell when a token has ended, if anything; @structural is the token where it is of one byte, else 0. */
static enum framing_result after_token(struct framing *f, char structural, int depth)
{
	bool skipped = f->skipping;

	f->state = AT_START;
	if (end_token(f, structural)) {
		reset(f);
		return skipped ? FRAMING_MORE : FRAMING_REQUEST;
	}
	if (skipped || f->braces + f->brackets <= depth)
		return FRAMING_MORE;
	f->skipping = true;
	return FRAMING_TOO_DEEP;
}

/* Adds a byte to the token, or begins one with it. */
static enum framing_result store(struct framing *f, char c, bool begins, size_t max)
{
	if (f->skipping)
		return FRAMING_MORE;
	if (f->size >= max) {
		f->skipping = true;
		return FRAMING_TOO_LONG;
	}
	if (begins) {
		/* Two such as 1 and -1 are to be two for the parser too. */
		if (f->size && !is_structural((unsigned char)f->text[f->size - 1]) && !is_structural((unsigned char)c) &&
		    !append(f, ' '))
			return FRAMING_NO_MEMORY;
		f->token = f->size;
	}
	return append(f, c) ? FRAMING_MORE : FRAMING_NO_MEMORY;
}

static enum framing_result stray(struct framing *f, char c)
{
	if (f->state == AT_START)
		f->token = f->size;
	reset(f);
	f->state = RECOVERING;
	return append(f, c) ? FRAMING_STRAY : FRAMING_NO_MEMORY;
}

/* Takes one byte, or leaves it for the next call when the token ended before it. */
static enum framing_result take(struct framing *f, char c, bool *used, size_t max, int depth)
{
	int state;
	enum framing_result result, ended;
	bool begins;

	*used = true;
	if (f->state == RECOVERING) {
		unsigned char u = (unsigned char)c;

		if (u >= 0x20 && u < 0xfe && !is_structural(u))
			return FRAMING_MORE;
		f->state = AT_START;
	}
	if (f->state == AT_START && is_space((unsigned char)c))
		return FRAMING_MORE;
	state = advance(f->state, (unsigned char)c);
	if (state == ENDED) {
		*used = false;
		return after_token(f, 0, depth);
	}
	if (state == BAD)
		return stray(f, c);
	begins = f->state == AT_START;
	result = store(f, c, begins, max);
	if (state != ENDS) {
		f->state = state;
		return result;
	}
	ended = after_token(f, begins ? c : 0, depth); /* of a request that is too long too */
	return result == FRAMING_MORE ? ended : result;
}

enum framing_result framing_feed(struct framing *f, const char *data, size_t size, size_t *used, size_t max, int depth)
{
	enum framing_result result = FRAMING_MORE;

	for (*used = 0; *used < size && result == FRAMING_MORE;) {
		bool taken;

		result = take(f, data[*used], &taken, max, depth);
		*used += taken;
	}
	return result;
}

void framing_next(struct framing *f)
{
	if (f->capacity > KEPT_MAX) { /* it is QEMU's memory */
		free(f->text);
		f->text = NULL;
		f->capacity = 0;
	}
	f->size = f->token = 0;
}

void framing_deinit(struct framing *f)
{
	free(f->text);
	*f = (struct framing){ .state = AT_START };
}
