/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Locking by system calls made directly: what counts is what the kernel did, and libc's functions can be interposed (a QEMU built
 * with a sanitizer has an mlock() and a munlock() that do nothing).
 */
#ifndef RAMLOCK_SYSCALLS_H
#define RAMLOCK_SYSCALLS_H

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "extents.h"

/* Returns 0 or an errno, as the next. */
static inline int sys_mlock2(struct range r, unsigned int flags)
{
	return syscall(SYS_mlock2, r.start, range_size(r), flags) ? errno : 0;
}

static inline int sys_munlock(struct range r)
{
	return syscall(SYS_munlock, r.start, range_size(r)) ? errno : 0;
}

#endif
