"""`python -m pysnap`."""

import sys

from pysnap.cli import main

sys.exit(main())
