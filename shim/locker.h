/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The mlock thread: works in small steps towards the guarantee that was set last. */
#ifndef RAMLOCK_LOCKER_H
#define RAMLOCK_LOCKER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "books.h"
#include "layout.h"
#include "pacer.h"
#include "plan.h"
#include "step.h"
#include "upkeep.h"

enum order { ORDER_RESIDENT, ORDER_ADDRESS };

enum locker_state {
	LOCKER_WAITING, /* guest RAM is not known */
	LOCKER_IDLE, /* the guarantee is held */
	LOCKER_LOCKING,
	LOCKER_UNLOCKING,
	LOCKER_SHORT, /* not all of the guarantee can be locked now */
	LOCKER_STATES,
};

const char *locker_state_name(enum locker_state s);

/* What is asked for. The protocol's set_ram_minguarantee, and the launch environment. */
struct wish {
	uint64_t lock_ram_size; /* bytes */
	bool all; /* lock_ram_size follows the size of guest RAM */
	enum order order;
	bool prefault; /* false: lock pages only when the guest touches them */
	uint32_t hold_budget_us; /* how long one system call may keep mmap_lock; 0: HOLD_BUDGET_US */
	uint32_t threads; /* that populate; 0: one */
	uint64_t host_reserve; /* bytes of memory that are left for the host; 0: as headroom_reserve() says */
};

enum {
	HOLD_BUDGET_US = 500,
	HOLD_BUDGET_MIN_US = 50,
	HOLD_BUDGET_MAX_US = 100 * 1000,
	THREADS_MAX = 16,
};

/* Something happened that clients want to hear of. */
enum locker_event {
	LOCKER_PROGRESS = 1 << 0,
	LOCKER_REACHED = 1 << 1,
	LOCKER_WENT_SHORT = 1 << 2,
	LOCKER_LOST = 1 << 3,
	LOCKER_REPAIRED = 1 << 4,
	LOCKER_COUNT = 1 << 5, /* no event for clients: resident pages are to be counted, see locker_peek() */
};

struct locker {
	pthread_mutex_t mutex; /* guards all below; never held over a system call on guest RAM */
	pthread_cond_t wake; /* the thread waits here for work */
	pthread_cond_t step_done; /* a removal waits here for the step in flight */
	void (*notify)(void *opaque); /* tells that `events` has news; called with the mutex held */
	void (*look)(void *opaque); /* if given, brings `layout` up to date; called without the mutex, by the thread */
	/* If given, finds out from QEMU whether guest RAM may be locked, as look() does. Returns false when QEMU is busy. */
	bool (*refresh)(void *opaque);
	void *opaque;

	bool stop; /* the thread is to end */
	bool ended; /* it has */
	bool closed; /* no wish is taken any more */
	struct wish wish;
	uint64_t generation; /* counts wishes */
	char launch_error[SHORT_TEXT]; /* why the wish of the launch was not set; empty: it was, or another one has been since */
	bool known; /* layout is valid */
	struct ram_layout layout;
	uint64_t layout_generation;
	bool look_again; /* what made the guarantee short may have changed */

	struct books books;
	const char *suspended; /* why guest RAM is not to be locked or populated now; NULL: it may be */
	uint64_t n_steps; /* counts steps begun */
	struct range in_flight; /* the range that a step works on now; empty when none */
	bool in_flight_gone; /* ... of which some is being unmapped */
	struct upkeep upkeep;

	enum locker_state state;
	enum shortage shortage;
	char short_text[SHORT_TEXT];
	unsigned int events; /* enum locker_event */
	uint64_t announced; /* the generation whose end was announced, with `announced_layout` */
	uint64_t announced_layout;

	struct pacer pacer; /* since the guarantee was set */
	struct step_times step_times;
	uint64_t began_ns, ended_ns; /* work since the guarantee was set */
	uint64_t done_bytes;
	uint64_t filled; /* bytes allocated only because they lay between resident pages */
	uint64_t rate; /* bytes per second lately; 0 until it is known */
	uint64_t rate_ns, rate_bytes; /* when, and with how many bytes done, that was taken */
	uint64_t progress_ns; /* time of the last progress event */
	/* What was resident of on-fault locks when that was counted last, if that was for this wish and layout. */
	struct {
		uint64_t generation, layout;
		uint64_t absent[RAM_BLOCKS_MAX], of[RAM_BLOCKS_MAX]; /* bytes that were not there, and of how many */
	} counted;

	/* Called on QEMU's threads when there are discards to look at: is to have follow_wake() called. */
	void (*discarded)(void *opaque);
	atomic_bool follows; /* goes along with memory that the guest gives back; set for good */
	int follow_error; /* why QEMU's discards do not all come to us, as -errno; 0: they do */
	int maps; /* /proc/self/maps, for that; -1: none */

	/* The thread's own. */
	uint64_t followed_layout; /* the layout_generation that discards are followed in */
	uint64_t follow_next_ns; /* not before that time discards are looked at again */
	bool avoids; /* there is memory that was given back */
	bool hungry; /* memory that comes back would be of use */
	struct plan plan;
	bool plan_valid;
	uint64_t plan_generation, plan_layout;
	bool plan_resident_done; /* resident pages are used up, the rest goes in address order */
	uint64_t retry_ns; /* the pause before a short guarantee is tried again */
	struct stepper stepper;
};

