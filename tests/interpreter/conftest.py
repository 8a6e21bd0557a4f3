"""These tests run Triton's kernels in its interpreter, in a process of their own with TRITON_INTERPRET=1."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
