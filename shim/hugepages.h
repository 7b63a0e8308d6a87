/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Huge pages that are set aside for nobody. Where guest RAM takes its pages from these (reserve=off), a guest that finds none
 * left is killed (SIGBUS), so the last of them are not for a guarantee.
 */
#ifndef RAMLOCK_HUGEPAGES_H
#define RAMLOCK_HUGEPAGES_H

#include <stddef.h>
#include <stdint.h>

enum { HUGEPAGE_SIZES_MAX = 4 };

struct hugepages {
	struct {
		uint64_t size; /* bytes */
		int free, reserved; /* /sys/kernel/mm/hugepages/hugepages-SIZEkB/free_hugepages, resv_hugepages */
	} v[HUGEPAGE_SIZES_MAX];
	size_t n;
};

void hugepages_init(struct hugepages *h);
void hugepages_open(struct hugepages *h, const char *root);
void hugepages_deinit(struct hugepages *h);

/* Bytes in huge pages of @size bytes that are free and reserved for nobody. What cannot be read is nothing. */
uint64_t hugepages_left(const struct hugepages *h, uint64_t size);

#endif
