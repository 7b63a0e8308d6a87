# How the shim and its C tests are built. Included by the top-level Makefile.
# SPDX-License-Identifier: GPL-2.0-or-later

SHIM          := injector/ramlock/ramlock.so
SHIM_BUILD    := build/shim
JOBS          ?= $(shell nproc)
SHIM_VERSION  := $(shell sed -n 's/^__version__.*"\([^"]*\)".*/\1/p' injector/ramlock/__init__.py 2>/dev/null)
SHIM_SOURCES  := $(wildcard shim/*.c)
SHIM_OBJECTS  := $(SHIM_SOURCES:shim/%.c=$(SHIM_BUILD)/%.o) $(SHIM_BUILD)/trampoline.o
SHIM_WARNINGS := -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Werror
SHIM_CFLAGS   := -std=gnu11 -O2 -g -fPIC -fvisibility=hidden -fno-strict-aliasing -fstack-protector-strong \
                 -D_GNU_SOURCE -DRAMLOCK_VERSION='"$(or $(SHIM_VERSION),0.0.0)"' $(SHIM_WARNINGS) $(CFLAGS)

# No path of this tree goes into the shim; shim/glibc.h says why every unit includes that.
SHIM_ONLY     := -ffile-prefix-map=$(CURDIR)=. -include shim/glibc.h

# QEMU's process gets no library from us: json-c is linked in where a static one exists.
JSONC_STATIC  := $(shell f=$$($(CC) -print-file-name=libjson-c.a); [ "$$f" != libjson-c.a ] && echo "$$f")
JSONC_LIBS    := $(or $(JSONC_STATIC),-ljson-c)
SHIM_LDFLAGS  := -shared -Wl,--version-script=shim/ramlock.map -Wl,-z,defs,-z,relro,-z,now,-z,noexecstack \
                 -Wl,--exclude-libs,ALL -Wl,--build-id=sha1 -Wl,-soname,ramlock.so $(LDFLAGS)

.PHONY: shim test-shim lint-shim
shim: $(SHIM) ## Build the shim, injector/ramlock/ramlock.so

$(SHIM): $(SHIM_OBJECTS) shim/ramlock.map shim/rules.mk
	$(CC) -o $@.tmp $(SHIM_LDFLAGS) $(SHIM_OBJECTS) $(JSONC_LIBS)
	mv -f $@.tmp $@

$(SHIM_BUILD)/%.o: shim/%.c shim/glibc.h shim/rules.mk injector/ramlock/__init__.py | $(SHIM_BUILD)
	$(CC) $(SHIM_CFLAGS) $(SHIM_ONLY) -MMD -MP -c -o $@ $<

$(SHIM_BUILD)/%.o: shim/%.S shim/rules.mk | $(SHIM_BUILD)
	$(CC) -fPIC -c -o $@ $<

# The C units run the same sources under the sanitizers.
SHIM_TEST_SOURCES := $(wildcard tests/shim/test_*.c)
SHIM_TESTS        := $(SHIM_TEST_SOURCES:tests/shim/%.c=$(SHIM_BUILD)/tests/%)
SHIM_TEST_UNITS   := $(filter-out shim/shim.c shim/look.c shim/glibc.c,$(SHIM_SOURCES))
SHIM_TEST_OBJECTS := $(SHIM_TEST_UNITS:shim/%.c=$(SHIM_BUILD)/sanitized/%.o)
SHIM_TEST_CFLAGS  := $(filter-out -O2,$(SHIM_CFLAGS)) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all \
                     -fno-omit-frame-pointer -Ishim

# Parsers of what comes from outside, fuzzed: tests/shim/fuzz_NAME.c, each with the inputs in tests/shim/corpus/NAME. The
# tests run these and FUZZ_RUNS inputs made of them by gcc's sanitizers; `make fuzz` needs clang.
FUZZED      := $(filter-out main,$(patsubst tests/shim/fuzz_%.c,%,$(wildcard tests/shim/fuzz_*.c)))
FUZZ_BUILD  := build/fuzz
FUZZ_RUNS   ?= 2000
CLANG       ?= clang
FUZZ_CFLAGS := $(filter-out $(SHIM_WARNINGS) -O2,$(SHIM_CFLAGS)) -O1 -fno-omit-frame-pointer -Ishim \
               -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all
FUZZ_LIMITS := -timeout=10 -rss_limit_mb=1024 -max_len=2048 -print_final_stats=1

.PHONY: shim-tests
shim-tests: $(SHIM_TESTS) $(FUZZED:%=$(SHIM_BUILD)/tests/fuzz_%)

test-shim: ## Run the shim's C units, and its parsers over bad input, under ASan and UBSan
	@+$(MAKE) --silent --jobs=$(JOBS) shim-tests
	@set -e; for t in $(SHIM_TESTS); do $$t; done
	@set -e; for f in $(FUZZED); do $(SHIM_BUILD)/tests/fuzz_$$f tests/shim/corpus/$$f $(FUZZ_RUNS); done

$(SHIM_BUILD)/tests/fuzz_%: tests/shim/fuzz_%.c tests/shim/fuzz_main.c $(wildcard tests/shim/*.h) $(SHIM_TEST_OBJECTS) $(wildcard shim/*.h) shim/rules.mk | $(SHIM_BUILD)/tests
	$(CC) $(SHIM_TEST_CFLAGS) -o $@ $< tests/shim/fuzz_main.c $(SHIM_TEST_OBJECTS) $(JSONC_LIBS) -lpthread -ldl

.PHONY: fuzzers
fuzzers: $(FUZZED:%=$(FUZZ_BUILD)/%)

# New inputs stay in build/fuzz/corpus, and one that fails in build/fuzz.
.PHONY: fuzz-run
fuzz-run:
	@+$(MAKE) --silent --jobs=$(JOBS) fuzzers
	@set -e; for f in $(FUZZED); do \
		mkdir -p $(FUZZ_BUILD)/corpus/$$f; echo "$$f for $(DURATION) s"; \
		$(FUZZ_BUILD)/$$f $(FUZZ_LIMITS) -max_total_time=$(DURATION) -artifact_prefix=$(FUZZ_BUILD)/$$f- \
			-dict=tests/shim/fuzz.dict $(FUZZ_BUILD)/corpus/$$f tests/shim/corpus/$$f 2>$(FUZZ_BUILD)/$$f.log || \
			{ tail -n 40 $(FUZZ_BUILD)/$$f.log; exit 1; }; \
		sed -n 's/^stat::\(number_of_executed_units\|new_units_added\): */  \1 /p' $(FUZZ_BUILD)/$$f.log; \
	done

$(FUZZ_BUILD)/%: tests/shim/fuzz_%.c $(wildcard tests/shim/*.h) $(SHIM_TEST_UNITS:shim/%.c=$(FUZZ_BUILD)/units/%.o) shim/rules.mk
	$(CLANG) $(FUZZ_CFLAGS) -fsanitize=fuzzer -o $@ $< $(SHIM_TEST_UNITS:shim/%.c=$(FUZZ_BUILD)/units/%.o) $(JSONC_LIBS) -lpthread -ldl

$(FUZZ_BUILD)/units/%.o: shim/%.c shim/rules.mk injector/ramlock/__init__.py
	@mkdir -p $(@D)
	$(CLANG) $(FUZZ_CFLAGS) -MMD -MP -c -o $@ $<

$(SHIM_BUILD)/tests/%: tests/shim/%.c $(wildcard tests/shim/*.h) $(SHIM_TEST_OBJECTS) $(wildcard shim/*.h) shim/rules.mk | $(SHIM_BUILD)/tests
	$(CC) $(SHIM_TEST_CFLAGS) -rdynamic -Wl,-z,relro,-z,now -o $@ $< $(SHIM_TEST_OBJECTS) $(JSONC_LIBS) -lpthread -ldl

$(SHIM_BUILD)/tests/test_got: $(SHIM_BUILD)/tests/later.so

$(SHIM_BUILD)/tests/later.so: tests/shim/later.c shim/rules.mk | $(SHIM_BUILD)/tests
	$(CC) $(filter-out -fvisibility=hidden,$(SHIM_CFLAGS)) -shared -Wl,-z,relro,-z,now -o $@ $<

$(SHIM_BUILD)/sanitized/%.o: shim/%.c shim/rules.mk injector/ramlock/__init__.py | $(SHIM_BUILD)/sanitized
	$(CC) $(SHIM_TEST_CFLAGS) -MMD -MP -c -o $@ $<

lint-shim: ## Compile the shim with every warning and gcc's analyzer as errors
	@+$(MAKE) --silent --jobs=$(JOBS) $(SHIM_SOURCES:shim/%.c=$(SHIM_BUILD)/linted/%)

$(SHIM_BUILD)/linted/%: shim/%.c shim/rules.mk injector/ramlock/__init__.py | $(SHIM_BUILD)/linted
	$(CC) $(SHIM_CFLAGS) $(SHIM_ONLY) -fanalyzer -MMD -MP -MF $@.d -MT $@ -c -o /dev/null $<
	touch $@

$(SHIM_BUILD) $(SHIM_BUILD)/tests $(SHIM_BUILD)/sanitized $(SHIM_BUILD)/linted:
	mkdir -p $@

-include $(SHIM_OBJECTS:.o=.d) $(SHIM_TEST_OBJECTS:.o=.d) $(SHIM_TEST_UNITS:shim/%.c=$(FUZZ_BUILD)/units/%.d) $(SHIM_SOURCES:shim/%.c=$(SHIM_BUILD)/linted/%.d)
