"""Matrix products, softmax and cross-entropy in Triton, under every transform of `torch.func`, compiled or not.

Needs torch alone; Triton where it is to be used. Each function takes `backend="auto"`, which follows the tables
measured on the card and leaves the rest to the library, or `"triton"`, which always takes the Triton kernel on CUDA.
On the CPU both take the fastest library call (and, in a process with TRITON_INTERPRET=1, `"triton"` the interpreter).
"""

from triton_kernels._choice import Choice as Choice
from triton_kernels._functions import cross_entropy as cross_entropy
from triton_kernels._functions import explain as explain
from triton_kernels._functions import linear as linear
from triton_kernels._functions import linear_cross_entropy as linear_cross_entropy
from triton_kernels._functions import log_softmax as log_softmax
from triton_kernels._functions import matmul as matmul
from triton_kernels._functions import softmax as softmax
from triton_kernels._tables import load_table as load_table
