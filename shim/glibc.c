/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Functions that exist in newer glibcs only, or have another form there, for json-c and for us. See glibc.h.
 *
 * Headers may turn the C99 names into the C23 ones, so the former are declared here by their names in the library.
 */
#include "glibc.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

long c99_strtol(const char *s, char **end, int base) __asm__("strtol");
long long c99_strtoll(const char *s, char **end, int base) __asm__("strtoll");
unsigned long c99_strtoul(const char *s, char **end, int base) __asm__("strtoul");
unsigned long long c99_strtoull(const char *s, char **end, int base) __asm__("strtoull");
int c99_vsscanf(const char *s, const char *format, va_list ap) __asm__("__isoc99_vsscanf");

/* C23, from 2.38: these differ in "0b" alone. */
long __isoc23_strtol(const char *s, char **end, int base);
long long __isoc23_strtoll(const char *s, char **end, int base);
unsigned long __isoc23_strtoul(const char *s, char **end, int base);
unsigned long long __isoc23_strtoull(const char *s, char **end, int base);
int __isoc23_sscanf(const char *s, const char *format, ...);

long __isoc23_strtol(const char *s, char **end, int base)
{
	return c99_strtol(s, end, base);
}

long long __isoc23_strtoll(const char *s, char **end, int base)
{
	return c99_strtoll(s, end, base);
}

unsigned long __isoc23_strtoul(const char *s, char **end, int base)
{
	return c99_strtoul(s, end, base);
}

unsigned long long __isoc23_strtoull(const char *s, char **end, int base)
{
	return c99_strtoull(s, end, base);
}

int __isoc23_sscanf(const char *s, const char *format, ...)
{
	va_list ap;
	int n;

	va_start(ap, format);
	n = c99_vsscanf(s, format, ap);
	va_end(ap);
	return n;
}

/* From 2.36; json-c seeds its hash tables with it. */
uint32_t arc4random(void);

uint32_t arc4random(void)
{
	uint32_t value = 0;

	/* Early in the boot of a host this would wait; a hash table can do without. */
	if (syscall(SYS_getrandom, &value, sizeof(value), 1 /* GRND_NONBLOCK */) != sizeof(value))
		value = (uint32_t)getpid();
	return value;
}

/* From 2.33 these are functions; before they were in each program. The kernel's struct stat is glibc's. */
int stat(const char *restrict path, struct stat *restrict facts)
{
	return (int)syscall(SYS_newfstatat, AT_FDCWD, path, facts, 0);
}

int lstat(const char *restrict path, struct stat *restrict facts)
{
	return (int)syscall(SYS_newfstatat, AT_FDCWD, path, facts, AT_SYMLINK_NOFOLLOW);
}

int fstat(int fd, struct stat *facts)
{
	return (int)syscall(SYS_fstat, fd, facts);
}

int fstatat(int folder, const char *restrict path, struct stat *restrict facts, int flags)
{
	return (int)syscall(SYS_newfstatat, folder, path, facts, flags);
}
