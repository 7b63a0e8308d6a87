/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The few lines that the C units need of a test framework. */
#ifndef RAMLOCK_CHECK_H
#define RAMLOCK_CHECK_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned int check_failures;

#define CHECK(condition)                                                                         \
	do {                                                                                     \
		if (!(condition)) {                                                              \
			fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, \
				#condition);                                                     \
			check_failures++;                                                        \
		}                                                                                \
	} while (0)

#define CHECK_EQ(got, want)                                                                             \
	do {                                                                                            \
		int64_t check_got = (int64_t)(got), check_want = (int64_t)(want);                       \
		if (check_got != check_want) {                                                          \
			fprintf(stderr, "%s:%d: %s: %s is %" PRId64 ", not %" PRId64 "\n", __FILE__, __LINE__, \
				__func__, #got, check_got, check_want);                                 \
			check_failures++;                                                               \
		}                                                                                       \
	} while (0)

#define CHECK_CONTAINS(text, part)                                                                      \
	do {                                                                                            \
		const char *check_text = (text);                                                        \
		if (!check_text || !strstr(check_text, (part))) {                                       \
			fprintf(stderr, "%s:%d: %s: no \"%s\" in: %s\n", __FILE__, __LINE__, __func__, (part), \
				check_text ? check_text : "(null)");                                    \
			check_failures++;                                                               \
		}                                                                                       \
	} while (0)

#define CHECK_STR(got, want)                                                                              \
	do {                                                                                              \
		const char *check_text = (got), *check_other = (want);                                    \
		if (!check_text || strcmp(check_text, check_other)) {                                     \
			fprintf(stderr, "%s:%d: %s: not \"%s\" but: %s\n", __FILE__, __LINE__, __func__, \
				check_other, check_text ? check_text : "(null)");                         \
			check_failures++;                                                                 \
		}                                                                                         \
	} while (0)

struct check_case {
	const char *name;
	void (*run)(void);
};

/* Runs every case; the exit status of main(). */
static inline int check_run(const char *file, const struct check_case *cases, size_t n)
{
	unsigned int failed = 0;

	for (size_t i = 0; i < n; i++) {
		unsigned int before = check_failures;

		cases[i].run();
		if (check_failures != before) {
			fprintf(stderr, "FAILED %s: %s\n", file, cases[i].name);
			failed++;
		}
	}
	printf("%s: %zu passed, %u failed\n", file, n - failed, failed);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

#define CASE(function) { #function, function }
#define CHECK_MAIN(...)                                                                    \
	int main(void)                                                                     \
	{                                                                                  \
		static const struct check_case cases[] = { __VA_ARGS__ };                  \
		return check_run(__FILE__, cases, sizeof(cases) / sizeof(cases[0]));       \
	}

#endif
