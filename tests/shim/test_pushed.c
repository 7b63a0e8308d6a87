/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest RAM as the controller says it is: against mappings by hand, and against this process. */
#include "check.h"
#include "pushed.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MIB = 1 << 20, PAGE = 4096, HUGE = 2 * MIB };

static struct evidence evidence[RAM_BLOCKS_MAX];
static struct ram_layout layout;

/* Two blocks: 2 MiB at 0x200000 and 4 MiB at 0x600000. */
static void two_blocks(void)
{
	layout.n = 2;
	layout.v[0] = (struct ram_block){ .id = "one", .host = { 0x200000, 0x400000 }, .page_size = PAGE };
	layout.v[1] = (struct ram_block){ .id = "two", .host = { 0x600000, 0xa00000 }, .page_size = PAGE };
	layout_finish(&layout);
}

static void hold_against(const char *maps)
{
	struct judge j;
	struct mapping m;
	char copy[2048], *save;

	snprintf(copy, sizeof(copy), "%s", maps);
	judge_begin(&j, &layout, evidence);
	for (char *line = strtok_r(copy, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		CHECK_EQ(mapping_parse(line, &m), 0);
		if (!judge_mapping(&m, &j))
			break;
	}
	judge_end(&j);
}

#define ONE "200000-400000 rw-p 0 0:0 0\n400000-401000 ---p 0 0:0 0\n"
#define TWO "600000-a00000 rw-p 0 0:0 0\na00000-a01000 ---p 0 0:0 0\n"

static void what_fits(void)
{
	static const struct {
		const char *maps;
		enum backing backing;
	} cases[] = {
		{ ONE TWO, BACKING_ANONYMOUS },
		{ "1000-2000 r--p 0 0:0 0 [vvar]\n" ONE TWO "b00000-c00000 rw-p 0 0:0 0 [stack]\n", BACKING_ANONYMOUS },
		/* Split by locking; merged with what lies in front. */
		{ ONE "500000-700000 rw-p 0 0:0 0\n700000-900000 rw-p 0 0:0 0\n900000-a00000 rw-p 0 0:0 0\na00000-c00000 ---p 0 0:0 0\n",
		  BACKING_ANONYMOUS },
		{ ONE "600000-a00000 rw-s 0 0:1 9 /memfd:ram (deleted)\na00000-a01000 ---p 0 0:0 0\n", BACKING_MEMFD },
		{ ONE "600000-a00000 rw-s 0 0:1 9 /dev/zero (deleted)\na00000-a01000 ---p 0 0:0 0\n", BACKING_ANONYMOUS },
		{ ONE "600000-800000 rw-s 10000 8:1 9 /ram\n800000-a00000 rw-s 210000 8:1 9 /ram\na00000-a01000 ---p 0 0:0 0\n",
		  BACKING_FILE },
	};

	two_blocks();
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		hold_against(cases[i].maps);
		for (size_t k = 0; k < layout.n; k++)
			if (evidence[k].wrong)
				fprintf(stderr, "case %zu, block %zu %s\n", i, k, evidence[k].wrong);
		CHECK(!evidence[0].wrong && !evidence[1].wrong);
		CHECK_EQ(evidence[1].backing, cases[i].backing);
	}
}

