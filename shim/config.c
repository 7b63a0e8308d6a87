/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The RAMLOCK_* environment. */
#include "config.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

__extension__ typedef unsigned __int128 u128;

enum { MILLION = 1000000 };

/* Reads DIGITS[.DIGITS] as millionths. Returns the first character after it, or NULL when there is no number. */
static const char *parse_millionths(const char *p, u128 *out)
{
	u128 value = 0;
	unsigned int scale = MILLION;

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
			scale /= 10;
			value += scale * (unsigned int)(*p - '0');
		}
	}
	*out = value;
	return p;
}

/* The binary exponent of a unit, 0 for none, -1 for an unknown one. */
static int unit_shift(const char *unit)
{
	static const char letters[] = "KMGTPE";
	const char *letter;

	if (!*unit)
		return 0;
	letter = strchr(letters, *unit & ~0x20);
	if (!letter || (unit[1] && strcasecmp(unit + 1, "iB")))
		return -1;
	return 10 * (int)(letter - letters + 1);
}

int guarantee_parse(const char *text, struct guarantee *out, const char **why)
{
	const char *unit;
	u128 millionths;
	int shift;

	if (!strcasecmp(text, "all")) {
		*out = (struct guarantee){ .kind = GUARANTEE_ALL };
		return 0;
	}
	unit = parse_millionths(text, &millionths);
	if (!unit) {
		*why = "is not a size: use bytes, 512M, 2G, 50% or all";
		return -EINVAL;
	}
	if (!strcmp(unit, "%")) {
		if (millionths > (u128)100 * MILLION) {
			*why = "is more than 100%";
			return -EINVAL;
		}
		*out = (struct guarantee){ GUARANTEE_PERCENT, (uint64_t)(millionths / 100) };
		return 0;
	}
	shift = unit_shift(unit);
	if (shift < 0) {
		*why = "has an unknown unit: use K, M, G, T or KiB, MiB, GiB, TiB";
		return -EINVAL;
	}
	millionths = (millionths << shift) / MILLION;
	if (millionths > INT64_MAX) {
		*why = "is too large";
		return -EINVAL;
	}
	if (!shift && millionths > 0 && millionths < 1 << 20) {
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

void config_from_environment(struct config *c, void (*warn)(const char *fmt, ...))
{
	const char *text, *why;
	char *end;

	memset(c, 0, sizeof(*c));
	c->prefault = true;
	c->owner = getuid();

	text = getenv("RAMLOCK_GUARANTEE");
	if (text && *text && guarantee_parse(text, &c->guarantee, &why))
		warn("RAMLOCK_GUARANTEE: '%s' %s; starting without a guarantee", text, why);

	text = getenv("RAMLOCK_ORDER");
	if (text && !strcmp(text, "address"))
		c->order = ORDER_ADDRESS;
	else if (text && *text && strcmp(text, "resident"))
		warn("RAMLOCK_ORDER: '%s' is neither resident nor address; using resident", text);

	text = getenv("RAMLOCK_PREFAULT");
	if (text && !strcmp(text, "0"))
		c->prefault = false;
	else if (text && *text && strcmp(text, "1"))
		warn("RAMLOCK_PREFAULT: '%s' is neither 0 nor 1; using 1", text);

	text = getenv("RAMLOCK_SOCKET");
	if (text && strlen(text) >= sizeof(c->socket))
		warn("RAMLOCK_SOCKET: the path is longer than %zu bytes; using the usual place", sizeof(c->socket) - 1);
	else if (text && *text && *text != '/')
		warn("RAMLOCK_SOCKET: '%s' is not an absolute path; using the usual place", text);
	else if (text)
		strcpy(c->socket, text);

	text = getenv("RAMLOCK_ALLOW_UID");
	if (text && *text) {
		unsigned long uid;

		errno = 0;
		uid = strtoul(text, &end, 10);
		c->has_allow_uid = !errno && !*end && *text >= '0' && *text <= '9' && uid < UINT32_MAX;
		c->allow_uid = (uid_t)uid;
		if (!c->has_allow_uid)
			warn("RAMLOCK_ALLOW_UID: '%s' is not a uid; left out", text);
	}
}
