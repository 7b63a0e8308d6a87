/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a step costs, on real memory: where nothing is left, only what allocates nothing is admitted. */
#include "fd.h"
#include "residency.h"
#include "smallfile.h"
#include "step.h"
#include "syscalls.h"
#include "tree.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

enum { CHUNK = 2 << 20 };

static struct stepper stepper;

static void begin(void)
{
	tree_begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: 0 kB\n", 8 << 20);
	put("proc/self/status", "VmLck:\t0 kB\n");
	put("proc/self/cgroup", "0::/\n");
	stepper_init(&stepper);
	stepper_open(&stepper, root);
}

static void end(void)
{
	stepper_deinit(&stepper);
	tree_end();
}

static char *map(int flags, int fd)
{
	char *p = mmap(NULL, 2 * CHUNK, PROT_READ | PROT_WRITE, flags | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);

	if (p == MAP_FAILED)
		abort();
	madvise(p, 2 * CHUNK, MADV_NOHUGEPAGE);
	return (char *)(((uintptr_t)p + CHUNK - 1) / CHUNK * CHUNK);
}

static bool admitted(const char *p, bool shared)
{
	struct step s = { .kind = STEP_LOCK, .prefault = true, .shared = shared, .page_size = 4096 };
	struct outcome o;

	s.r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + CHUNK };
	return step_admit(&stepper, &s, &o);
}

static void touch(const char *p)
{
	for (size_t at = 0; at < CHUNK; at += 4096)
		(void)*(const volatile char *)(p + at);
}

static void own_pages_cost_nothing(void)
{
	char *p;

	begin();
	p = map(MAP_PRIVATE, -1);
	CHECK(!admitted(p, false)); /* absent */
	memset(p, 1, CHUNK);
	CHECK(admitted(p, false));
	madvise(p + 4096, 4096, MADV_DONTNEED);
	CHECK(!admitted(p, false)); /* one of them absent */
	end();
}

static void the_zero_page_is_not_ours(void)
{
	char *p;

	begin();
	p = map(MAP_PRIVATE, -1);
	touch(p);
	CHECK(!admitted(p, false));
	end();
}

static void page_cache_is_memory_only_when_shared(void)
{
	int fd = memfd_create("test", MFD_CLOEXEC);
	char *shared, *private;

	begin();
	CHECK_EQ(ftruncate(fd, 2 * CHUNK), 0);
	shared = map(MAP_SHARED, fd);
	memset(shared, 1, CHUNK);
	CHECK(admitted(shared, true));
	private = map(MAP_PRIVATE, fd);
	touch(private);
	CHECK(!admitted(private, false));
	memset(private, 2, CHUNK); /* copied now */
	CHECK(admitted(private, false));
	close(fd);
	end();
}

static void what_is_armed_is_owed(void)
{
	struct step s = { .kind = STEP_LOCK, .prefault = false, .page_size = 4096 };
	struct outcome o;
	uint64_t armed = 0;
	char *p;

	begin();
	p = map(MAP_PRIVATE, -1);
	s.r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + CHUNK };
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\n", 8 << 20, (512 + 100) << 10);
	/* Arming allocates nothing, so nothing but the books stops it. */
	while (armed < (1ULL << 30) && step_admit(&stepper, &s, &o))
		armed += CHUNK;
	CHECK(armed > 50 * (1ULL << 20) && armed <= 100 * (1ULL << 20));
	CHECK_EQ(o.shortage, SHORTAGE_HOST_MEMORY);
	end();
}

/* Takes steps of @kind over @r until all is done. Returns how many, 0 when one was not admitted. */
static unsigned int work_off(enum step_kind kind, struct range r, bool prefault)
{
	unsigned int steps = 0;

	while (r.start < r.end) {
		struct step s = { .kind = kind, .r = r, .prefault = prefault, .page_size = 4096, .threads = 1 };
		struct outcome o;

		step_size(&stepper, &s);
		CHECK(range_size(s.r) > 0 && s.r.start >= r.start && s.r.end <= r.end);
		if (!step_admit(&stepper, &s, &o))
			return 0;
		step_carry_out(&stepper, &s, &o);
		CHECK_EQ(o.shortage, SHORTAGE_NONE);
		CHECK(range_size(o.done) > 0);
		if (kind == STEP_UNLOCK)
			r.end = o.done.start;
		else
			r.start = o.done.end;
		steps++;
	}
	return steps;
}

