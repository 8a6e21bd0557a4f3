"""Run the JAX side of docs/from_jax.md, in the environment of `make peers`; tests/test_docs.py runs the other side."""

import re
import textwrap
from pathlib import Path

page = (Path(__file__).parents[2] / "docs" / "from_jax.md").read_text()
names: dict = {}
for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL):
    exec(compile(textwrap.dedent(block), "docs/from_jax.md", "exec"), names)
print("the JAX side of docs/from_jax.md runs")
