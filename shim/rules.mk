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

.PHONY: shim-tests
shim-tests: $(SHIM_TESTS)

test-shim: ## Run the shim's C units under ASan and UBSan
	@+$(MAKE) --silent --jobs=$(JOBS) shim-tests
	@set -e; for t in $(SHIM_TESTS); do $$t; done

$(SHIM_BUILD)/tests/%: tests/shim/%.c $(wildcard tests/shim/*.h) $(SHIM_TEST_OBJECTS) $(wildcard shim/*.h) shim/rules.mk | $(SHIM_BUILD)/tests
	$(CC) $(SHIM_TEST_CFLAGS) -Wl,-z,relro,-z,now -o $@ $< $(SHIM_TEST_OBJECTS) $(JSONC_LIBS) -lpthread -ldl

$(SHIM_BUILD)/sanitized/%.o: shim/%.c shim/rules.mk injector/ramlock/__init__.py | $(SHIM_BUILD)/sanitized
	$(CC) $(SHIM_TEST_CFLAGS) -MMD -MP -c -o $@ $<

lint-shim: ## Compile the shim with every warning and gcc's analyzer as errors
	@+$(MAKE) --silent --jobs=$(JOBS) $(SHIM_SOURCES:shim/%.c=$(SHIM_BUILD)/linted/%)

$(SHIM_BUILD)/linted/%: shim/%.c shim/rules.mk injector/ramlock/__init__.py | $(SHIM_BUILD)/linted
	$(CC) $(SHIM_CFLAGS) $(SHIM_ONLY) -fanalyzer -MMD -MP -MF $@.d -MT $@ -c -o /dev/null $<
	touch $@

$(SHIM_BUILD) $(SHIM_BUILD)/tests $(SHIM_BUILD)/sanitized $(SHIM_BUILD)/linted:
	mkdir -p $@

-include $(SHIM_OBJECTS:.o=.d) $(SHIM_TEST_OBJECTS:.o=.d) $(SHIM_SOURCES:shim/%.c=$(SHIM_BUILD)/linted/%.d)
