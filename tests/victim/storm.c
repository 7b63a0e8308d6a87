/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preloaded into QEMU: threads that keep libc's and the loader's locks busy, as the worst neighbours of an injection
 * would. They start a second after the program, when QEMU's main loop runs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void *allocate(void *arg)
{
	unsigned int seed = (unsigned int)(size_t)arg;
	void *kept[64] = { 0 };

	for (;;) {
		unsigned int i = (unsigned int)rand_r(&seed) % 64;

		free(kept[i]);
		kept[i] = malloc(1 + (size_t)rand_r(&seed) % 100000);
		if (kept[i])
			memset(kept[i], 1, 1);
		if (rand_r(&seed) % 64 == 0)
			usleep(50);
	}
	return NULL;
}

static void *load(void *arg)
{
	static const char *const names[] = { "libresolv.so.2", "libnss_files.so.2", "libBrokenLocale.so.1", "libutil.so.1" };
	unsigned int seed = (unsigned int)(size_t)arg;

	for (;;) {
		void *handle = dlopen(names[(unsigned int)rand_r(&seed) % 4], RTLD_NOW | RTLD_LOCAL);

		if (handle)
			dlclose(handle);
		usleep(50);
	}
	return NULL;
}

static void *map(void *arg)
{
	unsigned int seed = (unsigned int)(size_t)arg;

	for (;;) {
		size_t size = 4096 * (1 + (size_t)rand_r(&seed) % 256);
		char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (p != MAP_FAILED) {
			p[0] = 1;
			munmap(p, size);
		}
		usleep(20);
	}
	return NULL;
}

static void *nothing(void *arg)
{
	return arg;
}

static void *spawn(void *arg)
{
	for (;;) {
		pthread_t thread;

		if (!pthread_create(&thread, NULL, nothing, arg))
			pthread_join(thread, NULL);
		usleep(50);
	}
	return NULL;
}

static void *begin(void *arg)
{
	static void *(*const storms[])(void *) = { allocate, allocate, load, map, spawn };
	pthread_t thread;

	sleep(1);
	for (size_t i = 0; i < sizeof(storms) / sizeof(storms[0]); i++)
		pthread_create(&thread, NULL, storms[i], (void *)(i + 1));
	return arg;
}

__attribute__((constructor)) static void enter(void)
{
	pthread_t thread;
	sigset_t all, before;

	/* QEMU directs signals at threads of its own. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_create(&thread, NULL, begin, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}
