"""The teacher is called as the student was: sample and time are found in the student's call, and the rest is repeated."""

import pytest
import torch
from dit_models import Block, DiT, make_batch, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment

LOSS = {"student_layer": 2, "teacher_layer": 4}
LINEAR = {"as it is": lambda t: t, "thousandths": lambda t: 1000 * t, "reversed": lambda t: 1 - t,
          "reversed thousandths": lambda t: 1000 - 1000 * t}  # fmt: skip


class Recorder(DiT):
    """Any way of being called; keeps what the teacher got."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def forward(self, hidden_states, timestep=None, class_labels=None, prompt=None, return_dict=True):
        self.calls.append((hidden_states, timestep, class_labels, prompt, return_dict))
        return super().forward(hidden_states.float(), timestep.float().flatten() / 1000, class_labels)


HALF = torch.full((4,), 0.5)
WAYS = ["position", "name", "another order", "column", "whole numbers", "half precision"]


@pytest.mark.parametrize(
    ("unit", "how"), [(u, how) for u in LINEAR for how in WAYS if how != "whole numbers" or u.endswith("thousandths")]
)
def test_the_students_call_is_repeated(unit, how, batch):
    torch.manual_seed(3)
    align = SelfAlignment(Recorder(), selfalign.SRALoss(**LOSS))
    x0, noise, t, y = batch
    tell, u, prompt = LINEAR[unit], torch.rand(4), torch.randn(4, 3, 7)
    x_t, time = align.path.add_noise(x0, noise, t), tell(t)
    t_teacher = align.loss.teacher_time(t, u)
    expected = tell(t_teacher)
    if how == "position":
        align.model(x_t, time, y, prompt, False)
    elif how == "name":
        align.model(hidden_states=x_t, timestep=time, class_labels=y, prompt=prompt, return_dict=False)
    elif how == "another order":
        align.model(x_t, class_labels=y, return_dict=False, prompt=prompt, timestep=time)
    elif how == "column":
        align.model(x_t, time[:, None], y, prompt, False)
        expected = expected[:, None]
    elif how == "half precision":
        align.model(x_t.bfloat16(), time, y, prompt, False)
    else:
        align.model(x_t, time.long(), y, prompt, False)
        expected = expected.long()
    align(x0, noise, t, u=u)
    got = align.teacher.calls[-1]
    torch.testing.assert_close(got[0].float(), align.path.add_noise(x0, noise, t_teacher), rtol=0.02, atol=0.02)
    torch.testing.assert_close(got[1], expected)
    assert got[0].dtype == (torch.bfloat16 if how == "half precision" else torch.float32)
    assert (got[2] is y, got[3] is prompt, got[4]) == (True, True, False)


@pytest.mark.parametrize(
    ("path", "t", "tell"),
    [
        (selfalign.paths.resolve("discrete"), torch.tensor([3, 500, 999, 0]), lambda t: t),
        (selfalign.paths.resolve("discrete"), torch.tensor([3, 500, 999, 0]), lambda t: t.float()),
        (selfalign.paths.resolve("discrete"), torch.tensor([3, 500, 999, 0]), lambda t: t / 1000),
        (selfalign.paths.resolve("edm"), torch.tensor([0.01, 1.0, 30.0, 2.0]), lambda t: t),
        (selfalign.paths.resolve("edm"), torch.tensor([0.01, 1.0, 30.0, 2.0]), lambda t: t.log() / 4),
        (selfalign.paths.resolve("cosine"), torch.rand(4), lambda t: 1000 * t),
    ],
)
def test_other_paths(path, t, tell, batch):
    align = SelfAlignment(Recorder(), selfalign.SRALoss(**LOSS, path=path))
    x0, noise, _, y = batch
    u = torch.rand(4)
    align.model(path.add_noise(x0, noise, t), tell(t), y)
    align(x0, noise, t, u=u)
    torch.testing.assert_close(align.teacher.calls[-1][1], tell(align.loss.teacher_time(t, u)))


def test_a_label_that_equals_the_time_is_no_time(batch):
    align = SelfAlignment(Recorder(), selfalign.SRALoss(**LOSS, path="discrete"))
    x0, noise, _, _ = batch
    t = torch.tensor([5, 3, 7, 1])
    align.model(align.path.add_noise(x0, noise, t), t, t.clone())
    align(x0, noise, t, u=torch.full((4,), 0.9))
    assert torch.equal(align.teacher.calls[-1][2], t)
    assert (align.teacher.calls[-1][1] < t).all()


def test_a_condition_given_to_align_must_be_the_students_in_every_step(batch):
    x0, noise, t, y = batch
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS))
    for given in ({"y": y}, {}):
        align.model(*seen(batch))
        align(x0, noise, t, *([] if given else [y]), **given)
        align.model(*seen(batch))
        with pytest.raises(
            ValueError, match=r"called as the student was. Received: the condition\[0\]: shape \(4,\) .* label dropout"
        ):
            align(x0, noise, t, (y + 1) % 10)


def test_a_sample_that_the_loop_scales_is_refused(batch):
    """As EDM's preconditioning does: the teacher would see another scale."""
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS))
    x_t, t, y = seen(batch)
    align.model(x_t * torch.rand(4, 1, 1), t, y)
    with pytest.raises(ValueError, match=r"itself. Received: argument 0, a multiple of it. Attach to the model that scales it"):
        align(*batch)


