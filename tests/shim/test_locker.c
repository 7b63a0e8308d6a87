/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The lock thread on real memory, judged by the kernel's VmLck and mincore(). */
#include "locking.h"

#include <dirent.h>
#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { BLOCKS = 2 };

static atomic_uint notes;

static void note(void *opaque)
{
	(void)opaque;
	atomic_fetch_add(&notes, 1);
}

static struct range map_block(void)
{
	char *p = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED || madvise(p, BLOCK, MADV_NOHUGEPAGE)) /* else bytes that are there depend on the host's settings */
		abort();
	madvise(p, BLOCK, MADV_NOHUGEPAGE); /* pages are counted: not by this host's settings */
	return (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + BLOCK };
}

static void nothing_is_known(void)
{
	CHECK_EQ(locker_set(&locker, &(struct wish){ .lock_ram_size = MIB }, text), -EAGAIN);
	locker_query(&locker, &status);
	CHECK_EQ(status.state, LOCKER_WAITING);
}

static void begin(void)
{
	locking_start(note, nothing_is_known);
	layout.n = BLOCKS;
	for (size_t i = 0; i < BLOCKS; i++) {
		layout.v[i] = (struct ram_block){ .id = "ram", .page_size = 4096, .host = map_block() };
	}
	layout_finish(&layout);
	locker_set_layout(&locker, &layout);
}

static void end(void)
{
	CHECK_EQ(locker_set(&locker, &(struct wish){ .prefault = true }, text), 0);
	for (size_t i = 0; i < BLOCKS; i++) {
		locker_remove(&locker, layout.v[i].host);
		munmap((void *)(uintptr_t)layout.v[i].host.start, BLOCK);
	}
}

static void wait_short(void)
{
	time_t deadline = time(NULL) + DEADLINE_S;

	do {
		usleep(1000);
		locker_query(&locker, &status);
	} while (status.state != LOCKER_SHORT && time(NULL) < deadline);
	CHECK_EQ(status.state, LOCKER_SHORT);
}

static void set(uint64_t size, enum order order, bool prefault)
{
	struct wish w = { .lock_ram_size = size, .order = order, .prefault = prefault };

	CHECK_EQ(locker_set(&locker, &w, text), 0);
}

static uint64_t resident(void)
{
	static unsigned char vec[BLOCK / 4096];
	uint64_t sum = 0;

	for (size_t i = 0; i < layout.n; i++) {
		CHECK_EQ(mincore((void *)(uintptr_t)layout.v[i].host.start, BLOCK, vec), 0);
		for (size_t j = 0; j < sizeof(vec); j++)
			sum += (vec[j] & 1) * 4096U;
	}
	return sum;
}

static void up_and_down_exactly(void)
{
	static const uint64_t sizes[] = { 1, 4096, 10 * MIB + 1, 100 * MIB, 128 * MIB, 70 * MIB - 5, 4096, 0 };

	begin();
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		uint64_t want = (sizes[i] + 4095) / 4096 * 4096;

		set(sizes[i], i % 2 ? ORDER_ADDRESS : ORDER_RESIDENT, true);
		wait_idle();
		CHECK_EQ(status.locked, want);
		CHECK_EQ(status.armed, want);
		CHECK_EQ(vm_locked(), want);
		CHECK(resident() >= want);
		CHECK_EQ(status.foreign, 0);
	}
	end();
}

static void resident_pages_cost_nothing(void)
{
	char *p;

	begin();
	p = (char *)(uintptr_t)layout.v[1].host.start;
	memset(p + 20 * MIB, 1, 30 * MIB);
	set(30 * MIB, ORDER_RESIDENT, true);
	wait_idle();
	CHECK_EQ(vm_locked(), 30 * MIB);
	CHECK_EQ(resident(), 30 * MIB);
	end();
}

static void on_fault_locks_what_is_touched(void)
{
	char *p;

	begin();
	set(64 * MIB, ORDER_ADDRESS, false);
	wait_idle();
	CHECK_EQ(status.armed, 64 * MIB);
	CHECK_EQ(status.locked, 0);
	CHECK_EQ(resident(), 0);
	p = (char *)(uintptr_t)layout.v[0].host.start;
	memset(p + 5 * MIB, 1, 3 * MIB);
	locker_query(&locker, &status);
	CHECK_EQ(status.locked, 3 * MIB);
	/* Asking for prefault populates what is armed. */
	set(64 * MIB, ORDER_ADDRESS, true);
	wait_idle();
	CHECK_EQ(status.locked, 64 * MIB);
	CHECK_EQ(resident(), 64 * MIB);
	end();
}