static uint64_t really_locked(void)
{
	struct headroom h;
	int64_t locked;

	headroom_init(&h);
	headroom_open(&h, "");
	locked = headroom_vm_locked(&h);
	headroom_deinit(&h);
	return (uint64_t)locked;
}

/* The kernel's part is real; only the host's memory is made up. */
static void a_terabyte_is_armed_in_few_steps(void)
{
	const uint64_t tib = 1ULL << 40;
	uint64_t before = really_locked();
	unsigned int steps;
	struct range r;
	char *p;

	begin();
	put("proc/meminfo", "MemTotal: %llu kB\nMemAvailable: %llu kB\n", 4ULL << 30, 3ULL << 30);
	p = mmap(NULL, tib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		abort();
	memset(p + 3 * (1ULL << 30), 1, 10 << 20); /* somewhere in it something is there */
	r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + tib };
	steps = work_off(STEP_LOCK, r, false);
	CHECK(steps > 0 && steps < 300);
	CHECK_EQ(really_locked() - before, tib);
	CHECK(stepper.owed <= tib && stepper.owed > tib - (1ULL << 30));
	steps = work_off(STEP_UNLOCK, r, false);
	CHECK(steps > 0 && steps < 300);
	CHECK_EQ(really_locked(), before);
	/* On a host that has not the memory for it, it is refused: the guest would be killed for touching what it has. */
	stepper.owed = stepper.credit = 0;
	put("proc/meminfo", "MemTotal: %llu kB\nMemAvailable: %llu kB\n", 24ULL << 20, 16ULL << 20);
	CHECK_EQ(work_off(STEP_LOCK, r, false), 0);
	CHECK(really_locked() - before < 16ULL << 30 && really_locked() - before > 8ULL << 30);
	munmap(p, tib);
	end();
}

static void plenty(void)
{
	begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\n", 64 << 20, 32 << 20);
}

static void a_kernel_without_populate_will_do(void)
{
	uint64_t before = really_locked();
	unsigned char vec[CHUNK / 4096];
	struct range r;
	char *p;

	plenty();
	p = map(MAP_PRIVATE, -1);
	r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + CHUNK };
	atomic_store(&stepper.no_populate, true);
	CHECK(work_off(STEP_LOCK, r, true) > 0);
	CHECK_EQ(really_locked() - before, CHUNK);
	CHECK_EQ(mincore(p, CHUNK, vec), 0);
	for (size_t i = 0; i < sizeof(vec); i++)
		CHECK(vec[i] & 1);
	CHECK(work_off(STEP_UNLOCK, r, true) > 0);
	CHECK_EQ(really_locked(), before);
	end();
}

static void a_step_that_is_called_off_leaves_nothing_armed(void)
{
	enum { SIZE = 64 << 20 };
	uint64_t before = really_locked();
	struct step s = { .kind = STEP_LOCK, .prefault = true, .page_size = 4096, .threads = 1 };
	struct outcome o;
	char *p;

	plenty();
	p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		abort();
	s.r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + SIZE };
	step_size(&stepper, &s);
	CHECK(step_admit(&stepper, &s, &o));
	CHECK(range_size(s.r) > s.piece); /* or there would be nothing to call off */
	atomic_store(&stepper.cancel, true);
	step_carry_out(&stepper, &s, &o);
	CHECK_EQ(o.shortage, SHORTAGE_NONE);
	CHECK_EQ(range_size(o.done), s.piece);
	CHECK_EQ(really_locked() - before, range_size(o.done));
	munmap(p, SIZE);
	end();
}

/* Bytes in huge pages of the mapping at @p; 0 when this host makes none. */
static uint64_t huge_bytes(const char *p)
{
	FILE *f = fopen("/proc/self/smaps", "re");
	unsigned long start, end, kib, sum = 0;
	char line[512];
	bool inside = false;

	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= (uintptr_t)p && (uintptr_t)p < end;
		else if (inside && sscanf(line, "AnonHugePages: %lu kB", &kib) == 1)
			sum += kib << 10;
	}
	if (f)
		fclose(f);
	return sum;
}

