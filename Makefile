# Two commands: `make simulate` (set-up and the main job) and `make test` (set-up and all tests).

PYTHON ?= python3
BIN := .venv/bin
FACES := .fedcunet/data/faces
SETTINGS := $(wildcard simulations/settings/*.toml)

.PHONY: simulate test check clean

simulate: .venv/installed
	$(BIN)/fedcunet data make faces --out $(FACES) --num-train 360 --num-test 120
	$(BIN)/python -m simulations compare $(SETTINGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The environment is made anew when its packages change.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[federated,dev]'
	touch $@

clean:
	rm -rf .venv .fedcunet
