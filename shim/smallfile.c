/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Small files of /proc and /sys. */
#include "smallfile.h"

#include "fd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int smallfile_open(const char *dir, const char *name)
{
	char path[SMALLFILE_PATH];

	if ((size_t)snprintf(path, sizeof(path), "%s/%s", dir, name) >= sizeof(path))
		return -1;
	return fd_above_stdio(open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY));
}

bool smallfile_exists(const char *dir, const char *name)
{
	char path[SMALLFILE_PATH];

	return (size_t)snprintf(path, sizeof(path), "%s/%s", dir, name) < sizeof(path) && !access(path, F_OK);
}

int smallfile_read(int fd, char *buf, size_t size)
{
	size_t got = 0;

	if (fd < 0)
		return -EBADF;
	while (got < size - 1) {
		ssize_t n = pread(fd, buf + got, size - 1 - got, (off_t)got);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		got += (size_t)n;
	}
	buf[got] = '\0';
	return 0;
}

int smallfile_value(const char *text, const char *key, int base, uint64_t *out)
{
	size_t len = strlen(key);

	for (const char *line = text; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (!strncmp(line, key, len)) {
			*out = strtoull(line + len, NULL, base);
			return 0;
		}
	}
	return -ENOENT;
}
