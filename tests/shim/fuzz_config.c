/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Any text as the settings that an injection brings, and as a SIZE. */
#include "config.h"
#include "fuzz.h"

#include <stdarg.h>

static void warn(const char *fmt, ...)
{
	char text[8192];
	va_list ap;

	va_start(ap, fmt);
	must(vsnprintf(text, sizeof(text), fmt, ap) > 0);
	va_end(ap);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	char *text = take_string(&bytes, &size);
	struct guarantee g;
	struct config c;
	const char *why = NULL;

	config_from_text(&c, text, warn);
	must(c.guarantee.kind != GUARANTEE_PERCENT || c.guarantee.value <= 1000000);
	must(!c.socket[0] || c.socket[0] == '/');
	must(c.threads <= THREADS_MAX && c.hold_budget_us <= HOLD_BUDGET_MAX_US);
	if (guarantee_parse(text, &g, &why))
		must(why != NULL);
	else
		must(guarantee_resolve(&g, UINT64_MAX) <= UINT64_MAX / (g.kind == GUARANTEE_BYTES ? 2 : 1));
	free(text);
	return 0;
}
