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
 * The bits of a block stay where they are when it goes, and so does this object after an eject: a thread may be in here.
 */
#include "discards.h"

#include "got.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

enum { PAGE = 4096, BITS = 64, LEAVE_MS = 1000, ATTEMPTS = 5 };
static const uint64_t CHUNK = DISCARDS_CHUNK;

typedef _Atomic uint64_t word;

/* One block of guest RAM. */
struct followed {
	word start, end; /* addresses; end 0: none */
	bool live; /* in the layout; the lock thread's own */
	word *pages; /* given back */
	word *touched; /* chunks to look at */
	word *unlocked; /* chunks that had to be unlocked */
	word *ours; /* chunks that we have locked */
};

static struct {
	struct followed v[RAM_BLOCKS_MAX];
	atomic_size_t n;
	atomic_uint inside; /* threads in a redirected call */
	atomic_bool pending, hungry, unlocked_all;
	word given_back; /* bits set in all `pages` */
	void (*notify)(void *opaque);
	void *opaque;
	struct got got;
} d;

/* Sets the bits [from, to), or clears them. Returns how many had been otherwise. */
static uint64_t change_bits(word *words, uint64_t from, uint64_t to, bool set)
{
	uint64_t changed = 0;

	for (uint64_t at = from; at < to;) {
		uint64_t end = (at / BITS + 1) * BITS < to ? (at / BITS + 1) * BITS : to;
		uint64_t mask = (end - at == BITS ? ~0ULL : ((1ULL << (end - at)) - 1)) << at % BITS;
		uint64_t before = set ? atomic_fetch_or(&words[at / BITS], mask) : atomic_fetch_and(&words[at / BITS], ~mask);

		changed += (uint64_t)__builtin_popcountll((set ? ~before : before) & mask);
		at = end;
	}
	return changed;
}

/* The first bit in [from, to) that is set, or not. @to when there is none. */
static uint64_t find_bit(word *words, uint64_t from, uint64_t to, bool set)
{
	while (from < to) {
		uint64_t w = atomic_load(&words[from / BITS]);

		w = (set ? w : ~w) >> from % BITS;
		if (w)
			return from + (uint64_t)__builtin_ctzll(w) < to ? from + (uint64_t)__builtin_ctzll(w) : to;
		from = (from / BITS + 1) * BITS;
	}
	return to;
}

/* Whether any bit in [from, to) is set. */
static bool any_bit(word *words, uint64_t from, uint64_t to)
{
	return find_bit(words, from, to, true) < to;
}

/* Chunks are counted from the one that the block begins in. */
static uint64_t chunk_index(uint64_t block_start, uint64_t at)
{
	return at / CHUNK - block_start / CHUNK;
}

static uint64_t chunks_upto(uint64_t block_start, uint64_t end)
{
	return chunk_index(block_start, end - 1) + 1;
}

/* The part of @r that is in the i-th block. Returns false when there is none. */
static bool part_in(size_t i, struct range *r)
{
	uint64_t start = atomic_load(&d.v[i].start), end = atomic_load(&d.v[i].end);

	if (r->start < start)
		r->start = start;
	if (r->end > end)
		r->end = end;
	return r->start < r->end;
}

