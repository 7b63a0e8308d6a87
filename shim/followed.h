/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is noted of a block of guest RAM whose discards are followed: bits for its pages and its chunks. */
#ifndef RAMLOCK_FOLLOWED_H
#define RAMLOCK_FOLLOWED_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extents.h"
#include "layout.h"

/* The unit in which locks are given up: 2 MiB. */
enum { DISCARDS_CHUNK = 2 << 20 };

enum followed_kind {
	FOLLOWED_GIVEN, /* pages that were given back and not asked for again */
	FOLLOWED_TOUCHED, /* chunks that the lock thread is to look at */
	FOLLOWED_UNLOCKED, /* chunks that had to be unlocked for that */
	FOLLOWED_OURS, /* chunks that we have locked */
	FOLLOWED_KINDS,
};

/* The file that a block is a mapping of. */
struct followed_file {
	uint64_t device, inode; /* as of fstat(2); inode 0: there is none */
	uint64_t offset; /* of the block's first byte */
};

/* One block. Only the bits change, which any thread may do. */
struct followed {
	struct range r;
	struct followed_file file;
	_Atomic uint64_t *bits[FOLLOWED_KINDS];
	size_t memory; /* bytes of all this */
	bool live; /* in the layout; the lock thread's own, as the next */
	struct followed *next;
};

/* Sets the bits for what of @r is in @f, or clears them. Returns how many had been otherwise. */
uint64_t followed_mark(struct followed *f, enum followed_kind kind, struct range r, bool set);

/* Whether any such bit is set. */
bool followed_any(const struct followed *f, enum followed_kind kind, struct range r);

/* The first address at or after @from whose bit is set, or is not. The end of the block when there is none. */
uint64_t followed_find(const struct followed *f, enum followed_kind kind, uint64_t from, bool set);

/* The addresses of [@offset, @offset + @size) of a file. Returns false when the block has none of them. */
bool followed_part_of_file(const struct followed *f, const struct followed_file *file, uint64_t size, struct range *r);

struct followed_blocks {
	/* What a thread finds here it may use as long as it is one of the `users`. */
	struct followed *_Atomic v[2 * RAM_BLOCKS_MAX]; /* those that come and those that go, for a moment */
	atomic_size_t n; /* all that are used are among the first */
	atomic_uint users;
	_Atomic uint64_t given_back; /* FOLLOWED_GIVEN bits that are set */
	struct followed *retired; /* gone, and perhaps still in use */
};

/* The blocks one by one: for (size_t i = 0; (f = followed_next(b, &i));) */
struct followed *followed_next(struct followed_blocks *b, size_t *i);

/* Notes that @r was given back, or is wanted again. */
void followed_note(struct followed_blocks *b, struct followed *f, struct range r, bool given);

/*
 * Follows the blocks of @l from now on. What is known of addresses that stay is kept. @maps is /proc/self/maps; without it, no file
 * is known. The lock thread only.
 */
void followed_set_layout(struct followed_blocks *b, const struct ram_layout *l, int maps);

#endif