static void the_last_of_many_wishes_counts(void)
{
	uint64_t last = 0;

	begin();
	srand(4);
	for (int i = 0; i < 1000; i++) {
		last = (uint64_t)rand() % (BLOCKS * BLOCK);
		set(last, rand() % 2 ? ORDER_ADDRESS : ORDER_RESIDENT, rand() % 4 != 0);
		if (i % 3 == 0)
			usleep((unsigned int)rand() % 3000);
	}
	set(last, ORDER_RESIDENT, true);
	wait_idle();
	CHECK_EQ(status.locked, (last + 4095) / 4096 * 4096);
	CHECK_EQ(vm_locked(), status.locked);
	CHECK(status.extents <= PLAN_EXTENTS_MAX + BLOCKS);
	end();
	wait_idle();
	CHECK_EQ(vm_locked(), 0);
}

static void a_scattered_guest_stays_in_few_extents(void)
{
	char *p;

	begin();
	p = (char *)(uintptr_t)layout.v[0].host.start;
	for (size_t at = 0; at < BLOCK; at += 8192)
		p[at] = 1;
	for (uint64_t size = 4 * MIB; size < 100 * MIB; size += 13 * MIB) {
		set(size, ORDER_RESIDENT, true);
		wait_idle();
		CHECK_EQ(vm_locked(), size);
		CHECK(status.extents <= PLAN_EXTENTS_MAX + BLOCKS);
		/* Half of the pages of the first block are there: the other half is what lies between. */
		if (size == 4 * MIB)
			CHECK(status.filled > MIB && status.filled <= 2 * MIB);
	}
	end();
}

/* Context switches of the threads of this process that are called @name, and how many such threads there are. */
static uint64_t switches(const char *name, unsigned int *threads)
{
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *task;
	uint64_t sum = 0;

	*threads = 0;
	while (tasks && (task = readdir(tasks))) {
		char path[300], line[200], *value;
		FILE *f;

		snprintf(path, sizeof(path), "/proc/self/task/%s/status", task->d_name);
		f = task->d_name[0] == '.' ? NULL : fopen(path, "re");
		if (!f)
			continue;
		while (fgets(line, sizeof(line), f)) {
			if (!strncmp(line, "Name:", 5) && strncmp(line + 6, name, strlen(name)))
				break;
			*threads += !strncmp(line, "Name:", 5);
			value = strstr(line, "ctxt_switches:");
			sum += value ? strtoull(value + strlen("ctxt_switches:"), NULL, 10) : 0;
		}
		fclose(f);
	}
	if (tasks)
		closedir(tasks);
	return sum;
}

static void several_threads_populate(void)
{
	struct wish w = { .lock_ram_size = 100 * MIB, .prefault = true, .threads = 4, .hold_budget_us = 50 };
	unsigned int threads;
	uint64_t before;

	begin();
	for (int i = 0; i < 5; i++) {
		w.lock_ram_size = (uint64_t)(20 + 25 * i) * MIB;
		CHECK_EQ(locker_set(&locker, &w, text), 0);
		wait_idle();
		CHECK_EQ(status.locked, w.lock_ram_size);
		CHECK_EQ(vm_locked(), w.lock_ram_size);
		CHECK(resident() >= w.lock_ram_size);
	}
	switches("ramlock-fill", &threads);
	CHECK_EQ(threads, 3);
	/* Asleep, they make no wakeups. */
	before = switches("ramlock-fill", &threads);
	usleep(300 * 1000);
	CHECK_EQ(switches("ramlock-fill", &threads), before);
	end();
}

static void nothing_wakes_for_no_guarantee(void)
{
	unsigned int threads;
	uint64_t before;

	begin();
	set(8 * MIB, ORDER_RESIDENT, true);
	wait_idle();
	set(0, ORDER_RESIDENT, true);
	wait_idle();
	usleep(100 * 1000);
	before = switches("ramlock-lock", &threads);
	CHECK_EQ(threads, 1);
	usleep(500 * 1000);
	CHECK_EQ(switches("ramlock-lock", &threads), before);
	end();
}

