"""`python -m ramlock` is `ramlock`."""
# SPDX-License-Identifier: GPL-2.0-or-later

from ramlock.commands import main

if __name__ == "__main__":
    main()
