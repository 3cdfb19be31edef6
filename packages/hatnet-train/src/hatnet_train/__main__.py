"""``python -m hatnet_train`` and ``deepspeed --module hatnet_train`` are ``hatnet-train``."""

import sys

from hatnet_train.cli import train

sys.exit(train())
