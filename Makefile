# `make demo` and `make test` do all the set-up on a machine with Python 3.11+ and make.
# A CPU-only torch, 4 GB smaller: make setup TORCH=cpu (from PyTorch's own package index).

PYTHON ?= python3
TORCH ?= lock
UV_VERSION := 0.13.9
BIN := .venv/bin
# Ray's ports listen on all addresses of a machine. Where others reach it, set RAY_AUTH_MODE=token (README, Safety).
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export UV_PROJECT_ENVIRONMENT := .venv
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check soak bench serve watch head stop

setup: .venv/.ready

.tools/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit("raymoe needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet uv==$(UV_VERSION)

# torch and the packages that come with it.
WITHOUT_TORCH = $(foreach p,torch triton $(shell sed -n 's/^name = "\(nvidia-[a-z0-9-]*\|cuda-[a-z0-9-]*\)"/\1/p' uv.lock),--no-install-package $(p))

# Bytecode is compiled once here: every Ray process starts in half the time.
COMPILE = $(BIN)/python -m compileall -q -j 0 $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') >/dev/null || true

.venv/.ready: pyproject.toml uv.lock .tools/bin/uv
ifeq ($(TORCH),cpu)
	.tools/bin/uv sync --quiet --frozen --extra dev --python $(PYTHON) $(WITHOUT_TORCH)
	.tools/bin/uv pip install --quiet --python $(BIN)/python --torch-backend cpu "torch==$$(sed -n '/^name = "torch"/{n;s/version = "\(.*\)"/\1/p}' uv.lock)"
else
	.tools/bin/uv sync --quiet --frozen --extra dev --python $(PYTHON)
endif
	$(COMPILE)
	touch $@

# Real clients of the API, an object store's server and experiment trackers, for the soak tests. torch stays as installed.
.venv/.clients: .venv/.ready
	.tools/bin/uv sync --quiet --frozen --inexact --no-install-project --extra dev --extra clients --extra tensorboard --extra wandb --extra mlflow --python $(PYTHON) $(WITHOUT_TORCH)
	$(COMPILE)
	touch $@

demo: setup
	$(BIN)/raymoe demo

test: setup
	$(BIN)/python -m pytest -m "not soak"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The dashboards' tests need Prometheus; without it they are skipped.
soak: .venv/.clients
	-$(BIN)/python dashboards/install_prometheus.py
	$(BIN)/python -m pytest -m soak

bench: setup
	$(BIN)/python jobs/benchmark.py layer
	$(BIN)/python jobs/benchmark.py step
	$(BIN)/python jobs/benchmark.py memory

# Serve the newest export behind an OpenAI-compatible API until `make stop`.
serve: setup
	$(BIN)/raymoe serve --start

# Prometheus over the runs and applications under RAYMOE_HOME, with the alerts of dashboards/.
watch: setup
	$(BIN)/python dashboards/watch.py

# A Ray head for `ray job submit`, in the foreground. `ray job stop` waits for the last checkpoint.
head: setup
	RAY_JOB_STOP_WAIT_TIME_S=120 RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5 PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(BIN)/ray start --head --block --temp-dir="$$($(BIN)/python -m raymoe.ops.local_head folder)"

# Stop the Ray head of `make head` or `make serve`, and what runs on it. Another Ray of this machine keeps running.
stop: setup
	$(BIN)/python -m raymoe.ops.local_head stop
