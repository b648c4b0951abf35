# Everything is set up by `make demo` or `make test` on a machine with Python 3.11+ and make.
# A CPU-only torch: make setup TORCH=cpu (takes torch from PyTorch's own CPU index instead of the ordinary one).

PYTHON ?= python3
TORCH ?= lock
UV_VERSION := 0.13.9
BIN := .venv/bin
# Ray listens on all addresses of a machine: where others reach it, set RAY_AUTH_MODE=token (README, Safety).
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export UV_PROJECT_ENVIRONMENT := .venv
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check soak bench serve watch head

setup: .venv/.ready

.tools/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit("raymoe needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet uv==$(UV_VERSION)

# All that comes with torch.
WITHOUT_TORCH = $(foreach p,torch triton $(shell sed -n 's/^name = "\(nvidia-[a-z0-9-]*\|cuda-[a-z0-9-]*\)"/\1/p' uv.lock),--no-install-package $(p))

# Bytecode is compiled once here: it halves the start of every Ray process.
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

# Real clients of the API, beside what is there: torch stays as it is, whichever it is.
.venv/.clients: .venv/.ready
	.tools/bin/uv sync --quiet --frozen --inexact --no-install-project --extra dev --extra clients --python $(PYTHON) $(WITHOUT_TORCH)
	$(COMPILE)
	touch $@

demo: setup
	$(BIN)/python jobs/demo.py

test: setup
	$(BIN)/python -m pytest -m "not soak"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

soak: .venv/.clients
	$(BIN)/python -m pytest -m soak

bench: setup
	$(BIN)/python jobs/benchmark.py layer
	$(BIN)/python jobs/benchmark.py step
	$(BIN)/python jobs/benchmark.py memory

# The newest export, behind an OpenAI-compatible API; it stays until `serve shutdown`.
serve: setup
	$(BIN)/python jobs/serve.py --start

# Prometheus over the runs and applications under RAYMOE_HOME, with the alerts of dashboards/.
watch: setup
	$(BIN)/python dashboards/watch.py

# A Ray head for `ray job submit`; `ray job stop` then waits for the last checkpoint. With RAY_AUTH_MODE=token it asks
# for the token that `ray get-auth-token --generate` makes.
head: setup
	RAY_JOB_STOP_WAIT_TIME_S=120 RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ray start --head --block
