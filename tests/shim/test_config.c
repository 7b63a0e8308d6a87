/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sizes and the RAMLOCK_* environment. */
#include "check.h"
#include "config.h"

#include <stdarg.h>
#include <unistd.h>

static char warnings[4096];

static void note(const char *fmt, ...)
{
	size_t n = strlen(warnings);
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(warnings + n, sizeof(warnings) - n, fmt, ap);
	va_end(ap);
}

static int64_t bytes(const char *text)
{
	struct guarantee g;
	const char *why;

	return guarantee_parse(text, &g, &why) ? -1 : (int64_t)guarantee_resolve(&g, 100ULL << 40);
}

/* tests/sizes.txt has lines of "TEXT" MEANING, which the controller is held to as well. */
static void the_table(void)
{
	static const uint64_t ram = 100ULL << 40;
	char line[256];
	unsigned int lines = 0;
	FILE *f = fopen("tests/sizes.txt", "r");

	while (f && fgets(line, sizeof(line), f)) {
		char *end = strrchr(line, '"'), *tab;
		char kind[16] = "";
		int64_t want = -1;

		if (*line == '#')
			continue;
		lines++;
		*end = '\0';
		tab = strstr(line, "\\t");
		if (tab) {
			*tab = '\t';
			memmove(tab + 1, tab + 2, strlen(tab + 2) + 1);
		}
		if (sscanf(end + 1, " %15s %ld", kind, &want) == 2 && !strcmp(kind, "percent"))
			want = (int64_t)(ram / 100) * want;
		else if (!strcmp(kind, "all"))
			want = (int64_t)ram;
		if (bytes(line + 1) != want) {
			fprintf(stderr, "'%s' is %lld, and not %lld\n", line + 1, (long long)bytes(line + 1), (long long)want);
			check_failures++;
		}
	}
	CHECK(lines > 50);
	if (f)
		fclose(f);
}

static void clear(void)
{
	unsetenv("RAMLOCK_GUARANTEE");
	unsetenv("RAMLOCK_ORDER");
	unsetenv("RAMLOCK_PREFAULT");
	unsetenv("RAMLOCK_HOLD_BUDGET");
	unsetenv("RAMLOCK_THREADS");
	unsetenv("RAMLOCK_FOLLOW_DISCARDS");
	unsetenv("RAMLOCK_MONITOR");
	unsetenv("RAMLOCK_HOST_RESERVE");
	unsetenv("RAMLOCK_SOCKET");
	unsetenv("RAMLOCK_ALLOW_UID");
	warnings[0] = '\0';
}

static void an_empty_environment_asks_for_nothing(void)
{
	struct config c;

	clear();
	config_from_environment(&c, note);
	CHECK_EQ(guarantee_resolve(&c.guarantee, 1 << 30), 0);
	CHECK_EQ(c.order, ORDER_RESIDENT);
	CHECK(c.prefault);
	CHECK_EQ(c.hold_budget_us, 0);
	CHECK_EQ(c.host_reserve, 0);
	CHECK_EQ(c.threads, 0);
	CHECK_EQ(c.socket[0], 0);
	CHECK(!c.has_allow_uid);
	CHECK_EQ(c.owner, getuid());
	CHECK_EQ(warnings[0], 0);
}

static void the_environment_is_understood(void)
{
	struct config c;

	clear();
	setenv("RAMLOCK_GUARANTEE", "1G", 1);
	setenv("RAMLOCK_ORDER", "address", 1);
	setenv("RAMLOCK_PREFAULT", "0", 1);
	setenv("RAMLOCK_HOLD_BUDGET", "250", 1);
	setenv("RAMLOCK_THREADS", "16", 1);
	setenv("RAMLOCK_FOLLOW_DISCARDS", "1", 1);
	setenv("RAMLOCK_MONITOR", "1", 1);
	setenv("RAMLOCK_HOST_RESERVE", "2G", 1);
	setenv("RAMLOCK_SOCKET", "/run/x.sock", 1);
	setenv("RAMLOCK_ALLOW_UID", "1000", 1);
	config_from_environment(&c, note);
	CHECK_EQ(guarantee_resolve(&c.guarantee, 0), 1 << 30);
	CHECK_EQ(c.host_reserve, 2LL << 30);
	CHECK(c.follow_discards);
	CHECK(c.monitor);
	CHECK_EQ(c.order, ORDER_ADDRESS);
	CHECK(!c.prefault);
	CHECK_EQ(c.hold_budget_us, 250);
	CHECK_EQ(c.threads, 16);
	CHECK(!strcmp(c.socket, "/run/x.sock"));
	CHECK(c.has_allow_uid && c.allow_uid == 1000);
	CHECK_EQ(warnings[0], 0);
}

static void mistakes_are_told_and_left_out(void)
{
	char path[200];
	struct config c;

	clear();
	memset(path, 'x', sizeof(path) - 1);
	path[0] = '/';
	path[sizeof(path) - 1] = '\0';
	setenv("RAMLOCK_GUARANTEE", "lots", 1);
	setenv("RAMLOCK_ORDER", "random", 1);
	setenv("RAMLOCK_PREFAULT", "yes", 1);
	setenv("RAMLOCK_HOLD_BUDGET", "49", 1);
	setenv("RAMLOCK_THREADS", "17", 1);
	setenv("RAMLOCK_FOLLOW_DISCARDS", "yes", 1);
	setenv("RAMLOCK_MONITOR", "yes", 1);
	setenv("RAMLOCK_HOST_RESERVE", "50%", 1);
	setenv("RAMLOCK_SOCKET", path, 1);
	setenv("RAMLOCK_ALLOW_UID", "-1", 1);
	config_from_environment(&c, note);
	CHECK_EQ(guarantee_resolve(&c.guarantee, 1 << 30), 0);
	CHECK(c.prefault);
	CHECK_EQ(c.hold_budget_us, 0);
	CHECK_EQ(c.threads, 0);
	CHECK_EQ(c.socket[0], 0);
	CHECK(!c.has_allow_uid);
	CHECK_CONTAINS(warnings, "RAMLOCK_GUARANTEE: 'lots' is not a size");
	CHECK_CONTAINS(warnings, "RAMLOCK_ORDER");
	CHECK_CONTAINS(warnings, "RAMLOCK_PREFAULT");
	CHECK_CONTAINS(warnings, "RAMLOCK_HOLD_BUDGET");
	CHECK_CONTAINS(warnings, "RAMLOCK_THREADS");
	CHECK(!c.follow_discards);
	CHECK(!c.monitor);
	CHECK_CONTAINS(warnings, "RAMLOCK_FOLLOW_DISCARDS");
	CHECK_CONTAINS(warnings, "RAMLOCK_MONITOR");
	CHECK_CONTAINS(warnings, "RAMLOCK_HOST_RESERVE");
	CHECK_CONTAINS(warnings, "RAMLOCK_SOCKET");
	CHECK_CONTAINS(warnings, "RAMLOCK_ALLOW_UID");
	clear();
	setenv("RAMLOCK_SOCKET", "relative", 1);
	config_from_environment(&c, note);
	CHECK_EQ(c.socket[0], 0);
}

CHECK_MAIN(CASE(the_table), CASE(an_empty_environment_asks_for_nothing),
	   CASE(the_environment_is_understood), CASE(mistakes_are_told_and_left_out))
