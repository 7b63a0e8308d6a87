/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a step costs, on real memory: where nothing is left, only what allocates nothing is admitted. */
#include "step.h"
#include "tree.h"

#include <fcntl.h>
#include <sys/mman.h>

enum { CHUNK = 2 << 20 };

static struct stepper stepper;

static void begin(void)
{
	tree_begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: 0 kB\n", 8 << 20);
	put("proc/self/status", "VmLck:\t0 kB\n");
	put("proc/self/cgroup", "0::/\n");
	stepper_init(&stepper);
	stepper_open(&stepper, root);
}

static void end(void)
{
	stepper_deinit(&stepper);
	tree_end();
}

static char *map(int flags, int fd)
{
	char *p = mmap(NULL, 2 * CHUNK, PROT_READ | PROT_WRITE, flags | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);

	if (p == MAP_FAILED)
		abort();
	madvise(p, 2 * CHUNK, MADV_NOHUGEPAGE);
	return (char *)(((uintptr_t)p + CHUNK - 1) / CHUNK * CHUNK);
}

static bool admitted(const char *p, bool shared)
{
	struct step s = { .kind = STEP_LOCK, .prefault = true, .shared = shared, .page_size = 4096 };
	struct outcome o;

	s.r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + CHUNK };
	return step_admit(&stepper, &s, &o);
}

static void touch(const char *p)
{
	for (size_t at = 0; at < CHUNK; at += 4096)
		(void)*(const volatile char *)(p + at);
}

static void own_pages_cost_nothing(void)
{
	char *p;

	begin();
	p = map(MAP_PRIVATE, -1);
	CHECK(!admitted(p, false)); /* absent */
	memset(p, 1, CHUNK);
	CHECK(admitted(p, false));
	madvise(p + 4096, 4096, MADV_DONTNEED);
	CHECK(!admitted(p, false)); /* one of them absent */
	end();
}

static void the_zero_page_is_not_ours(void)
{
	char *p;

	begin();
	p = map(MAP_PRIVATE, -1);
	touch(p);
	CHECK(!admitted(p, false));
	end();
}

static void page_cache_is_memory_only_when_shared(void)
{
	int fd = memfd_create("test", MFD_CLOEXEC);
	char *shared, *private;

	begin();
	CHECK_EQ(ftruncate(fd, 2 * CHUNK), 0);
	shared = map(MAP_SHARED, fd);
	memset(shared, 1, CHUNK);
	CHECK(admitted(shared, true));
	private = map(MAP_PRIVATE, fd);
	touch(private);
	CHECK(!admitted(private, false));
	memset(private, 2, CHUNK); /* copied now */
	CHECK(admitted(private, false));
	close(fd);
	end();
}

static void what_is_armed_is_owed(void)
{
	struct step s = { .kind = STEP_LOCK, .prefault = false, .page_size = 4096 };
	struct outcome o;
	uint64_t armed = 0;
	char *p;

	begin();
	p = map(MAP_PRIVATE, -1);
	s.r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + CHUNK };
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\n", 8 << 20, (512 + 100) << 10);
	/* Arming allocates nothing, so nothing but the books stops it. */
	while (armed < (1ULL << 30) && step_admit(&stepper, &s, &o))
		armed += CHUNK;
	CHECK(armed > 50 * (1ULL << 20) && armed <= 100 * (1ULL << 20));
	CHECK_EQ(o.shortage, SHORTAGE_HOST_MEMORY);
	end();
}

CHECK_MAIN(CASE(own_pages_cost_nothing), CASE(the_zero_page_is_not_ours), CASE(page_cache_is_memory_only_when_shared),
	   CASE(what_is_armed_is_owed))
