# How the shim and its C tests are built. Included by the top-level Makefile.
# SPDX-License-Identifier: GPL-2.0-or-later

SHIM          := injector/ramlock/ramlock.so
SHIM_BUILD    := build/shim
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
SHIM_SANITIZE     := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

test-shim: $(SHIM_TESTS) ## Run the shim's C units under ASan and UBSan
	@set -e; for t in $(SHIM_TESTS); do $$t; done

$(SHIM_BUILD)/tests/%: tests/shim/%.c $(wildcard tests/shim/*.h) $(SHIM_TEST_UNITS) $(wildcard shim/*.h) shim/rules.mk | $(SHIM_BUILD)/tests
	$(CC) $(filter-out -O2,$(SHIM_CFLAGS)) -O1 $(SHIM_SANITIZE) -Wl,-z,relro,-z,now -Ishim -o $@ $< $(SHIM_TEST_UNITS) $(JSONC_LIBS) -lpthread -ldl

lint-shim: ## Compile the shim with every warning and gcc's analyzer as errors
	@for f in $(SHIM_SOURCES); do $(CC) $(SHIM_CFLAGS) $(SHIM_ONLY) -fanalyzer -c -o /dev/null $$f || exit 1; done

$(SHIM_BUILD) $(SHIM_BUILD)/tests:
	mkdir -p $@

-include $(SHIM_OBJECTS:.o=.d)
