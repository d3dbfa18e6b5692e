"""What a user can do wrong is told in three sentences, not by an error from below."""

import weakref

import pytest
import torch
from dit_models import DiT, make_batch, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import EMATeacher, SelfAlignment

SRA = selfalign.SRALoss(student_layer=2, teacher_layer=4)


@pytest.mark.parametrize("model", [lambda x: x, DiT, [nn.Linear(1, 1)]])
def test_only_a_module_is_attached(model):
    message = r"model must be a torch.nn.Module, .* Received: .* Pass the module itself\."
    with pytest.raises(TypeError, match=message):
        SelfAlignment(model, SRA)


def test_lazy_modules_must_have_run():
    model = nn.Sequential(*(nn.LazyLinear(4) for _ in range(4)))
    with pytest.raises(ValueError, match=r"parameters must have values\. .* lazy .* Call the mod"):
        SelfAlignment(model, SRA)
    with torch.no_grad():
        model(torch.zeros(1, 2, 4))
    SelfAlignment(model, SRA)


def test_attaching_in_inference_mode_is_refused():
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"can be trained\. Received: torch.inf.*\. Attach outside"),
    ):
        SelfAlignment(DiT(), SRA)


def test_options_of_compile_are_torchs():
    with pytest.raises(TypeError, match=r"Received: 'foo'\. It has: backend, .*, mode, .*options"):
        SelfAlignment(DiT(), SRA, compile={"foo": 1})


@pytest.mark.parametrize("name", ["x0", "noise", "t"])
@pytest.mark.parametrize("spoil", [lambda value: None, lambda value: value.numpy()])
def test_samples_noise_and_times_are_tensors(name, spoil):
    batch = make_batch()
    model = DiT()
    align = SelfAlignment(model, SRA)
    model(*seen(batch))
    x0, noise, t, _ = batch
    given = {"x0": x0, "noise": noise, "t": t}
    given[name] = spoil(given[name])
    with pytest.raises(TypeError, match=rf"{name} must be a tensor\. Received: a .* Pass the x0"):
        align(**given)


class Attribute(DiT):
    def forward(self, x, t, y):
        return super().forward(x, t, self.label)


def test_a_condition_among_attributes_is_asked_for_as_an_argument():
    """The teacher was copied before it was set."""
    batch = make_batch()
    model = Attribute()
    align = SelfAlignment(model, SRA)
    model.label = batch[3]
    model(*seen(batch))
    message = (
        r"able to repeat the student's forward\. Received: AttributeError: .*label.*\. Give the "
        r"model what changes from call to call as arguments: .* pass call=\."
    )
    with pytest.raises(ValueError, match=message) as error:
        align(*batch)
    assert isinstance(error.value.__cause__, AttributeError)


class Attributes(dict):
    __getattr__ = dict.__getitem__


class Default(dict):
    __getattr__ = dict.get


@pytest.mark.parametrize("kind", [Attributes, Default])
def test_blocks_may_return_dicts_whose_entries_are_attributes(kind):
    class Block(nn.Linear):
        def forward(self, tokens):
            return kind(hidden=tokens + super().forward(tokens))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(4, 4) for _ in range(4))

        def forward(self, x, t):
            x = x + t[:, None, None]
            for block in self.blocks:
                x = block(x)["hidden"]
            return x

    model = Model()
    align = SelfAlignment(model, SRA)
    x0, noise, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.rand(3)
    model(align.path.add_noise(x0, noise, t), t)
    align(x0, noise, t).backward()
    assert model.blocks[0].weight.grad is not None


class Prompts(DiT):
    def forward(self, x, t, y, beside):
        if isinstance(beside, list):
            y = y + torch.tensor([len(prompt) for prompt in beside])
        else:
            x = x + beside
        return super().forward(x, t, y)


