"""The error function and its inverse, as XLA computes them: its coefficients, and its rounding where that shows.

Sources: Giles, "Approximating the erfinv function" (GPU Computing Gems, 2010), for the inverse; Cephes (Moshier) for
log(1 + x) in float64; the rational approximation of erf that Eigen and XLA share. `torch.erfinv` is up to 89 ulp from
XLA's, and 14 times slower compiled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fnn.random._rounding import multiply_add, to_single, with_derivatives


def _single(*values: float) -> list[float]:
    return torch.tensor(values, dtype=torch.float32, device="cpu").tolist()


# Giles' polynomials in w = -log(1 - x**2), highest power first. Single precision: in w - 2.5, and in sqrt(w) - 3 for
# the tails, w >= 5. The coefficients are float32 numbers.
_CENTRAL = _single(
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 2.1858087e-04, -1.25372503e-03, -4.17768164e-03,
    2.46640727e-01, 1.50140941,
)  # fmt: skip
_TAIL = _single(
    -2.00214257e-04, 1.00950558e-04, 1.34934322e-03, -3.67342844e-03, 5.73950773e-03, -7.6224613e-03, 9.43887047e-03,
    1.00167406, 2.83297682,
)  # fmt: skip

# Double precision: in w - 3.125 for w < 6.25, in sqrt(w) - 3.25 for w < 16, in sqrt(w) - 5 beyond.
_CENTRAL64 = (
    -3.6444120640178196996e-21, -1.685059138182016589e-19, 1.2858480715256400167e-18, 1.115787767802518096e-17,
    -1.333171662854620906e-16, 2.0972767875968561637e-17, 6.6376381343583238325e-15, -4.0545662729752068639e-14,
    -8.1519341976054721522e-14, 2.6335093153082322977e-12, -1.2975133253453532498e-11, -5.4154120542946279317e-11,
    1.051212273321532285e-09, -4.1126339803469836976e-09, -2.9070369957882005086e-08, 4.2347877827932403518e-07,
    -1.3654692000834678645e-06, -1.3882523362786468719e-05, 1.867342080340571352e-04, -7.4070253416626697512e-04,
    -6.0336708714301490533e-03, 2.4015818242558961693e-01, 1.6536545626831027356,
)  # fmt: skip
_TAIL64 = (
    2.2137376921775787049e-09, 9.0756561938885390979e-08, -2.7517406297064545428e-07, 1.8239629214389227755e-08,
    1.5027403968909827627e-06, -4.013867526981545969e-06, 2.9234449089955446044e-06, 1.2475304481671778723e-05,
    -4.7318229009055733981e-05, 6.8284851459573175448e-05, 2.4031110387097893999e-05, -3.550375203628474796e-04,
    9.5328937973738049703e-04, -1.6882755560235047313e-03, 2.4914420961078508066e-03, -3.7512085075692412107e-03,
    5.370914553590063617e-03, 1.0052589676941592334, 3.0838856104922207635,
)  # fmt: skip
_FAR_TAIL64 = (
    -2.7109920616438573243e-11, -2.5556418169965252055e-10, 1.5076572693500548083e-09, -3.7894654401267369937e-09,
    7.6157012080783393804e-09, -1.4960026627149240478e-08, 2.9147953450901080826e-08, -6.7711997758452339498e-08,
    2.2900482228026654717e-07, -9.9298272942317002539e-07, 4.5260625972231537039e-06, -1.9681778105531670567e-05,
    7.5995277030017761139e-05, -2.1503011930044477347e-04, -1.3871931833623122026e-04, 1.0103004648645343977,
    4.8499064014085844221,
)  # fmt: skip

# Cephes: log(1 + x) = x - x**2 / 2 + x**3 * P(x) / Q(x) for sqrt(1/2) - 1 < x < sqrt(2) - 1.
_LOG1P_P = (
    4.5270000862445199635215e-5, 4.9854102823193375972212e-1, 6.5787325942061044846969, 2.9911919328553073277375e1,
    6.0949667980987787057556e1, 5.7112963590585538103336e1, 2.0039553499201281259648e1,
)  # fmt: skip
_LOG1P_Q = (
    1.0, 1.5062909083469192043167e1, 8.3047565967967209469434e1, 2.2176239823732856465394e2,
    3.0909872225312059774938e2, 2.1642788614495947685003e2, 6.0118660497603843919306e1,
)  # fmt: skip

# erf(x) = x * P(x**2) / Q(x**2) in single precision, for x clamped to where erf rounds to 1.
_ERF_P = (
    2.2905065861350646e-04, 3.4082910107109506e-03, 5.0955695062380861e-02, 1.8520832239976145e-01, 1.128379143519084,
)  # fmt: skip
_ERF_Q = (
    -1.1791602954361697e-07, 2.3547966471313185e-05, 1.0179625278914885e-03, 1.4070470171167667e-02,
    1.1098505178285362e-01, 4.9746925110067538e-01, 1.0,
)  # fmt: skip
_ERF_LIMIT = 3.832506856900711


def erf(x: Tensor) -> Tensor:
    """The error function of float32 or float64 numbers, with the derivatives of `torch.erf`."""
    smooth = torch.erf(x)
    if x.dtype == torch.float64:
        return smooth
    x = x.detach().clamp(-_ERF_LIMIT, _ERF_LIMIT)
    square = x * x
    numerator, denominator = _rounded_polynomial(_ERF_P, square), _rounded_polynomial(_ERF_Q, square)
    quotient = (x * numerator).to(torch.float64) / denominator.to(torch.float64)
    return with_derivatives(to_single(quotient), smooth)


def erfinv(x: Tensor) -> Tensor:
    """The inverse error function of float32 or float64 numbers, |x| < 1, with the derivatives of its polynomials."""
    # That XLA rounds x**2 to the dtype of x moves results near |x| = 1 by up to 90 ulp, and is part of its definition.
    if x.dtype == torch.float32:
        w = -torch.log(1.0 - (x * x).to(torch.float64))
        value = torch.where(w < 5.0, _polynomial(_CENTRAL, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3.0))
        return value.to(torch.float32) * x
    w = -_log1p(-(x * x))
    root = torch.sqrt(w)
    tail = torch.where(w < 16.0, _polynomial(_TAIL64, root - 3.25), _polynomial(_FAR_TAIL64, root - 5.0))
    return torch.where(w < 6.25, _polynomial(_CENTRAL64, w - 3.125), tail) * x


def erfinv_closed(x: Tensor, differentiable: bool) -> Tensor:
    """`erfinv` for |x| <= 1; with the derivatives of `torch.erfinv` where it has to be differentiable."""
    end = x.detach()
    value = torch.where(end.abs() == 1.0, end * torch.inf, erfinv(end))
    return with_derivatives(value, torch.erfinv(x)) if differentiable else value


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total.mul_(x).add_(coefficient)
    return total


def _rounded_polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    # float32, each step rounded once.
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = multiply_add(total, x, torch.full_like(x, coefficient))
    return total


def _log1p(x: Tensor) -> Tensor:
    # For -1 < x <= 0. torch.log1p is the better function, up to 129 ulp away from this one.
    ratio = _polynomial(_LOG1P_P, x) / _polynomial(_LOG1P_Q, x)
    near = x + (x * (x * x) * ratio - 0.5 * (x * x))
    return torch.where(x > 1.0 - 2.0**0.5, near, torch.log(1.0 + x))