static void what_does_not(void)
{
	static const struct {
		const char *maps, *wrong;
	} cases[] = {
		{ ONE, "as a whole" },
		{ ONE "600000-900000 rw-p 0 0:0 0\n", "as a whole" },
		{ ONE "600000-900000 rw-p 0 0:0 0\na00000-a01000 ---p 0 0:0 0\n", "as a whole" },
		{ ONE "601000-a00000 rw-p 0 0:0 0\na00000-a01000 ---p 0 0:0 0\n", "as a whole" },
		{ ONE "600000-700000 rw-p 0 0:0 0\n701000-a00000 rw-p 0 0:0 0\na00000-a01000 ---p 0 0:0 0\n", "as a whole" },
		{ ONE "600000-a00000 r--p 0 0:0 0\na00000-a01000 ---p 0 0:0 0\n", "read and written" },
		{ ONE "600000-a00000 rwxp 0 0:0 0\na00000-a01000 ---p 0 0:0 0\n", "read and written" },
		{ ONE "600000-9ff000 rw-p 0 0:0 0\n9ff000-a01000 ---p 0 0:0 0\n", "read and written" },
		{ ONE "600000-b00000 rw-p 0 0:0 0\n", "any rights" },
		{ ONE "600000-a00000 rw-p 0 0:0 0\na00000-a01000 rw-p 0 0:0 0\n", "any rights" },
		{ ONE "600000-a00000 rw-p 0 0:0 0\na01000-a02000 ---p 0 0:0 0\n", "any rights" },
		{ ONE "600000-a00000 rw-p 0 0:0 0\na00000-4000000 ---p 0 0:0 0\n", "malloc()" },
		{ ONE "600000-a00000 rw-p 0 0:0 0 [heap]\na00000-a01000 ---p 0 0:0 0\n", "made of" },
		{ ONE "600000-a00000 rw-p 0 0:0 0 [stack]\na00000-a01000 ---p 0 0:0 0\n", "made of" },
		{ ONE "600000-a00000 rw-p 0 0:0 0 [anon: glibc: malloc]\na00000-a01000 ---p 0 0:0 0\n", "made of" },
		{ ONE "600000-a00000 rw-s 0 0:1 9 /SYSV00000000 (deleted)\na00000-a01000 ---p 0 0:0 0\n", "made of" },
		{ ONE "600000-a00000 rw-s 0 0:e 9 anon_inode:[io_uring]\na00000-a01000 ---p 0 0:0 0\n", "made of" },
		{ ONE "600000-800000 rw-p 0 0:0 0\n800000-a00000 rw-p 0 8:1 9 /ram\na00000-a01000 ---p 0 0:0 0\n", "belong" },
		{ ONE "600000-800000 rw-s 0 8:1 9 /ram\n800000-a00000 rw-s 0 8:1 9 /ram\na00000-a01000 ---p 0 0:0 0\n", "belong" },
		{ ONE "600000-800000 rw-s 0 8:1 9 /ram\n800000-a00000 rw-s 200000 8:1 8 /ram\na00000-a01000 ---p 0 0:0 0\n",
		  "belong" },
		{ ONE "600000-800000 rw-s 0 8:1 9 /ram\n800000-a00000 rw-p 200000 8:1 9 /ram\na00000-a01000 ---p 0 0:0 0\n",
		  "belong" },
	};

	two_blocks();
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		hold_against(cases[i].maps);
		CHECK(!evidence[0].wrong);
		CHECK_CONTAINS(evidence[1].wrong, cases[i].wrong);
	}
	/* The first one alone does not keep the second from being judged. */
	hold_against(TWO);
	CHECK_CONTAINS(evidence[0].wrong, "as a whole");
	CHECK(!evidence[1].wrong);
	layout.v[0].host.start += PAGE;
	hold_against(ONE TWO);
	CHECK_CONTAINS(evidence[0].wrong, "2 MiB");
}

static void blocks_that_cannot_be(void)
{
	two_blocks();
	CHECK(!pushed_sort(&layout));
	layout.v[1].host.start = 0x3ff000;
	CHECK_CONTAINS(pushed_sort(&layout), "over another");
	two_blocks();
	layout.v[0].host.end = layout.v[0].host.start;
	CHECK_CONTAINS(pushed_sort(&layout), "no size");
	two_blocks();
	layout.v[0].host.end = layout.v[0].host.start - PAGE;
	CHECK_CONTAINS(pushed_sort(&layout), "no size");
	two_blocks();
	layout.v[1].host.end += 1;
	CHECK_CONTAINS(pushed_sort(&layout), "whole pages");
	for (uint64_t page = 0; page < PAGE; page = page * 2 + 1) {
		two_blocks();
		layout.v[0].page_size = page;
		CHECK_CONTAINS(pushed_sort(&layout), "page size");
	}
	two_blocks();
	layout.v[0].page_size = 3 * PAGE;
	CHECK_CONTAINS(pushed_sort(&layout), "page size");
	/* In any order. */
	two_blocks();
	layout.v[2] = layout.v[0];
	layout.v[0] = layout.v[1];
	layout.v[1] = layout.v[2];
	CHECK(!pushed_sort(&layout));
	CHECK_EQ(layout.v[0].host.start, 0x200000);
}

/* ---- This process ---- */

static struct pushed pushed;
static char text[PUSHED_TEXT];

/*
 * @size bytes of @fd (-1: anonymous) at a multiple of 2 MiB, with one page behind that has no rights, as QEMU maps RAM. More than
 * a page may end, by chance, where a malloc() arena does.
 */
