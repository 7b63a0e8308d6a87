/* SPDX-License-Identifier: GPL-2.0-or-later */
/* File descriptors that stay clear of standard input, output and error. */
#ifndef RAMLOCK_FD_H
#define RAMLOCK_FD_H

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/*
 * QEMU may be started with some of 0 to 2 closed, and -daemonize puts /dev/null over them: a descriptor of ours there
 * would be lost. Returns @fd, or its copy above 2 with @fd closed; a negative @fd is returned as it is.
 */
static inline int fd_above_stdio(int fd)
{
	int copy, err;

	if (fd < 0 || fd > STDERR_FILENO)
		return fd;
	copy = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
	err = errno;
	close(fd);
	errno = err;
	return copy;
}

/* Closes @fd if it is one. */
static inline void fd_close(int fd)
{
	if (fd >= 0)
		close(fd);
}

#endif
