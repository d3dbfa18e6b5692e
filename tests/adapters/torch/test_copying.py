"""A copy runs on its own weights, whatever holds the functions that reach them."""

import functools
import types
import weakref

import pytest
import torch
from dit_models import DiT, seen

from selfalign.adapters.torch import SelfAlignment


class Helper:
    """Holds a layer beside the model's modules."""

    def __init__(self, layer):
        self.layer = layer

    def add(self, module, args, output):
        return output + self.layer(output)


class Slots(Helper):
    __slots__ = ("layer",)


def adding(layer):
    return lambda output: output + layer(output)


def nested(layer):
    inner = adding(layer)
    return lambda module, args, output: inner(output)


def weights_in_a_list(held, module, args, output):
    return output + torch.nn.functional.linear(output, held[0]["weight"])


def by_reference(reference):
    return lambda module, args, output: output + reference().side(output)


def named(layer):
    def hook(module, args, output, *, held=layer):
        return output + held(output)

    return hook


def as_hook(make):
    def put(model):
        model.blocks[1].register_forward_hook(make(model))

    return put


def as_attribute(value, use):
    """An attribute of the second block, which a hook without closure uses."""

    def put(model):
        model.blocks[1].held = value(model)
        model.blocks[1].register_forward_hook(use)

    return put


def replace_forward(model):
    plain = model.blocks[1].forward
    layer = model.side

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return plain(*args, **kwargs) + layer(args[0])

    model.blocks[1].forward = forward


def replace_method(model):
    block = model.blocks[1]
    block.helper = Helper(model.side)

    def forward(self, x, c):
        return self.helper.add(self, (x, c), type(self).forward(self, x, c))

    block.forward = types.MethodType(forward, block)


WAYS = {
    "a closure in a closure": as_hook(lambda model: nested(model.side)),
    "weights in a list": as_hook(
        lambda model: functools.partial(weights_in_a_list, [{"weight": model.side.weight}])
    ),
    "a bound method": as_hook(lambda model: Helper(model.side).add),
    "an object with slots": as_hook(lambda model: Slots(model.side).add),
    "a keyword's default": as_hook(lambda model: named(model.side)),
    "a weak reference": as_hook(lambda model: by_reference(weakref.ref(model))),
    "a weak reference as attribute": as_attribute(
        weakref.ref, lambda module, args, output: output + module.held().side(output)
    ),
    "a function as attribute": as_attribute(
        lambda model: adding(model.side), lambda module, args, output: module.held(output)
    ),
    "functions in a list": as_attribute(
        lambda model: [adding(model.side)], lambda module, args, output: module.held[0](output)
    ),
    "functions in a dict": as_attribute(
        lambda model: {"add": (adding(model.side),)},
        lambda module, args, output: module.held["add"][0](output),
    ),
    "a layer's method as attribute": as_attribute(
        lambda model: model.side.forward,
        lambda module, args, output: output + module.held(output),
    ),
    "a forward that wraps": replace_forward,
    "a forward with a helper": replace_method,
}


def build(way):
    torch.manual_seed(0)
    model = DiT(depth=4)
    model.side = torch.nn.Linear(16, 16)
    WAYS[way](model)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_the_copy_is_the_model_made_anew_with_its_weights(loss, batch, way):
    """Also after the average has moved, which a copy of the copy would not see."""
    model = build(way)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    align(*batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for parameter in align.teacher.parameters():
            parameter.mul_(1.1)
    alone = build(way)
    alone.load_state_dict(align.teacher.state_dict())
    torch.testing.assert_close(align.teacher(*seen(batch)), alone.eval()(*seen(batch)))


def test_what_holds_nothing_stays_the_same_object(loss):
    model = DiT(depth=4)
    model.act = torch.nn.functional.gelu
    model.sizes = [16, 16]
    model.compiled = torch.compile(adding(2), backend="eager")
    teacher = SelfAlignment(model, loss).teacher
    assert teacher.act is model.act
    assert teacher.sizes == model.sizes
    assert teacher.compiled is model.compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_forward_is_refused(loss, batch):
    model = DiT(depth=4)
    block = model.blocks[1]
    block.forward = torch.compile(block.forward, backend="eager")
    message = (
        r"must not run functions that hold its weights: .* Received: blocks.1.forward, replaced "
        r"by Block.forward. .* compile a block by block.compile\(\)."
    )
    with pytest.raises(ValueError, match=message):
        SelfAlignment(model, loss)
    del block.forward
    block.compile(backend="eager")
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    assert align(*batch).item() > 0
