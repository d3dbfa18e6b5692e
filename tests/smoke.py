"""The README's loop as a user would paste it: `make smoke` runs it against the installed wheel."""

from pathlib import Path

import torch
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x * (1 - t[:, None, None])
        for block in self.blocks:
            x = x + block(x)
        return x


root = Path(selfalign.__file__).parent
if "site-packages" not in str(root):
    raise SystemExit(
        f"The wheel must be under test. Received: selfalign from {root}. Run this from another "
        "directory."
    )
if not (root / "py.typed").exists():
    raise SystemExit(
        f"The wheel must hold py.typed. Received: none in {root}. See package-data in "
        "pyproject.toml."
    )

torch.manual_seed(0)
model = Model()
align = SelfAlignment(model, selfalign.SRALoss(student_layer=1, teacher_layer=3))
optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()], lr=1e-2)
terms = []
for _ in range(30):
    x0, noise, t = torch.randn(16, 5, 8), torch.randn(16, 5, 8), torch.rand(16)
    prediction = model(align.path.add_noise(x0, noise, t), t)
    term = align(x0, noise, t)
    (nn.functional.mse_loss(prediction, align.path.velocity(x0, noise, t)) + term).backward()
    optimizer.step()
    optimizer.zero_grad()
    align.update()
    terms.append(term.item())
if not terms[-1] < terms[0]:
    raise SystemExit(
        f"The term must fall in training. Received: {terms[0]} at first, {terms[-1]} at last."
    )
fall = f"the term fell from {terms[0]:.3f} to {terms[-1]:.3f}"
print(f"selfalign {selfalign.__version__} from the wheel: {fall}")
