/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the operator asked for at the start: RAMLOCK_* in the environment, or in the text that an injection brings. */
#ifndef RAMLOCK_CONFIG_H
#define RAMLOCK_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/un.h>

#include "locker.h"

struct guarantee {
	enum { GUARANTEE_BYTES, GUARANTEE_PERCENT, GUARANTEE_ALL } kind;
	uint64_t value; /* bytes, or millionths of guest RAM */
};

struct config {
	struct guarantee guarantee; /* 0 bytes: none */
	char guarantee_error[160]; /* why there is none, though one was asked for */
	enum order order;
	bool prefault;
	bool follow_discards;
	bool monitor; /* offer the commands in QEMU's own monitor too */
	uint32_t hold_budget_us; /* 0: the usual */
	uint32_t threads;
	uint64_t host_reserve; /* bytes; 0: the usual */
	char socket[sizeof(((struct sockaddr_un *)0)->sun_path)]; /* empty: the usual place */
	uid_t owner; /* who started QEMU, as far as that is no other VM: may always connect */
	bool has_allow_uid;
	uid_t allow_uid; /* may connect too */
};

/*
 * Parses SIZE: bytes, a number with K, M, G, T or KiB, MiB, GiB, TiB (binary, as in QEMU), a percentage, or "all".
 * Returns 0, or -EINVAL with *why saying what is wrong.
 */
int guarantee_parse(const char *text, struct guarantee *out, const char **why);

/* @g in bytes, for a VM that has @ram bytes. */
uint64_t guarantee_resolve(const struct guarantee *g, uint64_t ram);

/*
 * Reads RAMLOCK_*. A value that cannot be understood is reported with @warn and left out: a VM must not fail to start,
 * nor lock what nobody asked for, because of a typing error.
 */
void config_from_environment(struct config *c, void (*warn)(const char *fmt, ...));

/* The same from lines of NAME=VALUE. */
void config_from_text(struct config *c, const char *text, void (*warn)(const char *fmt, ...));

#endif