/* Memory that nothing has touched, from the start of a huge page on. */
static char *absent(size_t size, int advice)
{
	char *p = mmap(NULL, size + CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		abort();
	p = (char *)(((uintptr_t)p + CHUNK - 1) / CHUNK * CHUNK);
	madvise(p, size, advice);
	return p;
}

/* Memory of @size bytes whose first @small bytes are in small pages, the others in huge ones; NULL where that cannot be. */
static char *map_huge(size_t size, size_t small)
{
	char *p = absent(size, MADV_HUGEPAGE);

	if (small)
		madvise(p, small, MADV_NOHUGEPAGE);
	memset(p, 1, size);
	if (huge_bytes(p + small) == size - small)
		return p;
	munmap(p, size);
	printf("no huge pages to be had here: not tested\n");
	return NULL;
}

static void what_is_huge_is_found_from_the_end(void)
{
	enum { SIZE = 160 << 20 };
	struct range r;
	char *p;

	plenty();
	p = map_huge(SIZE, 0);
	r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + SIZE };
	if (p && residency_huge_end(stepper.pagemap, r, CHUNK)) { /* else a kernel before 6.7 */
		CHECK_EQ(residency_huge_end(stepper.pagemap, r, SIZE), SIZE);
		CHECK(residency_huge_end(stepper.pagemap, r, 16 << 20) >= 16 << 20);
		madvise(p + (SIZE - 100 * 1024 * 1024), 4096, MADV_DONTNEED); /* it splits one */
		CHECK_EQ(residency_huge_end(stepper.pagemap, r, SIZE), 98 << 20);
		madvise(p + (SIZE - 4096), 4096, MADV_DONTNEED);
		CHECK_EQ(residency_huge_end(stepper.pagemap, r, SIZE), 0);
	}
	if (p)
		munmap(p, SIZE);
	CHECK_EQ(residency_huge_end(-1, r, SIZE), 0); /* as with a kernel that does not know */
	end();
}

/* A step that locks and populates @p, sized. */
static struct step sized(const char *p, size_t size, unsigned int threads)
{
	struct step s = { .kind = STEP_LOCK, .prefault = true, .page_size = 4096, .threads = threads };

	s.r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + size };
	step_size(&stepper, &s);
	return s;
}

