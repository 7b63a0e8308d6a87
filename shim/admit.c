/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Whether there is room for a step. What was found is good for a while, as credit; and what is locked on fault is owed. */
#include "audit.h"
#include "clock.h"
#include "step.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

static const uint64_t CREDIT_NS = 50 * NS_PER_MS;
static const uint64_t ROOM = 32 << 20; /* what others may take of a cgroup meanwhile */

static struct headroom_ask ask_for(const struct stepper *st, const struct step *s)
{
	return (struct headroom_ask){
		.reserve = s->host_reserve,
		.nodes = numa_bound(&st->headroom.numa, s->r.start),
		.now_ns = now_ns(),
	};
}

/* Takes @cost from the credit, if that is good for it. */
static bool take_credit(struct stepper *st, const struct headroom_ask *ask, uint64_t cost)
{
	if (cost > st->credit || ask->now_ns >= st->credit_until_ns || ask->nodes != st->credit_nodes)
		return false;
	st->credit -= cost;
	headroom_spend(&st->headroom, cost);
	return true;
}

/* Whether @cost bytes may be allocated for @s. */
static bool afford(struct stepper *st, const struct step *s, uint64_t cost, struct outcome *o)
{
	const struct headroom_ask ask = ask_for(st, s);
	uint64_t left;
	enum shortage why;

	if (take_credit(st, &ask, cost))
		return true;
	left = headroom_memory(&st->headroom, &ask, &why);
	left = left > st->owed ? left - st->owed : 0;
	st->credit = left / 8;
	st->credit_until_ns = ask.now_ns + CREDIT_NS;
	st->credit_nodes = ask.nodes;
	if (st->credit < cost)
		st->credit = left / 2 >= cost ? cost : 0;
	if (take_credit(st, &ask, cost))
		return true;
	o->shortage = why;
	headroom_explain(&st->headroom, why, left, o->text, sizeof(o->text));
	return false;
}

/* Whether @size bytes that are there may be locked. */
static bool afford_pin(struct stepper *st, const struct step *s, uint64_t size, struct outcome *o)
{
	const struct headroom_ask ask = ask_for(st, s);
	enum shortage why;

	if (!size)
		return true;
	if (size > st->pin_credit || ask.now_ns >= st->pin_until_ns || ask.nodes != st->pin_nodes) {
		uint64_t left = headroom_pinnable(&st->headroom, &ask, s->of_file && s->shared, &why);

		st->pin_credit = left / 8 >= size ? left / 8 : left / 2 >= size ? size : 0;
		st->pin_until_ns = ask.now_ns + CREDIT_NS;
		st->pin_nodes = ask.nodes;
		if (!st->pin_credit) {
			o->shortage = why;
			headroom_explain(&st->headroom, why, left, o->text, sizeof(o->text));
			return false;
		}
	}
	st->pin_credit -= size;
	headroom_spend_pin(&st->headroom, size);
	return true;
}

/*
 * Bytes of @s that locking will allocate. Only pages that are certainly there cost nothing: pages of our own in anonymous
 * memory, or any in a shared mapping. Being present is not enough: so is the zero page, which a write replaces, and the
 * page cache under a private mapping, which a write copies.
 */
static uint64_t cost_of(const struct stepper *st, const struct step *s)
{
	uint64_t size = range_size(s->r);

	if (size > PACER_CHUNK_MAX)
		return size; /* it is as long as that because next to nothing is there, see size_lock() in sizing.c */
	return size - audit_owned(st->pagemap, s->r, s->shared);
}

/* Whether @s may be taken as it is. */
static bool admit(struct stepper *st, const struct step *s, struct outcome *o)
{
	uint64_t size = range_size(s->r), cost;
	bool tight = s->tmpfs && s->room.left < s->room.absent; /* the last of it is left to the guest */

	/* While there is plenty, it costs less to take everything for absent than to look. */
	if (s->kind == STEP_LOCK && s->prefault && !tight) {
		const struct headroom_ask ask = ask_for(st, s);

		if (take_credit(st, &ask, size))
			return true;
	}
	cost = cost_of(st, s);
	if (tight && cost) {
		o->shortage = SHORTAGE_KERNEL;
		snprintf(o->text, sizeof(o->text),
			 "the file system of guest RAM has no more room: %" PRIu64 " MiB, and the guest may need %" PRIu64 " MiB",
			 s->room.left >> 20, s->room.absent >> 20);
		return false;
	}
	if (s->kind == STEP_LOCK && !afford_pin(st, s, size - cost, o))
		return false;
	if (s->kind == STEP_POPULATE)
		st->owed = st->owed > cost ? st->owed - cost : 0; /* it was asked for when it was armed */
	if (!afford(st, s, cost, o)) {
		st->owed += s->kind == STEP_POPULATE ? cost : 0;
		return false;
	}
	if (s->kind == STEP_LOCK && !s->prefault)
		st->owed += cost;
	return true;
}

