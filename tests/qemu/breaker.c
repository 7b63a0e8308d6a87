/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preloaded into a test's QEMU, as something else in the process that knows nothing of ramlock: takes locks away. Lines of
 * "munlock START SIZE" come from the FIFO that BREAKER names.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *serve(void *path)
{
	char line[256];

	for (;;) {
		FILE *f = fopen(path, "re"); /* waits for a writer */

		if (!f)
			return NULL;
		while (fgets(line, sizeof(line), f)) {
			uintptr_t start;
			size_t size;

			if (sscanf(line, "munlock %zu %zu", &start, &size) == 2)
				syscall(SYS_munlock, start, size);
		}
		fclose(f);
	}
}

__attribute__((constructor)) static void enter(void)
{
	char *path = getenv("BREAKER"), exe[4096] = "";
	sigset_t all, before;
	pthread_t thread;

	if (!path || readlink("/proc/self/exe", exe, sizeof(exe) - 1) < 0 || !strstr(exe, "qemu-system-"))
		return;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_create(&thread, NULL, serve, path);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}
