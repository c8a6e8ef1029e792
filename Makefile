# The two commands of a newcomer: make serve, make test. Everything else is for those who change the code.
# Each process of a cluster would else compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup serve test check format protos constraints bench

setup: .venv/.installed

# Made anew only when what is to be installed changes, so that a second `make serve` starts at once.
.venv/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/.installed

serve: setup
	$(BIN)/zephyra serve

# Two processes, of one thread each, for what needs no cluster: the first trains the starter meanwhile. Clusters have the
# machine to themselves.
test: setup
	rm -rf artifacts/tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not ray" --starter artifacts/tested
	$(BIN)/python -m pytest -m ray --starter artifacts/tested tests/e2e tests/monitoring tests/serving

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# make bench MODEL=DIR ARGS="--adapters 8 --peers": on an idle machine. Without a model, a little of everything on a tiny one.
bench: setup
	$(BIN)/python -m benchmarks.engine $(if $(MODEL),--model $(MODEL),--quick) $(ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. deployments/protos/zephyra.proto

constraints: setup
	(echo "# Every package of a working environment, pinned. Made by: make constraints"; \
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//') > constraints.txt
