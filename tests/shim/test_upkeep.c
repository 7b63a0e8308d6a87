/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is lost of a guarantee behind the lock thread's back is noticed and repaired, on real memory. */
#include "locking.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

static char *private, *shared; /* the two blocks */
static int shared_fd;
static bool postcopy;

static bool refresh(void *opaque)
{
	(void)opaque;
	locker_suspend(&locker, postcopy ? "postcopy" : NULL);
	return true;
}

static struct ram_block block(char *p, bool is_shared)
{
	return (struct ram_block){
		.id = "ram",
		.page_size = 4096,
		.host = range_at(p, BLOCK),
		.backing = is_shared ? BACKING_MEMFD : BACKING_ANONYMOUS,
		.shared = is_shared,
		.mergeable = !is_shared,
	};
}

static void prepare(void)
{
	locker.refresh = refresh;
	shared_fd = memfd_create("test", MFD_CLOEXEC);
	CHECK_EQ(ftruncate(shared_fd, BLOCK), 0);
	private = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	shared = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
	if (private == MAP_FAILED || shared == MAP_FAILED)
		abort();
	layout.n = 2;
	layout.v[0] = block(private, false);
	layout.v[1] = block(shared, true);
	layout_finish(&layout);
	locker_set_layout(&locker, &layout);
}

static void begin(uint64_t size)
{
	locking_start(nothing_to_tell, prepare);
	CHECK_EQ(locker_set(&locker, &(struct wish){ .lock_ram_size = size, .prefault = true }, text), 0);
}

/* As if the time for it had come. */
static void look(void)
{
	time_t deadline = time(NULL) + DEADLINE_S;
	uint64_t looks;

	usleep(1000);
	pthread_mutex_lock(&locker.mutex);
	looks = locker.upkeep.looks;
	locker.upkeep.wanted = true;
	pthread_cond_signal(&locker.wake);
	while (looks == locker.upkeep.looks && time(NULL) < deadline) {
		pthread_mutex_unlock(&locker.mutex);
		usleep(1000);
		pthread_mutex_lock(&locker.mutex);
	}
	pthread_mutex_unlock(&locker.mutex);
}

static uint64_t absent(void)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < layout.n; i++)
		for (uint64_t at = 0; at < BLOCK; at += 8 * MIB) {
			uint64_t start = layout.v[i].host.start + at;

			sum += audit_absent(locker.stepper.pagemap, (struct range){ start, start + 8 * MIB });
		}
	return sum;
}

static void check_all_held(uint64_t lost, enum loss cause, struct losses before)
{
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(status.locked, 2 * BLOCK);
	CHECK_EQ(vm_locked(), 2 * BLOCK);
	CHECK_EQ(absent(), 0);
	CHECK_EQ(status.lost.bytes[cause] - before.bytes[cause], lost);
	CHECK_EQ(status.repaired.bytes[cause], status.lost.bytes[cause]);
}

static struct losses losses_before(void)
{
	locker_query(&locker, &status);
	return status.lost;
}

static void a_lock_taken_away(void)
{
	struct losses before;

	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	before = losses_before();
	CHECK_EQ(syscall(SYS_munlock, private + 5 * MIB, 7 * MIB), 0);
	/* Nobody is told the old figure, not even once. */
	locker_query(&locker, &status);
	CHECK(status.locked < 2 * BLOCK || status.lost.bytes[LOSS_UNLOCKED] > before.bytes[LOSS_UNLOCKED]);
	look();
	check_all_held(7 * MIB, LOSS_UNLOCKED, before);
	CHECK_EQ(status.foreign, 0);
}

static void all_locks_taken_away(void)
{
	struct losses before;

	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	before = losses_before();
	CHECK_EQ(syscall(SYS_munlockall), 0);
	look();
	check_all_held(2 * BLOCK, LOSS_UNLOCKED, before);
}

