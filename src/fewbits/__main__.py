"""``python -m fewbits``."""

import sys

from fewbits.cli import main

sys.exit(main())
