/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest RAM as the controller says it is, and what this process knows against it.
 *
 * QEMU maps every RAM block in one piece, readable and writable, not executable, and puts a page without any rights
 * behind it (util/mmap-alloc.c, 4.2 to 11.1); anonymous blocks begin at a multiple of 2 MiB. The heap, stacks and the data of
 * libraries do not look like that, and are refused by name or by what the loader knows besides.
 */
#include "pushed.h"

#include "fd.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <dirent.h>
#include <unistd.h>
#include <linux/magic.h>

enum {
	ANONYMOUS_ALIGN = 2 << 20,
	ARENA = 64 << 20, /* HEAP_MAX_SIZE of glibc's malloc(): so much, aligned to as much, for the threads' memory */
	GUARD = 4096,
	DESCRIPTORS_MOST = 1 << 16,
	TASKS_MOST = 4096,
};

const char *pushed_sort(struct ram_layout *l)
{
	for (size_t i = 0; i < l->n; i++) {
		const struct ram_block *b = &l->v[i];
		uint64_t page = b->page_size;

		if (b->host.start >= b->host.end)
			return "has no size";
		if (page < (uint64_t)sysconf(_SC_PAGESIZE) || page & (page - 1))
			return "has a page size that cannot be";
		if (b->host.start % page || b->host.end % page)
			return "is not made of whole pages";
	}
	layout_finish(l);
	for (size_t i = 1; i < l->n; i++)
		if (l->v[i].host.start < l->v[i - 1].host.end)
			return "lies over another one";
	return NULL;
}

/* ---- Against mappings; pure ---- */

void judge_begin(struct judge *j, const struct ram_layout *l, struct evidence evidence[RAM_BLOCKS_MAX])
{
	j->layout = l;
	j->evidence = evidence;
	j->at = 0;
	for (size_t i = 0; i < l->n; i++)
		evidence[i] = (struct evidence){ .reached = l->v[i].host.start };
}

static bool begins(const char *text, const char *with)
{
	return !strncmp(text, with, strlen(with));
}

/* What backs @m. Returns false when QEMU has no guest RAM in such a mapping. */
static bool backing_of(const struct mapping *m, enum backing *backing)
{
	if (!m->inode) {
		*backing = BACKING_ANONYMOUS;
		return !m->path[0]; /* [heap], [stack], [anon:...] */
	}
	if (begins(m->path, "/memfd:"))
		*backing = BACKING_MEMFD;
	else if (m->permissions[3] == 's' && begins(m->path, "/dev/zero")) /* shared anonymous memory */
		*backing = BACKING_ANONYMOUS;
	else
		*backing = BACKING_FILE;
	return m->path[0] == '/' && !begins(m->path, "/SYSV") && !begins(m->path, "/anon_hugepage");
}

static void judge_part(const struct ram_block *b, struct evidence *e, const struct mapping *m)
{
	uint64_t end = m->r.end < b->host.end ? m->r.end : b->host.end;
	bool first = e->reached == b->host.start, shared = m->permissions[3] == 's';
	uint64_t offset = m->offset + (e->reached - m->r.start);
	enum backing backing;

	if (m->r.start > e->reached) {
		e->wrong = "is not mapped as a whole";
	} else if (memcmp(m->permissions, "rw-", 3)) {
		e->wrong = "is not memory that is read and written, and no more";
	} else if (!backing_of(m, &backing)) {
		e->wrong = "is no memory that guest RAM is made of";
	} else if (first) {
		e->backing = backing;
		e->shared = shared;
		e->device = m->device;
		e->inode = m->inode;
		e->offset = m->inode ? offset : 0;
	} else if (backing != e->backing || shared != e->shared || m->device != e->device || m->inode != e->inode ||
		   (m->inode && offset != e->offset + (e->reached - b->host.start))) {
		e->wrong = "is mapped in parts that do not belong together";
	}
	e->reached = end;
}