static void not_locked_again_while_that_would_harm(void)
{
	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	postcopy = true;
	CHECK_EQ(syscall(SYS_munlock, private, 3 * MIB), 0);
	look();
	wait_settled(LOCKER_SHORT);
	CHECK_EQ(status.shortage, SHORTAGE_MIGRATION);
	CHECK_EQ(status.locked, 0);
	CHECK_EQ(vm_locked(), 0);
	postcopy = false;
	refresh(NULL);
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(status.locked, 2 * BLOCK);
	CHECK_EQ(status.repaired.bytes[LOSS_UNLOCKED], status.lost.bytes[LOSS_UNLOCKED]);
}

static void pages_taken_from_under_the_lock(void)
{
	struct losses before;
	char *other;

	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	before = losses_before();
	CHECK_EQ(fallocate(shared_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 20 * MIB + 4096, 3 * MIB), 0);
	look();
	check_all_held(3 * MIB, LOSS_DISCARDED, before);
	/* The kernel refuses this where memory is locked, but not to another mapping of the file. */
	before = losses_before();
	other = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
	CHECK(other != MAP_FAILED && madvise(shared, MIB, MADV_REMOVE) == -1);
	CHECK_EQ(madvise(other + 5 * MIB, 4 * MIB, MADV_REMOVE), 0);
	munmap(other, BLOCK);
	look();
	check_all_held(4 * MIB, LOSS_DISCARDED, before);
	/* Put back into the file by somebody else, but not mapped here: it could go to swap. */
	before = losses_before();
	CHECK_EQ(fallocate(shared_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 30 * MIB, MIB), 0);
	CHECK_EQ(pwrite(shared_fd, text, sizeof(text), 30 * MIB), sizeof(text));
	look();
	check_all_held(MIB, LOSS_DISCARDED, before);
	if (!madvise(private + MIB, 2 * MIB, MADV_DONTNEED_LOCKED)) {
		before = losses_before();
		look();
		check_all_held(2 * MIB, LOSS_DISCARDED, before);
	}
}

static void a_foreign_lock_that_goes_is_made_up_for(void)
{
	begin(0);
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(syscall(SYS_mlock, private, 16 * MIB), 0);
	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(locker.books.foreign.total, 16 * MIB);
	CHECK_EQ(syscall(SYS_munlock, private, 16 * MIB), 0);
	look();
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(status.locked, 2 * BLOCK);
	CHECK_EQ(vm_locked(), 2 * BLOCK);
	begin(0);
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(vm_locked(), 0);
}

static void on_fault_locks_are_no_loss(void)
{
	struct losses before = losses_before();
	struct wish w = { .lock_ram_size = BLOCK, .order = ORDER_ADDRESS };

	begin(0);
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(madvise(private, BLOCK, MADV_DONTNEED), 0);
	CHECK_EQ(fallocate(shared_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, BLOCK), 0);
	CHECK_EQ(locker_set(&locker, &w, text), 0);
	look();
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(memcmp(&before, &status.lost, sizeof(before)), 0);
	CHECK(status.locked < status.armed);
	begin(0);
	wait_settled(LOCKER_IDLE);
}

/* Where KSM works, locked memory is kept out of it, and let in again when it is released. */
static void locked_memory_is_not_merged(void)
{
	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	pthread_mutex_lock(&locker.mutex);
	locker.stepper.merging.at_work = true;
	pthread_mutex_unlock(&locker.mutex);
	CHECK_EQ(merging_keep_out(&locker.stepper.merging, layout.v[0].host), 0);
	CHECK_EQ(extents_overlap(&locker.stepper.merging.kept_out, layout.v[0].host), BLOCK);
	begin(0);
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(locker.stepper.merging.kept_out.total, 0);
}

CHECK_MAIN(CASE(a_lock_taken_away), CASE(all_locks_taken_away), CASE(not_locked_again_while_that_would_harm),
	   CASE(pages_taken_from_under_the_lock), CASE(a_foreign_lock_that_goes_is_made_up_for),
	   CASE(on_fault_locks_are_no_loss), CASE(locked_memory_is_not_merged))
