/* SPDX-License-Identifier: GPL-2.0-or-later */
/* /proc/PID/maps: lines as the kernel writes them, garbage, and this process's own. */
#include "check.h"
#include "maps.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static void a_line_of_each_kind(void)
{
	struct mapping m;

	CHECK_EQ(mapping_parse("7fb6bfe00000-7fb6dfe00000 rw-p 00000000 00:00 0 ", &m), 0);
	CHECK(m.r.start == 0x7fb6bfe00000 && m.r.end == 0x7fb6dfe00000 && !strcmp(m.permissions, "rw-p"));
	CHECK(!m.offset && !m.device && !m.inode && !m.path[0]);
	CHECK_EQ(mapping_parse("7fb6bfe00000-7fb6dfe00000 ---p 00000000 00:00 0", &m), 0);
	CHECK_EQ(mapping_parse("1000-2000 rw-s 00200000 fe:1f 2170939                    /a b (deleted)", &m), 0);
	CHECK(m.offset == 0x200000 && m.device == makedev(0xfe, 0x1f) && m.inode == 2170939);
	CHECK(!strcmp(m.path, "/a b (deleted)") && m.permissions[3] == 's');
	CHECK_EQ(mapping_parse("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]", &m),
		 0);
	CHECK(!strcmp(m.path, "[vsyscall]"));
}

static void what_is_no_line_is_refused(void)
{
	static const char *const lines[] = {
		"",
		"1000",
		"1000-",
		"1000-2000",
		"1000-2000 rw-p",
		"1000-2000 rw-p 0",
		"1000-2000 rw-p 0 0:0",
		"1000-2000 rw-p 0 0:0 x",
		"1000-2000 rwxx 0 0:0 0",
		"1000-2000 rw- 0 0:0 0",
		"2000-1000 rw-p 0 0:0 0",
		"1000-1000 rw-p 0 0:0 0",
		"g000-h000 rw-p 0 0:0 0",
		"11111111111111111-22222222222222222 rw-p 0 0:0 0",
		"1000-2000 rw-p 0 100000000:0 0",
		"1000-2000 rw-p 0 0:0 99999999999999999999",
		"1000 - 2000 rw-p 0 0:0 0",
		"1000-2000  rw-p 0 0:0 0",
	};
	struct mapping m;

	for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
		if (mapping_parse(lines[i], &m) != -EINVAL)
			fprintf(stderr, "taken: %s\n", lines[i]);
		CHECK_EQ(mapping_parse(lines[i], &m), -EINVAL);
	}
}

static void garbage_does_no_harm(void)
{
	static const char good[] = "7fb6bfe00000-7fb6dfe00000 rw-p 00000000 fe:00 2170939   /usr/bin/qemu";
	struct mapping m;

	srand(5);
	for (int i = 0; i < 200000; i++) {
		char line[sizeof(good)];

		memcpy(line, good, sizeof(good));
		for (int k = rand() % 4; k >= 0; k--)
			line[(size_t)rand() % (sizeof(good) - 1)] = (char)(rand() % 256);
		line[(size_t)rand() % sizeof(good)] = '\0';
		if (!mapping_parse(line, &m))
			CHECK(m.r.start < m.r.end && strlen(m.permissions) == 4 && strlen(m.path) < sizeof(m.path));
	}
}

static char *wanted;
static unsigned int seen;
static uint64_t last;

static bool look(const struct mapping *m, void *opaque)
{
	(void)opaque;
	CHECK(m->r.start >= last || m->path[0] == '[');
	last = m->r.end;
	if (m->r.start <= (uintptr_t)wanted && (uintptr_t)wanted < m->r.end)
		seen++;
	return true;
}

/* Thousands of mappings, with long paths among them. */
static void our_own(void)
{
	enum { PIECES = 5000, PAGE = 4096 };
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	char *p = mmap(NULL, 2 * PIECES * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	for (size_t i = 0; i < PIECES; i++)
		CHECK_EQ(mprotect(p + 2 * i * PAGE, PAGE, PROT_READ | PROT_WRITE), 0);
	for (size_t i = 0; i < 2 * PIECES; i += 999) {
		wanted = p + i * PAGE;
		seen = 0;
		last = 0;
		CHECK_EQ(maps_walk(fd, look, NULL), 0);
		CHECK_EQ(seen, 1);
	}
	munmap(p, 2 * PIECES * PAGE);
	close(fd);
	CHECK_EQ(maps_walk(fd, look, NULL), -EBADF);
}

static void other_files_make_no_sense(void)
{
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	int pipes[2];

	CHECK_EQ(maps_walk(fd, look, NULL), -EINVAL);
	close(fd);
	CHECK_EQ(pipe(pipes), 0);
	CHECK_EQ(maps_walk(pipes[0], look, NULL), -ESPIPE);
	close(pipes[0]);
	close(pipes[1]);
}

CHECK_MAIN(CASE(a_line_of_each_kind), CASE(what_is_no_line_is_refused), CASE(garbage_does_no_harm), CASE(our_own),
	   CASE(other_files_make_no_sense))