static struct range map_like_qemu(size_t size, int fd, int flags)
{
	const size_t all = size + 2 * HUGE;
	char *p = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *at = p + (HUGE - (uintptr_t)p % HUGE) % HUGE, *end = at + size + PAGE;

	if (p == MAP_FAILED ||
	    mmap(at, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0) == MAP_FAILED)
		abort();
	if ((at > p && munmap(p, (size_t)(at - p))) || munmap(end, (size_t)(p + all - end)))
		abort();
	return (struct range){ (uint64_t)(uintptr_t)at, (uint64_t)(uintptr_t)at + size };
}

static void begin(void)
{
	memset(&pushed, 0, sizeof(pushed));
	pushed_init(&pushed);
	pushed_open(&pushed);
}

static int accept_one(struct range r, uint64_t page_size, enum backing backing)
{
	layout.n = 1;
	layout.v[0] = (struct ram_block){ .id = "ram", .host = r, .page_size = page_size, .backing = backing };
	text[0] = '\0';
	return pushed_accept(&pushed, &layout, text);
}

static void memory_of_every_kind(void)
{
	char path[] = "/dev/shm/ramlock-test-XXXXXX", disk[] = "/var/tmp/ramlock-test-XXXXXX";
	int memfd = memfd_create("ram", MFD_CLOEXEC), shm = mkstemp(path), file = mkstemp(disk);
	struct range r;

	begin();
	CHECK(memfd >= 0 && shm >= 0 && file >= 0);
	CHECK(!ftruncate(memfd, 4 * MIB) && !ftruncate(shm, 4 * MIB) && !ftruncate(file, 4 * MIB));

	r = map_like_qemu(4 * MIB, -1, MAP_PRIVATE);
	CHECK_EQ(accept_one(r, PAGE, BACKING_ANONYMOUS), 0);
	CHECK_EQ(pushed.layout.total, 4 * MIB);
	CHECK_EQ(accept_one(r, PAGE, BACKING_MEMFD), -EINVAL);
	CHECK_CONTAINS(text, "another backing");
	CHECK_EQ(accept_one(r, HUGE, BACKING_ANONYMOUS), -EINVAL);
	CHECK_CONTAINS(text, "page size");
	CHECK_EQ(accept_one(r, HUGE, BACKING_HUGETLB), -EINVAL);
	CHECK_CONTAINS(text, "another backing");
	CHECK_EQ(pushed.layout.total, 4 * MIB); /* a refusal leaves what was accepted */
	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, -1, MAP_SHARED), PAGE, BACKING_ANONYMOUS), 0);
	CHECK(pushed.layout.v[0].shared);

	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, memfd, MAP_SHARED), PAGE, BACKING_MEMFD), 0);
	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, memfd, MAP_PRIVATE), PAGE, BACKING_MEMFD), 0);
	CHECK(!pushed.layout.v[0].shared);
	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, memfd, MAP_SHARED), PAGE, BACKING_ANONYMOUS), -EINVAL);
	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, shm, MAP_SHARED), PAGE, BACKING_SHMEM), 0);
	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, shm, MAP_SHARED), PAGE, BACKING_FILE), 0);
	CHECK_EQ(pushed.layout.v[0].backing, BACKING_SHMEM);
	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, file, MAP_SHARED), PAGE, BACKING_FILE), 0);
	CHECK_EQ(accept_one(map_like_qemu(4 * MIB, file, MAP_SHARED), PAGE, BACKING_SHMEM), -EINVAL);

	r = map_like_qemu(4 * MIB, memfd, MAP_SHARED);
	close(memfd);
	CHECK_EQ(accept_one(r, PAGE, BACKING_MEMFD), -EINVAL);
	CHECK_CONTAINS(text, "not open");
	unlink(path);
	unlink(disk);
	close(shm);
	close(file);
	pushed_deinit(&pushed);
}

static char bss[4 * MIB];

static void *sleep_on_a_stack(void *stop)
{
	char byte;

	while (read(*(int *)stop, &byte, 1) < 0)
		;
	return NULL;
}

