"""ramlock: a guaranteed amount of locked guest RAM for an unmodified QEMU, changed while the VM runs."""
# SPDX-License-Identifier: GPL-2.0-or-later

__version__ = "0.1.0"
