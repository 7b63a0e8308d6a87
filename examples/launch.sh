#!/bin/sh
# Launches a VM named web-1 with 256 MiB of its memory guaranteed; more arguments of QEMU may follow.
# SPDX-License-Identifier: GPL-2.0-or-later
#
# ramlock becomes QEMU: the process id stays, so service managers and shells see QEMU itself. Afterwards:
#     ramlock set 1G --vm web-1
#     ramlock status --vm web-1
exec ramlock run --guarantee 256M -- qemu-system-x86_64 -name web-1 "$@"
