/* SPDX-License-Identifier: GPL-2.0-or-later */
/* QEMU's symbols, looked up by name in the running process: every one optional. */
#ifndef RAMLOCK_LOOKUP_H
#define RAMLOCK_LOOKUP_H

#include <dlfcn.h>

/*
 * Sets sym.NAME, of the file's own table, to the address of NAME, or to NULL: dlsym()'s object pointer to any pointer, functions
 * included, without a cast that ISO C forbids.
 */
#define LOOK_UP(name) (*(void **)(void *)&sym.name = dlsym(RTLD_DEFAULT, #name))

#endif
