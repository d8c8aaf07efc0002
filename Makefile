# Every target works on a fresh machine: the environment and the build come first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
CSRC = $(filter-out %.md,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*))
SOURCES = $(CSRC) setup.py pyproject.toml msrnn_ops/version.py
MUTATIONS ?= mutations=[b-e]* mutations=no* mutations=relaxed* mutations=step_[b-t]*
DTYPES ?= bfloat16,float32,float16,float64
ARCHS ?= 75,80,86,89,90,100,120
PARTS ?= build,test,triton,sanitizer,stress,bench
TRITON ?= 3.6.0 3.9.0
OUT ?= bench/results

INTERPRETED = TRITON_INTERPRET=1 MSRNN_TEST_EXAMPLES=3 OMP_NUM_THREADS=1
SMALL = not thread and not long and not reference and not one_over_t and not far_beyond and not counts

SANITIZED = MSRNN_TEST_EXAMPLES=10 PYTHONPATH=. \
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	$(abspath $(BIN))/pytest -q -p no:cacheprovider

.PHONY: test pytest emulate triton budget bench bench-full bench-cuda gpu-check lint sanitize portable cuda wheel
.PHONY: papers distributed docs clean

# Two at a time; idle threads sleep, for others need the cores.
test: $(VENV)/ready
	$(MAKE) -j2 -Otarget pytest emulate triton budget DTYPES=bfloat16 ARCHS=80,90

test sanitize: export OMP_WAIT_POLICY = passive

pytest: $(VENV)/ready
	MSRNN_TEST_EXAMPLES=30 $(BIN)/pytest tests

# The CUDA kernels without a GPU: most of the same tests on the emulator; schedules, sanitizers and
# most planted bugs (MUTATIONS=mutations: all of them).
emulate: $(VENV)/ready
	MSRNN_TEST_KERNELS=$$($(BIN)/python tests/emulation/library.py) MSRNN_TEST_EXAMPLES=20 \
		$(BIN)/pytest -q tests/test_scan.py tests/test_torch.py tests/test_multi_state.py \
		-k "(test_scan or test_torch or not threads and not large and not bfloat16) and not reference \
		and not gru_identity and not lstm_joint"
	$(BIN)/python tests/emulation/check.py selftest schedules address thread $(foreach m,$(MUTATIONS),'$(m)')

# Triton's kernels without a GPU: the tests on its interpreter, and what it compiles to against the
# stored table. Each version has an environment that sees the packages of $(VENV) too.
triton: $(addprefix triton-,$(TRITON))

triton-%: $(VENV)/ready
	test -d $(VENV)/$@ || $(PYTHON) -m venv $(VENV)/$@
	echo "import site; site.addsitedir('$$($(abspath $(BIN))/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		>$$($(VENV)/$@/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/more.pth
	$(VENV)/$@/bin/pip install -q triton==$*
	MSRNN_BACKEND=triton $(INTERPRETED) $(VENV)/$@/bin/python -m pytest -q -p no:cacheprovider \
		tests/test_triton.py tests/test_scan.py tests/test_multi_state.py -k "$(SMALL)"
	test $* != $(lastword $(TRITON)) || $(VENV)/$@/bin/python tests/budgets/triton.py --check --quick

# What nvcc makes of them for seven architectures, against the stored table.
budget: $(VENV)/ready
	@command -v nvcc >/dev/null || { echo "budget: skipped, there is no nvcc"; exit 0; } && \
		$(BIN)/pip install -q nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump && \
		$(BIN)/python tests/budgets/cuda.py --check --dtypes $(DTYPES) --archs $(ARCHS)

# On a machine with a GPU, with the packages of $(PYTHON) alone and no network: build, test, sanitize,
# stress and measure; results go to the folder OUT.
gpu-check:
	$(PYTHON) tests/gpu/check.py --parts $(PARTS) --output $(OUT)

# Against what PyTorch users run today: the first ratios after seconds, all of it within four minutes.
# Results go to build/bench.
bench: $(VENV)/ready
	$(BIN)/python -m bench

