# Builds, tests and installs ramlock. `make help` explains every target.
# SPDX-License-Identifier: GPL-2.0-or-later
#
# What is missing on the machine is looked for first (.ci/deps) and the building is then done by a second make, since
# how to build is found out when a Makefile is read: a library that came later would not be seen.

PREFIX  ?= /usr/local
DESTDIR ?=
# More arguments for pytest, such as ARGS="-k retarget".
ARGS    ?=

MAKEFLAGS += --no-print-directory
# Commands are shown with V=1.
AGAIN := $(MAKE) $(if $(V),,--silent)
.DEFAULT_GOAL := all

VENV       := .venv
PYTHON_BIN := $(VENV)/bin/python
INSTALLED  := $(VENV)/.installed
GUEST      := .cache/guest
PYTHON_CODE := injector tests examples benchmarks packaging

-include shim/rules.mk

.PHONY: all
all: ## Build the shim and .venv with the package, editable: .venv/bin/ramlock works
	@.ci/deps build
	@+$(AGAIN) built

.PHONY: built
built: shim $(INSTALLED)
	@:

.PHONY: help
help: ## Explain every target
	@echo 'Begin with "make demo" or "make test". Targets:'
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | sort | awk -F '\t' '{ printf "  %-13s %s\n", $$1, $$2 }'
	@echo 'Variables: ARGS="-k word" (test), DURATION=60 (stress, fuzz), SIZE=8G QUICK=1 KVM=1 (bench), DESTDIR= PREFIX=$(PREFIX) (install), PYTHON=python3.12, V=1 (show commands)'

.PHONY: deps
deps: ## Install what building and testing need, as far as it is missing (apt, as root or by sudo)
	@.ci/deps all

.PHONY: guest
guest: ## Fetch a kernel and build the small Linux guest that the demo and the tests boot
	@.ci/deps all
	@+$(AGAIN) guest-built

.PHONY: guest-built
guest-built: $(GUEST)/initramfs.cpio.gz
	@:

$(GUEST)/vmlinuz:
	@tests/guest/build kernel

$(GUEST)/initramfs.cpio.gz: $(GUEST)/vmlinuz tests/guest/build tests/guest/init tests/guest/agent.c
	@tests/guest/build initramfs

# Everything that a running guest needs.
.PHONY: ready
ready: built guest-built
	@:

# Roots with QEMUs of other releases, for the tests; what cannot be had here is said, and its tests are skipped.
RELEASES := bullseye trixie
.PHONY: releases
releases:
	@for r in $(RELEASES); do tests/guest/release $$r || :; done

# A clean root that packages are installed into, for the tests.
.PHONY: clean-root
clean-root:
	@tests/packaging/root || :

# The checker of alert rules; without it its tests are skipped.
.PHONY: promtool
promtool:
	@.ci/promtool || :

.PHONY: demo
demo: ## Show it: boot a guest under ramlock, raise and lower its guarantee, watch it hold
	@.ci/deps all
	@+$(AGAIN) ready
	@$(PYTHON_BIN) examples/demo.py

.PHONY: demo-pressure
demo-pressure: ## What it is worth: two guests share too little memory, one has a guarantee; PLOT=1 draws docs/pressure.svg
	@.ci/deps all
	@+$(AGAIN) ready $(if $(PLOT),$(VENV)/.bench)
	@$(PYTHON_BIN) examples/demo_pressure.py $(if $(PLOT),--plot docs/pressure.svg)

.PHONY: test
test: ## Run the whole test suite: linters, the shim's C units, the Python units, real QEMUs
	@.ci/deps test
	@+$(AGAIN) ready releases promtool clean-root $(VENV)/.package
	@+$(AGAIN) linted
	@+$(AGAIN) test-shim
ifeq ($(strip $(ARGS)),)
	@+$(AGAIN) --jobs=2 test-apart test-with-qemu
else
	@$(PYTHON_BIN) -m pytest tests $(ARGS)
endif

# These wait more than they compute, so both run at once. What the first says is shown in one piece.
APART := tests/unit tests/victim tests/packaging tests/fleet tests/test_make.py
.PHONY: test-apart test-with-qemu
test-apart:
	@$(PYTHON_BIN) -m pytest $(APART) >build/test-apart.log 2>&1 && result=0 || result=$$?; \
		cat build/test-apart.log; exit $$result

test-with-qemu:
	@$(PYTHON_BIN) -m pytest tests $(APART:%=--ignore=%)

.PHONY: lint
lint: ## Lint and type-check: ruff, mypy, gcc with every warning an error
	@.ci/deps build
	@+$(AGAIN) built
	@+$(AGAIN) linted

