"""``python -m hatnet_dense`` is ``hatnet-dense``."""

import sys

from hatnet_dense_cli import main

sys.exit(main())