bool judge_mapping(const struct mapping *m, void *judge)
{
	struct judge *j = judge;
	const struct ram_layout *l = j->layout;

	while (j->at < l->n && (j->evidence[j->at].wrong || m->r.start > l->v[j->at].host.end))
		j->at++; /* past this block and what follows it */
	for (size_t i = j->at; i < l->n && l->v[i].host.start < m->r.end; i++) {
		struct evidence *e = &j->evidence[i];

		if (e->wrong)
			continue;
		if (m->r.end > e->reached && m->r.start < l->v[i].host.end) {
			judge_part(&l->v[i], e, m);
		} else if (m->r.start == l->v[i].host.end && begins(m->permissions, "---")) {
			e->guarded = true;
			e->arena = m->r.end % ARENA == 0 && range_size(m->r) > GUARD && l->v[i].host.start >= m->r.end - ARENA;
		}
	}
	return j->at < l->n;
}

void judge_end(struct judge *j)
{
	for (size_t i = 0; i < j->layout->n; i++) {
		const struct ram_block *b = &j->layout->v[i];
		struct evidence *e = &j->evidence[i];

		if (e->wrong)
			continue;
		if (e->reached < b->host.end)
			e->wrong = "is not mapped as a whole";
		else if (!e->guarded)
			e->wrong = "is not followed by a page without any rights, as QEMU's guest RAM is";
		else if (e->backing == BACKING_ANONYMOUS && !e->shared && e->arena)
			e->wrong = "is what malloc() keeps for a thread";
		else if (e->backing == BACKING_ANONYMOUS && b->host.start % ANONYMOUS_ALIGN)
			e->wrong = "does not begin at a multiple of 2 MiB, as QEMU's guest RAM does";
	}
}

/* ---- Against what this process knows ---- */

/* Program and libraries, with the data that no file backs. */
static int judge_object(struct dl_phdr_info *info, size_t size, void *judge)
{
	struct judge *j = judge;

	(void)size;
	for (size_t k = 0; k < info->dlpi_phnum; k++) {
		const ElfW(Phdr) *h = &info->dlpi_phdr[k];
		struct range r = { info->dlpi_addr + h->p_vaddr, info->dlpi_addr + h->p_vaddr + h->p_memsz };

		for (size_t i = 0; h->p_type == PT_LOAD && i < j->layout->n; i++)
			if (r.start < j->layout->v[i].host.end && j->layout->v[i].host.start < r.end)
				j->evidence[i].wrong = "lies over the program or one of its libraries";
	}
	return 0;
}

static void judge_address(struct judge *j, uint64_t address, const char *wrong)
{
	for (size_t i = 0; i < j->layout->n; i++)
		if (address >= j->layout->v[i].host.start && address < j->layout->v[i].host.end)
			j->evidence[i].wrong = wrong;
}

/* Stacks of threads that sleep: /proc/PID/task/TID/syscall ends with their stack pointer and program counter. */
static void judge_stacks(struct judge *j)
{
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *task;

	judge_address(j, (uint64_t)(uintptr_t)&tasks, "is a stack");
	for (int n = 0; tasks && n < TASKS_MOST && (task = readdir(tasks)); n++) {
		char path[sizeof("/proc/self/task//syscall") + sizeof(task->d_name)], text[256], *last;
		ssize_t size;
		int fd;

		snprintf(path, sizeof(path), "/proc/self/task/%s/syscall", task->d_name);
		fd = fd_above_stdio(open(path, O_RDONLY | O_CLOEXEC));
		size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
		fd_close(fd);
		text[size > 0 ? size : 0] = '\0';
		last = strrchr(text, ' ');
		if (!last)
			continue; /* it runs */
		*last = '\0';
		last = strrchr(text, ' ');
		if (last)
			judge_address(j, strtoull(last + 1, NULL, 16), "is a stack");
	}
	if (tasks)
		closedir(tasks);
}

/*
 * Tells the files of memory apart, by QEMU's own descriptor of them: of hugetlbfs, of tmpfs, or of a real file system. Only
 * files of the first two have seals, so nothing is asked of a file system that may be remote, and may not answer.
 */
