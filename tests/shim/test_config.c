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

	return guarantee_parse(text, &g, &why) ? -1 : (int64_t)guarantee_resolve(&g, 1ULL << 40);
}

static void sizes(void)
{
	CHECK_EQ(bytes("0"), 0);
	CHECK_EQ(bytes("1073741824"), 1 << 30);
	CHECK_EQ(bytes("512M"), 512 << 20);
	CHECK_EQ(bytes("512m"), 512 << 20);
	CHECK_EQ(bytes("2GiB"), 2LL << 30);
	CHECK_EQ(bytes("1.5G"), 3LL << 29);
	CHECK_EQ(bytes("1T"), 1LL << 40);
	CHECK_EQ(bytes("4K"), 4096);
	CHECK_EQ(bytes("50%"), 1LL << 39);
	CHECK_EQ(bytes("100%"), 1LL << 40);
	CHECK_EQ(bytes("12.5%"), 1LL << 37);
	CHECK_EQ(bytes("all"), 1LL << 40);
}

static void no_sizes(void)
{
	static const char *const bad[] = { "",	   "-1",    "abc",  "1GB",     "1 G",  "2048", "1.",   ".5G", "101%",
					   "1e30", "0x10M", "512MM", "9999999T", "1Gi", "inf",  "50%%", "all!",
					   "1000000000000000000000000000000",
					   "18446744073709551616E" };

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		if (bytes(bad[i]) != -1) {
			fprintf(stderr, "'%s' was taken for a size\n", bad[i]);
			check_failures++;
		}
}

static void clear(void)
{
	unsetenv("RAMLOCK_GUARANTEE");
	unsetenv("RAMLOCK_ORDER");
	unsetenv("RAMLOCK_PREFAULT");
	unsetenv("RAMLOCK_HOLD_BUDGET");
	unsetenv("RAMLOCK_THREADS");
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
	setenv("RAMLOCK_HOST_RESERVE", "2G", 1);
	setenv("RAMLOCK_SOCKET", "/run/x.sock", 1);
	setenv("RAMLOCK_ALLOW_UID", "1000", 1);
	config_from_environment(&c, note);
	CHECK_EQ(guarantee_resolve(&c.guarantee, 0), 1 << 30);
	CHECK_EQ(c.host_reserve, 2LL << 30);
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
	CHECK_CONTAINS(warnings, "RAMLOCK_HOST_RESERVE");
	CHECK_CONTAINS(warnings, "RAMLOCK_SOCKET");
	CHECK_CONTAINS(warnings, "RAMLOCK_ALLOW_UID");
	clear();
	setenv("RAMLOCK_SOCKET", "relative", 1);
	config_from_environment(&c, note);
	CHECK_EQ(c.socket[0], 0);
}

CHECK_MAIN(CASE(sizes), CASE(no_sizes), CASE(an_empty_environment_asks_for_nothing),
	   CASE(the_environment_is_understood), CASE(mistakes_are_told_and_left_out))
