/* SPDX-License-Identifier: GPL-2.0-or-later */
/* /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst): its entries, and its ioctl, which older headers lack. */
#ifndef RAMLOCK_PAGEMAP_H
#define RAMLOCK_PAGEMAP_H

#include <stdint.h>
#include <sys/ioctl.h>

/* Bits of an entry, one of 8 bytes for each page. All but the frame number can be read without privilege. */
static const uint64_t PAGEMAP_PRESENT = 1ULL << 63, PAGEMAP_FILE_OR_SHARED = 1ULL << 61, PAGEMAP_EXCLUSIVE = 1ULL << 56;

/* PAGEMAP_SCAN, Linux 6.7: lists runs of pages by category; returns how many, and in walk_end how far it got. */
struct pagemap_scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

struct pagemap_region {
	uint64_t start, end, categories;
};

enum { CATEGORY_PRESENT = 1 << 3, CATEGORY_SWAPPED = 1 << 4, CATEGORY_ZERO = 1 << 5, CATEGORY_HUGE = 1 << 6 };

static const unsigned long PAGEMAP_SCAN_CALL = _IOWR('f', 16, struct pagemap_scan);

#endif