static void threads_leave_out_no_piece(void)
{
	enum { SIZE = 30 << 20 };
	char *p = absent(SIZE, MADV_NOHUGEPAGE);
	struct range r = { (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + SIZE };
	uint64_t before = really_locked();

	plenty();
	for (unsigned int threads = 2; threads <= 5; threads++) {
		uint64_t at = r.start;

		while (at < r.end) {
			struct step s = sized((char *)(uintptr_t)at, r.end - at, threads);
			struct outcome o;
			uint64_t most;

			s.piece = 7 * 4096; /* so that their number is a multiple of nothing */
			most = s.r.start + (HOLDS_MAX - 1) * s.piece;
			if (most > s.r.end)
				most = s.r.end;
			CHECK(step_admit(&stepper, &s, &o));
			step_carry_out(&stepper, &s, &o);
			CHECK_EQ(o.shortage, SHORTAGE_NONE);
			CHECK_EQ(o.done.start, at);
			CHECK_EQ(o.done.end, most);
			/* The lock, each piece once, and what was not populated is unlocked again. */
			CHECK(o.n_holds >= 1 + (most - at + s.piece - 1) / s.piece);
			CHECK(o.n_holds <= HOLDS_MAX);
			CHECK_EQ(residency_count(stepper.pagemap, RESIDENCY_PRESENT, o.done, SIZE), range_size(o.done));
			at = o.done.end;
			CHECK_EQ(really_locked() - before, at - r.start);
		}
		CHECK_EQ(sys_munlock(r), 0); /* munlock() is ASan's, and does nothing */
		madvise(p, SIZE, MADV_DONTNEED);
	}
	workers_stop(&stepper.workers);
	munmap(p, SIZE);
	end();
}

static void *call_off(void *unused)
{
	(void)unused;
	for (int i = 0; i < 200; i++) {
		struct timespec t = { 0, 100 * 1000 };

		nanosleep(&t, NULL);
		atomic_store(&stepper.cancel, true);
	}
	return NULL;
}

static void what_threads_have_populated_of_a_step_that_is_called_off_is_not_locked(void)
{
	enum { SIZE = 64 << 20 };
	char *p = absent(SIZE, MADV_NOHUGEPAGE);
	uint64_t before = really_locked(), locked = 0;
	pthread_t other;

	plenty();
	CHECK_EQ(pthread_create(&other, NULL, call_off, NULL), 0);
	for (uint64_t at = 0; at < SIZE;) {
		struct step s = sized(p + at, SIZE - at, 3);
		struct outcome o;

		atomic_store(&stepper.cancel, false);
		CHECK(step_admit(&stepper, &s, &o));
		step_carry_out(&stepper, &s, &o);
		CHECK_EQ(o.shortage, SHORTAGE_NONE);
		CHECK(range_size(o.done) > 0);
		at += range_size(o.done);
		locked += range_size(o.done);
		CHECK_EQ(really_locked() - before, locked);
		CHECK_EQ(residency_count(stepper.pagemap, RESIDENCY_PRESENT, o.done, SIZE), range_size(o.done));
	}
	pthread_join(other, NULL);
	workers_stop(&stepper.workers);
	munmap(p, SIZE);
	end();
}

/* A host with plenty, and a cgroup that has @free MiB left to its limit; of which so much is page cache. */
static void full_cgroup(int free, int file)
{
	const long long limit = 1 << 30;

	tree_begin();
	put("proc/meminfo", "MemTotal: %d kB\nMemAvailable: %d kB\nSwapTotal: %d kB\nSwapFree: %d kB\n", 64 << 20, 32 << 20, 8 << 20,
	    8 << 20);
	put("proc/self/status", "VmLck:\t0 kB\n");
	put("proc/self/cgroup", "0::/vm\n");
	put("proc/self/mountinfo", "40 31 0:37 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n");
	put("sys/fs/cgroup/cgroup.procs", "1\n");
	put("sys/fs/cgroup/vm/memory.max", "%lld\n", limit);
	put("sys/fs/cgroup/vm/memory.current", "%lld\n", limit - free * (1LL << 20));
	put("sys/fs/cgroup/vm/memory.swap.max", "max\n");
	put("sys/fs/cgroup/vm/memory.swap.current", "0\n");
	put("sys/fs/cgroup/vm/memory.stat", "inactive_anon %lld\nactive_anon %lld\ninactive_file %lld\nactive_file 0\n",
	    limit / 4, limit / 4, file * (1LL << 20));
	stepper_init(&stepper);
	stepper_open(&stepper, root);
}

static void in_a_full_cgroup_room_is_made_for_little_at_a_time(void)
{
	enum { SIZE = 16 << 20 };
	char *p = absent(SIZE, MADV_NOHUGEPAGE);
	struct outcome o;
	struct step s;
	uint64_t size;

	full_cgroup(4, 0);
	stepper.pace.cost[PACE_FILL] = 1000; /* so that the step is as long as can be */
	s = sized(p, SIZE, 1);
	CHECK_EQ(range_size(s.r), SIZE);
	CHECK(step_admit(&stepper, &s, &o));
	CHECK_EQ(range_size(s.r), CHUNK);
	CHECK_EQ(s.looked, CHUNK);
	CHECK(stepper.makeroom.worked || stepper.makeroom.again_ns); /* it was asked */

	/* What is there already needs no room. */
	memset(p, 1, SIZE);
	s = sized(p, SIZE, 1);
	size = range_size(s.r);
	CHECK(size > CHUNK);
	CHECK(step_admit(&stepper, &s, &o));
	CHECK_EQ(range_size(s.r), size);
	madvise(p, SIZE, MADV_DONTNEED);
	stepper_deinit(&stepper);
	tree_end();

	/* Where a processor is kept from the kernel's own work, that would wait for it. */
	full_cgroup(4, 0);
	put("sys/devices/system/cpu/isolated", "2-3\n");
	stepper_deinit(&stepper);
	stepper_init(&stepper);
	stepper_open(&stepper, root);
	s = sized(p, SIZE, 1);
	CHECK(step_admit(&stepper, &s, &o));
	CHECK(!stepper.makeroom.worked && !stepper.makeroom.again_ns);
	stepper_deinit(&stepper);
	tree_end();

	/* Page cache is given up easily. */
	full_cgroup(4, 256);
	stepper.pace.cost[PACE_FILL] = 1000;
	s = sized(p, SIZE, 1);
	CHECK(step_admit(&stepper, &s, &o));
	CHECK_EQ(range_size(s.r), SIZE);
	CHECK(!stepper.makeroom.worked && !stepper.makeroom.again_ns);
	munmap(p, SIZE);
	end();
}

/* Small pages come after huge ones as the unlocking goes on: no step is sized for the one and spent on the other. */
static void huge_pages_are_unlocked_in_long_steps_and_small_ones_are_not(void)
{
	enum { SIZE = 384 << 20, SMALL = 128 << 20 };
	uint64_t before = really_locked(), small_end;
	unsigned int steps = 0;
	struct range r;
	char *p;

	plenty();
	p = map_huge(SIZE, SMALL);
	r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + SIZE };
	small_end = r.start + SMALL;
	if (p && residency_huge_end(stepper.pagemap, r, CHUNK)) {
		CHECK(work_off(STEP_LOCK, r, true) > 0);
		CHECK_EQ(really_locked() - before, SIZE);
		while (r.start < r.end) {
			struct step s = { .kind = STEP_UNLOCK, .r = r, .resident = true, .page_size = 4096 };
			uint64_t most = pace_bytes(&stepper.pace, PACE_UNLOCK);
			struct outcome o;

			step_size(&stepper, &s);
			CHECK_EQ(s.huge, s.r.end > small_end);
			if (s.huge)
				CHECK(s.r.start >= small_end);
			else
				CHECK(range_size(s.r) <= (most < CHUNK ? CHUNK : most));
			steps += s.huge;
			step_carry_out(&stepper, &s, &o);
			CHECK_EQ(o.done.end, r.end);
			r.end = o.done.start;
		}
		CHECK(steps > 0);
		CHECK_EQ(really_locked(), before);
		CHECK_EQ(huge_bytes(p + SMALL), SIZE - SMALL); /* no step has split one */
	}
	if (p)
		munmap(p, SIZE);
	end();
}

