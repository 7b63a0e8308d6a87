#!/bin/sh
# Sets the guarantee of a running VM without ramlock's command: set-over-socket.sh PID BYTES
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The shim speaks QMP. It answers what was sent before the end of input, then hangs up; -t lets socat wait for that.
set -eu
socket=/run/ramlock/$1.sock
printf '{"execute":"qmp_capabilities"}{"execute":"set_ram_minguarantee","arguments":{"size":%s}}' "$2" |
	socat -t 10 - "UNIX:$socket"
