"""Run from the source folder: ``deepspeed hatnet-train …`` in packages/, ``deepspeed packages/hatnet-train …`` above.

The launcher calls ``python hatnet-train …``, and Python runs a folder by its ``__main__.py``. The package itself must
be installed.
"""

import sys

from hatnet_train.cli import train

sys.exit(train())
