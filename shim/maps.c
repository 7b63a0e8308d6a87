/* SPDX-License-Identifier: GPL-2.0-or-later */
/* /proc/PID/maps: Documentation/filesystems/proc.rst of Linux says what is in a line. */
#include "maps.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum {
	MAPPINGS_MOST = 1000000, /* a process has 65,530 unless its host was told otherwise */
	LINE_KEPT = 256, /* a path may be longer: its beginning is enough */
	PIECE = 4096,
	HEX = 16,
	DECIMAL = 10,
};

/* Reads a number of base @base that ends in @end, and steps over both. */
static bool number(const char **at, unsigned int base, char end, uint64_t *value)
{
	const char *p = *at;

	*value = 0;
	for (; *p && *p != end; p++) {
		unsigned int digit = *p >= '0' && *p <= '9' ? (unsigned int)(*p - '0') :
				     *p >= 'a' && *p <= 'f' ? (unsigned int)(*p - 'a') + DECIMAL :
							      HEX;

		if (digit >= base || __builtin_mul_overflow(*value, base, value) ||
		    __builtin_add_overflow(*value, digit, value))
			return false;
	}
	if (p == *at || *p != end)
		return false;
	*at = p + 1;
	return true;
}

int mapping_parse(const char *line, struct mapping *m)
{
	static const char *const letters[] = { "r-", "w-", "x-", "ps" };
	uint64_t major, minor;
	const char *p = line;

	*m = (struct mapping){ .inode = 0 };
	if (!number(&p, HEX, '-', &m->r.start) || !number(&p, HEX, ' ', &m->r.end) || m->r.start >= m->r.end)
		return -EINVAL;
	for (size_t i = 0; i < sizeof(letters) / sizeof(letters[0]); i++, p++) {
		if (!*p || !strchr(letters[i], *p))
			return -EINVAL;
		m->permissions[i] = *p;
	}
	if (*p++ != ' ' || !number(&p, HEX, ' ', &m->offset) || !number(&p, HEX, ':', &major) ||
	    !number(&p, HEX, ' ', &minor) || major > UINT32_MAX || minor > UINT32_MAX)
		return -EINVAL;
	/* A mapping without a name may end right after its inode. */
	if (!number(&p, DECIMAL, ' ', &m->inode) && !number(&p, DECIMAL, '\0', &m->inode))
		return -EINVAL;
	m->device = makedev((unsigned int)major, (unsigned int)minor);
	if (p[-1]) {
		p += strspn(p, " ");
		snprintf(m->path, sizeof(m->path), "%s", p);
	}
	return 0;
}

int maps_walk(int fd, bool (*each)(const struct mapping *m, void *opaque), void *opaque)
{
	char piece[PIECE], line[LINE_KEPT];
	size_t kept = 0, n_mappings = 0;
	struct mapping m;
	ssize_t n;
	off_t at = 0;

	while ((n = pread(fd, piece, sizeof(piece), at)) > 0) {
		at += n;
		for (ssize_t i = 0; i < n; i++) {
			if (piece[i] != '\n') {
				if (kept < sizeof(line) - 1)
					line[kept++] = piece[i];
				continue;
			}
			line[kept] = '\0';
			kept = 0;
			if (mapping_parse(line, &m))
				return -EINVAL;
			if (++n_mappings > MAPPINGS_MOST)
				return -E2BIG;
			if (!each(&m, opaque))
				return 0;
		}
	}
	return n < 0 ? -errno : kept ? -EINVAL : 0;
}
