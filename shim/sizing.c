/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How much one step is, so that none of its system calls should take longer than the hold budget. */
#include "clock.h"
#include "residency.h"
#include "step.h"

static uint64_t round_to_pages(uint64_t bytes, uint64_t page_size)
{
	uint64_t pages = bytes / page_size;

	return (pages ? pages : 1) * page_size;
}

/* Ends @s after about @bytes: where it can, at the end of a huge page. */
static void cut_end(struct step *s, uint64_t bytes)
{
	uint64_t end;

	bytes = round_to_pages(bytes, s->page_size);
	if (range_size(s->r) <= bytes)
		return;
	end = s->r.start + bytes;
	if (s->page_size < PACER_CHUNK && end / PACER_CHUNK * PACER_CHUNK > s->r.start)
		end = end / PACER_CHUNK * PACER_CHUNK;
	s->r.end = end;
}

/* Begins @s about @bytes before its end. */
static void cut_start(struct step *s, uint64_t bytes)
{
	uint64_t start;

	bytes = round_to_pages(bytes, s->page_size);
	if (range_size(s->r) <= bytes)
		return;
	start = s->r.end - bytes;
	if (s->page_size < PACER_CHUNK && (start + PACER_CHUNK - 1) / PACER_CHUNK * PACER_CHUNK < s->r.end)
		start = (start + PACER_CHUNK - 1) / PACER_CHUNK * PACER_CHUNK;
	s->r.start = start;
}

/* A lock that is smaller than a huge page would keep absent pages from becoming one. */
static void cut_lock(struct step *s, uint64_t bytes)
{
	cut_end(s, bytes < PACER_CHUNK ? PACER_CHUNK : bytes);
}

/* Cuts @s where marking and locking what is there would take longer than the hold budget. */
static void size_lock(struct stepper *st, struct step *s)
{
	const struct pace *p = &st->pace;
	uint64_t at = s->r.start, used = 0; /* ns */

	s->present = 0;
	while (at < s->r.end) {
		struct range runs[32];
		uint64_t upto, seen = at, began = now_ns();
		size_t n = residency_list(st->pagemap, RESIDENCY_PRESENT, (struct range){ at, s->r.end }, runs, 32, &upto);

		step_looked(st, now_ns() - began);
		for (size_t i = 0; i <= n; i++) {
			/* What is absent up to the run, and the run. */
			struct range run = i < n ? runs[i] : (struct range){ upto, upto };
			uint64_t absent = run.start > seen ? run.start - seen : 0;
			uint64_t left = p->budget_ns > used ? p->budget_ns - used : 0;
			uint64_t ns = pace_expect(p, PACE_MARK, absent);

			if (ns > left) {
				cut_lock(s, seen - s->r.start + (uint64_t)((double)absent * (double)left / (double)ns));
				return;
			}
			used += ns;
			left -= ns;
			ns = pace_expect(p, PACE_LOCK, range_size(run));
			if (ns > left) {
				cut_lock(s, run.start - s->r.start +
						    (uint64_t)((double)range_size(run) * (double)left / (double)ns));
				s->present += s->r.end > run.start ? s->r.end - run.start : 0;
				return;
			}
			s->present += range_size(run);
			used += ns;
			seen = run.end;
		}
		at = upto;
	}
}

/* Whether most of what is populated of @s becomes huge pages, as what was absent lately did. */
static bool fills_huge(const struct stepper *st, const struct step *s)
{
	return st->fills_huge && step_is_absent(s);
}

/* Decides how many bytes of @s are populated at a time, and cuts it to what is worth a step. */
static void size_populate(struct stepper *st, struct step *s)
{
	const struct pace *p = &st->pace;
	const uint64_t pieces = (uint64_t)PIECES_PER_THREAD * s->threads;
	uint64_t size, most, ns;

	/* Not further than it could get if all were absent: whatever is beyond may look different by then. */
	most = pieces * pace_bytes(p, PACE_FILL);
	cut_end(s, most < PACER_CHUNK ? PACER_CHUNK : most);
	size = range_size(s->r);
	s->looked = size;
	s->present = residency_count(st->pagemap, RESIDENCY_PRESENT, s->r, size);
	s->swapped = residency_count(st->pagemap, RESIDENCY_SWAPPED, s->r, size - s->present);
	ns = pace_expect(p, PACE_CONFIRM, s->present) + pace_expect(p, PACE_SWAP_IN, s->swapped) +
	     pace_expect(p, PACE_FILL, size - s->present - s->swapped);
	s->piece = ns > p->budget_ns ? (uint64_t)((double)size * (double)p->budget_ns / (double)ns) : size;
	if (s->piece > PACER_CHUNK && s->page_size < PACER_CHUNK)
		s->piece = s->piece / PACER_CHUNK * PACER_CHUNK;
	if (s->piece < PACER_CHUNK && fills_huge(st, s))
		s->piece = PACER_CHUNK; /* less would fill as much at its first page */
	if (s->piece < PACER_CHUNK_MIN)
		s->piece = PACER_CHUNK_MIN;
	s->piece = round_to_pages(s->piece, s->page_size);
	most = pieces * s->piece;
	cut_end(s, most < PACER_CHUNK ? PACER_CHUNK : most);
}

/* Cuts @s where unlocking would take longer than the hold budget. */
static void size_unlock(struct stepper *st, struct step *s)
{
	uint64_t bytes = pace_bytes(&st->pace, PACE_UNLOCK), most = pace_bytes(&st->pace, PACE_UNLOCK_HUGE), huge;

	/*
	 * Nothing splits locked huge pages between this look and the step but the guest's own discards, a few at a time; if all
	 * of them were split, the step would take as long as one of their size over small pages.
	 */
	huge = residency_huge_end(st->pagemap, s->r, most);
	if (huge >= PACER_CHUNK) {
		s->huge = true;
		cut_start(s, huge < most ? huge : most);
		return;
	}
	while (!s->resident && range_size(s->r) > bytes) {
		uint64_t enough = bytes + 1, present;

		present = residency_count(st->pagemap, RESIDENCY_PRESENT, s->r, enough);
		if (present < enough)
			return; /* most of it is not there, and costs nothing */
		if (range_size(s->r) / 2 < bytes)
			break;
		cut_start(s, range_size(s->r) / 2);
	}
	cut_start(s, bytes);
}

void step_size(struct stepper *st, struct step *s)
{
	const struct pace *p = &st->pace;

	if (s->kind == STEP_UNLOCK) {
		size_unlock(st, s);
	} else if (s->kind == STEP_POPULATE) {
		cut_end(s, PACER_CHUNK_MAX);
		size_populate(st, s);
	} else if (s->kind == STEP_LOCK) {
		bool small = st->merging.at_work && s->mergeable; /* the step copies KSM's pages */

		cut_end(s, small ? PACER_CHUNK : s->prefault ? PACER_CHUNK_MAX : PACER_CHUNK_MAX_ABSENT);
		if (s->resident) {
			cut_end(s, pace_bytes(p, PACE_LOCK));
			s->piece = round_to_pages(pace_bytes(p, PACE_CONFIRM), s->page_size);
			if (range_size(s->r) <= s->piece * 2) /* in halves, rather than a whole one and a bit */
				s->piece = range_size(s->r) <= s->piece ? range_size(s->r) :
					   round_to_pages((range_size(s->r) / 2 + PACER_CHUNK - 1) / PACER_CHUNK *
						PACER_CHUNK, s->page_size);
			return;
		}
		size_lock(st, s);
		if (s->prefault)
			size_populate(st, s);
	}
}
