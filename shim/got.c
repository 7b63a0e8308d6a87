/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sends calls of QEMU to other functions.
 *
 * Theory of operation: a program calls libc through a table of addresses, one for each function, that its loader fills in. Where
 * they are the loader's own relocation tables say, which stay mapped. One address is changed by one store of a word, so
 * a thread that calls meanwhile goes to one or the other. Mostly the table is on pages that were made read-only
 * (RELRO); these are writable for the moment of the store.
 *
 * QEMU is the main program and the modules that it loads, which are known by the function that each calls to register.
 */
#include "got.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* What a module of QEMU calls when it is loaded (include/qemu/module.h). */
static const char MODULE_SIGN[] = "register_dso_module_init";

/* What the dynamic section of an object says. */
struct tables {
	const ElfW(Sym) *symbols;
	const char *strings;
	size_t strings_size;
	const ElfW(Rela) *plt, *other;
	size_t plt_size, other_size; /* bytes */
};

/* glibc has added the object's base to the addresses, other loaders have not. */
static const void *at(const struct dl_phdr_info *object, ElfW(Addr) address)
{
	return (const void *)(address < object->dlpi_addr ? object->dlpi_addr + address : address);
}

static bool read_tables(const struct dl_phdr_info *object, struct tables *t)
{
	const ElfW(Dyn) *d = NULL;
	ElfW(Sxword) plt_kind = DT_RELA;

	memset(t, 0, sizeof(*t));
	for (int i = 0; i < object->dlpi_phnum; i++)
		if (object->dlpi_phdr[i].p_type == PT_DYNAMIC)
			d = (const void *)(object->dlpi_addr + object->dlpi_phdr[i].p_vaddr);
	for (; d && d->d_tag != DT_NULL; d++) {
		switch (d->d_tag) {
		case DT_SYMTAB:
			t->symbols = at(object, d->d_un.d_ptr);
			break;
		case DT_STRTAB:
			t->strings = at(object, d->d_un.d_ptr);
			break;
		case DT_STRSZ:
			t->strings_size = d->d_un.d_val;
			break;
		case DT_JMPREL:
			t->plt = at(object, d->d_un.d_ptr);
			break;
		case DT_PLTRELSZ:
			t->plt_size = d->d_un.d_val;
			break;
		case DT_PLTREL:
			plt_kind = (ElfW(Sxword))d->d_un.d_val;
			break;
		case DT_RELA:
			t->other = at(object, d->d_un.d_ptr);
			break;
		case DT_RELASZ:
			t->other_size = d->d_un.d_val;
			break;
		default:
			break;
		}
	}
	return t->symbols && t->strings && plt_kind == DT_RELA;
}

static void walk_table(const struct dl_phdr_info *object, const struct tables *t, const ElfW(Rela) *r, size_t size,
		       got_slot_fn *found, void *opaque)
{
	for (size_t i = 0; r && i < size / sizeof(*r); i++) {
		unsigned long kind = ELF64_R_TYPE(r[i].r_info);
		const ElfW(Sym) *symbol = &t->symbols[ELF64_R_SYM(r[i].r_info)];

		if ((kind == R_X86_64_JUMP_SLOT || kind == R_X86_64_GLOB_DAT) && symbol->st_name < t->strings_size)
			found(opaque, t->strings + symbol->st_name, (void **)(object->dlpi_addr + r[i].r_offset));
	}
}

int got_walk(const struct dl_phdr_info *object, got_slot_fn *found, void *opaque)
{
	struct tables t;

	if (!read_tables(object, &t))
		return -EINVAL;
	walk_table(object, &t, t.plt, t.plt_size, found, opaque);
	walk_table(object, &t, t.other, t.other_size, found, opaque);
	return 0;
}

static uintptr_t page_of(uintptr_t address)
{
	return address & ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1);
}

bool got_is_relro(const struct dl_phdr_info *object, const void *slot)
{
	for (int i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *p = &object->dlpi_phdr[i];
		uintptr_t start = object->dlpi_addr + p->p_vaddr;

		/* Only whole pages can have been protected. */
		if (p->p_type == PT_GNU_RELRO && (uintptr_t)slot >= page_of(start) &&
		    (uintptr_t)slot < page_of(start + p->p_memsz))
			return true;
	}
	return false;
}

/* Stores @value at @slot. Returns 0 or -errno; then nothing was changed. */
static int store(void **slot, void *value, bool relro)
{
	void *page = (void *)page_of((uintptr_t)slot);

	if (relro && mprotect(page, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE))
		return -errno;
	__atomic_store_n(slot, value, __ATOMIC_SEQ_CST);
	if (relro)
		mprotect(page, (size_t)sysconf(_SC_PAGESIZE), PROT_READ);
	return 0;
}

struct redirecting {
	struct got *got;
	const struct got_redirection *redirections;
	size_t n;
	const struct dl_phdr_info *object;
	bool is_module;
	int err;
};

static void look_for_sign(void *opaque, const char *symbol, void **slot)
{
	struct redirecting *r = opaque;

	(void)slot;
	r->is_module |= !strcmp(symbol, MODULE_SIGN);
}

static void redirect_slot(void *opaque, const char *symbol, void **slot)
{
	struct redirecting *r = opaque;
	struct got_slot *s = &r->got->v[r->got->n];
	int err;

	for (size_t i = 0; i < r->n; i++) {
		if (strcmp(symbol, r->redirections[i].name) || *slot == r->redirections[i].to)
			continue;
		if (r->got->n == GOT_SLOTS_MAX) {
			r->err = r->err ? r->err : -ENOSPC;
			return;
		}
		*s = (struct got_slot){ slot, *slot, r->redirections[i].to, got_is_relro(r->object, slot) };
		err = store(slot, s->ours, s->relro);
		if (!err)
			r->got->n++;
		else if (!r->err)
			r->err = err;
		return;
	}
}

static int redirect_object(struct dl_phdr_info *object, size_t size, void *opaque)
{
	struct redirecting *r = opaque;
	bool main_program = !object->dlpi_name || !*object->dlpi_name;

	(void)size;
	r->got->loads = object->dlpi_adds;
	r->object = object;
	r->is_module = false;
	if (!main_program)
		got_walk(object, look_for_sign, r);
	if (main_program || r->is_module)
		got_walk(object, redirect_slot, r);
	return 0;
}

static int read_loads(struct dl_phdr_info *object, size_t size, void *opaque)
{
	(void)size;
	*(unsigned long long *)opaque = object->dlpi_adds;
	return 1;
}

int got_redirect(struct got *g, const struct got_redirection *redirections, size_t n)
{
	struct redirecting r = { .got = g, .redirections = redirections, .n = n };
	unsigned long long loads = 0;

	dl_iterate_phdr(read_loads, &loads);
	if (loads == g->loads)
		return 0;
	dl_iterate_phdr(redirect_object, &r);
	if (r.err)
		g->loads = 0; /* to be tried again */
	return r.err;
}

void got_restore(struct got *g)
{
	while (g->n) {
		const struct got_slot *s = &g->v[--g->n];

		if (*s->slot == s->ours)
			store(s->slot, s->former, s->relro);
	}
	g->loads = 0;
}
