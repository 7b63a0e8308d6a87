/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The mlock thread.
 *
 * Theory of operation: there is one wish (how much to hold locked) and one thread that works towards it. Each turn of
 * its loop decides one step under the mutex (choose), carries it out without the mutex, because it is a system call
 * that takes the process's mmap_lock, and accounts for it under the mutex again. So a new wish takes effect at the next
 * step, whatever the direction, and nobody ever waits for more than one step.
 *
 * The thread sleeps on a condition variable and makes no wakeup while there is nothing to do. While something is held it
 * looks every 5 s whether that is still so (upkeep.c), more often at a memory cgroup at its limit (freshen.c), and while the
 * guarantee is short it tries again on a slow timer.
 *
 * Lock order: `mutex` is the only lock. QEMU's main thread takes it in bottom halves and RAM block notifiers, so it
 * is never held over a system call on guest RAM, nor over file reading.
 */
#include "audit.h"
#include "locker_inside.h"
#include "residency.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

static const uint64_t PROGRESS_NS = 100 * NS_PER_MS;
static const uint64_t STOP_WAIT_NS = NS_PER_S; /* the longest that the control thread waits for a step */
static const uint64_t COUNT_NS = 50 * NS_PER_MS;
static const uint64_t RATE_NS = 250 * NS_PER_MS;
static const uint64_t RETRY_MAX_NS = 8ULL * NS_PER_S;
static const char *const state_names[] = {
	[LOCKER_WAITING] = "waiting",	  [LOCKER_IDLE] = "idle",   [LOCKER_LOCKING] = "locking",
	[LOCKER_UNLOCKING] = "unlocking", [LOCKER_SHORT] = "short",
};
static_assert(sizeof(state_names) / sizeof(state_names[0]) == LOCKER_STATES, "a name for each state");

const char *locker_state_name(enum locker_state s)
{
	return state_names[s];
}

void locker_init(struct locker *l, void (*notify)(void *opaque), void *opaque)
{
	l->notify = notify;
	l->opaque = opaque;
	l->wish = (struct wish){ .prefault = true, .hold_budget_us = HOLD_BUDGET_US, .threads = 1 };
	stepper_init(&l->stepper);
	upkeep_init(&l->upkeep);
	l->follow_error = -EAGAIN;
	l->maps = -1;
	pthread_mutex_init(&l->mutex, NULL);
	clock_cond_init(&l->wake);
	clock_cond_init(&l->step_done);
}

void locker_raise_event(struct locker *l, enum locker_event event)
{
	l->events |= event;
	l->notify(l->opaque);
}

/* The bytes that should be held now. */
uint64_t locker_target(const struct locker *l)
{
	if (l->wish.all || l->wish.lock_ram_size > l->layout.total)
		return l->layout.total;
	return l->wish.lock_ram_size;
}

/* ---- Deciding; with the mutex ---- */

static bool plan_is_current(const struct locker *l)
{
	return l->plan_valid && l->plan_generation == l->generation && l->plan_layout == l->layout_generation;
}

bool locker_has_other_work(const struct locker *l, uint64_t generation, uint64_t layout_generation)
{
	return l->stop || l->generation != generation || l->layout_generation != layout_generation;
}

bool locker_next_gone(const struct locker *l, struct range *r)
{
	if (!extents_part(&l->books.gone, (struct range){ 0, UINT64_MAX }, r))
		return false;
	if (range_size(*r) > PACER_CHUNK)
		r->end = r->start / PACER_CHUNK * PACER_CHUNK + PACER_CHUNK;
	return true;
}

/* Enters into @s what is known of the block that it lies in. */
static void describe(const struct locker *l, struct step *s, const struct ram_block *b)
{
	s->page_size = b->page_size;
	s->mergeable = b->mergeable;
	s->host_reserve = l->wish.host_reserve;
	s->hugetlb = b->backing == BACKING_HUGETLB;
	s->unreserved = b->unreserved;
	s->tmpfs = b->tmpfs;
	s->of_file = b->backing == BACKING_FILE;
	s->shared = b->shared;
	s->prefault = l->wish.prefault;
	s->threads = l->wish.threads;
}