/* Where somebody may always wait, each rest is a sleep. */
static void after_each_step_there_is_a_rest(void)
{
	uint64_t steps, before;
	unsigned int threads;

	begin();
	wait_idle();
	rest_always(&locker.stepper.rest);
	for (int up = 1; up >= 0; up--) {
		locker_query(&locker, &status);
		steps = status.step_times.count;
		before = switches("ramlock-lock", &threads);
		set(up ? BLOCKS * BLOCK : 0, ORDER_ADDRESS, true);
		wait_idle();
		steps = status.step_times.count - steps;
		CHECK(steps > 3);
		/* Marking absent pages has none after it: it takes no time; and who is preempted instead does not count. */
		CHECK(switches("ramlock-lock", &threads) - before >= steps / 2);
	}
	atomic_store(&locker.stepper.rest.blind_until_ns, 0);
	end();
}

/* What is told of the value before is not told as if it were of this one. */
static void what_is_told_is_true_of_the_last_wish(void)
{
	bool told = false;

	begin();
	for (uint64_t i = 1; i <= 20; i++) {
		unsigned int events;
		time_t deadline = time(NULL) + DEADLINE_S;

		set(i * 4 * MIB, ORDER_RESIDENT, true);
		events = locker_take_events(&locker, &status);
		CHECK(!(events & LOCKER_REACHED) || status.locked == i * 4 * MIB);
		for (locker_query(&locker, &status); status.state != LOCKER_IDLE && time(NULL) < deadline; usleep(1000))
			locker_query(&locker, &status);
		if (i % 2) { /* the others are left for the next turn */
			events = locker_take_events(&locker, &status);
			CHECK(events & LOCKER_REACHED);
			CHECK_EQ(status.requested, i * 4 * MIB);
			CHECK_EQ(status.locked, i * 4 * MIB);
			told = true;
		}
	}
	CHECK(told);
	end();
}

