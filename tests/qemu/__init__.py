"""Tests against a real QEMU: nothing of it is mocked, and the kernel's own figures are the judge."""

# SPDX-License-Identifier: GPL-2.0-or-later
