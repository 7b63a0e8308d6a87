"""Tests of the controller; each file tests the module of its name."""
# SPDX-License-Identifier: GPL-2.0-or-later
