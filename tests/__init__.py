"""The test suite: Python units, the shim's C units, and real QEMUs."""

# SPDX-License-Identifier: GPL-2.0-or-later
