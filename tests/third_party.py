"""An objective of one's own, as docs/extending.md shows it: every adapter takes it as it is."""

import dataclasses

from keras import ops

import selfalign


@dataclasses.dataclass(frozen=True)
class LowRank(selfalign.heads.Head):  # tokens @ down @ up
    rank: int = 2
    names = ("down", "up")

    def draw_shapes(self, width, target_width):
        return {"down": (width, self.rank), "up": (self.rank, target_width)}

    def init(self, draws):
        return {name: 2.0 * draw - 1.0 for name, draw in draws.items()}

    def apply(self, params, tokens):
        return ops.matmul(ops.matmul(tokens, params["down"]), params["up"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogCoshLoss(selfalign.Objective):
    """weight * mean_i log cosh(head(student_i) - stop_gradient(later_i))."""

    kind = "log_cosh"
    teacher_layer: int
    head = LowRank()

    @property
    def source(self):
        return selfalign.sources.LaterLayer(layer=self.teacher_layer)

    def compare(self, student, target, mask=None):
        d = ops.abs(ops.cast(student - ops.stop_gradient(target), "float32"))
        log_cosh = ops.mean(d + ops.softplus(-2.0 * d) - ops.log(2.0), axis=-1)  # [B, N]
        return selfalign.distances.masked_mean(log_cosh, mask)
