/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Small files of /proc and /sys: opened once, read again and again. */
#ifndef RAMLOCK_SMALLFILE_H
#define RAMLOCK_SMALLFILE_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SMALLFILE_PATH = 2 * PATH_MAX };

/* Opens @dir/@name for reading. Returns a descriptor, or -1 with errno set. */
int smallfile_open(const char *dir, const char *name);

bool smallfile_exists(const char *dir, const char *name);

/* Reads the whole file from its start, as a string; what does not fit is cut off. Returns 0 or -errno. */
int smallfile_read(int fd, char *buf, size_t size);

/* The number after @key at the start of a line; base 10 or 16. Returns 0 or -ENOENT. */
int smallfile_value(const char *text, const char *key, int base, uint64_t *out);

#endif