/* Nor is it one turn on a processor: a vCPU may wait for that. */
static void a_long_look_has_rests(void)
{
	enum { LARGE = 4 * BLOCK };
	char *p = mmap(NULL, LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct ram_layout large = { .n = 1 };
	unsigned long rests;

	if (p == MAP_FAILED || madvise(p, LARGE, MADV_NOHUGEPAGE))
		abort();
	memset(p, 1, LARGE);
	begin();
	large.v[0] = (struct ram_block){ .id = "ram", .page_size = 4096, .host = range_at(p, LARGE) };
	layout_finish(&large);
	locker_set_layout(&locker, &large);
	wait_idle();
	rests = locker.stepper.look_rests;
	set(4096, ORDER_RESIDENT, true); /* what is there is looked for everywhere */
	wait_idle();
	CHECK_EQ(status.locked, 4096);
	CHECK(locker.stepper.look_rests > rests);
	end();
	locker_remove(&locker, large.v[0].host);
	munmap(p, LARGE);
}

/* Nothing but a timer of seconds tells that there is room again; and then it is taken, and the timer ends. */
static void a_short_guarantee_is_tried_again_slowly(void)
{
	unsigned int threads;
	uint64_t before, woken;
	char *p;

	begin();
	p = (char *)(uintptr_t)layout.v[0].host.start;
	CHECK_EQ(munmap(p + 4 * MIB, 4096), 0);
	set(BLOCK, ORDER_ADDRESS, true);
	wait_short();
	before = switches("ramlock-lock", &threads);
	usleep(1500 * 1000);
	woken = switches("ramlock-lock", &threads) - before;
	CHECK(woken >= 1 && woken <= 10);
	CHECK(mmap(p + 4 * MIB, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
	for (time_t deadline = time(NULL) + DEADLINE_S; status.state != LOCKER_IDLE && time(NULL) < deadline; usleep(1000))
		locker_query(&locker, &status);
	CHECK_EQ(status.locked, BLOCK);
	before = switches("ramlock-lock", &threads);
	usleep(1500 * 1000);
	CHECK(switches("ramlock-lock", &threads) - before <= 3); /* the look every 5 s */
	end();
}

static void locks_of_others_are_left_alone(void)
{
	char *p;

	begin();
	p = (char *)(uintptr_t)layout.v[0].host.start;
	CHECK_EQ(syscall(SYS_mlock, p, 16 * MIB), 0);
	locker_query(&locker, &status);
	CHECK_EQ(status.foreign, 16 * MIB);
	set(24 * MIB, ORDER_ADDRESS, true);
	wait_idle();
	CHECK_EQ(status.locked, 24 * MIB);
	CHECK_EQ(vm_locked(), 24 * MIB);
	set(0, ORDER_ADDRESS, true);
	wait_idle();
	CHECK_EQ(status.locked, 0);
	CHECK_EQ(vm_locked(), 16 * MIB);
	CHECK_EQ(syscall(SYS_munlock, p, 16 * MIB), 0);
	end();
}

/* Whether [from, to) of @p is what is locked of [p, p + @size), by the kernel's word on each page. */
static bool only_locked(char *p, size_t size, size_t from, size_t to)
{
	for (size_t at = 0; at < size; at += 4096) {
		bool is = msync(p + at, 4096, MS_ASYNC | MS_INVALIDATE) && errno == EBUSY;

		if (is != (at >= from && at < to))
			return false;
	}
	return true;
}

/* Others may have locked a few pages amid what is locked at once: just those are theirs. */
static void locks_of_others_are_told_to_the_page(void)
{
	enum { FROM = 5 * MIB + 4096, TO = 5 * MIB + 4 * 4096 };
	char *p;

	begin();
	p = (char *)(uintptr_t)layout.v[0].host.start;
	CHECK_EQ(syscall(SYS_mlock, p + FROM, TO - FROM), 0);
	for (int prefault = 0; prefault < 2; prefault++) {
		set(BLOCK, ORDER_ADDRESS, prefault);
		wait_idle();
		CHECK_EQ(vm_locked(), BLOCK);
		CHECK_EQ(locker.books.foreign.total, TO - FROM);
		CHECK_EQ(locker.books.held.total, BLOCK);
		set(0, ORDER_ADDRESS, true);
		wait_idle();
		CHECK_EQ(vm_locked(), TO - FROM);
		CHECK_EQ(only_locked(p, BLOCK, FROM, TO), true);
	}
	CHECK_EQ(syscall(SYS_munlock, p + FROM, TO - FROM), 0);
	end();
}

/* A lock that fails amid a range takes back what it has locked of it, and nothing else. */
static void a_failed_lock_is_taken_back_beside_others(void)
{
	char *p;

	begin();
	p = (char *)(uintptr_t)layout.v[0].host.start;
	CHECK_EQ(syscall(SYS_mlock, p, MIB), 0);
	CHECK_EQ(munmap(p + 9 * MIB, 4096), 0);
	set(BLOCK, ORDER_ADDRESS, true);
	wait_short();
	CHECK_EQ(status.shortage, SHORTAGE_MAP_COUNT);
	set(0, ORDER_ADDRESS, true);
	wait_idle();
	CHECK_EQ(vm_locked(), MIB);
	CHECK_EQ(only_locked(p, 9 * MIB, 0, MIB), true);
	CHECK_EQ(syscall(SYS_munlock, p, MIB), 0);
	end();
}

static void an_unplugged_block_moves_the_guarantee(void)
{
	struct range gone;

	begin();
	set(40 * MIB, ORDER_ADDRESS, true);
	wait_idle();
	CHECK_EQ(extents_overlap(&locker.books.held, layout.v[0].host), 40 * MIB);
	gone = layout.v[0].host;
	locker_remove(&locker, gone);
	CHECK_EQ(munmap((void *)(uintptr_t)gone.start, BLOCK), 0);
	wait_idle();
	CHECK_EQ(status.locked, 40 * MIB);
	CHECK_EQ(extents_overlap(&locker.books.held, layout.v[1].host), 40 * MIB);
	CHECK_EQ(status.ram, BLOCK);
	CHECK_EQ(vm_locked(), 40 * MIB);
	set(0, ORDER_ADDRESS, true);
	wait_idle();
	locker_remove(&locker, layout.v[1].host);
	munmap((void *)(uintptr_t)layout.v[1].host.start, BLOCK);
}

/* Out of the guest, but still mapped: nothing of it stays locked, whatever the lock thread was about. */
static void an_unplugged_block_that_stays_is_unlocked(void)
{
	struct ram_layout small;

	for (unsigned int i = 0; i < 60; i++) {
		begin();
		small = layout;
		small.n = 1;
		layout_finish(&small);
		set(BLOCK + 40 * MIB, i % 2 ? ORDER_RESIDENT : ORDER_ADDRESS, i % 3);
		usleep(i * 500); /* in the middle of it */
		locker_set_layout(&locker, &small);
		wait_short();
		CHECK_EQ(status.shortage, SHORTAGE_NO_RAM);
		CHECK_EQ(status.armed, BLOCK);
		CHECK_EQ(status.foreign, 0);
		CHECK_EQ(vm_locked(), BLOCK);
		/* Back again, and gone while it is being unlocked. */
		locker_set_layout(&locker, &layout);
		wait_idle();
		CHECK_EQ(vm_locked(), BLOCK + 40 * MIB);
		locker_set_layout(&locker, &small);
		if (i % 2)
			usleep(i * 20);
		locker_remove(&locker, layout.v[1].host);
		CHECK_EQ(munmap((void *)(uintptr_t)layout.v[1].host.start, BLOCK), 0);
		wait_short();
		CHECK_EQ(vm_locked(), BLOCK);
		set(0, ORDER_ADDRESS, true);
		wait_idle();
		locker_remove(&locker, layout.v[0].host);
		munmap((void *)(uintptr_t)layout.v[0].host.start, BLOCK);
	}
}

/* The mapping stays then, and so would the lock. */
static void a_block_that_shrinks_keeps_what_is_left(void)
{
	struct range end;

	begin();
	set(BLOCK, ORDER_ADDRESS, true);
	wait_idle();
	end = (struct range){ layout.v[0].host.end - 24 * MIB, layout.v[0].host.end };
	CHECK(locker_remove(&locker, end));
	CHECK_EQ(syscall(SYS_munlock, end.start, range_size(end)), 0); /* as by qemu.c */
	wait_idle();
	CHECK_EQ(status.ram, 2 * BLOCK - 24 * MIB);
	CHECK_EQ(status.locked, BLOCK);
	CHECK_EQ(vm_locked(), BLOCK);
	CHECK_EQ(extents_overlap(&locker.books.held, end), 0);
	CHECK_EQ(status.lost.bytes[LOSS_UNLOCKED], 0);
	set(0, ORDER_ADDRESS, true);
	wait_idle();
	CHECK_EQ(vm_locked(), 0);
	layout.v[0].host.end = end.start;
	locker_remove(&locker, layout.v[0].host);
	munmap((void *)(uintptr_t)layout.v[0].host.start, BLOCK);
	locker_remove(&locker, layout.v[1].host);
	munmap((void *)(uintptr_t)layout.v[1].host.start, BLOCK);
}

static void all_follows_the_layout(void)
{
	struct wish w = { .all = true, .prefault = true };
	struct ram_layout small;

	begin();
	small = layout;
	small.n = 1;
	layout_finish(&small);
	locker_set_layout(&locker, &small);
	CHECK_EQ(locker_set(&locker, &w, text), 0);
	wait_idle();
	CHECK_EQ(status.locked, BLOCK);
	locker_set_layout(&locker, &layout);
	wait_idle();
	CHECK_EQ(status.requested, 2 * BLOCK);
	CHECK_EQ(vm_locked(), 2 * BLOCK);
	end();
}

static void too_much_is_refused_and_the_former_wish_stays(void)
{
	begin();
	set(8 * MIB, ORDER_ADDRESS, true);
	wait_idle();
	CHECK_EQ(locker_set(&locker, &(struct wish){ .lock_ram_size = 2 * BLOCK + 1 }, text), -ERANGE);
	CHECK_CONTAINS(text, "above guest RAM");
	CHECK_EQ(locker_set(&locker, &(struct wish){ .lock_ram_size = UINT64_MAX }, text), -ERANGE);
	locker_query(&locker, &status);
	CHECK_EQ(status.requested, 8 * MIB);
	CHECK_EQ(status.locked, 8 * MIB);
	CHECK_EQ(vm_locked(), 8 * MIB);
	end();
}

CHECK_MAIN(CASE(up_and_down_exactly), CASE(resident_pages_cost_nothing), CASE(on_fault_locks_what_is_touched),
	   CASE(the_last_of_many_wishes_counts), CASE(a_scattered_guest_stays_in_few_extents),
	   CASE(several_threads_populate), CASE(nothing_wakes_for_no_guarantee),
	   CASE(what_is_told_is_true_of_the_last_wish), CASE(a_long_look_has_rests), CASE(after_each_step_there_is_a_rest), CASE(a_short_guarantee_is_tried_again_slowly),
	   CASE(locks_of_others_are_left_alone), CASE(locks_of_others_are_told_to_the_page),
	   CASE(a_failed_lock_is_taken_back_beside_others), CASE(an_unplugged_block_moves_the_guarantee),
	   CASE(an_unplugged_block_that_stays_is_unlocked), CASE(a_block_that_shrinks_keeps_what_is_left),
	   CASE(all_follows_the_layout), CASE(too_much_is_refused_and_the_former_wish_stays))
