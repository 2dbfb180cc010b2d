import types

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_good_as, assert_close

from disa_fast import onednn

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(7, 24), (3, 5, 24), (2, 1, 24), (2, 2, 3, 24), (0, 24)]


@pytest.fixture(autouse=True)
def untried():
    """What was found out about this PyTorch's operators is forgotten, before and after."""
    onednn._takes_unpacked.cache_clear()
    yield
    onednn._takes_unpacked.cache_clear()


@pytest.fixture
def counted(monkeypatch):
    """How often oneDNN's operators are called."""
    calls, operators = [], torch.ops.mkldnn

    class Counting:
        def __getattr__(self, name):
            return getattr(operators, name)

        @property
        def _linear_pointwise(self):
            calls.append("_linear_pointwise")
            return operators._linear_pointwise

    monkeypatch.setattr(torch.ops, "mkldnn", Counting())
    return calls


def layer(dtype, columns=40, bias=True, layout="contiguous"):
    weight = torch.randn(columns, 24)
    if layout == "transposed":
        weight = weight.T.contiguous().T
    elif layout == "strided":
        weight = torch.randn(columns, 48)[:, ::2]
    return weight.to(dtype), torch.randn(columns).to(dtype) if bias else None


def exact_linear(x, weight, bias):
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


# Linear layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_linear(dtype, shape, bias, layout):
    x, (weight, bias) = torch.randn(shape).to(dtype), layer(dtype, bias=bias, layout=layout)
    out = onednn.linear(x, weight, bias)
    assert (out.shape, out.dtype) == ((*shape[:-1], 40), dtype)
    if out.numel():
        assert_as_good_as(out, F.linear(x, weight, bias), exact_linear(x, weight, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_an_input_that_is_not_contiguous(dtype):
    weight, bias = layer(dtype)
    for x in (
        torch.randn(24, 7).T,
        torch.randn(3, 24, 5).transpose(1, 2),
        torch.randn(3, 9, 24)[:, ::2],
        torch.randn(3, 5, 48)[..., ::2],
    ):
        out = onednn.linear(x.to(dtype), weight, bias)
        assert_as_good_as(out, F.linear(x.to(dtype), weight, bias), exact_linear(x.to(dtype), weight, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_linear(dtype, shape):
    x, (weight, bias) = torch.randn(shape).to(dtype), layer(dtype)
    out = onednn.packed_linear(weight, bias)(x)
    assert (out.shape, out.dtype) == ((*shape[:-1], 40), dtype)
    if out.numel():
        assert_as_good_as(out, F.linear(x, weight, bias), exact_linear(x, weight, bias), dtype)


# Gated units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gated_linear(dtype, shape, bias, layout):
    x, gate, up = torch.randn(shape).to(dtype), layer(dtype, bias=bias, layout=layout), layer(dtype, bias=bias)
    out = onednn.gated_linear(x, gate, up)
    assert (out.shape, out.dtype) == ((*shape[:-1], 40), dtype)
    if out.numel():
        eager = F.gelu(F.linear(x, *gate)) * F.linear(x, *up)
        assert_as_good_as(out, eager, exact_gelu(exact_linear(x, *gate)) * exact_linear(x, *up), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_is_the_exact_one(dtype):
    """Not the tanh approximation, which is off by up to 5e-4; over a range that has its largest errors."""
    gate = torch.eye(1, 24, dtype=dtype), None
    up = torch.zeros(1, 24, dtype=dtype), torch.ones(1, dtype=dtype)
    x = F.pad(torch.linspace(-6, 6, 401, dtype=dtype)[:, None], [0, 23])
    out = onednn.gated_linear(x, gate, up)
    assert_close(out, exact_gelu(x[:, :1].double()), worst=1e-6 if dtype == torch.float32 else 1e-13)
    with pytest.raises(AssertionError, match="worst element"):
        assert_close(F.gelu(x[:, :1], approximate="tanh"), exact_gelu(x[:, :1].double()), worst=1e-6)


def test_the_gate_is_the_first_layer():
    """It is what the activation is of."""
    x, gate, up = torch.randn(7, 24), layer(torch.float32), layer(torch.float32)
    assert not torch.allclose(onednn.gated_linear(x, gate, up), onednn.gated_linear(x, up, gate), atol=0.1)


# Which code runs ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_onednn_runs_where_it_serves(counted):
    x, (weight, bias) = torch.randn(7, 24), layer(torch.float32)
    onednn.linear(x, weight, bias)
    assert len(counted) == 2  # one of them the trial
    onednn.gated_linear(x, (weight, bias), (weight, bias))
    assert len(counted) == 4
    counted.clear()
    onednn.linear(x, weight.T.contiguous().T, bias)
    onednn.linear(x.double(), weight.double(), bias.double())
    assert not counted
    with torch.device("meta"):
        x, weight, bias = torch.zeros(7, 24), torch.zeros(40, 24), torch.zeros(40)
        assert onednn.linear(x, weight, bias).shape == onednn.packed_linear(weight, bias)(x).shape == (7, 40)
    assert not counted


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_the_trial_is_independent_of_the_default_device():
    x, (weight, bias) = torch.randn(7, 24), layer(torch.float32)
    with torch.device("meta"):
        onednn.linear(x, weight, bias)
    assert onednn._takes_unpacked(torch.float32)


def refusing(*arguments):
    raise RuntimeError("could not create a primitive descriptor")


def wrong(x, other, weight, bias, what):
    return torch.zeros(len(x), len(weight), dtype=x.dtype)


class Namespace(types.SimpleNamespace):
    """torch.ops.mkldnn without what an instance has not; the check for bfloat16 is there."""

    _is_mkldnn_bf16_supported = staticmethod(lambda: True)


@pytest.mark.parametrize(
    "operators",
    [
        pytest.param(Namespace(), id="missing"),
        pytest.param(Namespace(_linear_pointwise=types.SimpleNamespace()), id="missing-overload"),
        pytest.param(Namespace(_linear_pointwise=types.SimpleNamespace(binary=refusing)), id="refusing"),
        pytest.param(Namespace(_linear_pointwise=types.SimpleNamespace(binary=wrong)), id="wrong"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_layers_where_the_operator_is_missing_refuses_or_is_wrong(monkeypatch, operators, dtype):
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    x, gate, up = torch.randn(3, 5, 24).to(dtype), layer(dtype), layer(dtype, bias=False)
    assert torch.equal(onednn.linear(x, *gate), F.linear(x, *gate))
    assert torch.equal(onednn.gated_linear(x, gate, up), F.gelu(F.linear(x, *gate)) * F.linear(x, *up))
