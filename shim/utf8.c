/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Modified UTF-8: UTF-8, but a NUL character is C0 80, so that a C string can have it. */
#include "utf8.h"

bool utf8_is_character(uint32_t code)
{
	bool surrogate = code >= 0xd800 && code <= 0xdfff;
	bool no_character = (code >= 0xfdd0 && code <= 0xfdef) || (code & 0xfffe) == 0xfffe;

	return code <= 0x10ffff && !surrogate && !no_character;
}

int32_t utf8_decode(const unsigned char **at)
{
	static const uint32_t least[] = { 0x80, 0x800, 0x10000, 0x200000, 0x4000000 };
	const unsigned char *p = *at;
	uint32_t code = *p++;
	int more = 0;

	*at = p;
	if (code < 0x80)
		return (int32_t)code;
	if (code < 0xc0 || code > 0xfd)
		return -1;
	for (uint32_t bit = 0x40; code & bit; bit >>= 1)
		more++;
	code &= 0x3fu >> more;
	for (int i = 0; i < more; i++, p++) {
		*at = p;
		if ((*p & 0xc0) != 0x80)
			return -1;
		code = code << 6 | (*p & 0x3f);
	}
	*at = p;
	if (!utf8_is_character(code) || (code < least[more - 1] && !(code == 0 && more == 1)))
		return -1;
	return (int32_t)code;
}

char *utf8_encode(char *out, uint32_t code)
{
	if (code && code < 0x80) {
		*out++ = (char)code;
		return out;
	}
	if (code < 0x800) {
		*out++ = (char)(0xc0 | code >> 6);
	} else {
		if (code < 0x10000) {
			*out++ = (char)(0xe0 | code >> 12);
		} else {
			*out++ = (char)(0xf0 | code >> 18);
			*out++ = (char)(0x80 | (code >> 12 & 0x3f));
		}
		*out++ = (char)(0x80 | (code >> 6 & 0x3f));
	}
	*out++ = (char)(0x80 | (code & 0x3f));
	return out;
}
