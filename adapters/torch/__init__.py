"""selfalign for PyTorch: objectives on models as they are.

`SelfAlignment` attaches them, `EMATeacher` says how the teacher is kept, `features` gives what
blocks return, for `selfalign.diagnostics`.
"""

from .alignment import SelfAlignment
from .average import EMATeacher
from .features import features
from .heads import Projector

__all__ = ["EMATeacher", "Projector", "SelfAlignment", "features"]
