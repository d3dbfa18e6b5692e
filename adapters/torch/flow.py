"""What a sample runs through in a model, what runs after what, and in which order tokens are."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from selfalign.adapting import invalid

from .arguments import mapped, tensors_by_place
from .blocks import block_lists
from .probing import Probe, another_sample
from .repeating import kept_as_it_was
from .replaying import Outputs
from .tokens import Output, TokenReader

Run = Callable[[list[str], torch.Tensor], Outputs]  # paths of blocks, a sample -> their outputs


class Flow:
    """Looks at forwards of whole samples.

    Args:
        module: the model, or its teacher.
        blocks: paths of the modules in which tokens may mix.
        probe: a probe of blocks, by their readers.
        run: a forward.
        x: samples as the model sees them.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[str],
        probe: Callable[[Iterable[TokenReader]], Probe],
        run: Run,
        x: torch.Tensor,
    ) -> None:
        self.module = module
        self.blocks = blocks
        self.probe = probe
        self.run = run
        self.x = x

    def reads(self, reader: TokenReader) -> bool:
        """Whether a block's tokens depend on the sample, once all blocks run."""
        outputs = [self._once(reader.where, x) for x in (self.x, another_sample(self.x))]
        some, others = map(reader.features, outputs)
        return any(not torch.equal(some[place], others[place]) for place in some)

    def reads_at(self, where: str) -> bool:
        """The same by the block's path."""
        return self.reads(TokenReader(self.module, where, None, None))

    def follows(self, first: str, second: str) -> bool:
        """Whether what the second module gives depends on what the first one gives."""
        before = dict(tensors_by_place(self._once(second, self.x)))
        handle = self.module.get_submodule(first).register_forward_hook(_changed)
        try:
            after = dict(tensors_by_place(self._once(second, self.x)))
        finally:
            handle.remove()
        return any(not torch.equal(before[place], after[place]) for place in before)

    def check_in_a_row(self, student: str, target: str) -> None:
        """The target's module runs after the student's, on what that gave.

        Raises:
            ValueError: it does not: they run side by side, or in another order.
        """
        if student == target or self.follows(student, target):
            return
        instead = f"taps={(target, student)}, in the order in which they run"
        if not self.follows(target, student):
            found = self.instead(student)
            instead = found or "taps=, paths of two modules that run one after the other"
        raise invalid(
            "The target's module must run after the student's, on what that gave",
            f"{target}, which does not depend on {student}",
            f"Pass {instead}.",
        )

    def instead(self, where: str) -> str:
        """Options that name modules which the sample runs through, as they are written.

        The list that has a block at `where` is none of them.
        """
        lists = [path for path in self._lists() if not where.startswith(f"{path}.")]
        if lists:
            return " or ".join(f"blocks={path!r}" for path in lists)
        taps = self._taps()
        return f"taps=, paths of two modules, such as taps={taps}" if taps else ""

    def _lists(self) -> list[str]:
        """Paths of the block lists whose blocks have the sample's tokens, and run in a row."""
        ends = {}
        for path, blocks in block_lists(self.module).items():
            names = [name for name, block in blocks._modules.items() if block is not None]
            ends[path] = (f"{path}.{names[0]}", f"{path}.{names[-1]}")
        having = self._having([last for _, last in ends.values()])
        return [
            p for p, (first, last) in ends.items() if last in having and self.follows(first, last)
        ]

    def _taps(self) -> tuple[str, ...]:
        """Paths of two modules of one class that have the sample's tokens and run in a row.

        The first is a quarter of the way, the second two thirds. The commonest class that has such
        a pair decides; there may be none.
        """
        having = self._having(self.blocks)
        classes = {path: type(self.module.get_submodule(path)) for path in having}
        counts = collections.Counter(classes.values())
        for kind, count in counts.most_common():
            found = [path for path in having if classes[path] is kind]
            if count < 2:
                continue
            pair = found[count // 4], found[max(1, 2 * count // 3)]
            if having[pair[0]] == having[pair[1]] and self.follows(*pair):
                return pair
        return ()

    def _having(self, paths: Sequence[str]) -> dict[str, int]:
        """Of these modules those that have the sample's tokens, and their width."""
        probe = self.probe(readers_at(self.module, paths))
        widths = {}
        for reader in probe.readers:
            if probe.has_sample(reader):
                tensor = reader.features(probe.outputs[reader.where])[probe.stream(reader).place]
                widths[reader.where] = probe.stream(reader).reading(tensor).shape[-1]
        return widths

    def _once(self, where: str, x: torch.Tensor) -> Output:
        """What a module gives in a forward, which leaves nothing behind; None: it did not run."""
        with kept_as_it_was(self.module):
            return self.run([where], x).get(where)


def check_order(
    probe: Probe, student: TokenReader, target: TokenReader, others: Callable[[], list[str]]
) -> None:
    """Student and target must have their tokens in one order: each spot shows at one of them.

    Args:
        probe: of both.
        student, target: the sides.
        others: gives paths of blocks that have the student's order.

    Raises:
        ValueError: a spot shows at another token.
    """
    if not (probe.changes(student) and probe.changes(target)):
        return  # latents have no order
    mine, theirs = (probe.peaks(reader) for reader in (student, target))
    for here, there in zip(mine, theirs, strict=True):
        if here is not None and there is not None and here != there:
            example = (student.where, *others()[:1])
            raise invalid(
                "Student and target must have the sample's tokens in one order",
                f"token {here} of {student.where}, which is token {there} of {target.where}",
                f"Tap two blocks alike, such as taps={example}, in place of blocks= or layers.",
            )


def same_order(probe: Probe, student: TokenReader) -> list[str]:
    """Paths of the other blocks whose tokens lie as the student's do."""
    mine = probe.peaks(student)
    readers = [reader for reader in probe.readers if reader is not student]
    return [r.where for r in readers if probe.has_sample(r) and probe.peaks(r) == mine]


def readers_at(module: nn.Module, paths: Iterable[str]) -> list[TokenReader]:
    """Readers of the modules at these paths."""
    return [TokenReader(module, path, None, None) for path in paths]


def _changed(module: nn.Module, args: Any, output: Output) -> Output:
    """Another output of the same form."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 0.5 + 1.0 if tensor.is_floating_point() else tensor

    return mapped(other, output)