.PHONY: linted
linted: lint-shim
	@$(VENV)/bin/ruff check $(PYTHON_CODE)
	@$(VENV)/bin/ruff format --check $(PYTHON_CODE)
	@$(VENV)/bin/mypy --strict injector/ramlock
	@$(VENV)/bin/mypy --strict tests/conftest.py tests/pages.py tests/test_make.py tests/test_kernel_facts.py tests/qemu tests/packaging packaging examples benchmarks

SIZE ?= 8G
.PHONY: bench
bench: ## Measure who waits while memory is locked, against the usual ways; writes docs/benchmarks.md and plots
	@.ci/deps bench
	@+$(AGAIN) ready build/bench/bystander.so $(VENV)/.bench
	@$(PYTHON_BIN) benchmarks/lock.py --size $(SIZE) $(if $(QUICK),--quick) $(if $(KVM),--kvm)
	@$(PYTHON_BIN) benchmarks/report.py $(if $(QUICK),--quick)
	@$(PYTHON_BIN) benchmarks/silence.py
	@$(PYTHON_BIN) benchmarks/inject.py

$(VENV)/.bench: pyproject.toml $(INSTALLED)
	@echo "installing what plots need into $(VENV)"
	@$(PYTHON_BIN) -m pip --quiet --disable-pip-version-check install --editable '.[bench]'
	@touch $@

