/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Included before every unit of the shim by a compiler flag: the shim needs no glibc newer than 2.28, whichever it was
 * built on, so that it can be loaded into a QEMU that has an older one than this host.
 *
 * When glibc moved these from libpthread and libdl into libc they got new versions besides the former ones, for the same
 * functions; here the former ones are asked for. They are weak, because a process with such an older glibc need not
 * have those libraries: libraries of QEMU's always have them, but a preloaded shim must do no harm to a shell either.
 * Naming the libraries as needed would do harm the other way round: in a bare root there may be no file of that name.
 * What needs a whole function is in glibc.c.
 */
#ifndef RAMLOCK_GLIBC_H
#define RAMLOCK_GLIBC_H

#if defined(__x86_64__)
#define FIRST "GLIBC_2.2.5" /* version of glibc for this processor */
#define SETCLOCK "GLIBC_2.3.3"
#elif defined(__aarch64__)
#define FIRST "GLIBC_2.17"
#define SETCLOCK FIRST
#endif

#ifdef FIRST
#define PRAGMA(text) _Pragma(#text)
#define FORMER(name, version) PRAGMA(weak name) __asm__(".symver " #name "," #name "@" version)
FORMER(dladdr, FIRST);
FORMER(dlsym, FIRST);
FORMER(pthread_attr_setstacksize, FIRST);
FORMER(pthread_condattr_setclock, SETCLOCK);
FORMER(pthread_create, FIRST);
FORMER(pthread_join, FIRST);
FORMER(pthread_sigmask, FIRST);
#undef FORMER
#undef PRAGMA
#undef FIRST
#undef SETCLOCK
#endif

#endif
