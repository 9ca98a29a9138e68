# `make distill` and `make test` work on a fresh clone: each makes .venv first, once.

PYTHON ?= python3
# pip takes a CPU build where one is at hand. On a machine without one, and without a GPU:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
RUN ?= runs/lab-unified

BIN := .venv/bin
# Two workers keep two cores busy; more need more memory than CI has.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

.PHONY: distill test check lint

# The main job: plan, training, evaluation and report, in under 12 minutes on two cores.
# Called again it resumes, or just reports; RUN=runs/other starts another.
distill: $(INSTALLED)
	$(BIN)/fewstep distill recipes/lab/unified.yaml --out $(RUN) \
	    $(if $(wildcard $(RUN)/checkpoints/last.pt),--resume)

# Everything, in under 15 minutes on two cores.
test: lint
	$(PYTEST)

# Before a commit: the fast tests take just under 2 minutes on two cores, lint half of one.
check: lint
	$(PYTEST) -m "not slow and not gpu"

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# torch first and alone, so that nothing else decides which build is taken. Never torchvision.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e .
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/pip install -e ".[dev,diffusers,data]"
	touch $@