# The programs of docs/kernel-facts: exit 0 the fact holds, 1 it does not, 77 it cannot be asked here.
FACTS := $(patsubst docs/kernel-facts/%.c,build/kernel-facts/%,$(wildcard docs/kernel-facts/*.c))

.PHONY: facts
facts: ## Run the programs that show what the engine relies on in the kernel (docs/kernel-facts)
	@.ci/deps build
	@+$(AGAIN) facts-built
	@failed=0; for fact in $(FACTS); do \
		echo "$${fact##*/}"; $$fact || case $$? in 77) ;; *) failed=1 ;; esac; \
	done; exit $$failed

.PHONY: facts-built
facts-built: $(FACTS)
	@:

build/bench/bystander.so: benchmarks/bystander.c Makefile
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -O2 -fPIC -shared $(SHIM_WARNINGS) $(CFLAGS) -pthread -o $@ $< -ldl

build/kernel-facts/%: docs/kernel-facts/%.c docs/kernel-facts/fact.h docs/kernel-facts/group.h Makefile
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -D_GNU_SOURCE -O1 -g $(SHIM_WARNINGS) $(CFLAGS) -pthread -o $@ $<

DURATION ?= 60
.PHONY: stress
stress: ## Retarget a writing guest for DURATION seconds, 3,000 times under pressure; 1,000 injections in a storm, 500 kills; a balloon of 3 GiB
	@.ci/deps test
	@+$(AGAIN) ready
	@RAMLOCK_STRESS_SECONDS=$(DURATION) RAMLOCK_STRESS_INJECTIONS=1000 RAMLOCK_STRESS_KILLS=500 \
		RAMLOCK_STRESS_ROUNDS=200 RAMLOCK_STRESS_CHANGES=3000 RAMLOCK_STRESS_BALLOON=8 RAMLOCK_TEST_DEADLINE=3600 \
		$(PYTHON_BIN) -m pytest -rP tests/qemu/test_concurrency.py tests/qemu/test_retarget.py \
		tests/victim/test_storm.py tests/qemu/test_inject.py tests/qemu/test_targets.py \
		tests/qemu/test_discards.py::test_preloaded $(ARGS)

.PHONY: fuzz
fuzz: ## Fuzz each parser of the shim for DURATION seconds with libFuzzer, under ASan and UBSan
	@.ci/deps fuzz
	@+$(AGAIN) fuzz-run DURATION=$(DURATION)

# The package and what it needs go into a folder of their own, so that no system Python is touched.
LIB := $(PREFIX)/lib/ramlock
# The Python that runs the installed command.
INTERPRETER ?= $$($(PYTHON_BIN) -c 'import sys; print(sys._base_executable)')
.PHONY: install
install: ## Install the ramlock command, the shim, man pages and shell completion under DESTDIR and PREFIX
	@.ci/deps install
	@+$(AGAIN) shim $(PYTHON_BIN)
	@install -d '$(DESTDIR)$(LIB)' '$(DESTDIR)$(PREFIX)/bin'
	@install -m 0755 injector/ramlock/ramlock.so '$(DESTDIR)$(LIB)/ramlock.so'
	@rm -rf '$(DESTDIR)$(LIB)/python' build/lib
	@$(PYTHON_BIN) -m pip --quiet --disable-pip-version-check install --root-user-action ignore \
		--target '$(DESTDIR)$(LIB)/python' .
	@rm -rf '$(DESTDIR)$(LIB)/python/bin' '$(DESTDIR)$(LIB)'/python/ramlock-*.dist-info/direct_url.json
	@ln -sf ../../ramlock.so '$(DESTDIR)$(LIB)/python/ramlock/ramlock.so'
	@printf '%s\n' "#!$(INTERPRETER)" '# The ramlock command.' \
		'import sys' 'sys.path.insert(0, "$(LIB)/python")' 'from ramlock.__main__ import main' 'main()' \
		>'$(DESTDIR)$(PREFIX)/bin/ramlock'
	@chmod 0755 '$(DESTDIR)$(PREFIX)/bin/ramlock'
	@+$(AGAIN) install-docs DOC_PYTHON="env PYTHONPATH='$(DESTDIR)$(LIB)/python' $(CURDIR)/$(PYTHON_BIN) -B"
	@echo 'installed $(DESTDIR)$(PREFIX)/bin/ramlock and $(DESTDIR)$(LIB)/ramlock.so'

# Man pages and shell completion say what the commands themselves say, so they are made by a Python that has them.
DOC_PYTHON ?= $(PYTHON_BIN)
ZSH_FOLDER ?= $(PREFIX)/share/zsh/site-functions
SHELLS     := bash zsh fish

.PHONY: docs
docs:
	@mkdir -p build/docs
	@$(DOC_PYTHON) packaging/man.py build/docs
	@set -e; for shell in $(SHELLS); do \
		_RAMLOCK_COMPLETE=$${shell}_source $(DOC_PYTHON) -m ramlock >build/docs/ramlock.$$shell; \
	done

.PHONY: install-docs
install-docs: docs
	@install -D -m 0644 -t '$(DESTDIR)$(PREFIX)/share/man/man1' build/docs/ramlock.1
	@install -D -m 0644 -t '$(DESTDIR)$(PREFIX)/share/man/man7' build/docs/ramlock-protocol.7
	@install -D -m 0644 build/docs/ramlock.bash '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/ramlock'
	@install -D -m 0644 build/docs/ramlock.zsh '$(DESTDIR)$(ZSH_FOLDER)/_ramlock'
	@install -D -m 0644 -t '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d' build/docs/ramlock.fish

# A wheel says by its name which glibc it needs: no newer one than this, which auditwheel holds against the shim.
DIST     ?= dist
PLATFORM := manylinux_2_28_$(shell uname -m)
SDIST     = $(DIST)/ramlock-$(SHIM_VERSION).tar.gz

.PHONY: wheel
wheel: ## Build the source distribution, and out of it the wheel, into dist/
	@.ci/deps build
	@+$(AGAIN) $(VENV)/.package
	@rm -rf build/wheel
	@$(PYTHON_BIN) -m build --no-isolation --outdir build/wheel . >build/wheel.log 2>&1 || { tail -n 30 build/wheel.log >&2; exit 1; }
	@mkdir -p '$(DIST)'
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON_BIN) -m auditwheel repair --plat $(PLATFORM) --only-plat \
		--wheel-dir '$(DIST)' build/wheel/*.whl >>build/wheel.log 2>&1 || { tail -n 5 build/wheel.log >&2; exit 1; }
	@cp build/wheel/*.tar.gz '$(DIST)'
	@echo 'built $(SDIST) and the wheel beside it'

.PHONY: deb
deb: wheel ## Build the Debian package, out of the source distribution, into dist/
	@.ci/deps package
	@rm -rf build/deb && mkdir -p build/deb
	@tar -xf '$(SDIST)' -C build/deb
	@cd build/deb/ramlock-* && DEB_BUILD_OPTIONS='noautodbgsym parallel=$(JOBS)' MAKEFLAGS= \
		dpkg-buildpackage --build=binary --unsigned-changes >../log 2>&1 || { tail -n 30 ../log >&2; exit 1; }
	@mv build/deb/ramlock_*.deb '$(DIST)'
	@echo 'built $(DIST)/ramlock_$(SHIM_VERSION)_amd64.deb'

.PHONY: dist
dist: deb ## Build all packages into dist/: source distribution, wheel, Debian package

$(VENV)/.package: pyproject.toml $(INSTALLED)
	@echo "installing what packaging needs into $(VENV)"
	@$(PYTHON_BIN) -m pip --quiet --disable-pip-version-check install --editable '.[package]'
	@touch $@

.PHONY: clean
clean: ## Remove what was built; keep .venv and the guest
	rm -rf build dist injector/*.egg-info injector/ramlock/ramlock.so .pytest_cache .mypy_cache .ruff_cache
	find injector tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove everything that is not in the source
	rm -rf .venv .cache

$(PYTHON_BIN):
	@python=$$(.ci/deps python) && echo "making $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(INSTALLED): pyproject.toml $(wildcard setup.py) | $(PYTHON_BIN)
	@echo "installing the package into $(VENV)"
	@$(PYTHON_BIN) -m pip --quiet --disable-pip-version-check install --editable '.[test]'
	@touch $@
