"""Networks as expressions of containers and blocks."""

from fnn.models._googlenet import GoogLeNetOutputs as GoogLeNetOutputs
from fnn.models._googlenet import googlenet as googlenet
from fnn.models._gpt import gpt as gpt
from fnn.models._lenet import lenet5 as lenet5
from fnn.models._mlp import mlp as mlp
from fnn.models._resnet import resnet18 as resnet18
from fnn.models._resnet import resnet50 as resnet50
from fnn.models._resnet_cifar import resnet20 as resnet20
from fnn.models._vgg import vgg11 as vgg11
from fnn.models._vgg import vgg16 as vgg16
from fnn.models._vit import vit as vit
