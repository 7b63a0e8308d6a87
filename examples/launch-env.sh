#!/bin/sh
# The same as launch.sh by environment alone: for launchers that can set variables but not the command.
# SPDX-License-Identifier: GPL-2.0-or-later
#
# RAMLOCK_SO names the shim. Only QEMU gets it: it takes itself out of the environment that QEMU's children see.
exec env LD_PRELOAD="${RAMLOCK_SO:-/usr/local/lib/ramlock/ramlock.so}" RAMLOCK_GUARANTEE=256M \
	qemu-system-x86_64 -name web-1 "$@"
