"""Many devices: one mesh of processes, and what lies where on it."""

from fnn._ranks import is_main as is_main
from fnn.distributed._init import init as init