/* Notes that @r was given back, or is wanted again. Returns whether some of it is guest RAM. */
static bool note(struct range r, bool given)
{
	bool any = false;

	for (size_t i = 0; i < atomic_load(&d.n); i++) {
		struct range part = r;
		uint64_t start = atomic_load(&d.v[i].start), changed;

		if (!part_in(i, &part))
			continue;
		any = true;
		changed = change_bits(d.v[i].pages, (part.start - start) / PAGE, (part.end - start) / PAGE, given);
		if (given)
			atomic_fetch_add(&d.given_back, changed);
		else
			atomic_fetch_sub(&d.given_back, changed);
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

	for (size_t i = 0; i < atomic_load(&d.n); i++) {
		struct range part = r;
		uint64_t start = atomic_load(&d.v[i].start), from, to;

		if (!part_in(i, &part))
			continue;
		from = chunk_index(start, part.start);
		to = chunks_upto(start, part.end);
		any |= any_bit(d.v[i].ours, from, to);
		change_bits(d.v[i].touched, from, to, true);
	}
	if (any)
		tell();
}

static bool is_ours(struct range r)
{
	for (size_t i = 0; i < atomic_load(&d.n); i++) {
		struct range part = r;
		uint64_t start = atomic_load(&d.v[i].start);

		if (part_in(i, &part) &&
		    any_bit(d.v[i].ours, chunk_index(start, part.start), chunks_upto(start, part.end)))
			return true;
	}
	return false;
}

/* Unlocks the chunks of @r that are ours: less would leave as many mappings as there are pages. */
static void unlock_chunks(struct range r)
{
	for (size_t i = 0; i < atomic_load(&d.n); i++) {
		struct range part = r, whole;
		uint64_t start = atomic_load(&d.v[i].start);

		if (!part_in(i, &part))
			continue;
		whole = (struct range){ part.start / CHUNK * CHUNK, (part.end + CHUNK - 1) / CHUNK * CHUNK };
		part_in(i, &whole);
		change_bits(d.v[i].unlocked, chunk_index(start, whole.start), chunks_upto(start, whole.end), true);
		syscall(SYS_munlock, whole.start, range_size(whole));
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
	atomic_fetch_add(&d.inside, 1);
	if (advice == MADV_WILLNEED) {
		if (note(r, false) && atomic_load(&d.hungry))
			tell();
		result = sys_madvise(r, advice);
	} else if (!note(r, true)) {
		result = sys_madvise(r, advice);
	} else {
		result = is_ours(r) ? discard_locked(r, advice) : sys_madvise(r, advice);
		if (!result) {
			note(r, true);
			touch(r);
			errno = before;
		}
	}
	atomic_fetch_sub(&d.inside, 1);
	return result;
}

static int our_munlockall(void)
{
	int result;

	atomic_fetch_add(&d.inside, 1);
	result = (int)syscall(SYS_munlockall);
	atomic_store(&d.unlocked_all, true);
	tell();
	atomic_fetch_sub(&d.inside, 1);
	return result;
}

/* ---- The lock thread ---- */

int discards_follow(void (*notify)(void *opaque), void *opaque)
{
	struct got_redirection redirections[2] = { { .name = "madvise" }, { .name = "munlockall" } };

	/* A pointer to a function as one to an object, without a cast that ISO C forbids. */
	*(int (**)(void *, size_t, int))(void *)&redirections[0].to = our_madvise;
	*(int (**)(void))(void *)&redirections[1].to = our_munlockall;
	d.notify = notify;
	d.opaque = opaque;
	return got_redirect(&d.got, redirections, 2);
}

void discards_unfollow(void)
{
	const struct timespec moment = { .tv_nsec = 1000 * 1000 };

	got_restore(&d.got);
	for (int i = 0; i < LEAVE_MS && atomic_load(&d.inside); i++)
		nanosleep(&moment, NULL);
}

/* Bytes of memory for @bits bits. */
static size_t words_size(uint64_t bits)
{
	return (size_t)((bits + BITS - 1) / BITS * sizeof(word));
}

static void clear(struct followed *f)
{
	uint64_t start = atomic_load(&f->start), end = atomic_load(&f->end), chunks = chunks_upto(start, end);

	atomic_fetch_sub(&d.given_back, change_bits(f->pages, 0, (end - start) / PAGE, false));
	change_bits(f->touched, 0, chunks, false);
	change_bits(f->unlocked, 0, chunks, false);
	change_bits(f->ours, 0, chunks, false);
}

/* Follows @r, if there is room for it. */
static void add(struct range r)
{
	size_t n = atomic_load(&d.n), pages = words_size(range_size(r) / PAGE);
	size_t chunks = words_size(chunks_upto(r.start, r.end));
	struct followed *f = &d.v[n];
	char *memory;

	if (n == RAM_BLOCKS_MAX)
		return;
	memory = mmap(NULL, pages + 3 * chunks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		return;
	f->pages = (word *)(void *)memory;
	f->touched = (word *)(void *)(memory + pages);
	f->unlocked = (word *)(void *)(memory + pages + chunks);
	f->ours = (word *)(void *)(memory + pages + 2 * chunks);
	f->live = true;
	atomic_store(&f->start, r.start);
	atomic_store(&f->end, r.end);
	atomic_store(&d.n, n + 1);
}

void discards_set_layout(const struct ram_layout *l)
{
	for (size_t i = 0; i < atomic_load(&d.n); i++)
		d.v[i].live = false;
	for (size_t b = 0; b < l->n; b++) {
		struct range r = l->v[b].host;
		bool known = false;

		for (size_t i = 0; i < atomic_load(&d.n) && !known; i++) {
			known = atomic_load(&d.v[i].start) == r.start && atomic_load(&d.v[i].end) == r.end;
			d.v[i].live |= known;
		}
		if (!known)
			add(r);
	}
	for (size_t i = 0; i < atomic_load(&d.n); i++)
		if (!d.v[i].live)
			clear(&d.v[i]);
}

void discards_set_ours(struct range r, bool ours)
{
	for (size_t i = 0; i < atomic_load(&d.n); i++) {
		struct range part = r;
		uint64_t start = atomic_load(&d.v[i].start);

		if (d.v[i].live && part_in(i, &part))
			change_bits(d.v[i].ours, chunk_index(start, part.start), chunks_upto(start, part.end), ours);
	}
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

/* The live block with the lowest addresses that ends after @from, or NULL. */
static struct followed *block_after(uint64_t from)
{
	struct followed *found = NULL;

	for (size_t i = 0; i < atomic_load(&d.n); i++)
		if (d.v[i].live && d.v[i].end > from && (!found || d.v[i].start < found->start))
			found = &d.v[i];
	return found;
}

bool discards_take_chunk(uint64_t from, struct range *chunk, bool *unlocked)
{
	struct followed *f;

	for (; (f = block_after(from)); from = f->end) {
		uint64_t start = f->start, end = f->end, chunks = chunks_upto(start, end);
		uint64_t at = find_bit(f->touched, from > start ? chunk_index(start, from) : 0, chunks, true);

		if (at == chunks)
			continue;
		change_bits(f->touched, at, at + 1, false);
		*unlocked = change_bits(f->unlocked, at, at + 1, false) > 0;
		chunk->start = (start / CHUNK + at) * CHUNK;
		chunk->end = chunk->start + CHUNK < end ? chunk->start + CHUNK : end;
		if (chunk->start < start)
			chunk->start = start;
		return true;
	}
	return false;
}

bool discards_next(uint64_t from, struct range *run)
{
	struct followed *f;

	for (; (f = block_after(from)); from = f->end) {
		uint64_t start = f->start, pages = (f->end - start) / PAGE;
		uint64_t first = find_bit(f->pages, from > start ? (from - start) / PAGE : 0, pages, true);

		if (first == pages)
			continue;
		run->start = start + first * PAGE;
		run->end = start + find_bit(f->pages, first, pages, false) * PAGE;
		return true;
	}
	return false;
}

void discards_forget(struct range r)
{
	if (!atomic_load(&d.inside))
		note(r, false);
}

uint64_t discards_total(void)
{
	return atomic_load(&d.given_back) * PAGE;
}
