# Every target works on a fresh machine: the environment and the build come first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
SOURCES = $(wildcard csrc/*.* csrc/cpu/*.*) setup.py pyproject.toml msrnn_ops/version.py

SANITIZED = MSRNN_TEST_EXAMPLES=10 PYTHONPATH=. \
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	$(abspath $(BIN))/pytest -q -p no:cacheprovider

.PHONY: test bench bench-full lint sanitize portable wheel clean

test: $(VENV)/ready
	$(BIN)/pytest tests --cov=msrnn_ops --cov-report=term

bench: $(VENV)/ready
	$(BIN)/python -m bench

bench-full: $(VENV)/ready
	$(BIN)/python -m bench --full --name cpu-full

$(VENV)/ready: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" numpy setuptools pybind11 ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[test,bench]"
	touch $@

lint: $(VENV)/ready
	$(BIN)/pip install -q ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

# The suite with every kernel under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/ready
	MSRNN_SANITIZE=address,undefined $(BIN)/pip install -q --no-build-isolation --no-deps \
		--upgrade --target build/sanitized .
	cd build/sanitized && $(SANITIZED) -k "not long and not bfloat16 and not float64-" \
		../../tests/test_scan.py ../../tests/test_errors.py
	cd build/sanitized && $(SANITIZED) -k "not flex" ../../tests/test_multi_state.py

# The torch-free kernels for 64-bit Arm, compiled, not run.
portable: $(VENV)/ready
	$(BIN)/pip install -q ziglang
	for file in $(notdir $(basename $(wildcard csrc/cpu/*_baseline.cpp csrc/cpu/*_avx*.cpp))); do \
		$(BIN)/python -m ziglang c++ -target aarch64-linux-gnu -std=c++20 -O1 -ffp-contract=off \
			-c csrc/cpu/$$file.cpp -o /dev/null || exit 1; \
	done

# A wheel, installed into an environment of its own and tested from an empty directory.
wheel: $(VENV)/ready
	$(BIN)/pip install -q build
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	rm -rf build/wheel-venv build/empty && mkdir -p build/empty
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install -q "$(TORCH)" pytest hypothesis build/wheel/*.whl
	cp -r tests build/empty/tests
	cd build/empty && ../wheel-venv/bin/pytest -q tests/test_package.py tests/test_errors.py tests/test_torch.py

clean:
	rm -rf build dist *.egg-info msrnn_ops/*.so $(VENV)
