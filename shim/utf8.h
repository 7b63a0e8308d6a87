/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Modified UTF-8: UTF-8, but a NUL character is C0 80, so that a C string can have it (pure). */
#ifndef RAMLOCK_UTF8_H
#define RAMLOCK_UTF8_H

#include <stdbool.h>
#include <stdint.h>

/* No surrogate, none of Unicode's noncharacters, not too large. */
bool utf8_is_character(uint32_t code);

/*
 * Decodes the character at *@at, never beyond a NUL byte, and advances. Returns -1 when it is none: then *@at is behind what
 * could not be part of any other.
 */
int32_t utf8_decode(const unsigned char **at);

/* Writes up to 4 bytes at @out, and returns their end. */
char *utf8_encode(char *out, uint32_t code);

#endif
