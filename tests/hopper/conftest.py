"""These tests compile kernels for a GPU, which the interpreter's process cannot."""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