/* Chooses the range to work on next; step_size() will make it smaller. */
static void choose(struct locker *l, struct step *s)
{
	uint64_t want, need, held = l->books.held.total;
	const struct ram_block *b;
	bool foreign;

	*s = (struct step){ .kind = STEP_NONE };
	if (!l->known)
		return;
	if (locker_next_gone(l, &s->r)) {
		s->kind = STEP_LET_GO;
		return;
	}
	want = locker_target(l);
	if (held < want) {
		if (l->suspended) {
			s->kind = STEP_SUSPENDED;
			return;
		}
		if (!plan_is_current(l) || !plan_peek(&l->plan, &l->layout, &s->r) || !follow_trim(l, &s->r)) {
			s->kind = STEP_PLAN;
			return;
		}
		if (books_full(&l->books)) {
			s->kind = STEP_STUCK;
			return;
		}
		s->kind = STEP_LOCK;
		b = layout_find(&l->layout, s->r);
		describe(l, s, b);
		s->resident = l->plan.resident;
		s->fills = l->plan.fills;
		need = (want - held + b->page_size - 1) / b->page_size * b->page_size;
		if (range_size(s->r) > need)
			s->r.end = s->r.start + need;
		return;
	}
	if (held > want && books_newest(&l->books, &l->layout, held - want, PACER_CHUNK_MAX_ABSENT, &s->r, &foreign)) {
		s->kind = foreign ? STEP_FORGET : STEP_UNLOCK;
		describe(l, s, layout_find(&l->layout, s->r));
		s->resident = !extents_overlap(&l->books.on_fault, s->r);
		return;
	}
	if (l->wish.prefault && l->books.on_fault.total) {
		if (l->suspended) {
			s->kind = STEP_SUSPENDED;
			return;
		}
		extents_part(&l->books.on_fault, (struct range){ 0, UINT64_MAX }, &s->r);
		b = layout_find(&l->layout, (struct range){ s->r.start, s->r.start + 1 });
		if (!b)
			return; /* the books are within the layout */
		s->kind = STEP_POPULATE;
		describe(l, s, b);
		if (s->r.end > b->host.end) /* two blocks side by side */
			s->r.end = b->host.end;
	}
}

/* ---- Planning ---- */

struct residency {
	struct locker *locker;
	uint64_t generation, layout_generation;
};

static bool is_stale(struct residency *r)
{
	bool stale;

	pthread_mutex_lock(&r->locker->mutex);
	stale = locker_has_other_work(r->locker, r->generation, r->layout_generation);
	pthread_mutex_unlock(&r->locker->mutex);
	return stale;
}

static int find_residency(void *opaque, struct range r, struct range *runs, size_t max, uint64_t *upto)
{
	struct residency *looker = opaque;
	struct stepper *st = &looker->locker->stepper;
	uint64_t began;
	size_t n;

	if (is_stale(looker))
		return -ECANCELED;
	began = now_ns();
	n = residency_list(st->pagemap, RESIDENCY_PRESENT, r, runs, max, upto);
	step_looked(st, now_ns() - began);
	return (int)n;
}

/* Counts what is absent of @on_fault, unless that is not to be known any more. Returns 0 or -ECANCELED. */
static int count_owed(struct residency *r, const struct extents *on_fault)
{
	uint64_t owed = 0;

	for (size_t i = 0; i < on_fault->n; i++) {
		struct range rest = on_fault->v[i];

		while (rest.start < rest.end) {
			struct range runs[PLAN_RUNS];
			uint64_t from = rest.start;
			int n = find_residency(r, rest, runs, PLAN_RUNS, &rest.start);

			if (n < 0)
				return n;
			owed += rest.start - from;
			while (n-- > 0)
				owed -= range_size(runs[n]);
		}
	}
	r->locker->stepper.owed = owed;
	return 0;
}

