# Set-up, tests and the demo. A fresh machine needs Python 3.11+, git and make, nothing else.
# torch is installed first and by itself: whatever comes later finds it and pulls in no second one.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An environment holds exactly what its lock names; requirements/ has one for each that cannot be resolved with another,
# and one that brings weights along.
LOCKS := test kvpress real vllm lmms-eval
SOURCES := pyproject.toml setup.py requirements/triton.txt $(wildcard csrc/*)

# What Python compiles is kept: lanes and the processes that tests start import the same files.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install upgrade demo train train-q-zoom test test-transformers-4 test-card carry test-newest test-kvpress test-real hub \
	wheels docs fuzz soak sanitize lint format bench static-report clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/'

install: $(STAMP)  ## create .venv and install the package with its test tools

# $(call environment,FOLDER,LOCK). Without dependencies: pip is to install what the lock names, and to resolve nothing.
# Uncompiled: of these thousands of files Python compiles those that it imports.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --constraint $(2) pip setuptools wheel
	$(1)/bin/python -m pip install --quiet --constraint $(2) "$(TORCH)"
	$(1)/bin/python -m pip install --quiet --no-deps --requirement $(2)
	$(1)/bin/python -m pip show torch | grep -q '^Requires:.*triton' \
		|| $(1)/bin/python -m pip install --quiet --no-deps --requirement requirements/triton.txt
	PYTHONWARNINGS="ignore:Editable installation" \
		$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
endef

$(STAMP): requirements/test.txt $(SOURCES)
	$(call environment,$(VENV),$<)
	$(BIN)/python -m pip check
	@touch $@

# make build/environment-vllm/.installed, and so for the other locks: beside .venv, with a torch of its own.
build/environment-%/.installed: requirements/%.txt $(SOURCES)
	$(call environment,$(@D),$<)
	@touch $@

# uv resolves for every platform and Python at once.
build/uv: Makefile
	rm -rf $@ && $(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet uv==0.13.9

RESOLVE = build/uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest \
	--no-emit-index-url --custom-compile-command "make upgrade"
FROM_test := --extra test
FROM_kvpress := --extra peers
FROM_real := --extra peers requirements/real.in
FROM_vllm := requirements/vllm.in
# Its torchvision is one more CUDA build, and it does without.
FROM_lmms-eval := requirements/lmms-eval.in --no-emit-package torchvision

upgrade: $(LOCKS:%=resolve-%)  ## resolve all locks anew: the newest versions of today

resolve-triton: build/uv
	$(RESOLVE) requirements/triton.in --output-file requirements/triton.txt

resolve-%: build/uv resolve-triton
	$(RESOLVE) pyproject.toml --extra hide requirements/every.in $(FROM_$*) \
		--overrides requirements/overrides.txt --constraints requirements/triton.txt --no-emit-package triton \
		--output-file requirements/$*.txt

demo: $(STAMP)  ## HiDe answers a question about the example picture; writes demo/report.html
	$(BIN)/hide ask hide/examples/scene.jpg "Is the circle on the left or right side of the triangle?" --report demo

# By file: what tests of one file share (models, predictions, what a fresh process said) is made once.
PARALLEL := --numprocesses=2 --dist=loadfile

train: $(STAMP)  ## the embedded model from nothing on two cores; goes on where it stopped
	$(BIN)/python -m training.train --output build/embedded-model

train-q-zoom: $(STAMP)  ## Q-Zoom's region branch and gate for the embedded model, on two cores; goes on where it stopped
	$(BIN)/python -m torch.distributed.run --nproc-per-node 2 -m hide train q-zoom \
		--stages labels,region,gate --out build/q-zoom

test: $(STAMP) lint build/kernels  ## linters, type checks and all tests
	$(BIN)/python -m pytest $(PARALLEL)

# The kernels hub's client. Not in .venv, where transformers would use it, and without what only its signatures need.
build/kernels: Makefile | $(STAMP)
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ kernels==0.17.2

REPO_ID ?= OWNER/hide-kernels
hub: $(STAMP)  ## the Triton part as a repository of the kernels hub in build/hub; REPO_ID=you/hide-kernels
	$(BIN)/python -m hide_kernels.integrations.kernels_hub build/hub --repo-id $(REPO_ID)

# $(call over,FOLDER): what runs Python with the packages in a folder before those of .venv, in child processes too.
over = PYTHONPATH="$(CURDIR)/$(1)" $(BIN)/python
# What depends on a version of transformers: the capture, the families' inputs and forwards, sessions; and what is on top.
MODEL_TESTS := capture capture_generate capture_received capture_vision drop_tokens h2o image_tokens patches_to_tokens \
	families tile_families qwen2_5_vl qwen3_vl vision_slices session verbs threads q_zoom
METHOD_TESTS := tiny_model offload hide vicrop methods attend drop_in quantised checkpoint training

OLDEST := transformers==4.57.1 huggingface-hub==0.36.2 tokenizers==0.22.2
build/transformers-4: Makefile | $(STAMP)
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ $(OLDEST)

test-transformers-4: $(STAMP) build/transformers-4  ## the tests that run models, on the oldest transformers
	$(call over,build/transformers-4) -c "import transformers as t; assert t.__version__[0] == '4', t"
	$(call over,build/transformers-4) -m pytest $(PARALLEL) $(MODEL_TESTS:%=tests/test_%.py)

# What the first card's machine has: versions that the locks are ahead of, and its Python. Of the report of what kernels
# compile to, whose hashes are of the locked Triton, sm_90 alone is compiled.
CARD := triton==3.6.0 transformers==5.17.0 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 numpy==2.3.5
CARD_PYTHON ?= 3.12
CARD_TESTS := attention_rows_triton attention_rows_serving_triton attention_rows_compiled token_maps_triton \
	token_maps_compiled capture capture_generate registry first_card
build/card-versions: Makefile | $(STAMP)
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ $(CARD)

test-card: $(STAMP) build/card-versions  ## the kernels' tests on the versions that the first card's machine has
	$(call over,build/card-versions) -c "import triton as t, numpy as n; \
		assert (t.__version__, n.__version__) == ('3.6.0', '2.3.5'), (t, n)"
	$(call over,build/card-versions) -m pytest $(PARALLEL) $(CARD_TESTS:%=tests/test_%.py) \
		-k "not ((use_no_stack or report_says) and (8 or 1))"

# Its Triton, by which kernels in the cache are found; and wheels that it lacks.
build/card-wheel: Makefile | $(STAMP)
	rm -rf $@ && $(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(CARD_PYTHON) \
		$(foreach at,28 27 17,--platform manylinux_2_$(at)_x86_64) --dest $@ $(filter triton%,$(CARD))

carry: $(STAMP) build/card-versions build/card-wheel  ## in build/card what a card's machine is to be given (docs/first_minutes.md)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(CARD_PYTHON) \
		--platform manylinux_2_28_x86_64 --constraint requirements/test.txt --dest build/card/wheels torchao
	$(call over,build/card-versions) -m benchmarks.carry build/card --tests --wheel build/card-wheel/*.whl

# Whatever is the newest today, with what it needs; none of these needs torch, and torch stays the locked one.
NEWEST := transformers triton numpy pillow datasets ray
NEWEST_TESTS := $(MODEL_TESTS) $(METHOD_TESTS) attention_rows_triton attention_rows_serving_triton token_maps_triton \
	images pixel_values collage golden evaluation evaluation_methods on_ray

test-newest: $(STAMP)  ## the tests that touch transformers, triton, NumPy, Pillow, datasets or ray, on today's newest
	rm -rf build/newest && $(BIN)/python -m pip install --quiet --no-compile --target build/newest $(NEWEST)
	@test ! -e build/newest/torch || { echo "build/newest brings a torch of its own"; exit 1; }
	@$(call over,build/newest) -c "from importlib.metadata import version as v; import sys; \
		print('newest:', *(f'{name} {v(name)}' for name in sys.argv[1:]), sep='\n  ')" $(NEWEST)
	$(call over,build/newest) -m pytest $(PARALLEL) $(NEWEST_TESTS:%=tests/test_%.py)

test-kvpress: build/environment-kvpress/.installed  ## kvpress's SnapKV with our scores, in an environment of its own
	$(<D)/bin/python -m pytest tests/test_kvpress.py

test-real: build/environment-real/.installed  ## rows and what keys receive on a trained model, SmolLM2-135M, in its environment
	$(<D)/bin/python -m pytest tests/test_real_weights.py

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
	HYPOTHESIS_PROFILE=many $(BIN)/python -m pytest --numprocesses=2 --dist=load tests/test_properties.py

soak: $(STAMP)  ## 5,000 good and bad requests to hide serve: no answer is lost or wrong, and memory stays where it was
	$(BIN)/python tests/soak.py

sanitize: sanitize-thread sanitize-address  ## the kernels on blocks of real threads, looking for races, bad accesses and overflow

sanitize-address: MORE := ,undefined -fno-sanitize-recover=all
sanitize-%:
	@mkdir -p build
	g++ -std=c++17 -O1 -g -pthread -fsanitize=$*$(MORE) tests/csrc/driver.cpp -o build/driver_$*
	build/driver_$* 15

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hide_kernels hide training

format: $(STAMP)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## what a CPU can show; with a GPU: python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.regions_to_collage
	$(BIN)/python -m benchmarks.rows_to_pixel_values
	$(BIN)/python -m benchmarks.drop_in
	$(BIN)/python -m benchmarks.cpu

static-report: $(STAMP) build/card-versions  ## what the kernels compile to, into benchmarks/static_report.md
	$(call over,build/card-versions) -m benchmarks.static_report --save build/static-report.json
	$(BIN)/python -m benchmarks.static_report --beside build/static-report.json

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist demo *.egg-info
