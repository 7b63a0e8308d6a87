/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is noted of a block of guest RAM whose discards are followed. */
#include "followed.h"

#include "maps.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, BITS = 64 };

static const uint64_t units[] = {
	[FOLLOWED_GIVEN] = PAGE,
	[FOLLOWED_TOUCHED] = DISCARDS_CHUNK,
	[FOLLOWED_UNLOCKED] = DISCARDS_CHUNK,
	[FOLLOWED_OURS] = DISCARDS_CHUNK,
};
static_assert(sizeof(units) / sizeof(units[0]) == FOLLOWED_KINDS, "a unit for each kind");

/* Which bit stands for @at: they are counted from the unit that the block begins in. */
static uint64_t bit_of(const struct followed *f, enum followed_kind kind, uint64_t at)
{
	return at / units[kind] - f->r.start / units[kind];
}

/* Bytes of the bits of a kind, in whole words. */
static size_t bits_size(const struct followed *f, enum followed_kind kind)
{
	return (size_t)(bit_of(f, kind, f->r.end - 1) / BITS + 1) * sizeof(uint64_t);
}

/* Returns NULL when there is no memory for it. */
static struct followed *new_block(struct range r, struct followed_file file)
{
	struct followed facts = { .r = r, .file = file }, *f;
	size_t at = (sizeof(facts) + sizeof(uint64_t) - 1) / sizeof(uint64_t) * sizeof(uint64_t);

	facts.memory = at;
	for (int kind = 0; kind < FOLLOWED_KINDS; kind++)
		facts.memory += bits_size(&facts, kind);
	f = mmap(NULL, facts.memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (f == MAP_FAILED)
		return NULL;
	*f = facts;
	for (int kind = 0; kind < FOLLOWED_KINDS; kind++) {
		f->bits[kind] = (_Atomic uint64_t *)(void *)((char *)f + at);
		at += bits_size(f, kind);
	}
	return f;
}

/* The part of @r that is in the block. Returns false when there is none. */
static bool clip(const struct followed *f, struct range *r)
{
	if (r->start < f->r.start)
		r->start = f->r.start;
	if (r->end > f->r.end)
		r->end = f->r.end;
	return r->start < r->end;
}

uint64_t followed_mark(struct followed *f, enum followed_kind kind, struct range r, bool set)
{
	uint64_t changed = 0, to;

	if (!clip(f, &r))
		return 0;
	to = bit_of(f, kind, r.end - 1) + 1;
	for (uint64_t at = bit_of(f, kind, r.start), end; at < to; at = end) {
		_Atomic uint64_t *word = &f->bits[kind][at / BITS];
		uint64_t mask, before;

		end = (at / BITS + 1) * BITS < to ? (at / BITS + 1) * BITS : to;
		mask = (end - at == BITS ? ~0ULL : ((1ULL << (end - at)) - 1)) << at % BITS;
		before = set ? atomic_fetch_or(word, mask) : atomic_fetch_and(word, ~mask);
		changed += (uint64_t)__builtin_popcountll((set ? ~before : before) & mask);
	}
	return changed;
}

uint64_t followed_find(const struct followed *f, enum followed_kind kind, uint64_t from, bool set)
{
	uint64_t first = f->r.start / units[kind], to = bit_of(f, kind, f->r.end - 1) + 1;

	if (from < f->r.start)
		from = f->r.start;
	for (uint64_t at = from < f->r.end ? bit_of(f, kind, from) : to; at < to; at = (at / BITS + 1) * BITS) {
		uint64_t word = atomic_load(&f->bits[kind][at / BITS]), found;

		word = (set ? word : ~word) >> at % BITS;
		if (!word)
			continue;
		at += (uint64_t)__builtin_ctzll(word);
		if (at >= to)
			break;
		found = (first + at) * units[kind];
		return found > from ? found : from;
	}
	return f->r.end;
}

bool followed_any(const struct followed *f, enum followed_kind kind, struct range r)
{
	return clip(f, &r) && followed_find(f, kind, r.start, true) < r.end;
}

/* Sets the bits of @kind that are set in @other for the same addresses. Returns how many had not been. */
static uint64_t copy_bits(struct followed *f, enum followed_kind kind, const struct followed *other)
{
	struct range run = f->r;
	uint64_t changed = 0;

	for (clip(other, &run); run.start < f->r.end && run.start < other->r.end; run.start = run.end) {
		run.start = followed_find(other, kind, run.start, true);
		run.end = followed_find(other, kind, run.start, false);
		changed += followed_mark(f, kind, run, true);
	}
	return changed;
}

bool followed_part_of_file(const struct followed *f, const struct followed_file *file, uint64_t size, struct range *r)
{
	uint64_t ends = f->file.offset + range_size(f->r), end;

	if (!f->file.inode || f->file.inode != file->inode || f->file.device != file->device ||
	    __builtin_add_overflow(file->offset, size, &end) || end <= f->file.offset || file->offset >= ends)
		return false;
	*r = f->r;
	if (file->offset > f->file.offset)
		r->start += file->offset - f->file.offset;
	if (end < ends)
		r->end -= ends - end;
	return true;
}

/* ---- All blocks ---- */

struct followed *followed_next(struct followed_blocks *b, size_t *i)
{
	struct followed *f = NULL;