/* Has guest RAM looked at, with the mutex given up meanwhile. Returns whether it was found changed, or the wish is another one. */
static bool has_changed(struct locker *l)
{
	uint64_t generation = l->generation, layout_generation = l->layout_generation;

	if (!l->look)
		return false;
	pthread_mutex_unlock(&l->mutex);
	l->look(l->opaque);
	pthread_mutex_lock(&l->mutex);
	return generation != l->generation || layout_generation != l->layout_generation;
}

/*
 * Called with the mutex held, which it gives up while it looks. Returns why there is nothing to plan, or SHORTAGE_NONE when
 * there is, or when it is to be looked at again.
 */
static enum shortage make_plan(struct locker *l)
{
	static struct ram_layout layout; /* the thread's own copies */
	static struct extents held, on_fault;
	struct residency r = { l, l->generation, l->layout_generation };
	bool stale = !plan_is_current(l);
	uint64_t need = locker_target(l) - l->books.held.total;
	enum order order = l->wish.order;
	uint64_t runs;

	layout = l->layout;
	held = l->books.held;
	on_fault = l->books.on_fault;
	if (stale)
		l->plan_resident_done = false;
	pthread_mutex_unlock(&l->mutex);

	if (count_owed(&r, &on_fault)) {
		pthread_mutex_lock(&l->mutex);
		return SHORTAGE_NONE; /* think again */
	}
	follow_avoid(l, &held);
	plan_clear(&l->plan);
	if (order == ORDER_RESIDENT && !l->plan_resident_done) {
		int err = plan_resident(&l->plan, &layout, &held, need, find_residency, &r);

		if (err) {
			plan_clear(&l->plan);
			pthread_mutex_lock(&l->mutex);
			return SHORTAGE_NONE;
		}
		l->plan_resident_done = true;
	}
	if (!l->plan.n) {
		plan_address(&l->plan, &layout, &held, need);
		/* Where no more runs may be had, gaps are what is left, though there may be resident pages elsewhere. */
		l->plan.fills = order == ORDER_RESIDENT && held.n >= PLAN_EXTENTS_MAX;
	}
	runs = headroom_mappings(&l->stepper.headroom, held.n) / 2; /* each run splits a mapping twice at most */
	if (l->plan.n > runs)
		l->plan.n = (size_t)runs;

	pthread_mutex_lock(&l->mutex);
	if (locker_has_other_work(l, r.generation, r.layout_generation))
		return SHORTAGE_NONE;
	l->plan_valid = true;
	l->plan_generation = r.generation;
	l->plan_layout = r.layout_generation;
	if (l->plan.n)
		return SHORTAGE_NONE;
	if (!runs)
		return SHORTAGE_MAP_COUNT;
	return l->avoids ? SHORTAGE_DISCARDED : SHORTAGE_KERNEL;
}

/* ---- Accounting; with the mutex ---- */

static void account(struct locker *l, const struct step *s, const struct outcome *o, bool gone)
{
	for (size_t i = 0; i < o->n_holds; i++) {
		pacer_record(&l->pacer, o->holds[i]);
		step_times_record(&l->step_times, o->holds[i]);
	}
	if (!range_size(o->done))
		return;
	if (s->kind == STEP_LET_GO) {
		extents_remove(&l->books.gone, o->done);
		return;
	}
	if (s->kind == STEP_LOCK)
		plan_advance(&l->plan, o->done.end);
	if (!layout_find(&l->layout, o->done)) {
		/* Unplugged while the step ran. The lock goes with the mapping, if that goes. */
		if (s->kind == STEP_LOCK && !o->foreign && !s->hugetlb && !gone)
			extents_add(&l->books.gone, o->done);
		return;
	}
	if (s->kind == STEP_LOCK)
		books_add(&l->books, o->done, o->foreign, !s->prefault);
	else if (s->kind == STEP_POPULATE)
		books_populated(&l->books, o->done);
	else
		books_remove(&l->books, o->done);
	l->done_bytes += range_size(o->done);
	l->filled += o->filled < range_size(o->done) ? o->filled : range_size(o->done);
}

