"""Training: a state that owns its memory, one compiled step, and the loop around it."""

from fnn.train._callback import Callback as Callback
from fnn.train._callback import Run as Run
from fnn.train._checkpoint import Checkpointer as Checkpointer
from fnn.train._compile_cache import compile_cache as compile_cache
from fnn.train._device import device as device
from fnn.train._early_stopping import EarlyStopping as EarlyStopping
from fnn.train._eval import evaluate as evaluate
from fnn.train._eval import make_eval as make_eval
from fnn.train._fit import fit as fit
from fnn.train._history import History as History
from fnn.train._lr_finder import LRCurve as LRCurve
from fnn.train._lr_finder import find_lr as find_lr
from fnn.train._nonfinite import NonFiniteError as NonFiniteError
from fnn.train._plateau import ReduceOnPlateau as ReduceOnPlateau
from fnn.train._profile import Profile as Profile
from fnn.train._progress import Progress as Progress
from fnn.train._record import Record as Record
from fnn.train._state import TrainState as TrainState
from fnn.train._step import Step as Step
from fnn.train._step import make_step as make_step
from fnn.train._step import pure_step as pure_step
from fnn.train._strict import RecompileError as RecompileError
from fnn.train._tensorboard import TensorBoard as TensorBoard
from fnn.train._wandb import WandB as WandB
