# One environment, .venv in this folder, made on first use; every target may be repeated.
#   make install      the package, editable, with what the examples and tests need
#   make train        the main job: LeNet on real digits      (ARGS="--model mlp --out out/mlp")
#   make test         all tests                                (ARGS="-k name")
#   make test-fast    the tests of the inner loop               (JOBS=4: in so many processes)
#   make matrix       every operator under every transform, compiled; writes docs/matrix.md
#   make lint         ruff and pyright
#   make docs         the site, in build/site; fails on a broken link or a public name without a docstring
#   make peers        an environment of their own for JAX, Optax and Flax (.peers)
#   make golden       record the values that tests compare with from these peers, and from those of PyTorch (.peers-torch)
# make test TORCH=2.15.0 runs with another torch, in an environment of its own.

PYTHON ?= python3
TORCH ?= 2.13.0
ARGS ?=
JOBS ?= 2
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
VENV := $(if $(filter $(PINNED),$(TORCH)),.venv,.venv-$(TORCH))
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
PEERS := .peers/.ready
PEERS_TORCH := .peers-torch/.ready
# A path entry, not an import hook: in the folder above a clone called fnn, Python would take the clone for the package.
EDITABLE := --config-settings editable_mode=compat

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install train test test-fast matrix lint docs peers golden clean

install: $(READY)

# torch alone first: the pinned build decides which of its companions pip takes.
$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),$(PINNED))
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[test,lint,docs]" $(EDITABLE)
else
	$(RUN) -m pip install --quiet torch==$(TORCH)
	$(RUN) -m pip install --quiet torch==$(TORCH) -e ".[test]" $(EDITABLE)
endif
	touch $@

train: $(READY)
	$(RUN) examples/train_image.py --overwrite $(ARGS)

# JOBS processes of one thread each: most of the time goes into the compiler, which is Python.
test test-fast: export OMP_NUM_THREADS = 1

# Triton reads TRITON_INTERPRET when it is first imported, so its interpreter's tests are a process of their own;
# there it is no error (5) if ARGS selects none of them.
test: $(READY)
	$(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/interpreter $(ARGS) || [ $$? -eq 5 ]

test-fast: $(READY)
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

matrix: $(READY)
	$(RUN) -m triton_kernels.matrix --write docs/matrix.md $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

# The variable silences an advertisement that would drown a warning about a page.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

peers: $(PEERS)

$(PEERS): tests/golden/requirements.txt
	test -x .peers/bin/python || $(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet -r tests/golden/requirements.txt
	touch $@

$(PEERS_TORCH): tests/golden/requirements-torch.txt constraints.txt
	test -x .peers-torch/bin/python || $(PYTHON) -m venv .peers-torch
	.peers-torch/bin/python -m pip install --quiet -c constraints.txt torch -r tests/golden/requirements-torch.txt
	touch $@

golden: $(PEERS) $(PEERS_TORCH)
	for script in $(filter-out %record_curvature.py,$(wildcard tests/golden/record_*.py)); do \
		.peers/bin/python $$script || exit 1; \
	done
	.peers/bin/python tests/golden/check_jax_page.py
	.peers-torch/bin/python tests/golden/record_curvature.py

clean:
	rm -rf .venv .venv-* .peers .peers-torch build *.egg-info
