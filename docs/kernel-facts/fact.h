/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the programs of this folder share: memory to try things on, the kernel's figures about it, the verdict. */
#ifndef FACT_H
#define FACT_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)4096)

/* 0: as the file says; 1: not so; 77: this cannot be asked here (test runners know that number). */
enum verdict { FACT_HOLDS = 0, FACT_FAILS = 1, FACT_UNASKED = 77 };

static bool fact_failed;

/* Prints what was seen, and whether it is as expected. */
__attribute__((unused, format(printf, 2, 3))) static void see(bool expected, const char *format, ...)
{
	va_list args;

	printf("%s", expected ? "  yes  " : "  NO   ");
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	printf("\n");
	fflush(stdout);
	if (!expected)
		fact_failed = true;
}

__attribute__((unused)) static int verdict(void)
{
	return fact_failed ? FACT_FAILS : FACT_HOLDS;
}

__attribute__((unused, noreturn)) static void cannot_ask(const char *why)
{
	printf("  cannot be asked here: %s\n", why);
	exit(FACT_UNASKED);
}

__attribute__((unused, noreturn)) static void broken(const char *what)
{
	printf("  %s: %s\n", what, strerror(errno));
	exit(FACT_FAILS);
}

__attribute__((unused)) static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Absent private anonymous memory of 4 KiB pages, between two closed pages so that no neighbour joins its mapping. */
__attribute__((unused)) static char *memory(size_t size)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	char *mem = mmap(NULL, size + 2 * PAGE, PROT_NONE, flags, -1, 0);

	if (mem == MAP_FAILED || mprotect(mem + PAGE, size, PROT_READ | PROT_WRITE))
		broken("mmap");
	madvise(mem + PAGE, size, MADV_NOHUGEPAGE);
	return mem + PAGE;
}

__attribute__((unused)) static void touch(char *mem, size_t size)
{
	for (size_t i = 0; i < size; i += PAGE)
		((volatile char *)mem)[i] = (char)(i / PAGE + 1);
}

/* 0 or -errno. Direct, since an old libc has no mlock2(). */
__attribute__((unused)) static int lock_on_fault(void *mem, size_t size)
{
	return syscall(SYS_mlock2, mem, size, 1 /* MLOCK_ONFAULT */) ? -errno : 0;
}

/* A field "Name:  N kB" of a file under /proc, in bytes. */
__attribute__((unused)) static size_t proc_field(const char *path, const char *name)
{
	FILE *f = fopen(path, "re");
	char line[256];
	size_t value = 0;

	if (!f)
		broken(path);
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':')
			value = strtoul(line + strlen(name) + 1, NULL, 10) * 1024;
	fclose(f);
	return value;
}

/* Bytes of mappings under lock, resident or not. */
__attribute__((unused)) static size_t vm_lck(void)
{
	return proc_field("/proc/self/status", "VmLck");
}

/* Sum of a field of /proc/self/smaps over the mappings inside [mem, mem + size), in bytes. */
__attribute__((unused)) static size_t smaps_field(const void *mem, size_t size, const char *name)
{
	uintptr_t begin = (uintptr_t)mem, start = 0, end;
	FILE *f = fopen("/proc/self/smaps", "re");
	char line[512];
	size_t sum = 0;
	bool inside = false;

	if (!f)
		broken("smaps");
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && strchr(line, '-') < strchr(line, ' '))
			inside = start >= begin && end <= begin + size;
		else if (inside && !strncmp(line, name, strlen(name)) && line[strlen(name)] == ':')
			sum += strtoul(line + strlen(name) + 1, NULL, 10) * 1024;
	}
	fclose(f);
	return sum;
}

__attribute__((unused)) static size_t resident(const void *mem, size_t size)
{
	return smaps_field(mem, size, "Rss");
}

/* Has the kernel swap out at least half of that memory, if it has swap. */
__attribute__((unused)) static void swap_out(void *mem, size_t size)
{
	/* A page that the kernel is busy with is passed over: asked more than once. */
	for (int i = 0; i < 50 && smaps_field(mem, size, "Swap") < size / 2; i++) {
		madvise(mem, size, MADV_PAGEOUT);
		usleep(20000);
	}
	if (smaps_field(mem, size, "Swap") < size / 2)
		cannot_ask("the kernel does not swap out when asked to");
}

/* The pagemap entry of the page at @mem: bit 63 present, 62 swapped, 61 file or shared, 56 exclusively mapped. */
__attribute__((unused)) static uint64_t pagemap(const void *mem)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entry = 0;

	if (fd < 0 || pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)mem / PAGE * sizeof(entry))) != sizeof(entry))
		broken("pagemap");
	close(fd);
	return entry;
}

/* Whether the kernel has the page itself marked as locked and off the lists of what may be reclaimed. Needs root. */
__attribute__((unused)) static bool page_mlocked(const void *mem)
{
	uint64_t frame = pagemap(mem) & ((UINT64_C(1) << 55) - 1), flags = 0;
	int fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || !frame || pread(fd, &flags, sizeof(flags), (off_t)(frame * sizeof(flags))) != sizeof(flags))
		cannot_ask("only root can read the flags of a page");
	close(fd);
	return flags >> 33 & 1; /* KPF_MLOCKED */
}

/* A thread that does something again and again, and how long it had to wait for it. */
struct watcher {
	void (*act)(void *arg);
	void *arg;
	pthread_t thread;
	atomic_bool stop;
	atomic_ulong acts;
	double longest;
};

__attribute__((unused)) static void *watcher_main(void *opaque)
{
	struct watcher *w = opaque;
	double begin, took;

	while (!w->stop) {
		begin = now();
		w->act(w->arg);
		took = now() - begin;
		if (took > w->longest)
			w->longest = took;
		w->acts++;
	}
	return NULL;
}

__attribute__((unused)) static void watch(struct watcher *w)
{
	if (pthread_create(&w->thread, NULL, watcher_main, w))
		broken("pthread_create");
	while (w->acts < 3)
		usleep(1000);
}

/* Returns how often it acted in all. */
__attribute__((unused)) static unsigned long watched(struct watcher *w)
{
	w->stop = true;
	pthread_join(w->thread, NULL);
	return w->acts;
}

/* Acts that need mmap_lock: for reading, and for writing. */
__attribute__((unused)) static void read_mmap_lock(void *mem)
{
	unsigned char vec;

	mincore(mem, PAGE, &vec);
}

__attribute__((unused)) static void write_mmap_lock(void *unused)
{
	void *mem = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)unused;
	munmap(mem, PAGE);
}

#endif