@pytest.mark.filterwarnings("ignore:align.. must be given the sample")
def test_no_sample_at_all_is_no_multiple(batch):
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS))
    x_t, t, y = seen(batch)
    align.model(torch.zeros_like(x_t), t, y)
    assert align(*batch).item() > 0


def test_a_call_in_another_style_from_step_to_step(batch):
    align = SelfAlignment(Recorder(), selfalign.SRALoss(**LOSS))
    x_t, t, y = seen(batch)
    for call in (lambda m: m(x_t, t, y), lambda m: m(hidden_states=x_t, class_labels=y, timestep=t), lambda m: m(x_t, t, y)):
        call(align.model)
        align(*batch)
        assert align.teacher.calls[-1][2] is y


def test_unchecked_calls_are_repeated_all_the_same(batch):
    align = SelfAlignment(Recorder(), selfalign.SRALoss(**LOSS), check_condition=False)
    x_t, t, y = seen(batch)
    align.model(x_t, 1000 * t, y)
    align(*batch[:3], u=torch.zeros(4))
    assert torch.equal(align.teacher.calls[-1][1], 1000 * t)
    assert align.teacher.calls[-1][2] is y


def test_two_arguments_that_may_be_the_time_are_refused(batch):
    class Interval(DiT):
        def forward(self, x, t, t_end, y):
            return super().forward(x, t + t_end, y)

    align = SelfAlignment(Interval(), selfalign.SRALoss(**LOSS))
    x_t, t, y = seen(batch)
    align.model(x_t, t, t.clone(), y)
    with pytest.raises(ValueError, match=r"Received: 2 arguments like t \(as it is"):
        align(*batch[:3])


@pytest.mark.parametrize(("first", "tell"), [(0.0, LINEAR["thousandths"]), (0.5, LINEAR["reversed"])])
def test_a_first_batch_whose_times_tell_nothing(batch, first, tell):
    align = SelfAlignment(Recorder(), selfalign.SRALoss(**LOSS))
    x0, noise, t, y = batch
    for times in (torch.full((4,), first), t):
        align.model(align.path.add_noise(x0, noise, times), tell(times), y)
        align(x0, noise, times, u=HALF)
    torch.testing.assert_close(align.teacher.calls[-1][1], tell(align.loss.teacher_time(t, HALF)))


def test_whole_numbers_may_be_rounded(batch):
    align = SelfAlignment(Recorder(), selfalign.SRALoss(**LOSS))
    x_t, t, y = seen(batch)
    align.model(x_t, (1000 * t).round().long(), y)
    u = torch.rand(4)
    align(*batch[:3], u=u)
    assert torch.equal(align.teacher.calls[-1][1], (1000 * align.loss.teacher_time(t, u)).round().long())