	while (*i < atomic_load(&b->n) && !f)
		f = atomic_load(&b->v[(*i)++]);
	return f;
}

void followed_note(struct followed_blocks *b, struct followed *f, struct range r, bool given)
{
	uint64_t changed = followed_mark(f, FOLLOWED_GIVEN, r, given);

	if (given)
		atomic_fetch_add(&b->given_back, changed);
	else
		atomic_fetch_sub(&b->given_back, changed);
}

/* Gives up the memory of retired blocks, if no thread can use them any more. */
static void reclaim(struct followed_blocks *b)
{
	struct followed *f;

	/* A thread that comes now does not find them. */
	while (!atomic_load(&b->users) && (f = b->retired)) {
		b->retired = f->next;
		followed_note(b, f, f->r, false);
		munmap(f, f->memory);
	}
}

/* Follows @r, if there is room for it; what is known of these addresses already is taken over. */
static void add(struct followed_blocks *b, struct range r, struct followed_file file)
{
	struct followed *f, *other;
	size_t slot = 0;

	while (slot < sizeof(b->v) / sizeof(b->v[0]) && atomic_load(&b->v[slot]))
		slot++;
	f = slot < sizeof(b->v) / sizeof(b->v[0]) ? new_block(r, file) : NULL;
	if (!f)
		return;
	f->live = true;
	atomic_store(&b->v[slot], f);
	if (slot >= atomic_load(&b->n))
		atomic_store(&b->n, slot + 1);
	/* Only now, so that nothing is missed that comes meanwhile. */
	for (size_t i = 0; (other = followed_next(b, &i));)
		for (int kind = 0; other != f && kind < FOLLOWED_KINDS; kind++) {
			uint64_t changed = copy_bits(f, (enum followed_kind)kind, other);

			atomic_fetch_add(&b->given_back, kind == FOLLOWED_GIVEN ? changed : 0);
		}
}

/* Which files the blocks are mapped from. */
struct looking {
	const struct ram_layout *l;
	struct followed_file *files;
	size_t at; /* the first block that mappings can still say something about */
};

static bool look_at_mapping(const struct mapping *m, void *opaque)
{
	struct looking *w = opaque;

	for (; w->at < w->l->n && w->l->v[w->at].host.start < m->r.end; w->at++) {
		uint64_t start = w->l->v[w->at].host.start;

		if (start >= m->r.start && m->inode)
			w->files[w->at] = (struct followed_file){ m->device, m->inode, m->offset + (start - m->r.start) };
	}
	return w->at < w->l->n;
}

static bool is_known(struct followed_blocks *b, struct range r, const struct followed_file *file)
{
	struct followed *f;

	for (size_t i = 0; (f = followed_next(b, &i));)
		if (f->r.start == r.start && f->r.end == r.end && !memcmp(&f->file, file, sizeof(*file))) {
			f->live = true;
			return true;
		}
	return false;
}

void followed_set_layout(struct followed_blocks *b, const struct ram_layout *l, int maps)
{
	static struct followed_file files[RAM_BLOCKS_MAX]; /* the lock thread's own */
	struct looking looking = { .l = l, .files = files };
	struct followed *f;

	memset(files, 0, sizeof(files));
	maps_walk(maps, look_at_mapping, &looking); /* without, holes that are punched are noticed later, as a loss */
	reclaim(b);
	for (size_t i = 0; (f = followed_next(b, &i));)
		f->live = false;
	for (size_t i = 0; i < l->n; i++)
		if (!is_known(b, l->v[i].host, &files[i]))
			add(b, l->v[i].host, files[i]);
	for (size_t i = 0; i < atomic_load(&b->n); i++) {
		f = atomic_load(&b->v[i]);
		if (!f || f->live)
			continue;
		atomic_store(&b->v[i], NULL);
		followed_note(b, f, f->r, false);
		f->next = b->retired;
		b->retired = f;
	}
	reclaim(b);
}
