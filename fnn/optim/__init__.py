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

from fnn.optim._accumulate import AccumulateState as AccumulateState
from fnn.optim._accumulate import accumulate as accumulate
from fnn.optim._adadelta import ScaleByAdadeltaState as ScaleByAdadeltaState
from fnn.optim._adadelta import adadelta as adadelta
from fnn.optim._adadelta import scale_by_adadelta as scale_by_adadelta
from fnn.optim._adagrad import ScaleByAdagradState as ScaleByAdagradState
from fnn.optim._adagrad import adagrad as adagrad
from fnn.optim._adagrad import scale_by_adagrad as scale_by_adagrad
from fnn.optim._adam import ScaleByAdamState as ScaleByAdamState
from fnn.optim._adam import adam as adam
from fnn.optim._adam import adamw as adamw
from fnn.optim._adam import scale_by_adam as scale_by_adam
from fnn.optim._adamax import ScaleByAdamaxState as ScaleByAdamaxState
from fnn.optim._adamax import adamax as adamax
from fnn.optim._adamax import scale_by_adamax as scale_by_adamax
from fnn.optim._apply_if_finite import ApplyIfFiniteState as ApplyIfFiniteState
from fnn.optim._apply_if_finite import apply_if_finite as apply_if_finite
from fnn.optim._by_label import by_label as by_label
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
from fnn.optim._ema import EmaParamsState as EmaParamsState
from fnn.optim._ema import EmaState as EmaState
from fnn.optim._ema import ema as ema
from fnn.optim._ema import ema_params as ema_params
from fnn.optim._ema import eval_params as eval_params
from fnn.optim._hyper import Hyperparameter as Hyperparameter
from fnn.optim._hyper import Schedule as Schedule
from fnn.optim._hyper import Scheduled as Scheduled
from fnn.optim._hyper import get as get
from fnn.optim._hyper import set as set
from fnn.optim._lbfgs import ScaleByLbfgsState as ScaleByLbfgsState
from fnn.optim._lbfgs import lbfgs as lbfgs
from fnn.optim._lbfgs import scale_by_lbfgs as scale_by_lbfgs
from fnn.optim._learning_rate import ScaleByLearningRateState as ScaleByLearningRateState
from fnn.optim._learning_rate import scale_by_learning_rate as scale_by_learning_rate
from fnn.optim._line_search import strong_wolfe as strong_wolfe
from fnn.optim._lion import ScaleByLionState as ScaleByLionState
from fnn.optim._lion import lion as lion
from fnn.optim._lion import scale_by_lion as scale_by_lion
from fnn.optim._lookahead import LookaheadState as LookaheadState
from fnn.optim._lookahead import lookahead as lookahead
from fnn.optim._masked import freeze as freeze
from fnn.optim._masked import masked as masked
from fnn.optim._momentum import TraceState as TraceState
from fnn.optim._momentum import trace as trace
from fnn.optim._muon import ScaleByMuonState as ScaleByMuonState
from fnn.optim._muon import muon as muon
from fnn.optim._muon import scale_by_muon as scale_by_muon
from fnn.optim._nadam import ScaleByNadamState as ScaleByNadamState
from fnn.optim._nadam import nadam as nadam
from fnn.optim._nadam import scale_by_nadam as scale_by_nadam
from fnn.optim._radam import ScaleByRadamState as ScaleByRadamState
from fnn.optim._radam import radam as radam
from fnn.optim._radam import scale_by_radam as scale_by_radam
from fnn.optim._reduce_on_plateau import ReduceOnPlateauState as ReduceOnPlateauState
from fnn.optim._reduce_on_plateau import reduce_on_plateau as reduce_on_plateau
from fnn.optim._rmsprop import ScaleByRmsState as ScaleByRmsState
from fnn.optim._rmsprop import rmsprop as rmsprop
from fnn.optim._rmsprop import scale_by_rms as scale_by_rms
from fnn.optim._schedule_free import ScheduleFreeState as ScheduleFreeState
from fnn.optim._schedule_free import schedule_free as schedule_free
from fnn.optim._schedule_free import schedule_free_adamw as schedule_free_adamw
from fnn.optim._schedule_free import schedule_free_sgd as schedule_free_sgd
from fnn.optim._schedule_phases import join as join
from fnn.optim._schedule_phases import one_cycle as one_cycle
from fnn.optim._schedule_phases import warmup_cosine as warmup_cosine
from fnn.optim._schedules import constant as constant
from fnn.optim._schedules import cosine as cosine
from fnn.optim._schedules import exponential as exponential
from fnn.optim._schedules import linear as linear
from fnn.optim._schedules import polynomial as polynomial
from fnn.optim._schedules import step_decay as step_decay
from fnn.optim._sgd import sgd as sgd
from fnn.optim._trust_ratio import ScaleByTrustRatioState as ScaleByTrustRatioState
from fnn.optim._trust_ratio import lamb as lamb
from fnn.optim._trust_ratio import lars as lars
from fnn.optim._trust_ratio import scale_by_trust_ratio as scale_by_trust_ratio
