"""`features`: what the blocks give at each noise level, from a model that is left as it was."""

import pytest
import torch
from dit_models import (
    DiT,
    LabelEmbedder,
    TupleBlock,
    build_diffusers_dit,
    hooks_on,
    make_batch,
)

import selfalign
from selfalign import diagnostics
from selfalign.adapters.torch import SelfAlignment, features


def by_hand(model, x0, noise, y, time, path):
    """One forward per sample, with hooks of the test's own."""
    t = torch.full((len(x0),), time)
    x = path.add_noise(x0, noise, t)
    kept = []
    keep = lambda m, args, out: kept.append(out)  # noqa: E731
    handles = [block.register_forward_hook(keep) for block in model.blocks]
    model.eval()
    with torch.no_grad():
        for i in range(len(x0)):
            model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
    for handle in handles:
        handle.remove()
    depth = len(model.blocks)
    return [torch.cat(kept[layer::depth]) for layer in range(depth)]


@pytest.mark.parametrize("batch_size", [2, 3, 256])
@pytest.mark.parametrize("mean", [True, False])
def test_equals_hooks_by_hand(model, batch_size, mean):
    x0, noise, _, y = make_batch(5)
    found = features(model, x0, noise, y, times=[0.1, 0.5], batch_size=batch_size, mean=mean)
    assert list(found) == [0.1, 0.5]
    for time, layers in found.items():
        expected = by_hand(model, x0, noise, y, time, selfalign.paths.Linear())
        for got, wanted in zip(layers, expected, strict=True):
            torch.testing.assert_close(got, wanted.mean(1) if mean else wanted)


def test_conditions_by_name_a_call_and_another_path(model):
    x0, noise, _, y = make_batch(5)
    path = selfalign.paths.Discrete()
    adapt = lambda m, x, t, label: m(x, t / 1000, label)  # noqa: E731
    found = features(
        model, x0, noise, label=y, times=[300], path="discrete", call=adapt, batch_size=2
    )
    t = torch.full((5,), 300)
    kept = []
    handle = model.blocks[2].register_forward_hook(lambda m, args, out: kept.append(out))
    adapt(model.eval(), path.add_noise(x0, noise, t), t, y)
    handle.remove()
    torch.testing.assert_close(found[300][2], kept[0].mean(1).detach())


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    hooks = hooks_on(model)
    x0, noise, _, y = make_batch(3)
    state = torch.get_rng_state()
    found = features(model, x0, noise, y, times=[0.5])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(state, before)  # the batch was drawn: the comparison can fail
    assert [module.training for module in model.modules()] == modes
    assert hooks_on(model) == hooks
    assert not any(layer.requires_grad for layer in found[0.5])


def test_and_after_a_forward_that_fails(model):
    model.train()
    x0, noise, _, _ = make_batch(3)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        features(model, x0, noise, times=[0.5])
    assert model.training
    assert hooks_on(model) == 0


def test_labels_are_not_dropped():
    model = DiT(label_dropout=0.9)
    assert any(isinstance(m, LabelEmbedder) for m in model.modules())
    x0, noise, _, y = make_batch(4)
    first, second = (features(model, x0, noise, y, times=[0.5])[0.5][-1] for _ in range(2))
    assert torch.equal(first, second)


def test_between_the_steps_of_an_attached_model(loop, batch):
    """The run goes on as if nothing had been looked at."""
    twin = loop.twin()
    twin.align.load_state_dict(loop.align.state_dict())
    x0, noise, _, y = batch
    for _ in range(2):
        loop.step(batch)
        twin.step(batch)
        features(loop.model, x0, noise, y, times=[0.5])
        features(loop.align.teacher, x0, noise, y, times=[0.5])
    for mine, theirs in zip(loop.parameters, twin.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_tuples_and_models_of_diffusers():
    x0, noise, _, y = make_batch(3)
    assert features(DiT(block=TupleBlock), x0, noise, y, times=[0.5])[0.5][0].shape == (3, 16)
    model = build_diffusers_dit()
    side = model.config.sample_size
    x0 = torch.randn(3, model.config.in_channels, side, side)
    noise = torch.randn_like(x0)
    y = torch.tensor([1, 2, 3])
    adapt = lambda m, x, t, y: m(x, timestep=t * 1000, class_labels=y)  # noqa: E731
    found = features(model, x0, noise, y, times=[0.5], call=adapt, mean=False)
    assert [layer.shape for layer in found[0.5]] == [(3, 16, 32)] * 6


def test_the_finder_and_the_maps_take_them(model):
    x0, noise, _, y = make_batch(40, tokens=6)
    found = diagnostics.find_layers(features(model, x0, noise, y, times=[0.05, 0.5]), k=5)
    loss = selfalign.SRALoss(student_layer=found.student, teacher_layer=found.teacher)
    SelfAlignment(model, loss).detach()
    tokens = features(model, x0, noise, y, times=[0.05], mean=False)[0.05]
    assert diagnostics.pca_maps(tokens[2], (2, 3)).shape == (40, 2, 3, 3)


def test_a_block_that_does_not_run_once_is_refused():
    class Skipping(DiT):
        def forward(self, x, t, y):
            self.blocks[0](*self.embed(x, t, y))
            return x

    x0, noise, _, y = make_batch(3)
    rule = (
        r"^A block must run once per forward\. Received: 'blocks\.1', which ran 0 times\. Pass "
        r"blocks=, the list"
    )
    with pytest.raises(ValueError, match=rule):
        features(Skipping(), x0, noise, y, times=[0.5])


@pytest.mark.parametrize(
    ("times", "kind", "message"),
    [
        ([1.5], ValueError, r"t must lie in \[0, 1\]. Received: values from 1.5"),
        ([1], TypeError, "takes floating-point times. Received: t of dtype int64"),
    ],
)
def test_times_outside_the_path_are_refused(model, times, kind, message):
    x0, noise, _, y = make_batch(3)
    with pytest.raises(kind, match=message):
        features(model, x0, noise, y, times=times)


class Refined(DiT):
    """A refiner of the condition, which never sees the sample."""

    def __init__(self):
        super().__init__()
        self.refiner = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))

    def embed_label(self, y):
        tokens = super().embed_label(y)[:, None]
        for block in self.refiner:
            tokens = block(tokens)
        return tokens[:, 0]


def test_a_list_that_the_sample_does_not_run_through_is_refused():
    x0, noise, _, y = make_batch()
    message = (
        r"must be the sample's. Received: refiner.0, whose tokens do not depend on the sample. "
        r"Pass taps=, paths of two modules that the sample runs through."
    )
    with pytest.raises(ValueError, match=message):
        features(Refined(), x0, noise, y, times=[0.5], blocks="refiner")