/* Huge pages that nobody has set aside: as long as the guest would find one for each of its pages. */
static bool admit_unreserved(struct stepper *st, const struct step *s, struct outcome *o)
{
	uint64_t absent = audit_absent(st->pagemap, s->r), left = hugepages_left(&st->hugepages, s->page_size);

	if (absent && left < st->unreserved_absent) {
		o->shortage = SHORTAGE_HOST_MEMORY;
		snprintf(o->text, sizeof(o->text),
			 "%" PRIu64 " MiB are free in huge pages of %" PRIu64 " KiB, and the guest may need %" PRIu64 " MiB",
			 left >> 20, s->page_size / 1024, st->unreserved_absent >> 20);
		return false;
	}
	st->unreserved_absent -= absent < st->unreserved_absent ? absent : st->unreserved_absent;
	return true;
}

/* Whether a cgroup is so full that something would have to be swapped out for @s. */
static bool is_tight(const struct stepper *st, const struct step *s)
{
	uint64_t enough = range_size(s->r) + ROOM;

	if (s->kind == STEP_LOCK && !s->prefault)
		return false; /* it allocates nothing */
	return cgroups_loose(&st->headroom.cgroups, enough) < enough && cost_of(st, s);
}

/* Makes @s smaller, and sizes it anew: what is known of the whole is not true of a part. */
static void cut(struct stepper *st, struct step *s, uint64_t end)
{
	s->r.end = end;
	step_size(st, s);
}

/* Has the kernel swap out beforehand what it would have to for @s, of which it does not kill. */
static bool make_room(struct stepper *st, const struct step *s, struct outcome *o)
{
	uint64_t cost;

	step_freshen(st);
	rest_asleep(st->pace.budget_ns); /* before it: others would take the room */
	/* It waits for all processors: where some are kept from the kernel's own work, for as long as that takes. */
	if (st->isolates || st->rest.real_time || makeroom(&st->makeroom) != -EBUSY)
		return true;
	cost = cost_of(st, s);
	headroom_spend(&st->headroom, -cost);
	if (s->kind == STEP_POPULATE)
		st->owed += cost;
	o->shortage = SHORTAGE_CGROUP;
	snprintf(o->text, sizeof(o->text), "QEMU's memory cgroup is full, and the kernel cannot swap out of it now: all of it is in use");
	return false;
}

bool step_admit(struct stepper *st, struct step *s, struct outcome *o)
{
	bool tight;

	*o = (struct outcome){ .shortage = SHORTAGE_NONE };
	if (s->kind != STEP_LOCK && s->kind != STEP_POPULATE)
		return true;
	if (s->kind == STEP_LOCK && !s->hugetlb && st->headroom.status < 0) {
		/* Then it would not be seen when a lock is lost. */
		o->shortage = SHORTAGE_KERNEL;
		snprintf(o->text, sizeof(o->text), "QEMU's /proc/self/status cannot be read");
		return false;
	}
	if (s->hugetlb)
		return !s->unreserved || admit_unreserved(st, s, o);
	tight = is_tight(st, s);
	if (tight && s->page_size < PACER_CHUNK && range_size(s->r) > PACER_CHUNK) {
		cut(st, s, (s->r.start / PACER_CHUNK + 1) * PACER_CHUNK);
		tight = is_tight(st, s);
	}
	while (!admit(st, s, o)) {
		uint64_t half = range_size(s->r) / 2 / PACER_CHUNK * PACER_CHUNK;

		if (half < PACER_CHUNK || half < s->page_size)
			return false;
		cut(st, s, s->r.start + half);
		*o = (struct outcome){ .shortage = SHORTAGE_NONE };
	}
	return !tight || make_room(st, s, o);
}
