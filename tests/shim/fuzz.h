/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the fuzzed parsers share. Each has a LLVMFuzzerTestOneInput(), for libFuzzer or for fuzz_main.c. */
#ifndef RAMLOCK_FUZZ_H
#define RAMLOCK_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define must(condition)                                                                       \
	do {                                                                                  \
		if (!(condition)) {                                                           \
			fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
			abort();                                                              \
		}                                                                             \
	} while (0)

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

/* The next part of the input, up to a NUL byte, as a string that the caller frees. */
static inline char *take_string(const uint8_t **bytes, size_t *size)
{
	size_t n = strnlen((const char *)*bytes, *size);
	char *s = strndup((const char *)*bytes, n);

	n += n < *size;
	*bytes += n;
	*size -= n;
	return s;
}

#endif
