#!/bin/sh
# Gives a VM that runs already a guarantee, and takes it back when told to: inject-running.sh PID SIZE
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The VM was started without ramlock and is not restarted. Its main thread is away for about a millisecond, its vCPUs
# never. Doing it twice is no error: the second time the shim is found.
set -eu
pid=$1
size=$2

ramlock preflight --pid "$pid" # says what would stand in the way, and touches nothing
ramlock inject --pid "$pid" --guarantee "$size"
ramlock status --pid "$pid"

if [ -t 0 ]; then
	printf 'Press Enter to take the shim out again, Ctrl-C to leave it in. '
fi
if read -r _; then
	ramlock eject --pid "$pid"
fi
