"""What the heads' parameters are watched for, at every call."""

import copy

import pytest
import torch
from torch import nn

from disa_fast import MLPHead
from disa_fast.errors import UnsupportedError
from disa_fast.heads import packing
from disa_fast.heads.mlp import MLPNet, MLPSpec


def new_net() -> MLPNet:
    torch.manual_seed(1)
    return MLPNet(MLPSpec(16, 32, 2, 32)).requires_grad_(False)


def in_place(net):
    net.input_proj.bias.add_(1)


def loaded(net):
    net.load_state_dict({name: tensor + 1 for name, tensor in net.state_dict().items()})


def replaced_parameter(net):
    net.input_proj.bias = nn.Parameter(net.input_proj.bias + 1)


def replaced_in_the_dictionary(net):
    net.input_proj._parameters["bias"] = net.input_proj.bias + 1


def replaced_module(net):
    net.res_blocks[1].mlp[2] = copy.deepcopy(net.res_blocks[1].mlp[2])


def replaced_block(net):
    net.res_blocks[0] = net._block(32).requires_grad_(False)


def other_memory(net):
    net.cond_embed.weight.data = net.cond_embed.weight.data + 1


def cast(net):
    net.to(torch.float64)


def read_as_another_dtype(net):
    """In the same memory."""
    net.input_proj.bias.data = net.input_proj.bias.data.view(torch.int32)


def tied(net):
    net.res_blocks[1].mlp[0].weight = net.res_blocks[0].mlp[0].weight


def of_inference_mode(net):
    with torch.inference_mode():
        made = net.input_proj.bias + 1
    net.input_proj.bias = nn.Parameter(made, requires_grad=False)


CHANGES = (in_place, loaded, replaced_parameter, replaced_in_the_dictionary, replaced_module, replaced_block, other_memory, cast)
CHANGES += (read_as_another_dtype, tied, of_inference_mode)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_seen(change):
    net = new_net()
    seen = packing._Seen(net)
    assert seen.is_still_so()
    change(net)
    assert not seen.is_still_so()
    assert packing._Seen(net).is_still_so()


def test_additions_are_seen():
    """To what was empty, and to what was not."""
    for module, add in (
        (nn.SiLU(), lambda m: m.register_buffer("mask", torch.ones(1))),
        (nn.Sequential(nn.Linear(2, 2)), lambda m: m.append(nn.Linear(2, 2))),
        (nn.Linear(2, 2, bias=False), lambda m: m.register_parameter("bias", nn.Parameter(torch.ones(2)))),
    ):
        seen = packing._Seen(module)
        assert seen.is_still_so()
        add(module)
        assert not seen.is_still_so()


def test_a_parameter_that_becomes_one_of_inference_mode_is_seen():
    with torch.inference_mode():
        net = new_net()
        seen = packing._Seen(net)
        assert seen.is_still_so()
        net.input_proj.bias.data = net.input_proj.bias + 1
    assert not seen.is_still_so()


@pytest.mark.parametrize(
    ("unread", "change"),
    [("versions", in_place), ("dtypes", read_as_another_dtype), ("addresses", other_memory), ("values", replaced_module)],
)
def test_what_is_not_read_is_not_seen(monkeypatch, unread, change):
    """So each of them is needed."""
    net = new_net()
    if unread in ("versions", "dtypes"):
        monkeypatch.setattr(packing, f"_{unread[:-1]}", lambda tensor: 0)
    elif unread == "addresses":
        monkeypatch.setattr(packing._Seen, "_numbers_now", lambda self: [*map(packing._version, self._versioned)])
    seen = packing._Seen(net)
    if unread == "values":
        monkeypatch.setattr(packing._Seen, "_values_now", lambda self: self._values)
    change(net)
    assert seen.is_still_so()


def test_a_module_of_another_structure_is_refused_at_every_call():
    net = new_net()
    head = MLPHead.from_module(net)
    head.hoisted(torch.float32)
    net.res_blocks.append(net._block(32))
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="depth"):
            head.hoisted(torch.float32)
