# The same commands for people and for CI. `make` alone lists them.
PYTHON ?= python3
# Devices of `make run` and `make serve`.
PREFILL ?= auto
DECODE ?= auto
PROMPT ?= The for statement is used to
# Passed on to pytest and to the benchmarks: `make test ARGS="-k health"`.
ARGS ?=
# Where the router of `make serve` listens for HTTP; empty: nowhere.
HTTP ?=
# How long `make soak` goes on.
MINUTES ?= 5

# What a GPU needs as well, where there is one.
comma := ,
EXTRAS := test$(if $(wildcard /dev/nvidiactl),$(comma)gpu)

BIN := .venv/bin
INSTALLED := .venv/.installed
ALERTS := k8s/components/monitoring/alerts

export PREFILL DECODE PROMPT HTTP

.DEFAULT_GOAL := help
.PHONY: help install run serve test test-slow test-all test-gpu bench faults soak fuzz check protos protos-accept docs constraints

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## .venv with everything the commands here need

$(INSTALLED): pyproject.toml hatch_build.py $(wildcard protos/pdserve/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pdserve needs Python 3.11 or later: make install PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: minutes the first time, seconds later"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

run: install ## three services up, one prompt through all of them, and down again (PROMPT=...)
	@$(BIN)/supervisord -c supervisord.conf >.venv/services.log 2>&1 & services=$$!; \
	trap 'kill $$services 2>/dev/null; wait $$services' EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/pdserve generate --wait 60 --temperature 0 --max-tokens 120 "$$PROMPT" || { status=$$?; cat .venv/services.log; exit $$status; }

serve: HTTP = 127.0.0.1:8000
serve: install ## the same three services, staying up until Ctrl-C
	@echo 'router   127.0.0.1:50051   metrics http://127.0.0.1:9101/metrics   OpenAI API http://$(HTTP)/v1'
	@echo 'prefill  127.0.0.1:50052   metrics http://127.0.0.1:9102/metrics'
	@echo 'decode   127.0.0.1:50053   metrics http://127.0.0.1:9103/metrics'
	@echo '  $(BIN)/pdserve generate "$(PROMPT)"'
	@echo '  grpcurl -plaintext -d '"'"'{"prompt": "$(PROMPT)"}'"'"' 127.0.0.1:50051 pdserve.v1.RouterService/Generate'
	@exec $(BIN)/supervisord -c supervisord.conf

test: install ## every fast test that needs no GPU
	$(BIN)/pytest -q -m "not slow and not gpu" $(ARGS)

test-slow: install ## the slow tests that need no GPU
	$(BIN)/pytest -q -m "slow and not gpu" $(ARGS)

test-all: install ## both
	$(BIN)/pytest -q -m "not gpu" $(ARGS)

test-gpu: install ## tests that need a CUDA device, and on it the engine's, the kernels' and the services' own
	PDSERVE_TEST_DEVICE=cuda $(BIN)/pytest -q -m gpu $(ARGS)
	PDSERVE_TEST_DEVICE=cuda $(BIN)/pytest -q -m "not slow" tests/common/kernels tests/decode_service \
	    tests/integration/test_serving.py $(ARGS)

bench: install ## benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

faults: install ## every fault in every phase at every role, and what was promised for each (ARGS="kill decode")
	$(BIN)/python -u -m benchmarks.faults $(ARGS)

soak: install ## mixed traffic under random faults, for so many minutes (MINUTES=5; ARGS=kills: kills of workers alone)
	$(BIN)/python -u -m benchmarks.soak $(MINUTES) $(ARGS)

fuzz: install ## ten thousand random requests and as many random headers, and what stays behind
	@$(BIN)/python -m pip install -qq --disable-pip-version-check atheris || echo "no atheris for this Python: nothing will be fuzzed by coverage"
	$(BIN)/python -u -m benchmarks.fuzz $(ARGS)

check: install ## lint, format, types, import rules, and the contract against the accepted one
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/accepted.yaml

protos: ## regenerate the stubs in pdserve/v1
	@rm -f $(INSTALLED)
	@$(MAKE) --no-print-directory install

protos-accept: install ## declare the present protos the contract that later ones must not break
	$(BIN)/buf build --exclude-source-info -o protos/accepted.yaml

docs: install ## pages that are made from the code, and the alerts for the Prometheus operator
	$(BIN)/python -m common.metrics_page > docs/metrics.md
	$(BIN)/python -m common.settings_page > docs/settings.md
	$(BIN)/python -m common.rpc_page > docs/rpc.md
	@{ sed '/^spec:/q' $(ALERTS)/prometheus-rule.yaml; sed 's/^./  &/' $(ALERTS)/pdserve.rules.yaml; } > $(ALERTS)/.made
	@mv $(ALERTS)/.made $(ALERTS)/prometheus-rule.yaml

# Extras that images may be built with.
IMAGE_EXTRAS := flash-attn-3 flashinfer gpu http tracing
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
    --custom-compile-command "make constraints" -

constraints: install ## the versions that images are made of, resolved anew
	$(BIN)/python images/requirements.py build | $(COMPILE) -o images/build-constraints.txt
	$(BIN)/python images/requirements.py run $(IMAGE_EXTRAS) | $(COMPILE) -o images/constraints.txt
