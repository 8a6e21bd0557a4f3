"""Loss functions: differentiable in every mode and order, under `vmap`, compiled or not.

Every loss takes `reduction` and `where`.

`reduction`: ``"mean"`` over all values (the default), ``"sum"``, or ``"none"`` for the values themselves.

`where`: a bool tensor of the shape of the values or of their leading dimensions, ``(batch,)`` for whole
examples. What it leaves out does not count: not in the sum, not in what a mean divides by, and its gradient is
zero whatever it holds, NaN included. So the padded rows of a last batch leave no trace. With nothing left the mean
is 0, with zero gradients.

Shapes must agree exactly; nothing is broadcast.
"""

from fnn.losses._classification import cross_entropy as cross_entropy
from fnn.losses._classification import nll as nll
from fnn.losses._elementwise import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from fnn.losses._elementwise import huber as huber
from fnn.losses._elementwise import kl_div as kl_div
from fnn.losses._elementwise import mae as mae
from fnn.losses._elementwise import mse as mse
from fnn.losses._penalties import l1_penalty as l1_penalty
from fnn.losses._penalties import l2_penalty as l2_penalty
