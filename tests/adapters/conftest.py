"""Makes contract.py and reference.py importable below this folder, and finds an adapter's fixture.

The folder itself must not stay on sys.path: its folders have the names of frameworks.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytest.register_assert_rewrite("contract")
sys.path.insert(0, str(HERE))
try:
    importlib.import_module("reference")
    importlib.import_module("contract")
finally:
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def adapter(request):
    """The `Fixture` of the fixture.py that lies beside the test."""
    file = request.path.parent / "fixture.py"
    name = f"{file.parent.name}_fixture"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        specification.loader.exec_module(module)
    return sys.modules[name].Fixture()
