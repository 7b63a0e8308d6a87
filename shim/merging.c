/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Keeps locked memory out of KSM. While KSM does nothing, as on most hosts, this costs nothing. */
#include "merging.h"

#include "fd.h"
#include "smallfile.h"

#include <stdlib.h>
#include <sys/mman.h>

void merging_init(struct merging *m)
{
	m->run = m->merged = -1;
	m->at_work = false;
	extents_clear(&m->kept_out);
}

void merging_open(struct merging *m, const char *root)
{
	m->run = smallfile_open(root, "sys/kernel/mm/ksm/run");
	/* Without KSM in the kernel there is nothing to know; without /sys there is no telling. */
	if (m->run < 0 && errno == ENOENT && smallfile_exists(root, "sys/kernel/mm"))
		m->run = smallfile_open("", "dev/null");
	m->merged = smallfile_open(root, "proc/self/ksm_merging_pages");
	merging_look(m);
}

void merging_deinit(struct merging *m)
{
	fd_close(m->run);
	fd_close(m->merged);
	m->run = m->merged = -1;
	m->at_work = false;
}

/* The number in @fd, 0 in an empty file, @unknown when it cannot be read. */
static long read_number(int fd, long unknown)
{
	char text[32] = "";

	return fd >= 0 && pread(fd, text, sizeof(text) - 1, 0) >= 0 ? strtol(text, NULL, 10) : unknown;
}

void merging_look(struct merging *m)
{
	m->at_work = read_number(m->run, 1) == 1 || read_number(m->merged, 0) > 0;
}

int merging_keep_out(struct merging *m, struct range r)
{
	if (!m->at_work || extents_overlap(&m->kept_out, r) == range_size(r))
		return 0;
	if (madvise((void *)(uintptr_t)r.start, range_size(r), MADV_UNMERGEABLE))
		return errno == EINVAL ? 0 : -errno; /* EINVAL: a kernel without KSM */
	extents_add(&m->kept_out, r); /* with no room in it, we shall ask again and for nothing */
	return 0;
}

int merging_lock(struct merging *m, struct range r)
{
	extents_remove(&m->kept_out, r);
	return merging_keep_out(m, r);
}

void merging_let_in(struct merging *m, struct range r, bool mergeable)
{
	/* Also where another shim in this process did it: what is mergeable already stays so at no cost. */
	if (mergeable)
		madvise((void *)(uintptr_t)r.start, range_size(r), MADV_MERGEABLE);
	extents_remove(&m->kept_out, r);
}
