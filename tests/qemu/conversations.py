"""What is said to a QMP server, as data: each conversation is the pieces that are sent, one after another.

It is said to QEMU's own monitor and to the shim, and both must answer the same. Where a command is needed that only
one of them has, a word stands for it: `WORDS` has what it means to QEMU and to the shim.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import random

Conversation = tuple[bytes, ...]

# To QEMU, and to the shim. NUMBER: a command with an argument that is required and a number; the others: up to an
# argument of that type, whose value follows.
WORDS: dict[bytes, tuple[bytes, bytes]] = {
    b"NUMBER_COMMAND": (b"balloon", b"set_ram_minguarantee"),
    b"NUMBER": (b"value", b"size"),
    b"BOOLEAN": (
        b'"execute": "migrate-set-parameters", "arguments": {"cpu-throttle-tailslow"',
        b'"execute": "ramlock-eject", "arguments": {"keep"',
    ),
    b"STRING": (
        b'"execute": "set-action", "arguments": {"reboot"',
        b'"execute": "set_ram_minguarantee", "arguments": {"size": 0, "order"',
    ),
    b"LIST": (b'"execute": "send-key", "arguments": {"keys"', b'"execute": "set-ram-blocks", "arguments": {"blocks"'),
    b"OBJECT": (
        b'"execute": "transaction", "arguments": {"actions": [], "properties"',
        b'"execute": "ramlock-adopt", "arguments": {"books"',
    ),
}
ARGUMENTS: dict[bytes, bytes] = {
    b"value": b"size",
    b"cpu-throttle-tailslow": b"keep",
    b"reboot": b"order",
    b"keys": b"blocks",
    b"properties": b"books",
}
"""QEMU's arguments and the shim's, as errors name them."""

NEGOTIATE = b'{"execute": "qmp_capabilities"}'
ASK = b'{"execute": "query-version", "id": 9}'
COMMANDS = b'{"execute": "query-commands"}'


def bytewise(text: bytes) -> Conversation:
    return tuple(text[i : i + 1] for i in range(len(text)))


def negotiated(*pieces: bytes) -> Conversation:
    return (NEGOTIATE, *pieces)


BEFORE_NEGOTIATION: list[Conversation] = [
    (ASK,),
    (b'{"execute": "nonsense", "id": "x"}',),
    (b"{}", b"[]", b"1 ", b"@\n", b'{"foo": 1, "id": 2}', ASK, NEGOTIATE, ASK),
    (b'{"execute": 5}', b'{"exec-oob": "query-version"}', b'{"execute": "query-version", "arguments": 1}'),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": {}}', ASK),
    (b'{"execute": "qmp_capabilities", "arguments": {}}', ASK),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": {}}, "id": 1}', ASK),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": null}}',),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": [1]}}', NEGOTIATE),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": [null]}}',),
    (b'{"execute": "qmp_capabilities", "arguments": {"nonsense": []}}', ASK, NEGOTIATE),
    (b'{"execute": "qmp_capabilities", "arguments": {"nonsense": [], "enable": 1}}',),
    (b'{"execute": "qmp_capabilities", "nonsense": 1}', ASK),
    (NEGOTIATE, NEGOTIATE, b'{"execute": "qmp_capabilities", "id": 3, "arguments": {"enable": 1}}', ASK),
    bytewise(NEGOTIATE + ASK),
    (NEGOTIATE + ASK,),
    (ASK + NEGOTIATE + ASK + NEGOTIATE,),
]

# fmt: off
# Members of a request, ids, commands that do not exist.
REQUESTS = [
    b"{}",
    b'{"id": 5}',
    b'{"execute": null, "id": null}',
    b'{"execute": 1, "id": 5}',
    b'{"execute": ["query-version"], "id": 5}',
    b'{"execute": "query-version", "arguments": [], "id": 5}',
    b'{"execute": "query-version", "arguments": null, "id": 5}',
    b'{"execute": "query-version", "arguments": "", "id": 5}',
    b'{"execute": "query-version", "arguments": {}, "id": 5}',
    b'{"execute": "query-version", "nonsense": 1, "id": 5}',
    b'{"arguments": {}, "id": 5}',
    b'{"": 1}',
    b'{"execute": ""}',
    b'{"Execute": "query-version"}',
    b'{"exec-oob": "query-version", "id": 5}',
    b'{"execute": "query-version", "exec-oob": "query-version"}',
    b'{"execute": "nonsense", "id": 5}',
    b'{"execute": "no\\u00e9 \\n\\"\\u0000", "id": "x"}',
    b'{"execute": "QUERY-VERSION"}',
    b'{"execute": "query-version\\u0000"}',
    b'{"execute": "query-version", "arguments": {"nonsense": 1}, "id": 5}',
    b'{"execute": "query-version", "arguments": {"\\u00e9\\n": null}}',
    b'{"execute": "' + b"x" * 900 + b'"}',
    b"{'execute': 'query-version', 'id': '\"'}",
    b'{"execute": \'query-version\', "id": "\'"}',
    b'{"id": 1, "execute": "query-version"}',
    b'{"execute": "query-version", "execute": "query-version"}',
    b'{"id": 1, "execute": "query-version", "id": 1}',
    b'{"execute": "query-version", "arguments": {"a": 1, "a": 1}}',
    b"[]",
    b'[{"execute": "query-version"}]',
    b'"query-version"',
    b"1 ",
    b"-1.5e3 ",
    b"true ",
    b"null ",
    COMMANDS,
]
IDS = [
    *(b"null", b"true", b"false", b"0", b"-0", b"-1", b"1.5", b"-0.0", b"1e3", b"1E+2", b"25e-2", b"0.1"),
    *(b"1e300", b"1.0"),
    *(b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"18446744073709551616"),
    *(b"-9223372036854775808", b"-9223372036854775809", b"123456789012345678901234567890"),
    *(b"1e-400", b"1e400", b"-1e400"),
    *(b'""', b'"x"', b"'x'", b"[]", b"{}", b"[[[[]]]]", b'[1, "a", null, {"b": [true]}]', b'{"a": {"b": {}}}'),
    *(b'{"a\\"b": 1}', b'{"": ""}', b'"\\u0000\\u0001\\u001f \\u007f\\u0080\\u07ff\\u0800\\uffff"'),
    *(b'"\\b\\f\\n\\r\\t\\/\\\\\\"\\\'"', b'"\\ud83d\\ude00\\u20AC\\u20ac"', b'"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"'),
    *(b'"\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xee\x80\x80\xef\xbf\xbd\xf4\x8f\xbf\xbd"', b'"\xc0\x80"', b'"%d %s"'),
    *(b'"' + b"y" * 3000 + b'"',),
]
BAD_STRINGS = [
    *(rb"\q", rb"\x41", rb"\U0041", rb"\0", rb"\u", rb"\u1", rb"\u12", rb"\u123", rb"\u123g", rb"\u 123"),
    *(rb"\uu123", rb"\u00g0"),
    *(rb"\ud800", rb"\udbff", rb"\udc00", rb"\udfff", rb"\ud800\ud800", rb"\ud800\u0041", rb"\ud800\uZ"),
    *(rb"\ud800\n", rb"\ud800x"),
    *(rb"\ufffe", rb"\uffff", rb"\ufdd0", rb"\ufdef", rb"\uD83F\uDFFE", rb"\udbff\udfff", rb"ok\u0041\u00zz"),
    *(b"\\u12\xc3\xa9",),
    *(b"\xc3", b"\xc3(", b"\xe9", b"\x80", b"\xbf", b"\xc0\x81", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf"),
    *(b"\xed\xa0\x80", b"\xed\xbf\xbf"),
    *(b"\xef\xbf\xbe", b"\xef\xbf\xbf", b"\xef\xb7\x90", b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf"),
    *(b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80"),
    *(b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\xf0\x9f\x98", b"\xe2\x82", b"\xf0\x9f\xbf\xbf"),
    *(b"a\xff", b"\xfe"),
]
# What is no JSON, where input goes on behind it, and what QEMU takes beyond JSON.
SYNTAX = [
    *(b"}", b"]", b",", b":", b"}}", b"{]", b"[}", b"[{]}", b"[{]", b"{[}", b"{[}]", b"{,}", b"[,]", b"{:}"),
    *(b"{1:2}", b"{null:1}", b"{[]:1}"),
    *(b'{"a"}', b'{"a":}', b'{"a" 1}', b'{"a":1,}', b'{"a":1 "b":2}', b'{"a":1:"b"}', b'{"a":1,,"b":2}'),
    *(b'{"a"::1}', b'{"a":{"b"}}', b'{"execute" "x"}'),
    *(b'{"a":1,"a"}', b'{"a":1,"a":}', b'{"a":1,"a":2,}', b'{"a":[1,]}', b"[1 2]", b"[1,]", b"[1,,2]"),
    *(b'["a":1]', b"[[1 2], @]", b'{"a" "b" @'),
    *(b"nul ", b"True ", b"nUl ", b"truefalse ", b"true false ", b"nan ", b"NaN ", b"inf ", b"undefined "),
    *(b"a-b ", b'x"y"', b"null[]"),
    *(b"01 ", b"-01 ", b"-", b"- ", b"--1 ", b"+1 ", b".5 ", b"1. ", b"1.e5 ", b"1.5. ", b"1e ", b"1e+ "),
    *(b"1e5 ", b"0e1 ", b"0x1 ", b"1_000 ", b"1-1 ", b"1a ", b"-a "),
    *(b'1"a"2 ', b"1.5.5 ", b"1e5e5 ", b'{"id":01}', b'{"id":1.}', b'{"id":-}', b'{"id":1e}', b"[1e5]", b"[0]"),
    *(b"[-0]", b"[-]"),
    *(b"@", b"@@@", b"#", b"// comment\n", b"/* x */", b"%d ", b"%", b"`", b"~", b"&", b"(", b";", b"\\"),
    *(b"\\n", b"=", b"A", b"Z9"),
    *(b"@ {", b"@ }", b"@ [", b"@ :", b"@ ,", b"@ x", b"@\n", b"@\xff", b"@\xfe", b"@\xfd", b"@\x01"),
    *(b"@ \x01\x02\n", b"@\x00", b'@"{"', b"@ 'x' 1 true"),
    *(b"\x00", b"\x01", b"\x0b", b"\x0c", b"\x1b[2J", b"\x7f", b"\x80", b"\xc3\xa9", b"\xef\xbb\xbf", b"\xfe"),
    *(b"\xff", b"\xff\xff\xff", b" \xff", b"\t\x01"),
    *(b"1\xff", b"1\xc3", b"true\xff", b"-\xff", b"1e\xff", b"{\xff", b'{"a":\xff', b'{"a\xff', b"{'a\xff"),
    *(b'{"a\\\xff', b'{"a\\\x01', b'{"a\x01', b'{"a\n'),
    *(b'{"a\t"}', b'{"a\r\n', b'{"a\x00', b'{"a\x1f', b'{"a\xc3\xff', b'{"a\xe2\x82\x01'),
    *(b'{"a\x80\xe2(\xf0\x9f\xc3\x01', b'{"\xed\xa0\x80\x01', b'{"\xc0\x80 b\x01'),
    *(b'{"\xf8\x80\x80\x80\x80 b\x01', b'{"\xfc\x80\x80\x80\x80\x80 b\x01', b'{"\xfd b\x01'),
    *(b'{"\xf4\x90\x80\x80 b\x01', b'{"\xc0\x81\x01', b'{"\xef\xbf\xbf\x01'),
    *(b"'", b'"', b"'\xff", b'"abc', b"'abc", b'"\\', b"'a'", b'"a\'b"', b"'a\"b'", b"'\\''", b'"\\"" '),
    *(b"'\\q'", b"[']']", b"{'a}': 1}"),
    *(b"\n\n\r\n\t  ", b"", b"{", b"[", b'{"a": ', b'{"execute"', b"tru", b"12", b"{ } ", b"[ ]", b"{\n}\n"),
    *(b'{"a"\t:\r1\n}',),
    *(b'{"id": ' + b"[" * 30 + b"]" * 30 + b"}", b"[" * 32 + b"]" * 32, b"[" * 20 + b"}" * 20, b"[" * 25 + b"\xff"),
]
VALUES = [b"null", b"true", b"1", b"1.0", b"1.5", b'"x"', b"[]", b"{}"]
NUMBERS = [
    *VALUES,
    b"9223372036854775808",
    b"18446744073709551615",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"1e3",
    b'"1"',
]

# fmt: on

ARGUMENT_CHECKS: list[bytes] = [
    b'{"execute": "NUMBER_COMMAND", "id": 1}',
    b'{"execute": "NUMBER_COMMAND", "arguments": {}}',
    b'{"execute": "NUMBER_COMMAND", "arguments": {"nonsense": 1}}',
    b'{"execute": "NUMBER_COMMAND", "arguments": {"nonsense": 1, "NUMBER": "x"}}',
    b'{"execute": "NUMBER_COMMAND", "arguments": {"NUMBER": 1, "nonsense": 1}}',
    b'{"execute": "NUMBER_COMMAND", "arguments": {"NUMBER": 1, "NUMBER": 1}}',
    *(b'{"execute": "NUMBER_COMMAND", "arguments": {"NUMBER": %s}}' % v for v in NUMBERS if v not in (b"1", b"-1")),
    *(b"{BOOLEAN: %s}}" % v for v in VALUES if v != b"true"),
    *(b"{STRING: %s}}" % v for v in VALUES),
    b'{STRING: "resident\\u0000"}}',
    b'{STRING: ""}}',
    b'{STRING: "\\u00e9\\n"}}',
    *(b"{LIST: %s}}" % v for v in VALUES if v != b"[]"),
    *(b"{OBJECT: %s}}" % v for v in VALUES if v != b"{}"),
]

FRAMES: list[Conversation] = [
    bytewise(NEGOTIATE + ASK + b"\n" + ASK),
    bytewise(b"{'execute'\n:\t'qmp_capabilities'\r\n}" + b'{"id": "\xf0\x9f\x98\x80\\ud83d\\ude00"}' + b'{"a"@'),
    (NEGOTIATE + ASK * 20,),
    (NEGOTIATE + b"\n\n" + b"\r\n".join([ASK] * 5) + b"\n",),
    negotiated(*[ASK[:17], ASK[17:]] * 5),
    negotiated(b"".join(b'{"execute": "query-version", "id": %d}' % i for i in range(300))),
    negotiated(b"".join(b'{"execute": "nonsense", "id": %d}[]' % i for i in range(100))),
    negotiated(b"\xff\xff" + ASK, b'{"execute": "query-ver', b"\xff", ASK, b'{"execute": "query-ver\n' + ASK),
    negotiated(b"1", b"2", b".", b"5", b" ", b"tr", b"ue", b" ", b'"', b"a", b"\\", b'"', b'"', ASK),
    negotiated(b'{"id": "', b"\\", b"u", b"00", b"e9", b'"', b"}"),
    negotiated(b'{"id": "' + b"z" * 40_000 + b'", "execute": "query-version"}'),
    negotiated(b'{"execute": "query-version"' + b" " * 100_000 + b', "id": 7}'),
    negotiated(b" " * 200_000 + ASK),
]

CONVERSATIONS: list[Conversation] = [
    *BEFORE_NEGOTIATION,
    *FRAMES,
    *(negotiated(request, ASK) for request in REQUESTS),
    *(negotiated(b'{"execute": "query-version", "id": %s}' % each, b'{"id": %s}' % each) for each in IDS),
    *(negotiated(b'{"id": "%s"}' % each, ASK) for each in BAD_STRINGS),
    *(negotiated(b'{"%s": 1, "@": 2}' % each, ASK) for each in BAD_STRINGS),
    *(negotiated(each, ASK) for each in SYNTAX),
    *(negotiated(each + ASK) for each in SYNTAX),
    *(negotiated(each, ASK) for each in ARGUMENT_CHECKS),
]

# fmt: off
PIECES = [
    *(b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\r\n", b'"', b"'", b"\\", b"\\u", b"00e9", b"@"),
    *(b"\xff", b"\xfe", b"\x01", b"\x00", b"\xc3", b"\xa9"),
    *(b'"execute"', b'"query-version"', b'"id"', b'"arguments"', b'"a"', b"'b'", b"null", b"true", b"1", b"-"),
    *(b"0", b".", b"5", b"e", b"+", b"12", b"x", b"X"),
    *(b'"execute":"query-version"', b'"id":1', b'{"execute":"query-version"}'),
    *(b'{"execute":"query-version","id":2}', b'{"a":', b"[1,", b"{}", b"[]", b"1 ", b"%d"),
]
# fmt: on


def invented(seed: int) -> Conversation:
    """A conversation of random pieces, or a good request with something changed in it; sent in random parts."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        text = b"".join(chance.choices(PIECES, k=chance.randint(1, 25)))
    else:
        words = bytearray(b'{"execute":"query-version","arguments":{"a":[1,"b",{"c":-2.5e3}]},"id":"\xc3\xa9\\n"}' * 2)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(words))
            words[at : at + chance.randint(0, 3)] = chance.choice([*PIECES, b"", bytes([chance.randrange(256)])])
        text = bytes(words)
    cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 3)))
    return (NEGOTIATE, *(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)))
