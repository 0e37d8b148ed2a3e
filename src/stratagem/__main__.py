"""`python -m stratagem` is `stratagem`."""

import sys

from stratagem.cli import main

sys.exit(main())
