"""``python -m hatnet_dense`` is ``hatnet-dense``."""

import sys

from hatnet_dense.cli import main

sys.exit(main())
