/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Memory that is given back while it is locked, on real memory: this program's own calls are redirected as QEMU's are. */
#include "check.h"
#include "discards.h"
#include "follow.h"
#include "locker.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* What is given back in the very step that fills its range may be filled again. */
enum { IN_FLIGHT = 8 << 20 };
enum { MIB = 1 << 20, BLOCK = 64 * MIB, DEADLINE_S = 6, PAGE = 4096 };

static struct locker locker;
static struct ram_layout layout;
static struct locker_status status;
static char text[SHORT_TEXT];
static char *private, *shared; /* the two blocks */

static void note(void *opaque)
{
	(void)opaque;
}

/* QEMU has a control thread for that. */
static void discarded(void *opaque)
{
	(void)opaque;
	follow_wake(&locker);
}

static char *map(int flags)
{
	char *p = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		abort();
	return p;
}

static void set(uint64_t size)
{
	struct wish w = { .lock_ram_size = size, .order = ORDER_RESIDENT, .prefault = true };

	CHECK_EQ(locker_set(&locker, &w, text), 0);
}

static void begin(uint64_t size)
{
	static bool started;
	pthread_t thread;

	if (!started) {
		started = true;
		locker_init(&locker, note, NULL);
		locker.follows = true;
		locker.discarded = discarded;
		stepper_open(&locker.stepper, "");
		private = map(MAP_PRIVATE);
		shared = map(MAP_SHARED);
		layout.n = 2;
		for (size_t i = 0; i < layout.n; i++) {
			char *p = i ? shared : private;

			layout.v[i] = (struct ram_block){ .id = "ram", .page_size = PAGE, .shared = i > 0 };
			layout.v[i].host = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + BLOCK };
		}
		layout_finish(&layout);
		locker_set_layout(&locker, &layout);
		if (pthread_create(&thread, NULL, locker_run, &locker))
			abort();
	}
	set(size);
}

static uint64_t vm_locked(void)
{
	return (uint64_t)headroom_vm_locked(&locker.stepper.headroom);
}

static uint64_t resident(void)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < layout.n; i++)
		sum += BLOCK - audit_absent(locker.stepper.pagemap, layout.v[i].host);
	return sum;
}

static bool is_settled(void)
{
	locker_query(&locker, &status);
	return status.state == LOCKER_IDLE || status.state == LOCKER_SHORT;
}

static void wait_settled(enum locker_state state)
{
	time_t deadline = time(NULL) + DEADLINE_S;

	/* What was noted is looked at a little later. */
	do
		usleep(1000);
	while ((discards_pending() || !is_settled()) && time(NULL) < deadline);
	CHECK_EQ(status.state, state);
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
	CHECK_EQ(extents_overlap(&locker.books.held, layout.v[0].host) + extents_overlap(&locker.books.held, layout.v[1].host),
		 32 * MIB);
	given = (struct range){ (uint64_t)(uintptr_t)private, (uint64_t)(uintptr_t)private + 16 * MIB };
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

CHECK_MAIN(CASE(the_guarantee_moves), CASE(what_is_left_is_locked), CASE(every_other_page_leaves_few_ranges),
	   CASE(an_unlock_of_all_is_noticed_at_once), CASE(undone))
