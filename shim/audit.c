/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the kernel says about locked memory. */
#include "audit.h"

#include "pagemap.h"
#include "residency.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, RUNS = 64, ENTRIES = 512 };

static const char *const loss_names[] = {
	[LOSS_UNLOCKED] = "unlocked",
	[LOSS_DISCARDED] = "discarded",
	[LOSS_MERGED] = "merged",
};
static_assert(sizeof(loss_names) / sizeof(loss_names[0]) == LOSS_COUNT, "a name for each cause");

const char *loss_name(enum loss loss)
{
	return loss_names[loss];
}

/* Adds to *@absent what is absent in @r. Returns false when this kernel cannot tell in this way. */
static bool scan_absent(int pagemap, struct range r, uint64_t *absent)
{
	while (r.start < r.end) {
		struct range runs[RUNS];
		int n = residency_scan(pagemap, RESIDENCY_ABSENT, r, runs, RUNS, &r.start);

		if (n < 0)
			return false;
		for (int i = 0; i < n; i++)
			*absent += range_size(runs[i]);
	}
	return true;
}

/* Reads the pagemap entries of the pages from @at on. Returns how many, 0 when they cannot be read. */
static size_t read_entries(int pagemap, struct range r, uint64_t entries[ENTRIES])
{
	size_t pages = (size_t)(range_size(r) / PAGE);
	size_t want = (pages < ENTRIES ? pages : ENTRIES) * sizeof(entries[0]);

	return pread(pagemap, entries, want, (off_t)(r.start / PAGE * sizeof(entries[0]))) == (ssize_t)want ?
		       want / sizeof(entries[0]) :
		       0;
}

static uint64_t count_entries(int pagemap, struct range r, uint64_t mask, uint64_t value, bool *failed)
{
	uint64_t entries[ENTRIES], sum = 0;

	while (r.start < r.end) {
		size_t n = read_entries(pagemap, r, entries);

		if (!n) {
			*failed = true;
			break;
		}
		for (size_t i = 0; i < n; i++)
			sum += (entries[i] & mask) == value ? PAGE : 0;
		r.start += n * PAGE;
	}
	return sum;
}

static uint64_t mincore_absent(struct range r)
{
	unsigned char vec[ENTRIES];
	uint64_t absent = 0;

	while (r.start < r.end) {
		uint64_t pages = range_size(r) / PAGE < ENTRIES ? range_size(r) / PAGE : ENTRIES;

		if (mincore((void *)(uintptr_t)r.start, pages * PAGE, vec))
			memset(vec, 0, sizeof(vec));
		for (uint64_t i = 0; i < pages; i++)
			absent += (vec[i] & 1) ? 0 : PAGE;
		r.start += pages * PAGE;
	}
	return absent;
}

uint64_t audit_absent(int pagemap, struct range r)
{
	uint64_t absent = 0;
	bool failed = false;

	if (pagemap < 0)
		return mincore_absent(r);
	if (scan_absent(pagemap, r, &absent))
		return absent;
	absent = count_entries(pagemap, r, PAGEMAP_PRESENT, 0, &failed);
	return failed ? mincore_absent(r) : absent;
}

uint64_t audit_owned(int pagemap, struct range r, bool shared)
{
	const uint64_t mask = PAGEMAP_PRESENT | (shared ? 0 : PAGEMAP_FILE_OR_SHARED | PAGEMAP_EXCLUSIVE);
	const uint64_t value = PAGEMAP_PRESENT | (shared ? 0 : PAGEMAP_EXCLUSIVE);
	bool failed = false;
	uint64_t owned = count_entries(pagemap, r, mask, value, &failed);

	return failed ? 0 : owned;
}

uint64_t audit_merged(int pagemap, struct range r)
{
	bool failed = false;
	const uint64_t mask = PAGEMAP_PRESENT | PAGEMAP_FILE_OR_SHARED | PAGEMAP_EXCLUSIVE;

	return pagemap < 0 ? 0 : count_entries(pagemap, r, mask, PAGEMAP_PRESENT, &failed);
}

bool audit_next_present(int pagemap, struct range r, struct range *run)
{
	uint64_t entries[ENTRIES];
	bool open = false;

	while (pagemap >= 0 && r.start < r.end) {
		size_t n = read_entries(pagemap, r, entries);

		for (size_t i = 0; i < n; i++) {
			bool present = entries[i] & PAGEMAP_PRESENT;

			if (present && !open)
				run->start = r.start + i * PAGE;
			if (!present && open)
				return true;
			open = present;
			if (present)
				run->end = r.start + (i + 1) * PAGE;
		}
		if (!n)
			break;
		r.start += n * PAGE;
	}
	return open;
}
