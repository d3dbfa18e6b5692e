"""The contract of adapters, kept by the one for Keras: see contract.py."""

import pytest
from contract import *  # noqa: F403

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4
