/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Any text in the files of the memory cgroups: /proc/self/cgroup, /proc/self/mountinfo, the limit, the usage and the
 * statistics of a cgroup, each up to a NUL byte. A second reading after that is of other memberships.
 */
#include "cgroup.h"
#include "fuzz.h"
#include "tree.h"

static void begin(void)
{
	tree_begin();
	put("proc/self/status", "x\n");
	put("cg/a/cgroup.procs", "%s", "");
	put("cg/a/b/cgroup.procs", "%s", "");
	atexit(tree_end);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	static const char *const names[] = { "proc/self/cgroup", "proc/self/mountinfo", "cg/a/memory.max", "cg/a/memory.current",
					     "cg/a/memory.stat" };
	struct cgroups c;
	char *text;

	if (!root[0])
		begin();
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		text = take_string(&bytes, &size);
		put(names[i], "%s", text);
		free(text);
	}
	cgroups_init(&c);
	cgroups_open(&c, root);
	must(c.n_levels <= CGROUP_DEPTH_MAX);
	cgroups_left(&c, UINT64_MAX);
	cgroups_pinnable(&c, 0, true);
	text = take_string(&bytes, &size);
	put(names[0], "%s", text);
	free(text);
	must(cgroups_left(&c, 0) == 0 || c.known);
	cgroups_deinit(&c);
	return 0;
}
