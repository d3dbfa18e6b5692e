"""The SiT of the examples: the papers' sizes, and what the teacher computes of it."""

import sys
from pathlib import Path

import pytest
import torch
from dit_models import flops, take_first_step

import selfalign
from selfalign.adapters.torch import SelfAlignment

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))
from torch_sit import SiT


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "width", "depth", "prefix", "whole"),
    [
        ("B", 768, 12, 86_793_216, 130_500_112),
        ("L", 1024, 24, 304_852_992, 458_086_416),
        ("XL", 1152, 28, 481_195_008, 675_111_184),
    ],
)
def test_its_blocks_are_those_of_the_paper(size, width, depth, prefix, whole):
    """Parameters of SiT-*/2 on 32x32x4 latents: what the teacher runs, and the whole model."""
    with torch.device("meta"):
        blocks = SiT(32, 4, 1000, patch=2, width=width, depth=depth, heads=16).blocks
    counts = [count(block) for block in blocks]
    tokens = 256 * width + 17 * width
    labels = 1001 * width
    time = 256 * width + width + width**2 + width
    head = 2 * width**2 + 2 * width + 16 * width + 16
    _, teacher = selfalign.preset_layers(f"SiT-{size}/2")
    assert sum(counts[:teacher]) + tokens + labels + time == prefix
    assert sum(counts) + tokens + labels + time + head == whole


def test_the_teacher_runs_exactly_the_blocks_up_to_its_layer():
    model = SiT(8, 1, 10, patch=2, width=32, depth=6, heads=4)
    for p in model.parameters():  # gates at zero hide the condition, and the law looks on
        torch.nn.init.normal_(p, std=0.1)
    align = SelfAlignment(model, selfalign.SRALoss(student_layer=2, teacher_layer=4))
    x0 = torch.randn(4, 1, 8, 8)
    noise = torch.randn_like(x0)
    t = torch.rand(4)
    y = torch.randint(0, 10, (4,))
    take_first_step(align, (x0, noise, t, y))
    whole = flops(lambda: model(align.path.add_noise(x0, noise, t), t, y))
    counted = flops(lambda: align(x0, noise, t, y))
    tokens = torch.zeros(4, 16, 32)
    condition = torch.zeros(4, 32)
    teacher = align.teacher
    projector = flops(lambda: align.projector(tokens))
    after = flops(lambda: [block(tokens, condition) for block in teacher.blocks[4:]])
    head = flops(lambda: (teacher.modulation(condition), teacher.head(tokens)))
    assert counted - projector == whole - after - head