/* The piece that populating @r would begin with, after a step of it was taken. */
static uint64_t piece_after_a_step(struct range r)
{
	struct step s = { .kind = STEP_LOCK, .r = r, .prefault = true, .page_size = 4096, .threads = 1 };
	struct outcome o;

	step_size(&stepper, &s);
	CHECK(step_admit(&stepper, &s, &o));
	step_carry_out(&stepper, &s, &o);
	s.r = (struct range){ o.done.end, r.end };
	step_size(&stepper, &s);
	return s.piece;
}

/* However small the hold budget is. */
static void a_piece_is_no_smaller_than_the_huge_page_that_it_fills(void)
{
	enum { SIZE = 64 << 20 };
	struct range r;
	char *p;

	plenty();
	stepper.pace.budget_ns = 1000;
	p = map_huge(SIZE, 0);
	if (p && residency_huge_end(stepper.pagemap, (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + SIZE }, CHUNK)) {
		madvise(p, SIZE, MADV_DONTNEED);
		r = (struct range){ (uint64_t)(uintptr_t)p, (uint64_t)(uintptr_t)p + SIZE };
		CHECK_EQ(piece_after_a_step(r), CHUNK);
		madvise(p + SIZE / 2, SIZE / 2, MADV_NOHUGEPAGE);
		r.start += SIZE / 2;
		CHECK(piece_after_a_step(r) < CHUNK);
	}
	if (p)
		munmap(p, SIZE);
	end();
}

CHECK_MAIN(CASE(threads_leave_out_no_piece), CASE(what_threads_have_populated_of_a_step_that_is_called_off_is_not_locked),
	   CASE(in_a_full_cgroup_room_is_made_for_little_at_a_time), CASE(what_is_huge_is_found_from_the_end), CASE(huge_pages_are_unlocked_in_long_steps_and_small_ones_are_not),
	   CASE(a_piece_is_no_smaller_than_the_huge_page_that_it_fills), CASE(a_terabyte_is_armed_in_few_steps), CASE(a_kernel_without_populate_will_do),
	   CASE(a_step_that_is_called_off_leaves_nothing_armed),
	   CASE(own_pages_cost_nothing), CASE(the_zero_page_is_not_ours), CASE(page_cache_is_memory_only_when_shared),
	   CASE(what_is_armed_is_owed))
