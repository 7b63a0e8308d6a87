/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Redirecting a call of this very program, and back again. */
#include "check.h"
#include "got.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <sys/mman.h>
#include <unistd.h>

static unsigned int calls;
static struct got got;

static int counted(void *address, size_t size)
{
	(void)address, (void)size;
	calls++;
	return 7;
}

static int call(void)
{
	/* Nothing is mapped there. */
	return munlock((void *)4096, 4096);
}

struct found {
	void **slot;
	unsigned int n;
	bool relro;
	const struct dl_phdr_info *object;
};

static void find(void *opaque, const char *symbol, void **slot)
{
	struct found *f = opaque;

	if (strcmp(symbol, "munlock"))
		return;
	f->n++;
	f->slot = slot;
	f->relro = got_is_relro(f->object, slot);
}

static int find_in_program(struct dl_phdr_info *object, size_t size, void *opaque)
{
	struct found *f = opaque;

	(void)size;
	f->object = object;
	CHECK_EQ(got_walk(object, find, f), 0);
	return 1; /* the program comes first */
}

/* Whether a page may be written: the kernel's word. */
static bool is_writable(void *address)
{
	int fds[2];
	bool yes;

	if (pipe(fds))
		abort();
	CHECK_EQ(write(fds[1], address, 8), 8);
	yes = read(fds[0], address, 8) == 8; /* the same bytes */
	close(fds[0]);
	close(fds[1]);
	return yes;
}

static void there_and_back(void)
{
	const struct got_redirection redirections[] = { { "no_such_function", NULL }, { "munlock", NULL } };
	struct got_redirection ours[2];
	struct found f = { .n = 0 };
	void *former;
	bool writable;

	memcpy(ours, redirections, sizeof(ours));
	*(int (**)(void *, size_t))(void *)&ours[1].to = counted;
	dl_iterate_phdr(find_in_program, &f);
	CHECK_EQ(f.n, 1);
	if (!f.n)
		return;
	former = *f.slot;
	writable = is_writable(f.slot);
	CHECK(f.relro && !writable); /* as QEMU is linked */
	for (int round = 0; round < 3; round++) {
		calls = 0;
		CHECK_EQ(got_redirect(&got, ours, 2), 0);
		CHECK_EQ(got.n, 1);
		CHECK_EQ(call(), 7);
		CHECK_EQ(calls, 1);
		CHECK_EQ(is_writable(f.slot), writable);
		CHECK_EQ(got_redirect(&got, ours, 2), 0); /* once is enough */
		CHECK_EQ(got.n, 1);
		got_restore(&got);
		CHECK_EQ(got.n, 0);
		CHECK(*f.slot == former);
		CHECK_EQ(is_writable(f.slot), writable);
		call();
		CHECK_EQ(calls, 1);
	}
}

static void what_somebody_else_has_changed_stays(void)
{
	struct got_redirection ours = { "munlock", NULL };
	struct found f = { .n = 0 };
	void *former;

	*(int (**)(void *, size_t))(void *)&ours.to = counted;
	dl_iterate_phdr(find_in_program, &f);
	if (!f.n)
		return;
	former = *f.slot;
	CHECK_EQ(got_redirect(&got, &ours, 1), 0);
	got.v[0].ours = former; /* as if the address that is there were not ours */
	got_restore(&got);
	CHECK(*f.slot == ours.to);
	CHECK_EQ(got_redirect(&got, &ours, 1), 0);
	CHECK_EQ(got.n, 0);
	got.v[0] = (struct got_slot){ f.slot, former, ours.to, f.relro };
	got.n = 1;
	got_restore(&got);
	CHECK(*f.slot == former);
}

/* What every module of QEMU calls. */
__attribute__((visibility("default"))) void register_dso_module_init(void);

void register_dso_module_init(void)
{
}

static void a_module_that_is_loaded_later(void)
{
	struct got_redirection ours = { "munlock", NULL };
	char path[PATH_MAX] = "";
	int (*later_call)(void);
	void *module;

	*(int (**)(void *, size_t))(void *)&ours.to = counted;
	CHECK_EQ(got_redirect(&got, &ours, 1), 0);
	CHECK_EQ(got.n, 1);
	CHECK(readlink("/proc/self/exe", path, sizeof(path) - sizeof("later.so")) > 0);
	memcpy(strrchr(path, '/') + 1, "later.so", sizeof("later.so"));
	module = dlopen(path, RTLD_NOW);
	CHECK(module);
	if (!module)
		return;
	*(void **)(void *)&later_call = dlsym(module, "later_call");
	calls = 0;
	later_call();
	CHECK_EQ(calls, 0);
	CHECK_EQ(got_redirect(&got, &ours, 1), 0); /* at the next look */
	CHECK_EQ(got.n, 2);
	CHECK(got.v[1].relro && !is_writable(got.v[1].slot));
	CHECK_EQ(later_call(), 7);
	CHECK_EQ(calls, 1);
	got_restore(&got);
	later_call();
	CHECK_EQ(calls, 1);
	CHECK(!is_writable(got.v[1].slot));
}

static void an_object_without_tables_is_refused(void)
{
	const struct dl_phdr_info nothing = { .dlpi_phnum = 0 };
	struct found f = { .n = 0 };

	CHECK_EQ(got_walk(&nothing, find, &f), -EINVAL);
	CHECK(!got_is_relro(&nothing, &f));
}

CHECK_MAIN(CASE(there_and_back), CASE(what_somebody_else_has_changed_stays), CASE(a_module_that_is_loaded_later),
	   CASE(an_object_without_tables_is_refused))
