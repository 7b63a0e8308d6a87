/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest RAM that the guest gives back.
 *
 * Theory of operation: QEMU discards memory by madvise(MADV_DONTNEED), or MADV_REMOVE, or by punching a hole into its file. The
 * kernel refuses the first two where memory is locked, and by the last the guarantee would lose pages. So these calls come here, on
 * QEMU's threads. They do what was asked, by MADV_DONTNEED_LOCKED, or by unlocking first where there is no such thing,
 * and set bits: one for each page that was given back, one for each chunk that the lock thread should look at. No lock
 * is taken, nothing is allocated, and the lock thread is told at most once until it begins to look.
 *
 * A page's bit is set before the page is discarded, so whoever sees the page absent sees the bit, and again after that. A page
 * that the guest uses again needs no call: the bit is wrong then, and cleared when the lock thread sees the page in
 * memory while no discard is under way.
 *
 * Which block a hole in a file belongs to is told by the file's numbers, which were taken from the mappings when the block came.
 *
 * A block that went, or changed, is given up only when no thread is in a redirected call; and this object stays mapped after an
 * eject, since one may be in here.
 */
#include "discards.h"

#include "followed.h"
#include "got.h"
#include "syscalls.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

enum { PAGE = 4096, LEAVE_MS = 1000, ATTEMPTS = 5 };
static const uint64_t CHUNK = DISCARDS_CHUNK;

static struct {
	struct followed_blocks blocks;
	atomic_bool pending, hungry, unlocked_all;
	void (*notify)(void *opaque);
	void *opaque;
	struct got got;
} d;

/* Notes that @r was given back, or is wanted again. Returns whether some of it is guest RAM. */
static bool note(struct range r, bool given)
{
	struct followed *f;
	bool any = false;

	for (size_t i = 0; (f = followed_next(&d.blocks, &i));) {
		any |= r.start < f->r.end && r.end > f->r.start;
		followed_note(&d.blocks, f, r, given);
	}
	return any;
}

static void tell(void)
{
	if (!atomic_exchange(&d.pending, true))
		d.notify(d.opaque);
}

/* Has the lock thread look at what is ours of @r. */
static void touch(struct range r)
{
	bool any = atomic_load(&d.hungry);
	struct followed *f;

	for (size_t i = 0; (f = followed_next(&d.blocks, &i));) {
		any |= followed_any(f, FOLLOWED_OURS, r);
		followed_mark(f, FOLLOWED_TOUCHED, r, true);
	}
	if (any)
		tell();
}

static bool is_ours(struct range r)
{
	struct followed *f;

	for (size_t i = 0; (f = followed_next(&d.blocks, &i));)
		if (followed_any(f, FOLLOWED_OURS, r))
			return true;
	return false;
}

/* Unlocks the chunks of @r that are ours: less would leave as many mappings as there are pages. */
static void unlock_chunks(struct range r)
{
	struct range chunks = { r.start / CHUNK * CHUNK, (r.end + CHUNK - 1) / CHUNK * CHUNK };
	struct followed *f;

	for (size_t i = 0; (f = followed_next(&d.blocks, &i));) {
		struct range part = {
			chunks.start > f->r.start ? chunks.start : f->r.start,
			chunks.end < f->r.end ? chunks.end : f->r.end,
		};

		if (part.start >= part.end)
			continue;
		followed_mark(f, FOLLOWED_UNLOCKED, part, true);
		sys_munlock(part);
	}
}

/* The system call: what counts is what the kernel does. */
static int sys_madvise(struct range r, int advice)
{
	return (int)syscall(SYS_madvise, r.start, range_size(r), advice);
}

/* Discards @r, which is locked by us. As madvise(2). */
static int discard_locked(struct range r, int advice)
{
	if (advice == MADV_DONTNEED && !sys_madvise(r, MADV_DONTNEED_LOCKED))
		return 0;
	if (advice == MADV_DONTNEED && errno != EINVAL)
		return -1;
	/* The lock thread may be locking there, and stops doing so when it sees what was noted. */
	for (int i = 1; i < ATTEMPTS; i++) {
		unlock_chunks(r);
		if (!sys_madvise(r, advice))
			return 0;
		if (errno != EINVAL)
			return -1;
	}
	unlock_chunks(r);
	return sys_madvise(r, advice);
}

/* ---- What QEMU calls instead ---- */

static int our_madvise(void *address, size_t size, int advice)
{
	struct range r = { (uint64_t)(uintptr_t)address, (uint64_t)(uintptr_t)address + size };
	int before = errno, result;

	if (advice != MADV_DONTNEED && advice != MADV_REMOVE && advice != MADV_WILLNEED)
		return sys_madvise(r, advice);
	atomic_fetch_add(&d.blocks.users, 1);
	if (advice == MADV_WILLNEED) {
		if (note(r, false) && atomic_load(&d.hungry))
			tell();
		result = sys_madvise(r, advice);
	} else if (!note(r, true)) {
		result = sys_madvise(r, advice);
	} else {
		result = is_ours(r) ? discard_locked(r, advice) : sys_madvise(r, advice);
		if (result && errno == EINVAL && is_ours(r)) /* it was locked just then */
			result = discard_locked(r, advice);
		if (!result) {
			note(r, true);
			touch(r);
			errno = before;
		}
	}
	atomic_fetch_sub(&d.blocks.users, 1);
	return result;
}

