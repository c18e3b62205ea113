# What a contributor runs; CONTRIBUTING.md says when.
.PHONY: lint test-fast test docs

lint:  ## a first answer, in about a minute
	ruff check .
	ruff format --check .
	pyright
	pyright -p pyright-strict.json
	lint-imports

test-fast:  ## a second one, in ninety: every room
	pytest -m "not slow" -n 2 --dist loadfile

test:  ## everything
	pytest -n 2 --dist loadfile

docs:  ## the site, into build/docs; a warning is an error
	mkdocs build --strict
