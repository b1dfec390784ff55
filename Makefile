# pkcs11-ha: verbs. scripts/setup knows the machine, build.py knows the build.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
CHAOS ?= 2000
CHAOS_OPERATIONS ?= 1000000
CHAOS_SEED ?=
FUZZ_SECONDS ?= 60
LEAKS ?= 10000 1000000
TESTS ?=
# ThreadSanitizer does not follow a fork into its child, which makes its locks anew.
THREADED := tests/boundary/test_threads.py tests/ha/test_stress.py tests/replay/test_threads.py tests/worker -k 'not fork'

BIN := .venv/bin
C_FLAGS := -std=c11 -O2 -Wall -Wextra -Wconversion -Werror -Iinclude -pthread
C_FILES = $(wildcard shim/csrc/*.[ch] shim/worker/*.[ch] include/*.h demo/*.[ch] bench/*.[ch] tests/*.[ch] tests/*/*.[ch])

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-demo build test demo bench lint format asan tsan valgrind leaks fuzz chaos pictures install clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## install what building and testing need and is missing: system packages, .venv
	@PYTHON='$(PYTHON)' scripts/setup test

setup-demo: ## the same for building and the demo alone: less
	@PYTHON='$(PYTHON)' scripts/setup demo

build: setup-demo build/demo-client build/p11bench ## build/libpkcs11-ha.so; the command is .venv/bin/p11ha
	@$(BIN)/python build.py

build/demo-client: demo/client.c include/pkcs11.h include/pkcs11_ha.h
build/p11bench: bench/p11bench.c include/pkcs11.h
build/demo-client build/p11bench:
	@mkdir -p build
	$(CC) $(C_FLAGS) -o $@ $< -ldl

test: setup build lint ## everything that must hold: lint and the test suite
	$(BIN)/pytest

demo: build ## two HSMs, one killed and brought back under a signing program
	@$(BIN)/python -m demo.run

bench: setup build ## speed against the bare module and p11-kit's proxy and server; BENCH="--quick"
	@$(BIN)/python -m bench.bench $(BENCH)

lint: setup build ## ruff, mypy --strict, clang-format; compiler warnings are errors in the build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: setup ## put Python and C into the form that lint wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# Our C under a sanitizer, whose runtime must be in a process before our module is. What is lost is looked for in programs in
# C alone (tests/boundary/test_lost_memory.py): a Python at its end has lost much of its own. libstdc++ is there before any vendor's
# library in C++, as a sanitizer looks for its `throw` when it starts.
SANITIZED = $(BIN)/python build.py --sanitize=$(1) && PKCS11_HA_MODULE=$(CURDIR)/build/$(2)/libpkcs11-ha.so \
    LD_PRELOAD=$$($(CC) -print-file-name=lib$(2).so):$$($(CC) -print-file-name=libstdc++.so.6)

asan: setup ## the tests with AddressSanitizer and UndefinedBehaviorSanitizer
	$(call SANITIZED,address,asan) ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:handle_segv=0 \
	    UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/pytest $(TESTS)

tsan: setup ## many threads in our C with ThreadSanitizer
	$(call SANITIZED,thread,tsan) TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:suppressions=$(CURDIR)/tests/tsan.supp \
	    $(BIN)/pytest $(or $(TESTS),$(THREADED))

valgrind: setup build ## programs in C under valgrind, the long stories too
	P11HA_VALGRIND=1 $(BIN)/pytest tests/boundary/test_lost_memory.py

leaks: setup build ## 10,000 lives of the module and 1,000,000 sessions; LEAKS="100 5000" for fewer
	P11HA_LEAKS='$(LEAKS)' $(BIN)/pytest -s tests/boundary/test_leaks.py

fuzz: setup ## libFuzzer on the boundary and the worker protocol; FUZZ_SECONDS=600 for longer than a minute each
	$(BIN)/python build.py --sanitize=fuzzer
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m tests.fuzz.run

chaos: setup build ## a million operations while members die, and 2,000 histories of writes; CHAOS=100 CHAOS_OPERATIONS=10000 for fewer
	$(BIN)/python -m tests.soak --operations $(CHAOS_OPERATIONS) --seconds 1800 $(if $(CHAOS_SEED),--seed $(CHAOS_SEED)) --keep build/soak
	P11HA_CHAOS=$(CHAOS) $(BIN)/pytest -s tests/chaos

pictures: setup build ## screens of the command, of real runs, into docs/pictures
	$(BIN)/python -m demo.pictures

install: ## what was built into PREFIX (/usr/local), below DESTDIR if given
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' scripts/install

clean: ## remove what was built; .venv stays
	rm -rf build shim/pkcs11_ha/ck.py shim/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
