"""Matrix products, softmax and cross-entropy: each call takes the fastest kernel by a fixed rule.

The rule looks at the device, the processor or card, the dtype and the sizes, never at a clock, so the same call
computes the same bits in every run. `use` overrides it, `explain` says what it chose.
"""

from fnn.ops._collectives import all_gather as all_gather
from fnn.ops._collectives import all_reduce as all_reduce
from fnn.ops._collectives import average_gradient as average_gradient
from fnn.ops._collectives import reduce_scatter as reduce_scatter
from fnn.ops._explain import explain as explain
from fnn.ops._functions import cross_entropy as cross_entropy
from fnn.ops._functions import linear as linear
from fnn.ops._functions import linear_cross_entropy as linear_cross_entropy
from fnn.ops._functions import log_softmax as log_softmax
from fnn.ops._functions import matmul as matmul
from fnn.ops._functions import softmax as softmax
from fnn.ops._sharded_leaf import ShardedLeaf as ShardedLeaf
from fnn.ops._synchronised import synchronised as synchronised
from fnn.ops._use import use as use
