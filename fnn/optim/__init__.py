"""Optimizers as pure functions on pytrees: `opt.init(params)`, `opt.update(grads, opt_state, params)`.

The whole state is tensors, hyper-parameters and step counts included, so one compiled step serves a whole
training run. Every optimizer is a short `chain` of the parts listed below.

Example:
    >>> import torch
    >>> from fnn import optim
    >>> opt = optim.adamw(optim.warmup_cosine(0.0, 1e-3, 100, 1000), weight_decay_mask=lambda path, leaf: leaf.ndim > 1)
    >>> params = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    >>> opt_state = opt.init(params)
    >>> grads = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    >>> updates, opt_state = opt.update(grads, opt_state, params)
    >>> params = optim.apply_updates(params, updates)
    >>> optim.get(opt_state, "lr")
    tensor(0.)
"""

from fnn.optim._adam import ScaleByAdamState as ScaleByAdamState
from fnn.optim._adam import scale_by_adam as scale_by_adam
from fnn.optim._chain import chain as chain
from fnn.optim._chain import identity as identity
from fnn.optim._clip import ClipByGlobalNormState as ClipByGlobalNormState
from fnn.optim._clip import ClipState as ClipState
from fnn.optim._clip import clip as clip
from fnn.optim._clip import clip_by_global_norm as clip_by_global_norm
from fnn.optim._clip import global_norm as global_norm
from fnn.optim._contract import GradientTransformation as GradientTransformation
from fnn.optim._contract import apply_updates as apply_updates
from fnn.optim._decay import AddDecayedWeightsState as AddDecayedWeightsState
from fnn.optim._decay import add_decayed_weights as add_decayed_weights
from fnn.optim._hyper import Hyperparameter as Hyperparameter
from fnn.optim._hyper import Schedule as Schedule
from fnn.optim._hyper import Scheduled as Scheduled
from fnn.optim._hyper import get as get
from fnn.optim._hyper import set as set
from fnn.optim._learning_rate import ScaleByLearningRateState as ScaleByLearningRateState
from fnn.optim._learning_rate import scale_by_learning_rate as scale_by_learning_rate
from fnn.optim._momentum import TraceState as TraceState
from fnn.optim._momentum import trace as trace
from fnn.optim._optimizers import adam as adam
from fnn.optim._optimizers import adamw as adamw
from fnn.optim._optimizers import sgd as sgd
from fnn.optim._schedules import constant as constant
from fnn.optim._schedules import cosine as cosine
from fnn.optim._schedules import linear as linear
from fnn.optim._schedules import warmup_cosine as warmup_cosine
