"""Trains one model for three steps and compares all tokens with those taken by hand."""

from __future__ import annotations

import ast
import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from entry import Entry
from noise import GAP
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment

STEPS = 3
MESSAGES = 3  # that are followed at most
DECAY = 0.5
CLOSE = 2e-5  # of the tokens' standard deviation
WITHOUT = "without dropping"  # an answer: builds the model so
OPTIONS = ("select", "blocks", "taps", "width", "call")


class Found(NamedTuple):
    """What came out for one model.

    Attributes:
        name: of its class.
        outcome: "at once", "after one message", "refused", or what went wrong.
        options: those that the message asked for, as they were given.
        blocks: paths of the tapped blocks.
        tokens: of a sample: those that were aligned.
        student, teacher: largest difference from the tokens taken by hand, in standard deviations.
        messages: the errors that were followed.
    """

    name: str
    outcome: str
    options: dict[str, str]
    blocks: list[str]
    tokens: int
    student: float
    teacher: float
    messages: list[str]


class Differs(Exception):
    """Tokens that are not those taken by hand."""


class Pairs:
    """A distance that keeps what it is given: the projected tokens and the target's."""

    def __init__(self) -> None:
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.last = (student.detach(), target.detach())
        return (student - target).square().mean(dim=-1)


class Run:
    """The user's loop around one model, and the same by hand beside it."""

    def __init__(self, entry: Entry) -> None:
        torch.manual_seed(0)
        self.entry = entry
        self.model = entry.build()
        self.model.train()  # which may return None
        self.plain = copy.deepcopy(self.model)  # the teacher by hand
        self.plain.eval()
        self.pairs = Pairs()
        self.student = self.teacher = 0.0
        self.blocks: list[str] = []
        self.tokens = 0
        self.labels: dict[str, list[torch.Tensor]] = {}

    def go(self, **options: Any) -> None:
        """Attach, and train for some steps.

        Raises:
            ValueError, TypeError: what selfalign says.
            Differs: other tokens than those taken by hand.
        """
        student, teacher = self.entry.layers
        loss = selfalign.SRALoss(
            student_layer=student,
            teacher_layer=teacher,
            path=self.entry.noise.path,
            distance=self.pairs,
            max_gap=GAP,
            decay=DECAY,
        )
        align = SelfAlignment(self.model, loss, seed=1, **options)
        self.blocks = list(align.taps)
        try:
            for step in range(STEPS):
                self.step(align, step)
        finally:
            align.detach()

    def step(self, align: SelfAlignment, number: int) -> None:
        """One step of training, compared."""
        entry = self.entry
        torch.manual_seed(100 + number)
        x0, condition = entry.batch(entry.size)
        noise = torch.randn_like(x0)
        t = entry.noise.draw(entry.size)
        u = 0.5 + 0.5 * torch.rand(entry.size)
        x_t = entry.noise.noised(x0, noise, t)
        with captured(self.model, entry.taps[0]) as outputs, self.labels_kept():
            prediction = entry.run(self.model, x_t, t, condition)
        if number == 0:  # a model may normalise its weights in its forward
            self.plain.load_state_dict(self.model.state_dict())
        term = align(x0, noise, t, u=u, **self.told(condition))
        own = entry.pick(outputs[0], condition).detach()

        earlier = entry.noise.earlier(t, u)
        x_s = entry.noise.noised(x0, noise, earlier)
        target = self.by_hand(x_s, earlier, condition)
        assert self.pairs.last is not None
        projected, given = self.pairs.last
        with torch.no_grad():
            expected = align.projector(own)
        self.tokens = given.shape[0] * given.shape[1] // entry.size
        self.student = max(self.student, difference(projected, expected, "student"))
        self.teacher = max(self.teacher, difference(given, target, "teacher"))
        if number:  # before, zero-initialised gates may hide what a block is told
            self.check_that_errors_show(x_s, t, earlier, condition, target)

        (first_tensor(prediction).float().square().mean() + term).backward()
        self.move(align)

    def told(self, condition: dict[str, Any]) -> dict[str, Any]:
        """What `call=` is handed beside sample and time."""
        return {"condition": condition} if self.with_call else {}

    with_call = False

    def by_hand(self, x: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]) -> Any:
        """The teacher's tokens, by a plain forward of a plain copy."""
        taps = captured(self.plain, self.entry.taps[1])
        with torch.no_grad(), taps as outputs, self.labels_given():
            self.entry.run(self.plain, x, t, condition)
        return self.entry.pick(outputs[0], condition)

    def check_that_errors_show(
        self,
        x: torch.Tensor,
        students_time: torch.Tensor,
        time: torch.Tensor,
        condition: dict[str, Any],
        target: torch.Tensor,
    ) -> None:
        """Another time and other weights give other tokens: else the comparison sees nothing."""
        other_time = self.by_hand(x, students_time, condition)
        average = copy.deepcopy(self.plain.state_dict())
        self.plain.load_state_dict(self.model.state_dict())
        other_weights = self.by_hand(x, time, condition)
        self.plain.load_state_dict(average)
        for name, other in (("time", other_time), ("weights", other_weights)):
            if relative(other, target) < 10 * CLOSE:
                raise AssertionError(f"{self.entry.name}: the teacher's tokens hide its {name}")

    def move(self, align: SelfAlignment) -> None:
        """A step of an optimizer, with an EMA by hand."""
        with torch.no_grad():
            for p in (*self.model.parameters(), *align.projector.parameters()):
                if p.requires_grad and p.is_floating_point():
                    p.add_(0.1 * torch.randn_like(p))
            align.update()
            for mine, theirs in zip(self.plain.parameters(), self.model.parameters(), strict=True):
                if theirs.requires_grad:
                    mine.mul_(DECAY).add_(theirs, alpha=1 - DECAY)
            for mine, theirs in zip(self.plain.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)
        self.model.zero_grad()
        align.projector.zero_grad()

    @contextmanager
    def labels_kept(self) -> Iterator[None]:
        """Keep the labels that the student looks up, after its own dropping."""
        self.labels = {path: [] for path in self.entry.dropped}

        def keep(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            self.labels[path].append(args[0].detach().clone())

        with hooked(self.model, self.entry.dropped, keep):
            yield

    @contextmanager
    def labels_given(self) -> Iterator[None]:
        """The same labels for the teacher by hand."""
        left = {path: list(labels) for path, labels in self.labels.items()}

        def give(path: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (left[path].pop(0), *args[1:])

        with hooked(self.plain, self.entry.dropped, give):
            yield


@contextmanager
def hooked(model: nn.Module, paths: tuple[str, ...], hook: Callable[..., Any]) -> Iterator[None]:
    """A hook before modules, which is told their path."""
    handles = [
        model.get_submodule(path).register_forward_pre_hook(functools.partial(hook, path))
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured(model: nn.Module, path: str) -> Iterator[list[Any]]:
    """What a block returns in the forwards inside."""
    outputs: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    try:
        yield outputs
    finally:
        handle.remove()


def first_tensor(output: Any) -> torch.Tensor:
    """Of what a model returns."""
    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    return first_tensor(next(part for part in parts if part is not None))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in standard deviations of what was expected."""
    scale = expected.float().std().clamp(min=1e-12)
    return float((found.float() - expected.float()).abs().max() / scale)


def difference(found: torch.Tensor, expected: torch.Tensor, side: str) -> float:
    """The largest difference between tokens.

    Raises:
        Differs: it is too large, or they are not as many.
    """
    wanted = expected.reshape(-1, expected.shape[-1])
    tokens = found.reshape(-1, found.shape[-1])
    if tokens.shape != wanted.shape:
        raise Differs(f"{side}: {tuple(found.shape)}, by hand {tuple(expected.shape)}")
    largest = relative(tokens, wanted)
    if not largest < CLOSE:
        raise Differs(f"{side}: tokens differ by {largest:.2g} standard deviations")
    return largest


# Following a message


def follow(text: str, entry: Entry, width: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The options that an error asks for, and how they read.

    The first option that it names and that can be answered: with an expression that the message
    gives, with a path that it lists, or with what a user knows of the model.
    """
    fix = text.partition("Received:")[2] or text
    named = re.findall(rf"\b({'|'.join(OPTIONS)})=", fix)
    for name in dict.fromkeys(named):
        if name in entry.answers:
            value = entry.answers[name]
            listed = name != "blocks" or all(repr(path) in text for path in listed_paths(value))
            if listed:
                return {name: value}, {name: readable(value)}
        if name == "select" and (code := expression(fix)):
            return {name: eval(code, {"torch": torch})}, {name: code}
        if name == "width":
            return {name: width}, {name: str(width)}
        if name == "taps":
            taps = offered_taps(fix) or entry.taps
            return {name: taps}, {name: readable(taps)}
        if name == "call":
            return {name: called(entry)}, {name: "the model's own call"}
    if "own dropping off" in fix and WITHOUT in entry.answers:
        return {"build": entry.answers[WITHOUT]}, {"the model's": "own dropping off"}
    return {}, {}


def listed_paths(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def readable(value: Any) -> str:
    return "a function of the user's" if callable(value) else repr(value)


def expression(text: str) -> str:
    """The function that a message offers for select=, the longest text that is one."""
    _, _, rest = text.partition("select=lambda")
    for end in range(len(rest), 0, -1):
        code = f"lambda{rest[:end]}".rstrip(" .,")
        try:
            ast.parse(code, mode="eval")
        except SyntaxError:
            continue
        return code if rest else ""
    return ""


def offered_taps(text: str) -> tuple[str, ...]:
    """The two paths that a message offers for taps=."""
    found = re.search(r"taps=\('([\w.]+)', '([\w.]+)'\)", text)
    return found.groups() if found else ()


def called(entry: Entry) -> Callable[..., Any]:
    return lambda module, x, t, condition: entry.run(module, x, t, condition)


def attempt(entry: Entry, **options: Any) -> tuple[Run, Exception | None]:
    """One attempt, and the error that it ended in."""
    build = options.pop("build", entry.build)
    taps = options.get("taps", entry.taps)
    run = Run(entry._replace(build=build, taps=taps))
    run.with_call = "call" in options
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", module="selfalign")
            run.go(**options)
    except Exception as error:
        return run, error
    return run, None


def find(entry: Entry) -> Found:
    """What comes out for one model: attached as it is, and again as its messages say."""
    options: dict[str, Any] = {}
    readable: dict[str, str] = {}
    messages: list[str] = []
    run, error = attempt(entry)
    while is_ours(error) and len(messages) < MESSAGES:
        given, texts = follow(str(error), entry, own_width(entry))
        if not given or given.keys() <= options.keys():
            break
        messages.append(str(error))
        options |= given
        readable |= texts
        run, error = attempt(entry, **options)
    if is_ours(error):
        outcome = "refused" if entry.refused else "NO WAY OUT"
        return result(run, outcome, readable, [*messages, str(error)])
    return result(run, outcome_of(entry, error, len(messages)), readable, messages)


def outcome_of(entry: Entry, error: Exception | None, messages: int) -> str:
    """In words; in capitals, what must not be."""
    if entry.refused:
        return f"NOT REFUSED: {error}"
    if error is None:
        return ("at once", "after one message", "AFTER TWO MESSAGES", "AFTER THREE")[messages]
    kind = "WRONG" if isinstance(error, Differs) else f"RAW {type(error).__name__}"
    return f"{kind}: {error}"


def is_ours(error: Exception | None) -> bool:
    """Whether an error is one of selfalign's own."""
    return isinstance(error, (ValueError, TypeError)) and "Received:" in str(error)


def own_width(entry: Entry) -> int:
    """The width of the student's tokens."""
    torch.manual_seed(0)
    model = entry.build()
    model.train()
    x0, condition = entry.batch(entry.size)
    with torch.no_grad(), captured(model, entry.taps[0]) as outputs:
        entry.run(model, x0, entry.noise.draw(entry.size), condition)
    return entry.pick(outputs[0], condition).shape[-1]


def result(run: Run, outcome: str, options: dict[str, str], messages: list[str]) -> Found:
    return Found(
        run.entry.name,
        outcome,
        options,
        run.blocks,
        run.tokens,
        run.student,
        run.teacher,
        messages,
    )
