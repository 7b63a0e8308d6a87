/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sends calls of QEMU to other functions: by the addresses through which it calls libc (its GOT), no instruction is touched. */
#ifndef RAMLOCK_GOT_H
#define RAMLOCK_GOT_H

#include <link.h>
#include <stdbool.h>
#include <stddef.h>

/* Calls of @name go to @to. */
struct got_redirection {
	const char *name;
	void *to;
};

/* One address that was changed. */
struct got_slot {
	void **slot;
	void *former, *ours;
	bool relro; /* its page is read-only */
};

enum { GOT_SLOTS_MAX = 64 };

struct got {
	struct got_slot v[GOT_SLOTS_MAX];
	size_t n;
	unsigned long long loads; /* how many objects had ever been loaded when this was looked at last */
};

/* Called with each address of an object through which it calls or takes the address of @symbol. */
typedef void got_slot_fn(void *opaque, const char *symbol, void **slot);

/* Walks over the addresses of a loaded object. Returns 0, or -EINVAL when it cannot be read; x86-64 and the like. */
int got_walk(const struct dl_phdr_info *object, got_slot_fn *found, void *opaque);

/* Whether @slot is on a page of @object that was made read-only after it was filled in. */
bool got_is_relro(const struct dl_phdr_info *object, const void *slot);

/*
 * Redirects @n calls in the main program and in each loaded module of QEMU, where they are not already. Cheap when nothing
 * was loaded since the last time. Not on a thread that QEMU waits for: it takes the loader's lock. Returns 0 or -errno of
 * the first address that could not be changed.
 */
int got_redirect(struct got *g, const struct got_redirection *redirections, size_t n);

/* Undoes all of it, where nobody else has changed it since. A thread may still be in a function that was redirected to. */
void got_restore(struct got *g);

#endif
