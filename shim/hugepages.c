/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Huge pages that are set aside for nobody; Documentation/admin-guide/mm/hugetlbpage.rst of Linux. */
#include "hugepages.h"

#include "fd.h"
#include "smallfile.h"

#include <stdio.h>

/* From the smallest to the largest of any 64-bit architecture. */
static const uint64_t SMALLEST = 64 << 10, LARGEST = 16ULL << 30;

void hugepages_init(struct hugepages *h)
{
	h->n = 0;
}

void hugepages_open(struct hugepages *h, const char *root)
{
	for (uint64_t size = SMALLEST; size <= LARGEST && h->n < HUGEPAGE_SIZES_MAX; size *= 2) {
		char name[96];
		int free, reserved;

		snprintf(name, sizeof(name), "sys/kernel/mm/hugepages/hugepages-%llukB/free_hugepages",
			 (unsigned long long)size / 1024);
		free = smallfile_open(root, name);
		if (free < 0)
			continue;
		snprintf(name, sizeof(name), "sys/kernel/mm/hugepages/hugepages-%llukB/resv_hugepages",
			 (unsigned long long)size / 1024);
		reserved = smallfile_open(root, name);
		h->v[h->n].size = size;
		h->v[h->n].free = free;
		h->v[h->n++].reserved = reserved;
	}
}

void hugepages_deinit(struct hugepages *h)
{
	for (size_t i = 0; i < h->n; i++) {
		fd_close(h->v[i].free);
		fd_close(h->v[i].reserved);
	}
	hugepages_init(h);
}

/* The file's number, or @unknown. */
static uint64_t number(int fd, uint64_t unknown)
{
	char text[32];
	uint64_t value;

	return smallfile_read(fd, text, sizeof(text)) || smallfile_value(text, "", 10, &value) ? unknown : value;
}

uint64_t hugepages_left(const struct hugepages *h, uint64_t size)
{
	for (size_t i = 0; i < h->n; i++) {
		uint64_t free, reserved;

		if (h->v[i].size != size)
			continue;
		free = number(h->v[i].free, 0);
		reserved = number(h->v[i].reserved, UINT64_MAX);
		return free > reserved ? (free - reserved) * size : 0;
	}
	return 0;
}
