"""The whole training step of the parts of every model in one graph, equal to the eager step.

A compiler takes its time by the number of layers; benchmarks/compile_models.py gives it the whole models. LeNet, and
with it the parts of an MLP, is compiled in test_step.py.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from fnn import losses, models, nn, optim, random, train, tree
from fnn.models import _googlenet, _resnet, _vgg

KEY = random.key(0)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
INCEPTION = nn.Sequential(
    _googlenet._conv(4, 3, stride=4), _googlenet._inception(2, 2, 3, 2, 3, 2), _googlenet._head(5, 0.7)
)
MODELS = {
    "vgg": (_vgg._vgg((1, 1, 1, 1, 1), 5, 0.5, 8), IMAGES),
    "googlenet": (INCEPTION, IMAGES),
    "resnet18": (_resnet._resnet(_resnet._basic, (1, 1), 1, 5, 4), IMAGES),
    "resnet50": (_resnet._resnet(_resnet._bottleneck, (2,), 4, 5, 4), IMAGES),
    "vit": (models.vit(5, 32, 8, 1, 2, 8, 16), IMAGES),
    "gpt": (models.gpt(11, 8, 1, 2, 8, dropout=0.1), TOKENS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_is_one_graph_and_the_eager_step(fast_compile, name):
    net, x = MODELS[name]
    labels = torch.tensor([1, 4]) if x is IMAGES else x
    params, state = net.init(KEY, x)

    def loss_fn(params, state, batch, key):
        outputs, state = net.apply(params, state, batch[0], key=key, train=True)
        return losses.cross_entropy(outputs.movedim(-1, 1), batch[1]), (state, {})

    optimizer = optim.sgd(0.01, momentum=0.9)
    after = {}
    counters.clear()
    for compile in (False, True):
        step = train.make_step(loss_fn, optimizer, compile=compile)
        train_state = train.TrainState.create(params, optimizer, KEY, state=state)
        for _ in range(2):
            train_state, metrics = step(train_state, (x, labels))
        after[compile] = {**tree.paths(train_state), **metrics}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(after[True], after[False], rtol=1e-4, atol=1e-5)