def test_another_time_than_the_students(batch):
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS))
    x_t, t, y = seen(batch)
    align.model(x_t, t / 7, y)
    with pytest.raises(
        ValueError, match=r"the x0, noise and t of align\(\). Received: no arguments like t \(as it is, in thousandths"
    ):
        align(*batch)


def test_another_sample_is_warned_of_once(batch):
    """As of a path whose time runs the other way."""
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS, path=selfalign.paths.Linear(noise_at=0.0)))
    align.model(*seen(batch))
    with pytest.warns(
        UserWarning,
        match=r"the sample that the model saw. Received: argument 0 shape .* not path.add_noise.* direction of time",
    ):
        align(*batch)
    align.model(*seen(batch))
    assert align(*batch).item() > 0


def test_a_function_that_calls_otherwise_than_the_student_was(batch):
    x0, noise, t, y = batch
    x_t = selfalign.paths.Linear().add_noise(x0, noise, t)
    loss = selfalign.SRALoss(**LOSS)
    with SelfAlignment(model := Recorder(), loss, call=lambda m, x, t, y: m(x, t, y)) as align:
        model(x_t, 1000 * t, y)
        with pytest.raises(
            ValueError, match=r"as the student was. Received: timestep: shape \(4,\) \[.*for the teacher at the student"
        ):
            align(x0, noise, t, y)
    with SelfAlignment(model, loss, call=lambda m, x, t, y: m(x, 1000 * t, y)) as align:
        model(x_t, 1000 * t, y, {"text": [torch.ones(4)]})
        with pytest.raises(ValueError, match=r"Received: prompt\['text'\]\[0\]: shape \(4,\) .* for the student, nothing"):
            align(x0, noise, t, y)
    with SelfAlignment(model, loss, call=lambda m, x, t, y: m(x, 1000 * t, y), check_condition=False) as align:
        model(x_t, 1000 * t, y, torch.ones(4))
        assert align(x0, noise, t, y).item() > 0
    with SelfAlignment(model, loss, call=lambda m, x, t, y: m(x, 1000 * t, y)) as align:
        model(x_t, 1000 * t, y)
        assert align(x0, noise, t, y).item() > 0


def test_a_sample_inside_a_list_needs_a_function(batch):
    class Listed(DiT):
        def forward(self, x, t, y):
            return super().forward(torch.stack(x), t, y)

    x0, noise, t, y = batch
    x_t = selfalign.paths.Linear().add_noise(x0, noise, t)
    with SelfAlignment(model := Listed(), selfalign.SRALoss(**LOSS)) as align:
        model(list(x_t), t, y)
        with pytest.raises(ValueError, match=r"no arguments like x_t.*scales them otherwise, pass call="):
            align(x0, noise, t)
    with SelfAlignment(model, selfalign.SRALoss(**LOSS), call=lambda m, x, t, y: m(list(x), t, y)) as align:
        model(list(x_t), t, y)
        assert align(x0, noise, t, y).item() > 0


def test_features_on_a_grid_of_a_unet_of_diffusers():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    model = UNet2DModel(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, down_block_types=down, up_block_types=up)
    x0, noise, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randint(0, 1000, (2,))
    loss = selfalign.SRALoss(**LOSS, path="discrete")
    taps = {"student": "down_blocks.0.resnets.1", "teacher": "up_blocks.1.resnets.0"}
    with pytest.raises(ValueError, match=r"width of the tapped block must be known.*Pass width=D, or example="):
        SelfAlignment(model, loss, **taps)
    align = SelfAlignment(model, loss, **taps, example=(x0, t))
    assert next(iter(align.projector.parameters())).shape[0] == 16
    model(align.path.add_noise(x0, noise, t), t)
    align(x0, noise, t).backward()
    assert model.conv_in.weight.grad.abs().sum() > 0
    align.detach()
    align = SelfAlignment(model, loss, student="down_blocks.0", teacher="mid_block", width=16)
    model(align.path.add_noise(x0, noise, t), t)
    with pytest.raises(ValueError, match=r"width on one axis.* Received: mid_block: shape \(2, 32, 4, 4\), width 16. Pass"):
        align(x0, noise, t)


