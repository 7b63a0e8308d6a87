/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Ending the lock thread: one that hangs in the kernel, as populating waits for whoever answers for the memory (userfaultfd(2)); and what it leaves. */
#include "check.h"
#include "locker.h"
#include "syscalls.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BLOCK = 4 << 20 };

static struct locker locker;
static struct ram_layout layout;
static struct locker_status status;

static void note(void *opaque)
{
	(void)opaque;
}

/* Memory whose pages nobody provides, until the descriptor is closed. Returns that, or -1 where it may not be had. */
static int unanswered(void **at)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register area = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	*at = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	area.range.start = (uint64_t)(uintptr_t)*at;
	area.range.len = BLOCK;
	if (fd >= 0 && (*at == MAP_FAILED || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &area))) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static void wait_for(bool in_step)
{
	bool is = !in_step;

	for (int i = 0; i < 10000 && is != in_step; i++) {
		usleep(1000);
		pthread_mutex_lock(&locker.mutex);
		is = range_size(locker.in_flight);
		pthread_mutex_unlock(&locker.mutex);
	}
	CHECK_EQ(is, in_step);
}

static void a_thread_that_hangs_is_not_waited_for(void)
{
	char text[SHORT_TEXT];
	pthread_t thread;
	void *at;
	int fd = unanswered(&at);

	if (fd < 0)
		return; /* only root may have it answer for the kernel's own faults */
	locker_init(&locker, note, NULL);
	stepper_open(&locker.stepper, "");
	CHECK_EQ(pthread_create(&thread, NULL, locker_run, &locker), 0);
	layout.n = 1;
	layout.v[0] = (struct ram_block){ .id = "ram", .page_size = 4096 };
	layout.v[0].host = (struct range){ (uint64_t)(uintptr_t)at, (uint64_t)(uintptr_t)at + BLOCK };
	layout_finish(&layout);
	locker_set_layout(&locker, &layout);
	CHECK_EQ(locker_set(&locker, &(struct wish){ .lock_ram_size = BLOCK, .prefault = true }, text), 0);
	wait_for(true);
	CHECK_EQ(locker_stop(&locker), -EBUSY);
	locker_query(&locker, &status); /* everything else still answers */
	CHECK_EQ(status.requested, BLOCK);
	CHECK_EQ(locker_set(&locker, &(struct wish){ .prefault = true }, text), 0);
	CHECK(!locker_is_released(&locker));
	CHECK_EQ(locker_stop(&locker), -EBUSY);

	close(fd); /* pages are provided as usual from now on */
	wait_for(false);
	for (int i = 0; i < 10000 && !locker_is_released(&locker); i++)
		usleep(1000);
	CHECK(locker_is_released(&locker));
	CHECK_EQ(locker_stop(&locker), 0);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	stepper_deinit(&locker.stepper);
	munmap(at, BLOCK);
}

static void what_is_no_guest_ram_is_not_handed_over(void)
{
	static struct books books;
	char *at = mmap(NULL, 2 * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct range both = { (uint64_t)(uintptr_t)at, (uint64_t)(uintptr_t)at + 2 * BLOCK }, one = { both.start, both.start + BLOCK };
	struct wish wish;

	memset(&locker, 0, sizeof(locker));
	locker_init(&locker, note, NULL);
	stepper_open(&locker.stepper, "");
	layout.n = 1;
	layout.v[0] = (struct ram_block){ .id = "ram", .page_size = 4096, .host = both };
	layout_finish(&layout);
	locker_set_layout(&locker, &layout);
	CHECK_EQ(sys_mlock2(both, 0), 0);
	books_add(&locker.books, both, false, false);
	layout.v[0].host = one;
	layout_finish(&layout);
	locker_set_layout(&locker, &layout);
	CHECK_EQ(locker.books.gone.total, BLOCK);
	locker_give(&locker, &books, &wish);
	CHECK_EQ(books.gone.total, 0);
	CHECK_EQ(books.held.total, BLOCK);
	CHECK_EQ(headroom_vm_locked(&locker.stepper.headroom), BLOCK);
	CHECK_EQ(range_size(locker.in_flight), 0);
	stepper_deinit(&locker.stepper);
	munmap(at, 2 * BLOCK);
}

CHECK_MAIN(CASE(a_thread_that_hangs_is_not_waited_for), CASE(what_is_no_guest_ram_is_not_handed_over))
