"""Run the first block of Python in a README that is not an interactive session."""

import re
import sys
from pathlib import Path

blocks = re.findall(r"^```python\n(.*?)^```", Path(sys.argv[1]).read_text(), re.MULTILINE | re.DOTALL)
exec(compile(next(block for block in blocks if ">>>" not in block), sys.argv[1], "exec"))  # noqa: S102  the README of this repository
