/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A folder that stands for the file system's root, with files as the kernel shows them. */
#ifndef RAMLOCK_TREE_H
#define RAMLOCK_TREE_H

#include "check.h"

#include <ftw.h>
#include <limits.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[64];

__attribute__((format(printf, 2, 3))) static void put(const char *name, const char *fmt, ...)
{
	char path[PATH_MAX];
	va_list ap;
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", root, name);
	for (char *slash = path + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
		*slash = '\0';
		mkdir(path, 0755);
		*slash = '/';
	}
	f = fopen(path, "w");
	if (!f)
		abort();
	va_start(ap, fmt);
	vfprintf(f, fmt, ap);
	va_end(ap);
	fclose(f);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type, (void)ftw;
	return remove(path);
}

static inline void tree_begin(void)
{
	snprintf(root, sizeof(root), "/tmp/ramlock-test-XXXXXX");
	CHECK(mkdtemp(root) != NULL);
}

static inline void tree_end(void)
{
	nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

#endif
