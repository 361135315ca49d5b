# What one types often. Every target does the same as the command behind it; none is needed.
PYTHON ?= python

.PHONY: help install test lint notebooks demo bench

help:
	@echo "make install   this project, editable, with everything for the course and the tests"
	@echo "make test      all tests"
	@echo "make lint      ruff and mypy"
	@echo "make notebooks the lessons, executed again, from notebooks/src/ (minutes)"
	@echo "make demo      watch the embedded model write"
	@echo "make bench     latency against transformers, into benchmarks/results/ (ten minutes on two cores)"

install:
	$(PYTHON) -m pip install -e '.[course,test]'

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

notebooks:
	$(PYTHON) notebooks/build.py

demo:
	$(PYTHON) -m minillm demo

bench:
	mkdir -p benchmarks/results
	for shape in qwen3-0.6b smollm2-135m; do \
	  $(PYTHON) -m minillm bench latency --model random:$$shape --dtype bfloat16 --against transformers \
	    --json benchmarks/results/latency-$$shape.json || exit 1; done
