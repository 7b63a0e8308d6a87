/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest RAM of a QEMU that does not export its symbols: the controller has found it, and says where it is. Nothing of that
 * is believed before the kernel's own list of mappings bears it out, and nobody tells when it stops being true: so it is
 * held against that list again before each use.
 */
#ifndef RAMLOCK_PUSHED_H
#define RAMLOCK_PUSHED_H

#include <pthread.h>

#include "layout.h"
#include "maps.h"

enum { PUSHED_TEXT = 256 };

/* What the mappings say of one block. */
struct evidence {
	const char *wrong; /* what does not fit; NULL: nothing so far */
	uint64_t reached; /* so far mapped from the start of the block without a hole */
	bool guarded; /* a mapping without any rights follows, as QEMU puts one behind guest RAM */
	bool arena; /* it is followed as the part in use of a malloc() arena is */
	bool shared;
	enum backing backing; /* BACKING_FILE stands for SHMEM and HUGETLB too */
	uint64_t device, inode; /* of its file, 0 without one */
	uint64_t offset; /* of the block's start in its file */
};

/* Holds blocks against mappings. Pure: mappings come from the caller, ascending. */
struct judge {
	const struct ram_layout *layout;
	struct evidence *evidence; /* one for each block */
	size_t at; /* the first block that mappings can still say something about */
};

void judge_begin(struct judge *j, const struct ram_layout *l, struct evidence evidence[RAM_BLOCKS_MAX]);

/* Returns false when the mappings that follow say nothing more. */
bool judge_mapping(const struct mapping *m, void *judge);

/* After the last mapping: every evidence has `wrong`, or fits. */
void judge_end(struct judge *j);

/*
 * Sorts @l. Returns NULL, or what is wrong with it in itself: a block without size, of no whole pages, over another one.
 */
const char *pushed_sort(struct ram_layout *l);

struct pushed {
	pthread_mutex_t mutex; /* guards all below; never taken on QEMU's main thread */
	int maps; /* /proc/self/maps */
	struct ram_layout layout; /* what was accepted, and is still true */
	struct evidence evidence[RAM_BLOCKS_MAX]; /* ... as it was then */
	struct evidence now[RAM_BLOCKS_MAX]; /* scratch */
};

/* @p is all zeroes. */
void pushed_init(struct pushed *p);

/* Opens what may not be opened later, in the process whose RAM this is about. */
void pushed_open(struct pushed *p);
void pushed_deinit(struct pushed *p);

/*
 * Accepts @l instead of what was accepted before, or refuses it as a whole with the reason in @text.
 * With the mutex. Returns 0 or -EINVAL.
 */
int pushed_accept(struct pushed *p, const struct ram_layout *l, char text[PUSHED_TEXT]);

/* Drops the blocks that are not what they were when they were accepted. With the mutex. Returns whether there were any. */
bool pushed_look(struct pushed *p);

#endif
