/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Memory that is given back while it is locked, on real memory: this program's own calls are redirected as QEMU's are. */
#include "discards.h"
#include "follow.h"
#include "locking.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

/* What is given back in the very step that fills its range may be filled again. */
enum { IN_FLIGHT = 8 << 20 };
enum { PAGE = 4096, BEFORE = 6 * MIB };

static char *private, *shared; /* the two blocks */
static int shared_fd; /* of the second, which begins at BEFORE */

/* QEMU has a control thread for that. */
static void discarded(void *opaque)
{
	(void)opaque;
	follow_wake(&locker);
}

static char *map(int flags, int fd, off_t offset)
{
	char *p = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, flags, fd, offset);

	if (p == MAP_FAILED)
		abort();
	return p;
}

static void set(uint64_t size)
{
	struct wish w = { .lock_ram_size = size, .order = ORDER_RESIDENT, .prefault = true };

	CHECK_EQ(locker_set(&locker, &w, text), 0);
}

static void prepare(void)
{
	locker.discarded = discarded;
	locker.maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	shared_fd = memfd_create("test", MFD_CLOEXEC);
	CHECK_EQ(ftruncate(shared_fd, BEFORE + BLOCK + MIB), 0);
	private = map(MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	shared = map(MAP_SHARED, shared_fd, BEFORE);
	layout.n = 2;
	layout.v[0] = (struct ram_block){ .id = "ram", .page_size = PAGE, .host = range_at(private, BLOCK) };
	layout.v[1] = (struct ram_block){ .id = "ram", .page_size = PAGE, .host = range_at(shared, BLOCK), .shared = true };
	layout_finish(&layout);
	locker_set_layout(&locker, &layout);
}

static void begin(uint64_t size)
{
	locking_start(nothing_to_tell, prepare);
	set(size);
}

static uint64_t resident(void)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < layout.n; i++)
		sum += BLOCK - audit_absent(locker.stepper.pagemap, layout.v[i].host);
	return sum;
}

/* What was noted is looked at a little later, so waits for what is to come of it. */
#define EVENTUALLY(condition)                                                              \
	do {                                                                               \
		time_t eventually = time(NULL) + DEADLINE_S;                               \
		while (!(is_settled() && (condition)) && time(NULL) < eventually)          \
			usleep(1000);                                                      \
		CHECK(condition);                                                          \
	} while (0)

/* Gives all back, without a guarantee. */
static void end(void)
{
	set(0);
	EVENTUALLY(status.state == LOCKER_IDLE && vm_locked() == 0);
	for (size_t i = 0; i < layout.n; i++) {
		CHECK_EQ(madvise(i ? shared : private, BLOCK, MADV_WILLNEED), 0);
	}
	CHECK_EQ(madvise(private, BLOCK, MADV_DONTNEED), 0);
	CHECK_EQ(madvise(shared, BLOCK, MADV_REMOVE), 0);
	for (size_t i = 0; i < layout.n; i++)
		CHECK_EQ(madvise(i ? shared : private, BLOCK, MADV_WILLNEED), 0);
	CHECK_EQ(discards_total(), 0);
}

static void only_when_asked_for(void)
{
	begin(2 * BLOCK);
	wait_idle();
	CHECK(madvise(private, PAGE, MADV_DONTNEED) == -1 && errno == EINVAL);
	CHECK(!locker_follows(&locker) && !status.follows);
	locker_follow(&locker);
	EVENTUALLY(locker_follows(&locker) && status.follows);
	CHECK_EQ(madvise(private, PAGE, MADV_DONTNEED), 0);
	end();
}

