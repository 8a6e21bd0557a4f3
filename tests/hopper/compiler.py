"""Compiles a Triton kernel for sm_90 without a GPU."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

SLACK = 0 if triton.__version__.startswith("3.7.") else 24
"""Bytes that may spill beside what a test allows: the tiles were chosen with Triton 3.7, and 3.9 spills up to these."""


def hopper(kernel, signature: dict[str, str], constants: dict[str, object], aligned=(), **options):
    """The compiled kernel; `.asm["ptx"]`, `.asm["cubin"]` and `.metadata` say what became of it.

    signature: each argument of the kernel in order to its type: "*bf16", "i32", "constexpr" or, for a block of a
    tensor that the copy engine reads, "tensordesc<bf16[128,64]>".
    constants: the values of the constexprs. aligned: names of the arguments that are divisible by 16.
    options: num_warps, num_stages, ...
    """
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_source(source, target=GPUTarget("cuda", 90, 32), options=options)
