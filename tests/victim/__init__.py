"""Injection into small threaded programs of our own, which can look at themselves, and into a QEMU under storm."""
# SPDX-License-Identifier: GPL-2.0-or-later
