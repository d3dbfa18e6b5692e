"""The teacher is called as the student was: sample and time are found in the student's call, and the rest is repeated."""

import pytest
import torch
from dit_models import DiT, make_batch, seen
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


def test_a_condition_given_to_align_is_used_and_must_be_the_students(batch):
    x0, noise, t, y = batch
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS))
    align.model(*seen(batch))
    with pytest.raises(
        ValueError, match=r"must be called as the student was. Received: y: shape \(4,\) \[.* after label dropout"
    ):
        align(x0, noise, t, (y + 1) % 10)
    align.model(*seen(batch))
    with pytest.raises(
        ValueError, match=r"in the order of the model's call, or none of it. Received: 2 tensors for 1 of the call"
    ):
        align(x0, noise, t, y, y)
    align.model(*seen(batch))
    align(x0, noise, t, y)


def test_another_time_than_the_students(batch):
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS))
    x_t, t, y = seen(batch)
    align.model(x_t, t / 7, y)
    with pytest.raises(ValueError, match=r"the x0, noise and t of align\(\). Received: not .* t: as it is, in thousandths"):
        align(*batch)


def test_another_sample_is_warned_of_once(batch):
    """As of a path whose time runs the other way."""
    align = SelfAlignment(DiT(), selfalign.SRALoss(**LOSS, path=selfalign.paths.Linear(noise_at=0.0)))
    align.model(*seen(batch))
    with pytest.warns(
        UserWarning, match=r"the sample that the model saw. Received: x shape .* not path.add_noise.* direction of time"
    ):
        align(*batch)
    align.model(*seen(batch))
    align(*batch)


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
        with pytest.raises(
            ValueError, match=r"not exactly one argument like x_t.*If your call arranges them otherwise, pass call="
        ):
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
    with pytest.raises(ValueError, match=r"same shape \[B, N, D\]. Received: student \(2, 16, 16\), teacher \(2, 16, 32\)"):
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
    align._tap.take = lambda select: taken.append(take(select)) or taken[-1]
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
