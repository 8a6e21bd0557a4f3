"""Training: a state that owns its memory, one compiled step, and the loop around it."""

from fnn.train._callback import Callback as Callback
from fnn.train._callback import Run as Run
from fnn.train._device import device as device
from fnn.train._early_stopping import EarlyStopping as EarlyStopping
from fnn.train._eval import evaluate as evaluate
from fnn.train._eval import make_eval as make_eval
from fnn.train._fit import NonFiniteError as NonFiniteError
from fnn.train._fit import fit as fit
from fnn.train._history import History as History
from fnn.train._kfold import KFold as KFold
from fnn.train._progress import Progress as Progress
from fnn.train._state import TrainState as TrainState
from fnn.train._step import Step as Step
from fnn.train._step import make_step as make_step
from fnn.train._step import pure_step as pure_step
from fnn.train._tensorboard import TensorBoard as TensorBoard