static uint64_t judge_file(struct evidence *e)
{
	struct rlimit most = { .rlim_cur = DESCRIPTORS_MOST };
	struct statfs fs;
	struct stat st;

	getrlimit(RLIMIT_NOFILE, &most);
	for (int fd = 0; fd < DESCRIPTORS_MOST && (rlim_t)fd < most.rlim_cur; fd++) {
		if (fcntl(fd, F_GET_SEALS) < 0 || fstat(fd, &st) || st.st_ino != e->inode ||
		    st.st_dev != e->device || fstatfs(fd, &fs))
			continue;
		if (fs.f_type == HUGETLBFS_MAGIC) {
			e->backing = BACKING_HUGETLB;
			return (uint64_t)fs.f_bsize;
		}
		if (e->backing == BACKING_FILE && fs.f_type == TMPFS_MAGIC)
			e->backing = BACKING_SHMEM;
		return (uint64_t)sysconf(_SC_PAGESIZE);
	}
	if (e->backing == BACKING_MEMFD)
		e->wrong = "is of a memory file that is not open, so its page size is not known";
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* What is said besides the address: the kind of memory, and its page size. */
static void judge_kind(struct ram_block *b, struct evidence *e)
{
	uint64_t page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	enum backing seen = e->backing;

	if (!e->wrong && seen != BACKING_ANONYMOUS) {
		page_size = judge_file(e);
		seen = e->backing;
	}
	if (e->wrong)
		return;
	if (seen == BACKING_SHMEM && b->backing == BACKING_FILE)
		b->backing = seen; /* a file of tmpfs is a file */
	if (seen != b->backing)
		e->wrong = "has another backing";
	else if (page_size != b->page_size)
		e->wrong = "has another page size";
	b->shared = e->shared;
}

void pushed_init(struct pushed *p)
{
	p->maps = -1;
	pthread_mutex_init(&p->mutex, NULL);
}

void pushed_open(struct pushed *p)
{
	p->maps = fd_above_stdio(open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
}

void pushed_deinit(struct pushed *p)
{
	fd_close(p->maps);
	p->maps = -1;
}

int pushed_accept(struct pushed *p, const struct ram_layout *l, char text[PUSHED_TEXT])
{
	static struct ram_layout judged; /* with the mutex */
	const char *wrong;
	struct judge j;
	int err;

	judged = *l;
	wrong = pushed_sort(&judged);
	if (wrong) {
		snprintf(text, PUSHED_TEXT, "a block %s", wrong);
		return -EINVAL;
	}
	judge_begin(&j, &judged, p->now);
	err = maps_walk(p->maps, judge_mapping, &j);
	if (err) {
		snprintf(text, PUSHED_TEXT, "QEMU's /proc/self/maps cannot be read: %s", strerror(-err));
		return -EINVAL;
	}
	judge_end(&j);
	dl_iterate_phdr(judge_object, &j);
	judge_stacks(&j);
	for (size_t i = 0; i < judged.n; i++) {
		judge_kind(&judged.v[i], &p->now[i]);
		if (p->now[i].wrong) {
			snprintf(text, PUSHED_TEXT, "the block '%.64s' at 0x%" PRIx64 " %s", judged.v[i].id,
				 judged.v[i].host.start, p->now[i].wrong);
			return -EINVAL;
		}
	}
	p->layout = judged;
	memcpy(p->evidence, p->now, judged.n * sizeof(p->now[0]));
	return 0;
}

/* Whether the mappings of a block are still those that it was accepted with. */
static bool is_same(const struct evidence *then, const struct evidence *now)
{
	return !now->wrong && then->shared == now->shared && then->device == now->device && then->inode == now->inode &&
	       then->offset == now->offset;
}

bool pushed_look(struct pushed *p)
{
	struct judge j;
	bool readable;
	size_t n = 0;

	judge_begin(&j, &p->layout, p->now);
	readable = !maps_walk(p->maps, judge_mapping, &j);
	judge_end(&j);
	for (size_t i = 0; i < p->layout.n; i++)
		if (readable && is_same(&p->evidence[i], &p->now[i])) {
			p->evidence[n] = p->evidence[i];
			p->layout.v[n++] = p->layout.v[i];
		}
	if (n == p->layout.n)
		return false;
	p->layout.n = n;
	layout_finish(&p->layout);
	return true;
}
