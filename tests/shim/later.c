/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Loaded by test_got.c: has the sign of a module of QEMU, and calls libc as one. */
#include <sys/mman.h>

void register_dso_module_init(void); /* the program's */
int later_call(void);

int later_call(void)
{
	register_dso_module_init();
	return munlock((void *)4096, 4096);
}