def test_features_in_space_and_time():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv3d(4, 4, 3, padding=1) for _ in range(4))

        def forward(self, x, t):
            for layer in self.layers:
                x = x + layer(x) * t.view(-1, 1, 1, 1, 1)
            return x

    x0, noise, t = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5), torch.rand(2)
    align = SelfAlignment(Video(), selfalign.SRALoss(**LOSS | {"teacher_layer": 3}), width=4)
    align.model(align.path.add_noise(x0, noise, t), t)
    align(x0, noise, t, loss_mask=torch.ones(2, 75)).backward()
    assert align.model.layers[0].weight.grad.abs().sum() > 0
    assert align.model.layers[2].weight.grad is None


def test_two_lists_in_a_row_are_numbered_through(batch):
    class Double(DiT):
        def __init__(self):
            super().__init__()
            self.double_blocks, self.single_blocks = self.blocks[:2], self.blocks[2:]
            self.other = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            blocks = list(self.blocks)
            del self.blocks
            self.order = lambda: blocks

        def forward(self, x, t, y):
            x, c = self.x_embedder(x), self.embed_time(t) + self.embed_label(y)
            for block in [*self.double_blocks, *self.single_blocks]:
                x = block(x, c)
            return self.final_layer(x)

    for options in ({}, {"blocks": ("double_blocks", "single_blocks")}):
        with SelfAlignment(model := Double(), selfalign.SRALoss(**LOSS), **options) as align:
            assert align.taps == ["double_blocks.1", "single_blocks.1"]
            model(*seen(batch))
            assert align(*batch).item() > 0


def test_a_block_at_several_places_is_refused():
    model = DiT()
    model.blocks[4] = model.blocks[1]
    with pytest.raises(
        ValueError, match=r"Blocks must be modules of their own. Received: one module at several places of 'blocks.0'"
    ):
        SelfAlignment(model, selfalign.SRALoss(**LOSS))


def test_ragged_text_in_front_of_lumina2s_tokens():
    """Each sample's tokens follow its own text at once, and padding comes last."""
    from diffusers_models import FAMILIES

    torch.manual_seed(0)
    family = FAMILIES["Lumina2Transformer2DModel"]
    model = family.build()
    x0, condition = family.batch(2)
    condition["encoder_attention_mask"][1, 4:] = False
    align = SelfAlignment(model, selfalign.SRALoss(**LOSS))
    outputs = []
    model.layers[1].register_forward_hook(lambda m, args, out: outputs.append(out))
    noise, t = torch.randn_like(x0), torch.rand(2)
    model(hidden_states=align.path.add_noise(x0, noise, t), timestep=1 - t, return_dict=False, **condition)
    taken, take = [], align._tap.take
    align._tap.take = lambda *a: taken.append(take(*a)) or taken[-1]
    align(x0, noise, t)
    assert torch.equal(taken[0][0], outputs[0][0, 7:23])
    assert torch.equal(taken[0][1], outputs[0][1, 4:20])


def test_gaps_are_new_in_every_call_and_the_same_in_a_resumed_run():
    draws = []

    def run(seed):
        torch.manual_seed(0)
        align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS), seed=seed)
        draws.clear()
        kept = type(align.loss).teacher_time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(align.loss), "teacher_time", lambda self, t, u: draws.append(u) or kept(self, t, u))
            for _ in range(2):
                batch = make_batch()
                align.model(*seen(batch))
                align(*batch)
        return torch.stack(draws)

    first = run(1)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def test_features_with_the_width_last_and_with_both_axes_alike():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x, t):
            for layer in self.layers:
                x = x + layer(x)
            return x

    for side, options in ((4, {}), (4, {"example": (torch.randn(2, 4, 4, 6), torch.rand(2))}), (6, {})):
        x0, noise, t = torch.randn(2, side, side, 6), torch.randn(2, side, side, 6), torch.rand(2)
        align = SelfAlignment(Last(), selfalign.SRALoss(**LOSS | {"teacher_layer": 3}), **options)
        assert next(iter(align.projector.parameters())).shape[0] == 6
        align.model(align.path.add_noise(x0, noise, t), t)
        if side == 4:
            align(x0, noise, t, loss_mask=torch.ones(2, 16)).backward()
        else:
            with pytest.raises(ValueError, match=r"width on one axis.* Received: layers.1: shape \(2, 6, 6, 6\)"):
                align(x0, noise, t)


