# Short names, for the active environment: pip install -e '.[test,lint,docs]'. What CI runs is .ci/run.
.PHONY: test quick long lint docs stress measurements

test:
	python -m pytest

quick:
	python -m pytest -m "not slow"

# What `make test` leaves out.
long:
	python -m pytest -m long

lint:
	pre-commit run --all-files

docs:
	sphinx-build -nW --keep-going -b html docs build/docs

# Some of distributed's own tests, and a thousand kills: about three quarters of an hour.
# DISTRIBUTED=FOLDER is a checkout of distributed; otherwise its tests come from Debian's package.
stress:
	python tests/stress/suite --choice quick --at-once --distributed "$${DISTRIBUTED:-$$(.ci/distributed-tests "$(CURDIR)/build/distributed")}"
	python tests/stress/chaos

# The page and its pictures, from benchmarks/results.
measurements:
	python benchmarks/page
