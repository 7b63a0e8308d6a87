"""What is built for installing, installed and run."""
# SPDX-License-Identifier: GPL-2.0-or-later
