/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which wishes RLIMIT_MEMLOCK refuses, with the process's figures from a tree of files. No lock thread runs. */
#include "check.h"
#include "locker.h"
#include "tree.h"

#include <errno.h>
#include <sys/resource.h>

enum { MIB = 1 << 20 };

static struct locker locker;
static struct locker_status status;
static int news;
static char text[SHORT_TEXT];

static void note(void *opaque)
{
	(void)opaque;
	news++;
}

static int set(uint64_t size)
{
	return locker_set(&locker, &(struct wish){ .lock_ram_size = size, .prefault = true }, text);
}

/* A VM with 64 MiB of RAM, of which nothing is locked, and a limit of 4 MiB, which every user may set. */
static void begin(void)
{
	static struct ram_layout layout;
	const struct rlimit r = { 4 * MIB, 4 * MIB };

	tree_begin();
	put("proc/self/status", "CapEff:\t0000000000000000\nVmLck:\t       0 kB\n");
	put("proc/self/fd/.made", "%s", "");
	CHECK_EQ(setrlimit(RLIMIT_MEMLOCK, &r), 0);
	memset(&locker, 0, sizeof(locker));
	locker_init(&locker, note, NULL);
	stepper_open(&locker.stepper, root);
	layout.n = 1;
	layout.v[0] = (struct ram_block){ .id = "ram", .page_size = 4096, .host = { 64 * MIB, 128 * MIB } };
	layout_finish(&layout);
	locker_set_layout(&locker, &layout);
}

static void end(void)
{
	stepper_deinit(&locker.stepper);
	tree_end();
}

static void put_vfio(void)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/proc/self/fd/7", root);
	CHECK_EQ(symlink("/dev/vfio/12", path), 0);
}

static void devices_keep_their_share_of_the_limit(void)
{
	begin();
	CHECK_EQ(set(3 * MIB), 0);
	put_vfio();
	CHECK_EQ(set(2 * MIB), -EPERM); /* more would take what they may pin: guest RAM and 1 GiB */
	CHECK_CONTAINS(text, "VFIO");
	put("proc/self/status", "CapEff:\t0000000000004000\nVmLck:\t       0 kB\n");
	CHECK_EQ(set(64 * MIB), 0); /* CAP_IPC_LOCK knows no limit */
	end();
}

static void the_limit_counts_what_is_locked(void)
{
	begin();
	CHECK_EQ(set(3 * MIB), 0);
	CHECK_EQ(set(5 * MIB), -EPERM);
	put("proc/self/status", "CapEff:\t0000000000000000\nVmLck:\t    2560 kB\n");
	CHECK_EQ(set(3 * MIB), -EPERM);
	CHECK_CONTAINS(text, "2621440 are locked already");
	CHECK(!strstr(text, "VFIO"));
	CHECK_EQ(set(2 * MIB), 0); /* perhaps these very bytes */
	end();
}

static void who_leaves_takes_no_wish(void)
{
	begin();
	CHECK_EQ(set(2 * MIB), 0);
	locker_close(&locker, false);
	CHECK_EQ(set(3 * MIB), -ESHUTDOWN);
	CHECK_CONTAINS(text, "leaving");
	CHECK_EQ(set(0), -ESHUTDOWN); /* the wish may have been handed over */
	locker_query(&locker, &status);
	CHECK_EQ(status.requested, 2 * MIB);
	locker_reopen(&locker);
	CHECK_EQ(set(3 * MIB), 0);
	locker_close(&locker, true);
	CHECK_EQ(set(3 * MIB), -ESHUTDOWN);
	locker_query(&locker, &status);
	CHECK_EQ(status.requested, 0);
	end();
}

static void peek(uint64_t locked)
{
	news = 0;
	locker_peek(&locker, &status);
	CHECK_EQ(status.armed, 3 * MIB);
	CHECK_EQ(status.locked, locked);
	CHECK_EQ(news, locker.books.on_fault.total > 0); /* it is to be counted by another thread */
}

/* Nothing is mapped where guest RAM is said to be, so that a count finds nothing; what it found is put in its place here. */
static void a_peek_counts_no_page(void)
{
	const struct range held = { 64 * MIB, 67 * MIB }, on_fault = { 65 * MIB, 67 * MIB };

	begin();
	put("proc/self/status", "CapEff:\t0000000000000000\nVmLck:\t    3072 kB\n");
	CHECK_EQ(extents_add(&locker.books.held, held), 0);
	peek(3 * MIB);
	CHECK_EQ(extents_add(&locker.books.on_fault, on_fault), 0);
	peek(1 * MIB);
	CHECK_EQ(locker_take_events(&locker, &status), LOCKER_COUNT);
	CHECK_EQ(locker.counted.absent[0], 2 * MIB);
	CHECK_EQ(locker.counted.of[0], 2 * MIB);
	locker.counted.absent[0] = MIB / 2;
	peek(5 * MIB / 2);
	locker.counted.of[0] = 3 * MIB / 2; /* half a MiB was locked since then: it may be absent */
	peek(2 * MIB);
	extents_remove(&locker.books.on_fault, (struct range){ 65 * MIB, 66 * MIB + 3 * MIB / 4 });
	peek(3 * MIB - MIB / 4);
	locker.counted.generation++; /* of another guarantee */
	peek(3 * MIB - MIB / 4);
	end();
}

CHECK_MAIN(CASE(devices_keep_their_share_of_the_limit), CASE(the_limit_counts_what_is_locked),
	   CASE(who_leaves_takes_no_wish), CASE(a_peek_counts_no_page))