/* Notes, by @each, the parts of @file that are mapped as guest RAM. Returns whether there are any. */
static bool each_part(const struct followed_file *file, uint64_t size, void (*each)(struct range r))
{
	struct followed *f;
	struct range r;
	bool any = false;

	for (size_t i = 0; (f = followed_next(&d.blocks, &i));) {
		if (!followed_part_of_file(f, file, size, &r))
			continue;
		any = true;
		each(r);
	}
	return any;
}

static void note_given(struct range r)
{
	note(r, true);
}

static void note_done(struct range r)
{
	note(r, true);
	touch(r);
}

static int sys_fallocate(int fd, int mode, off_t offset, off_t size)
{
	return (int)syscall(SYS_fallocate, fd, mode, offset, size);
}

/* Most files are disks: those are let through, and may take their time. */
static int our_fallocate(int fd, int mode, off_t offset, off_t size)
{
	struct followed_file file = { .offset = (uint64_t)offset };
	int before = errno, result;
	bool ours = false;
	struct stat facts;

	if (mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) || offset < 0 || size <= 0)
		return sys_fallocate(fd, mode, offset, size);
	atomic_fetch_add(&d.blocks.users, 1);
	if (!fstat(fd, &facts)) {
		file.device = facts.st_dev;
		file.inode = facts.st_ino;
		ours = each_part(&file, (uint64_t)size, note_given);
	}
	if (!ours)
		atomic_fetch_sub(&d.blocks.users, 1);
	result = sys_fallocate(fd, mode, offset, size);
	if (!result)
		errno = before;
	if (ours && !result)
		each_part(&file, (uint64_t)size, note_done);
	if (ours)
		atomic_fetch_sub(&d.blocks.users, 1);
	return result;
}

static int our_munlockall(void)
{
	int result;

	atomic_fetch_add(&d.blocks.users, 1);
	result = (int)syscall(SYS_munlockall);
	atomic_store(&d.unlocked_all, true);
	tell();
	atomic_fetch_sub(&d.blocks.users, 1);
	return result;
}

/* ---- The lock thread ---- */

int discards_follow(void (*notify)(void *opaque), void *opaque)
{
	enum { MADVISE, MUNLOCKALL, FALLOCATE, FALLOCATE64, CALLS };
	struct got_redirection redirections[CALLS] = {
		[MADVISE] = { .name = "madvise" },
		[MUNLOCKALL] = { .name = "munlockall" },
		[FALLOCATE] = { .name = "fallocate" },
		[FALLOCATE64] = { .name = "fallocate64" },
	};

	/* A pointer to a function as one to an object, without a cast that ISO C forbids. */
	*(int (**)(void *, size_t, int))(void *)&redirections[MADVISE].to = our_madvise;
	*(int (**)(void))(void *)&redirections[MUNLOCKALL].to = our_munlockall;
	*(int (**)(int, int, off_t, off_t))(void *)&redirections[FALLOCATE].to = our_fallocate;
	redirections[FALLOCATE64].to = redirections[FALLOCATE].to;
	d.notify = notify;
	d.opaque = opaque;
	return got_redirect(&d.got, redirections, CALLS);
}

void discards_unfollow(void)
{
	const struct timespec moment = { .tv_nsec = 1000 * 1000 };

	got_restore(&d.got);
	for (int i = 0; i < LEAVE_MS && atomic_load(&d.blocks.users); i++)
		nanosleep(&moment, NULL);
}

void discards_set_layout(const struct ram_layout *l, int maps)
{
	followed_set_layout(&d.blocks, l, maps);
}

void discards_set_ours(struct range r, bool ours)
{
	struct followed *f;

	for (size_t i = 0; (f = followed_next(&d.blocks, &i));)
		followed_mark(f, FOLLOWED_OURS, r, ours);
}

void discards_set_hungry(bool hungry)
{
	atomic_store(&d.hungry, hungry);
}

bool discards_pending(void)
{
	return atomic_load(&d.pending);
}

void discards_begin(void)
{
	atomic_store(&d.pending, false);
}

bool discards_take_unlocked_all(void)
{
	return atomic_exchange(&d.unlocked_all, false);
}

/* The block with the lowest addresses that ends after @from, or NULL. */
static struct followed *block_after(uint64_t from)
{
	struct followed *f, *found = NULL;

	for (size_t i = 0; (f = followed_next(&d.blocks, &i));)
		if (f->r.end > from && (!found || f->r.start < found->r.start))
			found = f;
	return found;
}

bool discards_take_chunk(uint64_t from, struct range *chunk, bool *unlocked)
{
	struct followed *f;

	for (; (f = block_after(from)); from = f->r.end) {
		uint64_t at = followed_find(f, FOLLOWED_TOUCHED, from, true), end;

		if (at == f->r.end)
			continue;
		end = (at / CHUNK + 1) * CHUNK;
		*chunk = (struct range){ at, end < f->r.end ? end : f->r.end };
		followed_mark(f, FOLLOWED_TOUCHED, *chunk, false);
		*unlocked = followed_mark(f, FOLLOWED_UNLOCKED, *chunk, false) > 0;
		return true;
	}
	return false;
}

bool discards_next(uint64_t from, struct range *run)
{
	struct followed *f;

	for (; (f = block_after(from)); from = f->r.end) {
		run->start = followed_find(f, FOLLOWED_GIVEN, from, true);
		if (run->start == f->r.end)
			continue;
		run->end = followed_find(f, FOLLOWED_GIVEN, run->start, false);
		return true;
	}
	return false;
}

void discards_forget(struct range r)
{
	if (!atomic_load(&d.blocks.users))
		note(r, false);
}

uint64_t discards_total(void)
{
	return atomic_load(&d.blocks.given_back) * PAGE;
}
