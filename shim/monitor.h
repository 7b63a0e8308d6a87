/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Commands of ours in QEMU's own monitor, the QMP server that QEMU's clients speak with. */
#ifndef RAMLOCK_MONITOR_H
#define RAMLOCK_MONITOR_H

#include <stdbool.h>

#include "qmp.h"

/* Looks up QEMU's symbols; @usable: bottom halves can be had. Calls nothing of QEMU. */
void monitor_init(bool usable);

/*
 * From now on @server is to run the commands, on QEMU's main thread; NULL: nobody any more, and none is running when this returns. The next monitor_settle() tells
 * QEMU. Any thread. Returns 0, -ENOSYS when this QEMU does not export its monitor, or -EEXIST when it was found to have such a command by itself.
 */
int monitor_want(const struct qmp_server *server);

/* Bottom half only, when the machine is complete: has QEMU's monitor know the commands if they are wanted, and else not. */
void monitor_settle(void);

/* Whether QEMU's monitor still has commands of ours. Any thread. */
bool monitor_is_offered(void);

/* "off", "waiting" (for the machine to be complete), "on", "not-exported" or "taken". */
const char *monitor_state(void);

#endif