/* Prepares @l, which is all zeroes. @notify is called with news, with the mutex held: it must not block. */
void locker_init(struct locker *l, void (*notify)(void *opaque), void *opaque);

/* The thread's body; returns after locker_stop(). @arg is the locker. */
void *locker_run(void *arg);

/*
 * Sets a new wish and wakes the thread; a size above guest RAM, and one that RLIMIT_MEMLOCK forbids, are refused with
 * the former wish kept. Returns 0, -EAGAIN when guest RAM is not known, -ENODEV when there is none, -ERANGE above
 * guest RAM, -EPERM when RLIMIT_MEMLOCK forbids it, or -ESHUTDOWN after locker_close(); then @text says so.
 */
int locker_set(struct locker *l, const struct wish *wish, char text[SHORT_TEXT]);

/* From now on no wish is taken, from whichever thread; what is held stays, or with @release is wished for no more. */
void locker_close(struct locker *l, bool release);

/* Takes wishes again. */
void locker_reopen(struct locker *l);

/* Sets the wish from before guest RAM was known: not refused, but short while it cannot be. @error is why it is not what was asked for, or "". */
void locker_set_launch(struct locker *l, const struct wish *wish, const char *error);

/* Guest RAM is now @layout. What we locked and is no part of it any more is unlocked by and by. */
void locker_set_layout(struct locker *l, const struct ram_layout *layout);

/*
 * Holds locking and populating back because of @why, or lets it go on if that is NULL: while the VM is the target of a postcopy migration, a locked page
 * cannot be discarded and a populated one is lost to the source. Unlocking goes on.
 */
void locker_suspend(struct locker *l, const char *why);

/*
 * [gone] is about to be unmapped: forgets it, and waits until no step works on it. At most 100 ms: the caller is QEMU's
 * main thread. Returns whether some of it was locked by us. A step that takes longer is past its mlock2() then, and only populates.
 */
bool locker_remove(struct locker *l, struct range gone);

/* Goes along with memory that the guest gives back from now on, which takes a moment, or until guest RAM is known. */
void locker_follow(struct locker *l);

/* Whether it does, so that QEMU can discard what is locked. */
bool locker_follows(struct locker *l);

/* Whether nothing is held and nothing is wished for. */
bool locker_is_released(struct locker *l);

/*
 * Ends the thread after the step in flight; what is held stays locked. Returns 0, or -EBUSY when that takes more than 1 s,
 * as when populating waits for a remote file system: then the thread goes on as before.
 */
int locker_stop(struct locker *l);

/* What is held and wished for. Only after the thread has ended, and locker_close(). */
void locker_give(struct locker *l, struct books *books, struct wish *wish);

/*
 * Takes over from another shim in this process what it held, and what it wished for unless there is a wish here already,
 * which is newer. Returns 0, -EINVAL when @books is not about locked guest RAM, or -EBUSY when it does not fit now; then
 * nothing has changed.
 */
int locker_adopt(struct locker *l, const struct books *books, const struct wish *wish);

/* Whether something of @r may be locked by us. */
bool locker_holds(struct locker *l, struct range r);

/* Whether guest RAM is known: locker_set_layout() was called. */
bool locker_knows_ram(struct locker *l);

/* Whether there is a guarantee above 0. */
bool locker_has_guarantee(struct locker *l);

/*
 * What a controller sees of the cgroups from outside: they leave @left bytes, which is to be believed for @seconds. A guarantee
 * that is short is tried again at once.
 */
void locker_lease(struct locker *l, uint64_t left, unsigned int seconds);

/* Whether the guarantee would grow with guest RAM. */
bool locker_wants_more(struct locker *l);

struct locker_block {
	struct ram_block block;
	uint64_t locked;
	uint64_t absent; /* bytes that are on-fault locked and not resident */
};

struct locker_status {
	struct wish wish;
	uint64_t generation, layout_generation;
	enum locker_state state;
	enum shortage shortage;
	char short_text[SHORT_TEXT];
	char launch_error[SHORT_TEXT]; /* as in struct locker */
	uint64_t requested, locked, armed, foreign, ram;
	uint64_t left_out; /* as in struct ram_layout */
	struct locker_block blocks[RAM_BLOCKS_MAX];
	size_t n_blocks;
	uint64_t step_max_us, step_p99_us, rate, eta_s, extents, filled;
	struct step_times step_times;
	uint64_t memlock_limit; /* UINT64_MAX: unlimited */
	bool follows; /* memory that the guest gives back is followed */
	uint64_t given_back; /* bytes of that, as far as is known */
	uint64_t counted; /* what VmLck must show at least */
	struct losses lost, repaired; /* since the start */
	struct losses news_lost, news_repaired; /* with the events of the same names: since the last */
	uint64_t host_reserve; /* bytes, in force */
	bool cgroups_seen; /* as far as we can tell from inside */
};

/* A consistent picture. Counts resident pages when there are on-fault locks, so it may take a while. */
void locker_query(struct locker *l, struct locker_status *s);

/*
 * The same at once, for QEMU's main thread: waits for nobody and looks at no page. What is resident of on-fault locks is what was
 * counted last for this guarantee; it is counted anew by and by.
 */
void locker_peek(struct locker *l, struct locker_status *s);

/* Takes the events that are due, with the figures that belong to them. */
unsigned int locker_take_events(struct locker *l, struct locker_status *s);

#endif