/* How fast it goes lately, for the time that is left: an average of all would take long to notice a change. */
static void note_rate(struct locker *l, uint64_t now)
{
	if (now - l->rate_ns < RATE_NS)
		return;
	l->rate = (uint64_t)((double)(l->done_bytes - l->rate_bytes) * NS_PER_S / (double)(now - l->rate_ns));
	l->rate_ns = now;
	l->rate_bytes = l->done_bytes;
}

static void go_short(struct locker *l, enum shortage why, const char *text)
{
	bool news = l->state != LOCKER_SHORT || l->shortage != why || l->announced != l->generation;

	l->state = LOCKER_SHORT;
	l->shortage = why;
	snprintf(l->short_text, sizeof(l->short_text), "%s", text);
	l->announced = l->generation;
	l->ended_ns = now_ns();
	if (news)
		locker_raise_event(l, LOCKER_WENT_SHORT);
}

/* There is nothing to do: says what that means. */
static void settle(struct locker *l)
{
	bool news = l->announced != l->generation || l->announced_layout != l->layout_generation ||
		    l->state != LOCKER_IDLE;

	if (!l->known) {
		l->state = LOCKER_WAITING;
		return;
	}
	if (!l->wish.all && l->wish.lock_ram_size > l->layout.total) {
		go_short(l, SHORTAGE_NO_RAM, "the VM has less RAM than that");
		return;
	}
	l->state = LOCKER_IDLE;
	l->shortage = SHORTAGE_NONE;
	if (!l->books.held.total)
		l->stepper.freshen_ns = 0; /* as long as it is, limits may be changed unseen */
	upkeep_settled(l);
	l->announced = l->generation;
	l->announced_layout = l->layout_generation;
	if (!news)
		return;
	l->ended_ns = now_ns();
	locker_raise_event(l, LOCKER_REACHED);
}

/* The thread's own copy of the layout. Without the mutex. */
static const struct ram_layout *copy_layout(struct locker *l)
{
	static struct ram_layout layout;

	pthread_mutex_lock(&l->mutex);
	layout = l->layout;
	pthread_mutex_unlock(&l->mutex);
	return &layout;
}

/* Counts now and then what the guest may still take of the huge pages that are set aside for nobody. Without the mutex. */
static void count_unreserved(struct locker *l)
{
	struct stepper *st = &l->stepper;
	const struct ram_layout *layout;
	uint64_t now = now_ns();

	if (now < st->unreserved_until_ns)
		return;
	layout = copy_layout(l);
	st->unreserved_absent = 0;
	for (size_t i = 0; i < layout->n; i++)
		if (layout->v[i].unreserved)
			st->unreserved_absent += audit_absent(st->pagemap, layout->v[i].host);
	st->unreserved_until_ns = now + COUNT_NS;
}