static void the_guarantee_moves(void)
{
	struct range given = { 0, 0 };

	begin(32 * MIB);
	memset(private, 1, BLOCK);
	wait_settled(LOCKER_IDLE);
	end();
	memset(private, 1, BLOCK);
	set(32 * MIB);
	wait_settled(LOCKER_IDLE);
	given = range_at(private, 16 * MIB);
	errno = 5;
	for (size_t at = 0; at < 16 * MIB; at += PAGE)
		CHECK_EQ(madvise(private + at, PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(errno, 5);
	EVENTUALLY(status.locked == 32 * MIB && vm_locked() == 32 * MIB && status.given_back == 16 * MIB &&
		   extents_overlap(&locker.books.held, given) == 0);
	CHECK_EQ(resident(), BLOCK - 16 * MIB); /* nothing was allocated for it */
	/* Used again: not locked again. */
	memset(private, 2, 16 * MIB);
	CHECK_EQ(vm_locked(), 32 * MIB);
	end();
}

static void what_is_left_is_locked(void)
{
	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	CHECK_EQ(madvise(private, 40 * MIB, MADV_DONTNEED), 0);
	CHECK_EQ(madvise(shared + 8 * MIB, 40 * MIB, MADV_REMOVE), 0);
	EVENTUALLY(status.state == LOCKER_SHORT && status.locked == 48 * MIB && vm_locked() == 48 * MIB);
	CHECK_EQ(status.shortage, SHORTAGE_DISCARDED);
	CHECK_EQ(resident(), 48 * MIB);
	/* Wanted again: made good without a touch. */
	CHECK_EQ(madvise(private, 40 * MIB, MADV_WILLNEED), 0);
	CHECK_EQ(madvise(shared + 8 * MIB, 40 * MIB, MADV_WILLNEED), 0);
	EVENTUALLY(status.state == LOCKER_IDLE && status.locked == 2 * BLOCK && vm_locked() == 2 * BLOCK);
	CHECK_EQ(status.lost.bytes[LOSS_DISCARDED], 0);
	end();
}

static int punch(int fd, off_t offset, off_t size)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
}

static void a_hole_in_the_file_is_followed(void)
{
	int other = memfd_create("disk", MFD_CLOEXEC);

	begin(2 * BLOCK);
	wait_idle();
	errno = 5;
	CHECK_EQ(punch(shared_fd, BEFORE + 8 * MIB, 16 * MIB), 0);
	CHECK_EQ(errno, 5);
	EVENTUALLY(status.state == LOCKER_SHORT && status.locked == 2 * BLOCK - 16 * MIB && vm_locked() == status.locked &&
		   extents_overlap(&locker.books.held, range_at(shared + 8 * MIB, 16 * MIB)) == 0);
	CHECK_EQ(status.given_back, 16 * MIB);
	CHECK_EQ(resident(), 2 * BLOCK - 16 * MIB);
	/* At both ends some of it is no guest RAM. */
	CHECK_EQ(punch(shared_fd, 0, BEFORE + 2 * MIB), 0);
	CHECK_EQ(punch(shared_fd, BEFORE + BLOCK - 2 * MIB, 3 * MIB), 0);
	EVENTUALLY(status.locked == 2 * BLOCK - 20 * MIB && vm_locked() == status.locked);
	CHECK_EQ(status.given_back, 20 * MIB);
	/* What is none of it is let through, as are other calls. */
	CHECK_EQ(punch(shared_fd, 0, BEFORE), 0);
	CHECK_EQ(fallocate(other, 0, 0, MIB), 0);
	CHECK_EQ(punch(other, 0, MIB), 0);
	CHECK(punch(-1, BEFORE, MIB) == -1 && errno == EBADF);
	CHECK(punch(shared_fd, -1, MIB) == -1 && errno == EINVAL);
	CHECK_EQ(discards_total(), 20 * MIB);
	CHECK_EQ(status.lost.bytes[LOSS_DISCARDED], 0);
	close(other);
	end();
}

/* As with virtio-mem, of which more and more is plugged. */
static void blocks_come_and_go(void)
{
	struct ram_layout other = layout;

	begin(0);
	wait_idle();
	CHECK_EQ(madvise(private, 4 * MIB, MADV_DONTNEED), 0);
	CHECK_EQ(discards_total(), 4 * MIB);
	for (unsigned int i = 0; i < 1100; i++) { /* more often than there are places for blocks */
		other.v[private < shared ? 0 : 1].host.end -= i % 16 ? PAGE : -15 * PAGE;
		discards_set_layout(&other, locker.maps);
		CHECK_EQ(discards_total(), 4 * MIB); /* it is the same memory */
	}
	discards_set_layout(&layout, locker.maps);
	CHECK_EQ(madvise(private + BLOCK - PAGE, PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(discards_total(), 4 * MIB + PAGE);
	other = layout;
	other.v[private < shared ? 0 : 1].host.start += 4 * MIB;
	discards_set_layout(&other, locker.maps);
	CHECK_EQ(discards_total(), PAGE);
	discards_set_layout(&layout, locker.maps);
	end();
}

static void every_other_page_leaves_few_ranges(void)
{
	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	for (size_t at = 0; at < BLOCK; at += 3 * (size_t)PAGE)
		CHECK_EQ(madvise(private + at, PAGE, MADV_DONTNEED), 0);
	EVENTUALLY(status.state == LOCKER_SHORT && vm_locked() == status.locked && resident() <= 2 * BLOCK - BLOCK / 3 + IN_FLIGHT &&
		   status.locked <= resident());
	CHECK(status.locked >= BLOCK);
	CHECK(resident() <= 2 * BLOCK - BLOCK / 3 + IN_FLIGHT);
	CHECK(status.extents <= PLAN_EXTENTS_MAX + 2);
	end();
}

static void an_unlock_of_all_is_noticed_at_once(void)
{
	uint64_t before;

	begin(BLOCK);
	wait_settled(LOCKER_IDLE);
	before = status.lost.bytes[LOSS_UNLOCKED];
	CHECK_EQ(munlockall(), 0);
	EVENTUALLY(status.lost.bytes[LOSS_UNLOCKED] - before == BLOCK);
	EVENTUALLY(vm_locked() == BLOCK);
	end();
}

static void undone(void)
{
	begin(2 * BLOCK);
	wait_settled(LOCKER_IDLE);
	discards_unfollow();
	CHECK(madvise(private, PAGE, MADV_DONTNEED) == -1 && errno == EINVAL);
}

CHECK_MAIN(CASE(only_when_asked_for), CASE(the_guarantee_moves), CASE(what_is_left_is_locked),
	   CASE(a_hole_in_the_file_is_followed), CASE(blocks_come_and_go), CASE(every_other_page_leaves_few_ranges),
	   CASE(an_unlock_of_all_is_noticed_at_once), CASE(undone))
