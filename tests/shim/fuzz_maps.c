/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Any bytes as /proc/PID/maps, and two blocks of guest RAM that are held against it. */
#include "fuzz.h"
#include "maps.h"
#include "pushed.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

static struct evidence evidence[RAM_BLOCKS_MAX];
static struct ram_layout layout;

static bool judge_sane(const struct mapping *m, void *judge)
{
	must(m->r.start < m->r.end && strlen(m->permissions) == 4 && strlen(m->path) < sizeof(m->path));
	return judge_mapping(m, judge);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	static int fd = -1;
	struct judge judge;
	int err;

	if (fd < 0)
		fd = memfd_create("maps", MFD_CLOEXEC);
	must(!ftruncate(fd, 0) && pwrite(fd, bytes, size, 0) == (ssize_t)size);
	layout.n = 2;
	layout.v[0] = (struct ram_block){ .id = "one", .host = { 0x200000, 0x400000 }, .page_size = 4096 };
	layout.v[1] = (struct ram_block){ .id = "two", .host = { 0x600000, 0xa00000 }, .page_size = 4096 };
	must(!pushed_sort(&layout));
	judge_begin(&judge, &layout, evidence);
	err = maps_walk(fd, judge_sane, &judge);
	judge_end(&judge);
	must(!err || err == -EINVAL);
	for (size_t i = 0; i < layout.n; i++)
		must(evidence[i].wrong || evidence[i].reached == layout.v[i].host.end);
	return 0;
}
