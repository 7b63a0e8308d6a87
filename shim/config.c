/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The RAMLOCK_* settings, from the environment or from a text of the same names. */
#include "config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

__extension__ typedef unsigned __int128 u128;

enum { MILLION = 1000000, SIZE_TEXT = 64 /* characters of the longest size */ };

static const char spaces[] = " \t\n\v\f\r";

/* Reads DIGITS[.DIGITS], with up to six after the point, as millionths. Returns what follows; NULL: there is no number. */
static const char *parse_millionths(const char *p, u128 *out, bool *fraction)
{
	u128 value = 0;
	unsigned int scale = MILLION;

	*fraction = false;
	if (*p < '0' || *p > '9')
		return NULL;
	for (; *p >= '0' && *p <= '9'; p++) {
		if (value > UINT64_MAX)
			return NULL;
		value = value * 10 + (unsigned int)(*p - '0');
	}
	value *= MILLION;
	if (*p == '.') {
		p++;
		if (*p < '0' || *p > '9')
			return NULL;
		for (; *p >= '0' && *p <= '9'; p++) {
			if (scale == 1)
				return NULL;
			scale /= 10;
			value += scale * (unsigned int)(*p - '0');
			*fraction |= *p != '0';
		}
	}
	*out = value;
	return p;
}

/* The binary exponent of a unit, -1 for an unknown one. */
static int unit_shift(const char *unit)
{
	static const char letters[] = "KMGT";
	const char *letter;

	if (!*unit || !strcasecmp(unit, "B"))
		return 0;
	letter = strchr(letters, *unit & ~0x20);
	if (!letter || (unit[1] && strcasecmp(unit + 1, "iB")))
		return -1;
	return 10 * (int)(letter - letters + 1);
}

int guarantee_parse(const char *text, struct guarantee *out, const char **why)
{
	char copy[SIZE_TEXT + 1];
	const char *unit;
	u128 millionths;
	bool fraction;
	size_t n;
	int shift;

	*why = "is not a size: use bytes, 512M, 2G, 50% or all";
	text += strspn(text, spaces);
	n = strlen(text);
	while (n && strchr(spaces, text[n - 1]))
		n--;
	if (n >= sizeof(copy))
		return -EINVAL;
	memcpy(copy, text, n);
	copy[n] = '\0';

	if (!strcasecmp(copy, "all")) {
		*out = (struct guarantee){ .kind = GUARANTEE_ALL };
		return 0;
	}
	unit = parse_millionths(copy, &millionths, &fraction);
	if (!unit)
		return -EINVAL;
	unit += strspn(unit, spaces);
	if (!strcmp(unit, "%")) {
		*why = fraction ? "is not a whole percentage" : "is more than 100%";
		if (fraction || millionths > (u128)100 * MILLION)
			return -EINVAL;
		*out = (struct guarantee){ GUARANTEE_PERCENT, (uint64_t)(millionths / 100) };
		return 0;
	}
	shift = unit_shift(unit);
	if (shift < 0) {
		*why = "has an unknown unit: use K, M, G, T or KiB, MiB, GiB, TiB";
		return -EINVAL;
	}
	if (!shift && fraction) {
		*why = "has a fraction of a byte";
		return -EINVAL;
	}
	if (millionths >> (127 - shift) || (millionths << shift) / MILLION > INT64_MAX) {
		*why = "is too large";
		return -EINVAL;
	}
	millionths = (millionths << shift) / MILLION;
	if (!*unit && millionths > 0 && millionths < 1 << 20) {
		*why = "is a very small number of bytes: add a unit, such as M";
		return -EINVAL;
	}
	*out = (struct guarantee){ GUARANTEE_BYTES, (uint64_t)millionths };
	return 0;
}

uint64_t guarantee_resolve(const struct guarantee *g, uint64_t ram)
{
	switch (g->kind) {
	case GUARANTEE_BYTES:
		return g->value;
	case GUARANTEE_PERCENT:
		return (uint64_t)((u128)ram * g->value / MILLION);
	case GUARANTEE_ALL:
		break;
	}
	return ram;
}

typedef const char *config_get_fn(void *opaque, const char *name);

/* Reads a decimal number from @min to @max; *out stays as it is when there is none. */
static bool parse_number(const char *text, unsigned long min, unsigned long max, uint32_t *out)
{
	unsigned long value;
	char *end;

	errno = 0;
	value = strtoul(text, &end, 10);
	if (errno || *end || *text < '0' || *text > '9' || value < min || value > max)
		return false;
	*out = (uint32_t)value;
	return true;
}

static bool parse_uid(const char *text, uid_t *out)
{
	return parse_number(text, 0, UINT32_MAX - 1, out);
}

static bool is_of(const char *path, uid_t uid)
{
	struct stat st;

	return !stat(path, &st) && st.st_uid == uid;
}

/*
 * The uid that started this process, or 0. One that root starts as another user, as libvirt does, shares that uid with other
 * VMs, and they are not to reach it. A person's processes come from one of theirs, or have a runtime directory.
 */
