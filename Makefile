# Set-up, tests and the demo. A fresh machine needs Python 3.11+, git and make, nothing else.
# torch is installed first and by itself: whatever comes later finds it and pulls in no second one.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-transformers-4 hub wheels docs fuzz sanitize lint format bench static-report clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

install: $(STAMP)  ## create .venv and install the package with its test tools

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	@touch $(STAMP)

demo: $(STAMP)  ## HiDe answers a question about the example picture; writes demo/report.html
	$(BIN)/hide ask hide/examples/scene.jpg "Is the heart on the left or right side of the circle?" --report demo

test: $(STAMP) lint build/kernels  ## linters, type checks and all tests
	$(BIN)/python -m pytest --numprocesses=2

# The kernels hub's client. Not in .venv, where transformers would use it, and without what only its signatures need.
build/kernels: Makefile | $(STAMP)
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ kernels==0.17.2

REPO_ID ?= OWNER/hide-kernels
hub: $(STAMP)  ## the Triton part as a repository of the kernels hub in build/hub; REPO_ID=you/hide-kernels
	$(BIN)/python -m hide_kernels.integrations.kernels_hub build/hub --repo-id $(REPO_ID)

# Beside the installed one, for the tests that run models.
OLDEST := transformers==4.57.1 huggingface-hub==0.36.2 tokenizers==0.22.2
MODEL_TESTS := capture capture_generate image_tokens families tile_families qwen2_5_vl qwen3_vl vision_slices tiny_model \
	session threads modes offload pipeline attend drop_in quantised

build/transformers-4: Makefile
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ $(OLDEST)

test-transformers-4: $(STAMP) build/transformers-4  ## the tests that run models, on the oldest transformers
	PYTHONPATH=build/transformers-4 $(BIN)/python -c "import transformers as t; assert t.__version__[0] == '4', t"
	PYTHONPATH=build/transformers-4 $(BIN)/python -m pytest --numprocesses=2 $(MODEL_TESTS:%=tests/test_%.py)

wheels: $(STAMP)  ## sdist, pure wheel and compiled wheel in dist/, and the demo's job from each wheel
	rm -rf dist build/wheels
	mkdir -p build
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" >build/sdist.log
	HIDE_KERNELS_BUILD=none $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist dist/*.tar.gz
	HIDE_KERNELS_BUILD=host $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist dist/*.tar.gz
	ls dist
	for wheel in dist/*.whl; do \
		folder="$(CURDIR)/build/wheels/$$(basename $$wheel .whl)" && \
		$(BIN)/python -m pip install --quiet --no-deps --target "$$folder" $$wheel && \
		(cd build/wheels && PYTHONPATH="$$folder" "$(CURDIR)/$(BIN)/python" -P "$(CURDIR)/tests/run_from_wheel.py" \
			"$$folder") || exit 1; \
	done

docs: $(STAMP)  ## the pages of docs/ as a site in build/site; broken links are errors
	$(BIN)/mkdocs build --strict --quiet

fuzz: $(STAMP)  ## the properties on more than 10,000 examples
	HYPOTHESIS_PROFILE=many $(BIN)/python -m pytest --numprocesses=2 tests/test_properties.py

sanitize:  ## the kernels on blocks of real threads, looking for races, bad accesses and overflow
	@mkdir -p build
	g++ -std=c++17 -O1 -g -pthread -fsanitize=thread tests/csrc/driver.cpp -o build/driver_thread
	build/driver_thread 15
	g++ -std=c++17 -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=all tests/csrc/driver.cpp \
		-o build/driver_address
	build/driver_address 15

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hide_kernels hide

format: $(STAMP)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## what a CPU can show; with a GPU: python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.regions_to_collage
	$(BIN)/python -m benchmarks.rows_to_pixel_values
	$(BIN)/python -m benchmarks.drop_in
	$(BIN)/python -m benchmarks.cpu

static-report: $(STAMP)  ## recompile the kernels for six architectures, rewrite benchmarks/static_report.md
	$(BIN)/python -m benchmarks.static_report

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist demo *.egg-info