/* Carries out one step with the mutex given up meanwhile. */
static void carry_out(struct locker *l, struct step *s)
{
	struct outcome o;
	uint64_t now, longest = 0, generation = l->generation, layout_generation = l->layout_generation;
	enum locker_state working =
		s->kind == STEP_LOCK || s->kind == STEP_POPULATE ? LOCKER_LOCKING : LOCKER_UNLOCKING;
	bool admitted, gone = false;

	if (l->state != LOCKER_SHORT) /* it is, until a step has worked */
		l->state = working;
	l->stepper.pace.budget_ns = (uint64_t)l->wish.hold_budget_us * NS_PER_US;
	/* This reads files, and may take its time; so the step is in flight only after it. */
	pthread_mutex_unlock(&l->mutex);
	rest_note_policy(&l->stepper.rest);
	step_size(&l->stepper, s);
	if (s->unreserved)
		count_unreserved(l);
	if (s->tmpfs) {
		const struct ram_layout *layout = copy_layout(l);

		s->room = tmpfs_ask(layout, layout_find(layout, s->r));
	}
	admitted = step_admit(&l->stepper, s, &o);
	pthread_mutex_lock(&l->mutex);
	if (admitted) {
		if (generation != l->generation || layout_generation != l->layout_generation) {
			l->state = working;
			return; /* decide again */
		}
		atomic_store(&l->stepper.cancel, false);
		l->in_flight = s->r;
		l->in_flight_gone = false;
		l->n_steps++;
		if (s->kind == STEP_LOCK)
			follow_locking(l, s->r);
		pthread_mutex_unlock(&l->mutex);

		step_carry_out(&l->stepper, s, &o);

		pthread_mutex_lock(&l->mutex);
		l->in_flight = (struct range){ 0, 0 };
		gone = l->in_flight_gone;
		pthread_cond_broadcast(&l->step_done);
		account(l, s, &o, gone);
	}
	if (o.shortage) {
		follow_changed(l, s->r);
		l->plan_valid = false;
		if (generation == l->generation && layout_generation == l->layout_generation)
			go_short(l, o.shortage, o.text);
		else
			l->state = working; /* a new wish, or other RAM, deserves a try of its own */
		return;
	}
	follow_changed(l, s->r);
	l->state = working;
	l->shortage = SHORTAGE_NONE;
	l->retry_ns = RETRY_MIN_NS;
	now = now_ns();
	note_rate(l, now);
	if (now - l->progress_ns >= PROGRESS_NS) {
		l->progress_ns = now;
		locker_raise_event(l, LOCKER_PROGRESS);
	}
	if (!o.n_holds)
		return;
	for (size_t i = 0; i < o.n_holds; i++)
		longest = o.holds[i] > longest ? o.holds[i] : longest;
	pthread_mutex_unlock(&l->mutex);
	rest_after(&l->stepper.rest, l->stepper.views, longest);
	pthread_mutex_lock(&l->mutex);
}

/* When the cgroups are to be looked at, between steps: while nothing is held, we do them no harm. */
static uint64_t freshen_deadline(const struct locker *l)
{
	return l->books.held.total ? l->stepper.freshen_ns : UINT64_MAX;
}

/* With the mutex given up meanwhile. */
static void freshen(struct locker *l)
{
	pthread_mutex_unlock(&l->mutex);
	step_freshen(&l->stepper);
	pthread_mutex_lock(&l->mutex);
}

/* When to look by ourselves at what is held, was given back, or is about to be reclaimed. */
static uint64_t next_deadline(struct locker *l)
{
	uint64_t upkeep = upkeep_deadline(l), follow = follow_deadline(l), fresh = freshen_deadline(l);
	uint64_t soonest = follow < fresh ? follow : fresh;

	/* What was given back goes first, see upkeep_is_due(). */
	return follow_is_pending(l) || soonest < upkeep ? soonest : upkeep;
}

/* There is nothing to do: waits for work, or for the next look at what is held. */
static void wait_idle(struct locker *l)
{
	uint64_t deadline = next_deadline(l);

	if (deadline == UINT64_MAX)
		pthread_cond_wait(&l->wake, &l->mutex);
	else
		clock_wait(&l->wake, &l->mutex, deadline);
}

/*
 * A short guarantee is tried again when the wish or the layout changes, or after a while: the kernel tells of pressure (PSI,
 * memory.events), but not that a limit was raised or memory became free.
 */