def test_a_fraction_of_a_batch_takes_its_prompts():
    batch = make_batch()
    model = Prompts()
    align = SelfAlignment(model, SRA, teacher=EMATeacher(batch_fraction=0.5))
    model(*seen(batch), ["", "a", "", "b"])
    assert align(*batch[:3]).isfinite()


def test_a_fraction_is_refused_where_something_is_as_long_as_the_batch():
    x0, noise, t, y = make_batch()
    beside = torch.randn(len(t), x0.shape[2])  # a number for each of as many tokens
    x0, noise = x0[:, :4], noise[:, :4]
    model = Prompts()
    align = SelfAlignment(model, SRA, teacher=EMATeacher(batch_fraction=0.5))
    model(align.path.add_noise(x0, noise, t), t, y, beside)
    message = r"do not depend on each other\. Received: RuntimeError: .* leave batch_fraction= out"
    with pytest.raises(ValueError, match=message):
        align(x0, noise, t)


# Advice that helps where it is followed


@pytest.mark.parametrize("taps", [("blocks.1", "blocks.1"), ("blocks.1", "again")])
def test_taps_are_two_modules(taps):
    model = DiT()
    model.again = model.blocks[1]
    message = r"taps= must name two modules, .* which are one\. Pass a later module as the second"
    with pytest.raises(ValueError, match=message):
        SelfAlignment(model, SRA, taps=taps)
    same = selfalign.SRALoss(student_layer=2, teacher_layer=2, allow_same_layer=True)
    assert SelfAlignment(model, same, taps=taps).taps == list(taps)


def test_a_parameter_of_another_shape_is_no_matter_of_sharding():
    batch = make_batch()
    model = DiT()
    align = SelfAlignment(model, SRA)
    first = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    first.weight = nn.Parameter(torch.randn(20, first.embedding_dim))
    model(*seen(batch))
    message = r"must keep the shapes .* Change the model first, then build SelfAlignment\."
    with pytest.raises(ValueError, match=message):
        align(*batch)


class Weak(DiT):
    """A copy's dictionary holds the student's blocks."""

    def __init__(self):
        super().__init__()
        self.steps = weakref.WeakValueDictionary(enumerate(self.blocks))

    def forward(self, x, t, y):
        blocks, self.blocks = self.blocks, nn.ModuleList(self.steps[n] for n in sorted(self.steps))
        try:
            return super().forward(x, t, y)
        finally:
            self.blocks = blocks


def test_blocks_behind_a_weak_dictionary_are_told_of():
    batch = make_batch()
    model = Weak()
    align = SelfAlignment(model, SRA)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"never ran\. .* of a weak dictionary, or of a cache"):
        align(*batch)


@pytest.mark.parametrize(
    "change",
    [lambda x, t, y: (x, 1000 * t, y), lambda x, t, y: (x - 0.5, t, y)],
)
def test_hooks_that_change_the_call_are_the_teachers_as_well(change):
    """align() is told what the caller passed; each side's hook changes it."""
    batch = make_batch()
    model = DiT()
    model.register_forward_pre_hook(lambda module, args: change(*args))
    align = SelfAlignment(model, SRA)
    model(*seen(batch))
    assert align(*batch).isfinite()


def test_tokens_may_be_masked_inside_a_block_behind_the_student():
    """So few that some samples keep all of theirs; the teacher sees all in any case."""

    class Block(nn.Linear):
        masks = False

        def forward(self, tokens):
            kept = torch.rand(*tokens.shape[:2], 1) > 0.05 * (self.masks and self.training)
            return tokens + super().forward(tokens * kept)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.blocks = nn.ModuleList(Block(8, 8) for _ in range(4))
            self.blocks[2].masks = True

        def forward(self, x, t):
            tokens = self.embed(x) + t[:, None, None]
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    torch.manual_seed(0)
    batch = torch.randn(4, 5, 4), torch.randn(4, 5, 4), torch.rand(4)
    model = Model()
    align = SelfAlignment(model, SRA)
    model(align.path.add_noise(*batch), batch[2])
    assert align(*batch).isfinite()
