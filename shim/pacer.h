/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How many bytes a step covers, how long to pause after it, and what the steps cost. Pure. */
#ifndef RAMLOCK_PACER_H
#define RAMLOCK_PACER_H

#include <stdint.h>

/*
 * mlock() and munlock() hold the process's mmap_lock for writing while they walk the resident pages, and populating
 * holds it for reading: a short step is a short wait for every other thread that maps memory or takes a page fault.
 * 2 MiB is one huge page, and measured at 0.3 ms when resident.
 */
enum { PACER_CHUNK = 2 << 20 };
/* An on-fault lock touches only pages that are there already, so its steps may be longer. */
enum { PACER_CHUNK_ON_FAULT = 16 << 20 };

/* Four buckets for each power of two of microseconds. */
enum { PACER_BUCKETS = 4 * 33 };

struct pacer {
	uint64_t max_us;
	uint64_t count;
	uint64_t buckets[PACER_BUCKETS];
};

void pacer_reset(struct pacer *p);

/* Notes a step that took @ns nanoseconds. */
void pacer_record(struct pacer *p, uint64_t ns);

/* Nanoseconds to leave mmap_lock alone after a step of @ns, so that a waiting writer gets in: 5 % of the step. */
uint64_t pacer_gap(uint64_t ns);

/* The 99th percentile of the steps in microseconds, at most 25 % too high; 0 before the first step. */
uint64_t pacer_p99_us(const struct pacer *p);

#endif
