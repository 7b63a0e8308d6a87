/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Where a request ends in a stream of bytes, found as QEMU's monitor finds it (pure). */
#ifndef RAMLOCK_FRAMING_H
#define RAMLOCK_FRAMING_H

#include <stdbool.h>
#include <stddef.h>

enum framing_result {
	FRAMING_MORE, /* all bytes were taken, and no request is complete */
	FRAMING_REQUEST, /* `text` is one, though perhaps with bad grammar */
	FRAMING_STRAY, /* bytes that begin no token: `text` has them */
	FRAMING_TOO_LONG, /* the rest of this request will be skipped */
	FRAMING_TOO_DEEP, /* likewise */
	FRAMING_NO_MEMORY,
};

/* Zeroed: nothing was seen yet. */
struct framing {
	int state; /* what the last byte was part of */
	int braces, brackets; /* that are open */
	bool skipping; /* over a limit: until the end of this request */
	size_t token; /* where the last token begins in `text` */
	char *text; /* ends with a NUL byte, which is not counted */
	size_t size, capacity;
};

/*
 * Takes up to @size bytes, fewer when it has something to tell, and counts them in @used. A request may have @max bytes,
 * its spaces not counted, and @depth levels. After any result but FRAMING_MORE call framing_next().
 */
enum framing_result framing_feed(struct framing *f, const char *data, size_t size, size_t *used, size_t max, int depth);

/* Forgets `text`. */
void framing_next(struct framing *f);

void framing_deinit(struct framing *f);

#endif
