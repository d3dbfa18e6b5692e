"""Diagnostics: what the features of a diffusion transformer hold, by layer and noise level.

`health` and `cka` are arithmetic on `keras.ops`, for the training loop too. The rest looks at
features afterwards, and takes whatever NumPy can read. scikit-learn and matplotlib are imported by
the functions that need them.
"""

from .finder import Layers, find_layers
from .health import drift, effective_rank, feature_norm, participation_ratio, snr_decibels
from .loggers import CSVLogger, TensorBoardLogger
from .maps import draw_maps, pca_maps
from .probes import knn_probe, linear_probe, per_layer
from .similarity import cka, cknna, compare

__all__ = [
    "CSVLogger",
    "Layers",
    "TensorBoardLogger",
    "cka",
    "cknna",
    "compare",
    "draw_maps",
    "drift",
    "effective_rank",
    "feature_norm",
    "find_layers",
    "knn_probe",
    "linear_probe",
    "participation_ratio",
    "pca_maps",
    "per_layer",
    "snr_decibels",
]