# Every op, shape, peer and length, into the results that are kept in git: about 30 minutes.
bench-full: $(VENV)/ready
	$(BIN)/python -m bench --full --output bench/results

bench-cuda: $(VENV)/ready
	$(BIN)/python -m bench cuda

# The papers' experiments, small enough for two cores: minutes, and build/bench/papers.md to read.
papers: $(VENV)/ready
	$(BIN)/python -m bench papers

# Data and context parallel training over 4, 2 and 1 ranks against one process.
distributed: export OMP_NUM_THREADS = 1
distributed: RANKS = $(BIN)/torchrun --standalone --nproc-per-node
distributed: RESULTS = --check --json build/bench/distributed.json
distributed: $(VENV)/ready
	rm -rf build/checkpoint build/bench/distributed.json
	$(RANKS) 4 -m bench distributed --context 2 $(RESULTS)
	$(RANKS) 4 -m bench distributed --context 2 --fsdp --save build/checkpoint $(RESULTS)
	$(RANKS) 2 -m bench distributed --context 2 --fsdp --load build/checkpoint $(RESULTS)
	$(BIN)/python -m bench distributed --load build/checkpoint $(RESULTS)

$(VENV)/ready: $(SOURCES)
	@echo "== $(VENV): an environment with $(TORCH), a few minutes the first time"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)" numpy "setuptools>=77" pybind11 ninja
	@echo "== $(VENV): building msrnn_ops, about two minutes on two cores, with nvcc and a torch with CUDA ten"
	$(BIN)/pip install --no-build-isolation -e ".[test,bench,papers,transformers]"
	touch $@

# The pages of docs/ and the docstrings, as a site in build/docs. A reference that leads nowhere fails.
docs: $(VENV)/ready
	@echo "== docs: Sphinx writes build/docs/index.html, half a minute"
	$(BIN)/pip install -q sphinx myst-parser
	$(BIN)/python -m sphinx -n -W --keep-going -q docs build/docs

lint: $(VENV)/ready
	$(BIN)/pip install -q ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(wildcard tests/emulation/*.cpp tests/emulation/*.h)

# The suite with every kernel under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/ready
	MSRNN_SANITIZE=address,undefined $(BIN)/pip install -q --no-build-isolation --no-deps \
		--upgrade --target build/sanitized .
	cd build/sanitized && $(SANITIZED) -k "not long and not bfloat16 and not float64-" \
		../../tests/test_scan.py ../../tests/test_errors.py
	cd build/sanitized && $(SANITIZED) -k "not flex and not float32 and not float16" ../../tests/test_multi_state.py

# The torch-free kernels for 64-bit Arm, compiled, not run.
portable: $(VENV)/ready
	$(BIN)/pip install -q ziglang && mkdir -p build
	for file in $(wildcard csrc/cpu/instantiations/*.cpp); do \
		$(BIN)/python -m ziglang c++ -target aarch64-linux-gnu -std=c++20 -O1 -ffp-contract=off \
			-c $$file -o build/portable.o || exit 1; \
	done

# The CUDA library with a torch that has no CUDA: it compiles, links, loads and registers.
cuda: $(VENV)/ready
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(BIN)/pip install -q --no-build-isolation --no-deps \
		--upgrade --target build/with-cuda .
	cd build/with-cuda && PYTHONPATH=. $(abspath $(BIN))/pytest -q -p no:cacheprovider \
		../../tests/test_cuda.py ../../tests/test_errors.py

# A wheel, installed into an environment of its own and tested from an empty directory.
wheel: $(VENV)/ready
	$(BIN)/pip install -q build
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	rm -rf build/wheel-venv build/empty && mkdir -p build/empty
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install -q "$(TORCH)" pytest hypothesis build/wheel/*.whl
	cp -r tests build/empty/tests
	cd build/empty && ../wheel-venv/bin/pytest -q tests/test_package.py tests/test_errors.py \
		-k "not instruction_set"

clean:
	rm -rf build dist *.egg-info msrnn_ops/*.so $(VENV)