static void what_is_not_guest_ram(void)
{
	struct range r = { 0, 0 };
	pthread_attr_t attr;
	pthread_t thread;
	int stop[2];

	begin();
	CHECK_EQ(pipe(stop), 0);
	/* Whatever the mappings look like: this program's own data... */
	r.start = ((uint64_t)(uintptr_t)bss + HUGE - 1) / HUGE * HUGE;
	r.end = r.start + PAGE;
	bss[0] = 1;
	CHECK_EQ(mprotect((void *)(uintptr_t)r.end, PAGE, PROT_NONE), 0);
	CHECK_EQ(accept_one(r, PAGE, BACKING_ANONYMOUS), -EINVAL);
	CHECK_CONTAINS(text, "program or one of its libraries");
	CHECK_EQ(mprotect((void *)(uintptr_t)r.end, PAGE, PROT_READ | PROT_WRITE), 0);
	/* ... a stack, even one that is mapped just as QEMU maps RAM... */
	r = map_like_qemu(4 * MIB, -1, MAP_PRIVATE);
	pthread_attr_init(&attr);
	pthread_attr_setstack(&attr, (void *)(uintptr_t)r.start, 4 * MIB);
	CHECK_EQ(pthread_create(&thread, &attr, sleep_on_a_stack, &stop[0]), 0);
	usleep(100000);
	CHECK_EQ(accept_one(r, PAGE, BACKING_ANONYMOUS), -EINVAL);
	CHECK_CONTAINS(text, "is a stack");
	CHECK_EQ(write(stop[1], "x", 1), 1);
	pthread_join(thread, NULL);
	CHECK_EQ(accept_one(r, PAGE, BACKING_ANONYMOUS), 0);
	/* ... nothing at all, and the end of the world. */
	CHECK_EQ(accept_one((struct range){ 0x1000, 0x2000 }, PAGE, BACKING_ANONYMOUS), -EINVAL);
	CHECK_EQ(accept_one((struct range){ UINT64_MAX / PAGE * PAGE - PAGE, UINT64_MAX / PAGE * PAGE }, PAGE,
			    BACKING_ANONYMOUS),
		 -EINVAL);
	CHECK_EQ(accept_one((struct range){ 0, UINT64_MAX / PAGE * PAGE }, PAGE, BACKING_ANONYMOUS), -EINVAL);
	close(stop[0]);
	close(stop[1]);
	pushed_deinit(&pushed);
	pushed.maps = -1;
	CHECK_EQ(accept_one(r, PAGE, BACKING_ANONYMOUS), -EINVAL);
	CHECK_CONTAINS(text, "cannot be read");
}

static void what_changes_is_dropped(void)
{
	struct range r[3];

	begin();
	layout.n = 3;
	for (size_t i = 0; i < 3; i++) {
		r[i] = map_like_qemu(4 * MIB, -1, MAP_PRIVATE);
		layout.v[i] = (struct ram_block){ .id = "ram", .host = r[i], .page_size = PAGE };
	}
	CHECK_EQ(pushed_accept(&pushed, &layout, text), 0);
	CHECK(!pushed_look(&pushed));
	/* Split by locking and advice: the same. */
	CHECK_EQ(mlock2((void *)(uintptr_t)(r[0].start + MIB), MIB, MLOCK_ONFAULT), 0);
	CHECK_EQ(madvise((void *)(uintptr_t)r[1].start, MIB, MADV_DONTDUMP), 0);
	CHECK(!pushed_look(&pushed));
	CHECK_EQ(munmap((void *)(uintptr_t)(r[1].start + MIB), PAGE), 0);
	CHECK(pushed_look(&pushed));
	CHECK_EQ(pushed.layout.n, 2);
	CHECK_EQ(pushed.layout.total, 8 * MIB);
	CHECK(!layout_find(&pushed.layout, r[1]) && layout_find(&pushed.layout, r[0]));
	CHECK(!pushed_look(&pushed));
	/* Other memory in the same place. */
	CHECK(mmap((void *)(uintptr_t)r[2].start, 4 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED,
		   -1, 0) != MAP_FAILED);
	CHECK(pushed_look(&pushed));
	CHECK_EQ(pushed.layout.n, 1);
	/* What cannot be seen any more is not guest RAM. */
	pushed_deinit(&pushed);
	CHECK(pushed_look(&pushed));
	CHECK_EQ(pushed.layout.n, 0);
}

CHECK_MAIN(CASE(what_fits), CASE(what_does_not), CASE(blocks_that_cannot_be), CASE(memory_of_every_kind),
	   CASE(what_is_not_guest_ram), CASE(what_changes_is_dropped))
