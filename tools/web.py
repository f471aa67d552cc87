"""Serve a page for the browser: ``python tools/web.py``, or ``make web``; see docs/web.md."""

import sys

from sgm.web.main import main

if __name__ == "__main__":
    sys.exit(main())