def test_a_trunk_of_mixed_blocks_is_a_candidate():
    class Gated(Block):
        pass

    model = DiT()
    model.blocks = nn.ModuleList(kind(16) for kind in (Block, Gated, Block, Gated, Block, Gated))
    with SelfAlignment(model, selfalign.SRALoss(**LOSS)) as align:
        assert align.taps == ["blocks.1", "blocks.3"]
    model.context_refiner = nn.ModuleList(Block(16) for _ in range(4))
    with pytest.raises(ValueError, match=r"found 'blocks' \(6 x Block\), 'context_refiner' \(4 x Block\)"):
        SelfAlignment(model, selfalign.SRALoss(**LOSS))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_writing_in_place_after_the_tapped_block_changes_nothing(batch, compiled):
    class InPlace(DiT):
        def forward(self, x, t, y):
            x, c = self.x_embedder(x), self.embed_time(t) + self.embed_label(y)
            for block in self.blocks:
                x = block(x, c)
                x += 0.5
            return self.final_layer(x)

    loss = selfalign.SRALoss(student_layer=3, teacher_layer=3, allow_same_layer=True, max_gap=0.1)
    align = SelfAlignment(InPlace(), loss)
    align.projector.forward = lambda tokens: tokens
    run = torch.compile(align.model, backend="aot_eager") if compiled else align.model
    run(*seen(batch))
    assert align(*batch, u=torch.zeros(4)).item() < 1e-6  # the same input, layer and weights


def test_padding_in_pytorchs_own_encoder_layers():
    """Whose way of inference would drop padded tokens from the teacher's features."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4)

        def forward(self, x, t, padding):
            return self.encoder(x + t[:, None, None], src_key_padding_mask=padding)

    x0, noise, t = torch.randn(4, 5, 16), torch.randn(4, 5, 16), torch.rand(4)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    align = SelfAlignment(Encoder(), selfalign.SRALoss(**LOSS | {"teacher_layer": 3}))
    align.model(align.path.add_noise(x0, noise, t), t, padding)
    assert torch.isfinite(align(x0, noise, t, loss_mask=~padding))
    assert torch.backends.mha.get_fastpath_enabled()


def test_another_batch_where_nothing_is_compared(batch):
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS), check_condition=False)
    align.model(*seen(batch))
    align(*batch)
    align.model(*seen(batch))
    with pytest.raises(
        ValueError, match=r"student's batch. Received: x0 of shape \(2, 5, 4\), after a model's call with \(4, 5, 4\)"
    ):
        align(*(part[:2] for part in batch))


def test_tokens_without_text_where_text_should_be_in_front():
    """Lumina2's refiner has blocks of the trunk's class, before text joins."""
    from diffusers_models import FAMILIES

    family = FAMILIES["Lumina2Transformer2DModel"]
    model, (x0, condition) = family.build(), family.batch(2)
    align = SelfAlignment(model, selfalign.SRALoss(**LOSS), student="noise_refiner.0", teacher="layers.3")
    noise, t = torch.randn_like(x0), torch.rand(2)
    model(hidden_states=align.path.add_noise(x0, noise, t), timestep=1 - t, return_dict=False, **condition)
    with pytest.raises(
        ValueError, match=r"must be joined in the block's output. Received: 16 tokens for 16 of the sample. Pass"
    ):
        align(x0, noise, t)