static uid_t launcher(void)
{
	const char *runtime = getenv("XDG_RUNTIME_DIR");
	char parent[64];

	snprintf(parent, sizeof(parent), "/proc/%d", (int)getppid());
	return is_of(parent, getuid()) || (runtime && is_of(runtime, getuid())) ? getuid() : 0;
}

/* Reads 0 or 1, if @text has something; *out is the default. */
static void read_switch(const char *name, const char *text, bool *out, void (*warn)(const char *fmt, ...))
{
	if (!text || !*text)
		return;
	if (!strcmp(text, "0") || !strcmp(text, "1"))
		*out = *text == '1';
	else
		warn("%s: '%s' is neither 0 nor 1; using %d", name, text, *out);
}

static void config_read(struct config *c, config_get_fn *get, void *opaque, void (*warn)(const char *fmt, ...))
{
	const char *text, *why;

	memset(c, 0, sizeof(*c));
	c->prefault = true;
	c->owner = launcher();

	text = get(opaque, "RAMLOCK_GUARANTEE");
	if (text && *text && guarantee_parse(text, &c->guarantee, &why)) {
		snprintf(c->guarantee_error, sizeof(c->guarantee_error), "RAMLOCK_GUARANTEE: '%.64s' %s; none is set", text, why);
		warn("%s", c->guarantee_error);
	}

	text = get(opaque, "RAMLOCK_ORDER");
	if (text && !strcmp(text, "address"))
		c->order = ORDER_ADDRESS;
	else if (text && *text && strcmp(text, "resident"))
		warn("RAMLOCK_ORDER: '%s' is neither resident nor address; using resident", text);

	read_switch("RAMLOCK_PREFAULT", get(opaque, "RAMLOCK_PREFAULT"), &c->prefault, warn);

	text = get(opaque, "RAMLOCK_HOLD_BUDGET");
	if (text && *text && !parse_number(text, HOLD_BUDGET_MIN_US, HOLD_BUDGET_MAX_US, &c->hold_budget_us))
		warn("RAMLOCK_HOLD_BUDGET: '%s' is not a number of microseconds from %d to %d; using %d", text,
		     HOLD_BUDGET_MIN_US, HOLD_BUDGET_MAX_US, HOLD_BUDGET_US);

	text = get(opaque, "RAMLOCK_THREADS");
	if (text && *text && !parse_number(text, 1, THREADS_MAX, &c->threads))
		warn("RAMLOCK_THREADS: '%s' is not a number from 1 to %d; using 1", text, THREADS_MAX);

	text = get(opaque, "RAMLOCK_HOST_RESERVE");
	if (text && *text && strcasecmp(text, "default")) {
		struct guarantee reserve;

		why = "is not a number of bytes above 0";
		if (!guarantee_parse(text, &reserve, &why) && reserve.kind == GUARANTEE_BYTES && reserve.value)
			c->host_reserve = reserve.value;
		else
			warn("RAMLOCK_HOST_RESERVE: '%s' %s; using the default", text, why);
	}

	read_switch("RAMLOCK_FOLLOW_DISCARDS", get(opaque, "RAMLOCK_FOLLOW_DISCARDS"), &c->follow_discards, warn);
	read_switch("RAMLOCK_MONITOR", get(opaque, "RAMLOCK_MONITOR"), &c->monitor, warn);

	text = get(opaque, "RAMLOCK_SOCKET");
	if (text && strlen(text) >= sizeof(c->socket))
		warn("RAMLOCK_SOCKET: the path is longer than %zu bytes; using the usual place", sizeof(c->socket) - 1);
	else if (text && *text && *text != '/')
		warn("RAMLOCK_SOCKET: '%s' is not an absolute path; using the usual place", text);
	else if (text)
		strcpy(c->socket, text);

	text = get(opaque, "RAMLOCK_ALLOW_UID");
	if (text && *text) {
		c->has_allow_uid = parse_uid(text, &c->allow_uid);
		if (!c->has_allow_uid)
			warn("RAMLOCK_ALLOW_UID: '%s' is not a uid; left out", text);
	}
	text = get(opaque, "RAMLOCK_OWNER_UID");
	if (text && *text && !parse_uid(text, &c->owner))
		warn("RAMLOCK_OWNER_UID: '%s' is not a uid; left out", text);
}

static const char *from_environment(void *opaque, const char *name)
{
	(void)opaque;
	return getenv(name);
}

void config_from_environment(struct config *c, void (*warn)(const char *fmt, ...))
{
	config_read(c, from_environment, NULL, warn);
}

struct text_source {
	const char *text;
	char value[4096];
};

static const char *from_text(void *opaque, const char *name)
{
	struct text_source *s = opaque;
	size_t n = strlen(name);

	for (const char *line = s->text; *line; line += strcspn(line, "\n"), line += *line == '\n') {
		size_t length = strcspn(line, "\n");

		if (strncmp(line, name, n) || line[n] != '=' || length - n - 1 >= sizeof(s->value))
			continue;
		memcpy(s->value, line + n + 1, length - n - 1);
		s->value[length - n - 1] = '\0';
		return s->value;
	}
	return NULL;
}

void config_from_text(struct config *c, const char *text, void (*warn)(const char *fmt, ...))
{
	struct text_source source = { .text = text };

	config_read(c, from_text, &source, warn);
}
