"""Many devices: one mesh of processes, and what lies where on it."""

from fnn._ranks import is_main as is_main
from fnn.distributed._fsdp import fsdp as fsdp
from fnn.distributed._init import init as init
from fnn.distributed._rules import fully_sharded as fully_sharded
from fnn.distributed._rules import replicated as replicated
from fnn.distributed._rules import tensor_parallel as tensor_parallel
from fnn.distributed._shard import shard as shard