static void wait_short(struct locker *l)
{
	uint64_t generation = l->generation, layout_generation = l->layout_generation;
	uint64_t deadline = now_ns() + l->retry_ns;

	while (!l->stop && !l->look_again && generation == l->generation && layout_generation == l->layout_generation &&
	       !upkeep_is_due(l) && follow_deadline(l) > now_ns()) {
		uint64_t sooner;

		if (freshen_deadline(l) <= now_ns()) {
			freshen(l); /* that alone is no reason to try again */
			continue;
		}
		sooner = next_deadline(l);
		if (sooner > deadline)
			sooner = deadline;
		if (clock_wait(&l->wake, &l->mutex, sooner) == ETIMEDOUT && sooner == deadline)
			break;
	}
	l->look_again = false;
	l->retry_ns = l->retry_ns * 2 < RETRY_MAX_NS ? l->retry_ns * 2 : RETRY_MAX_NS;
	l->stepper.credit = l->stepper.pin_credit = 0;
}

void *locker_run(void *arg)
{
	struct locker *l = arg;

	prctl(PR_SET_NAME, "ramlock-lock");
	prctl(PR_SET_TIMERSLACK, 1); /* the default adds 50 us to every sleep */
	rest_begin(&l->stepper.rest);
	pthread_mutex_lock(&l->mutex);
	l->retry_ns = RETRY_MIN_NS;
	while (!l->stop) {
		uint64_t generation, layout_generation;
		enum shortage why;
		struct step s;

		if (follow_deadline(l) <= now_ns()) {
			follow_run(l);
			continue;
		}
		if (upkeep_is_due(l)) {
			upkeep_run(l);
			l->stepper.freshen_ns = 0; /* limits may have been changed */
			continue;
		}
		if (freshen_deadline(l) <= now_ns()) {
			freshen(l);
			continue;
		}
		choose(l, &s);
		follow_hunger(l, s.kind != STEP_NONE);
		switch (s.kind) {
		case STEP_NONE:
			settle(l);
			break;
		case STEP_PLAN:
			if (l->state != LOCKER_SHORT)
				l->state = LOCKER_LOCKING;
			if (has_changed(l))
				continue;
			why = make_plan(l);
			if (!why)
				continue;
			go_short(l, why,
				 why == SHORTAGE_MAP_COUNT ? "QEMU has nearly as many mappings as vm.max_map_count allows" :
				 why == SHORTAGE_DISCARDED ? "the guest has given the rest of its RAM back" :
							     "no part of guest RAM is left to lock");
			break;
		case STEP_SUSPENDED:
			go_short(l, SHORTAGE_MIGRATION, l->suspended);
			break;
		case STEP_STUCK:
			go_short(l, SHORTAGE_MAP_COUNT, "guest RAM is locked in too many pieces");
			break;
		default:
			carry_out(l, &s);
			if (l->state != LOCKER_SHORT)
				continue;
		}
		/*
		 * A guarantee above guest RAM waits for a layout change, which wakes; all other shortages can end
		 * without anybody telling us.
		 */
		generation = l->generation;
		layout_generation = l->layout_generation;
		if (l->state == LOCKER_SHORT && l->shortage != SHORTAGE_NO_RAM)
			wait_short(l);
		else if (!l->stop)
			wait_idle(l);
		if (!l->stop && (generation != l->generation || layout_generation != l->layout_generation)) {
			pthread_mutex_unlock(&l->mutex);
			rest_before_work();
			pthread_mutex_lock(&l->mutex);
		}
	}
	l->ended = true;
	pthread_cond_broadcast(&l->step_done);
	pthread_mutex_unlock(&l->mutex);
	workers_stop(&l->stepper.workers);
	return NULL;
}

int locker_stop(struct locker *l)
{
	uint64_t deadline = now_ns() + STOP_WAIT_NS;
	int err = 0;

	pthread_mutex_lock(&l->mutex);
	l->stop = true;
	atomic_store(&l->stepper.cancel, true);
	pthread_cond_signal(&l->wake);
	while (!l->ended && !err)
		err = clock_wait(&l->step_done, &l->mutex, deadline) == ETIMEDOUT ? -EBUSY : 0;
	if (l->ended)
		err = 0;
	else
		l->stop = false;
	pthread_mutex_unlock(&l->mutex);
	return err;
}
