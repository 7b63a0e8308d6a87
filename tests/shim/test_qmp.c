/* SPDX-License-Identifier: GPL-2.0-or-later */
/* QMP sessions as bytes in and bytes out. */
#include "check.h"
#include "qmp.h"

#include <errno.h>
#include <json-c/json.h>

static unsigned int runs;

static void run(void *opaque, const char *command, struct json_object *arguments, struct qmp_reply *reply)
{
	(void)opaque;
	runs++;
	if (!strcmp(command, "echo"))
		reply->value = json_object_get(arguments);
	else
		qmp_fail(reply, "CommandNotFound", "The command %s has not been found", command);
}

static const struct qmp_server server = { run, NULL, "long" };
static struct qmp q;

/* Feeds @text and returns what came out, until the next call. */
static const char *talk_bytes(const char *text, size_t size)
{
	static char out[4096];
	size_t n;

	CHECK_EQ(qmp_feed(&q, text, size), 0);
	n = q.out.size < sizeof(out) - 1 ? q.out.size : sizeof(out) - 1;
	if (n)
		memcpy(out, q.out.data, n);
	out[n] = '\0';
	qmp_sent(&q, q.out.size);
	return out;
}

static const char *talk(const char *text)
{
	return talk_bytes(text, strlen(text));
}

static void begin(void)
{
	CHECK_EQ(qmp_init(&q, &server), 0);
	talk("{\"execute\":\"qmp_capabilities\"}");
}

static void greets_first_in_one_line(void)
{
	CHECK_EQ(qmp_init(&q, &server), 0);
	CHECK(q.out.size > 2 && !memcmp(q.out.data + q.out.size - 2, "\r\n", 2));
	CHECK(memchr(q.out.data, '\n', q.out.size) == q.out.data + q.out.size - 1);
	CHECK_CONTAINS(talk(""), "\"package\": \"ramlock ");
	qmp_deinit(&q);
}

static void nothing_before_negotiation(void)
{
	CHECK_EQ(qmp_init(&q, &server), 0);
	CHECK_CONTAINS(talk("{\"execute\":\"echo\",\"id\":7}"), "\"CommandNotFound\"");
	CHECK_EQ(runs, 0);
	CHECK_CONTAINS(talk("{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}"), "\"error\"");
	CHECK_CONTAINS(talk("{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[]}}"), "\"return\"");
	CHECK_CONTAINS(talk("{\"execute\":\"qmp_capabilities\"}"), "already complete");
	qmp_deinit(&q);
}

static void a_byte_at_a_time_and_all_at_once(void)
{
	const char *text = "{\"execute\":\"echo\",\"arguments\":{\"a\":1},\"id\":\"x\"}";
	const char *out = "";

	begin();
	for (size_t i = 0; text[i]; i++) {
		CHECK_EQ(*out, 0);
		out = talk_bytes(text + i, 1);
	}
	CHECK_CONTAINS(out, "{\"return\": {\"a\": 1}, \"id\": \"x\"}\r\n");
	out = talk("{\"execute\":\"echo\",\"id\":1}{\"execute\":\"echo\",\"id\":2}\n\n {\"execute\":\"echo\",\"id\":3}");
	CHECK_CONTAINS(out, "\"id\": 1");
	CHECK_CONTAINS(out, "\"id\": 2");
	CHECK_CONTAINS(out, "\"id\": 3");
	qmp_deinit(&q);
}

static void bad_requests_get_an_error_with_their_id(void)
{
	static const struct {
		const char *in, *want;
	} cases[] = {
		{ "{\"id\":5}", "lacks member 'execute'" },
		{ "{\"execute\":1,\"id\":5}", "must be a string" },
		{ "{\"execute\":\"echo\",\"arguments\":[],\"id\":5}", "must be an object" },
		{ "{\"execute\":\"echo\",\"extra\":1,\"id\":5}", "'extra' is unexpected" },
		{ "{\"execute\":\"nothing\",\"id\":5}", "has not been found" },
	};

	begin();
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		const char *out = talk(cases[i].in);

		CHECK_CONTAINS(out, cases[i].want);
		CHECK_CONTAINS(out, "\"id\": 5");
	}
	CHECK_CONTAINS(talk("[1]"), "must be a JSON object");
	CHECK_CONTAINS(talk("null\n"), "must be a JSON object");
	qmp_deinit(&q);
}

static void goes_on_after_garbage(void)
{
	static const char *const garbage[] = { "}\n", "{\"execute\": }\n", "garbage\n", "{'a\x01",
					       "{\"execute\" \"x\"} and more\xff", "\xc3(\n" };

	begin();
	for (size_t i = 0; i < sizeof(garbage) / sizeof(garbage[0]); i++) {
		CHECK_CONTAINS(talk(garbage[i]), "JSON parse error");
		CHECK_CONTAINS(talk("{\"execute\":\"echo\",\"id\":1}"), "\"return\"");
	}
	qmp_deinit(&q);
}

/* A request with an id of @size bytes. */
static const char *long_request(const char *command, size_t size)
{
	static char text[QMP_LONG_MAX * 3];
	size_t n = (size_t)sprintf(text, "{\"execute\":\"%s\",\"id\":\"", command);

	memset(text + n, 'x', size);
	strcpy(text + n + size, "\"}");
	return text;
}

static void a_long_request_is_one_error(void)
{
	begin();
	runs = 0;
	CHECK(strstr(talk(long_request("echo", QMP_REQUEST_MAX - 32)), "{\"return\""));
	CHECK_EQ(runs, 1);
	talk(long_request("echo", QMP_REQUEST_MAX));
	CHECK_EQ(runs, 1);
	talk(long_request("long", QMP_LONG_MAX - 100));
	CHECK_EQ(runs, 2);
	CHECK_STR(talk(long_request("long", QMP_LONG_MAX * 2)),
		  "{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON token size limit exceeded\"}}\r\n");
	CHECK_CONTAINS(talk("{\"execute\":\"echo\"}"), "\"return\"");
	/* Space between tokens is not a part of it. */
	CHECK_STR(talk("{\"execute\""), "");
	for (int i = 0; i < 100; i++)
		CHECK_STR(talk("                                                                                "), "");
	CHECK_CONTAINS(talk(":\"echo\"}"), "\"return\"");
	qmp_deinit(&q);
}

static void a_deep_request_is_one_error(void)
{
	char text[400] = "{\"execute\":\"echo\",\"id\":";
	size_t n = strlen(text);

	begin();
	memset(text + n, '[', QMP_DEPTH_MAX - 1);
	memset(text + n + QMP_DEPTH_MAX - 1, ']', QMP_DEPTH_MAX - 1);
	strcpy(text + n + 2 * QMP_DEPTH_MAX - 2, "}");
	CHECK_CONTAINS(talk(text), "\"return\"");
	memset(text + n, '[', 100);
	memset(text + n + 100, ']', 100);
	strcpy(text + n + 200, "}");
	CHECK_STR(talk(text),
		  "{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON nesting depth limit exceeded\"}}\r\n");
	CHECK_CONTAINS(talk("{\"execute\":\"echo\"}"), "\"return\"");
	/* What is never closed ends with a byte that no request has. */
	memset(text, '[', 100);
	strcpy(text + 100, "\xff");
	CHECK_CONTAINS(talk(text), "limit exceeded");
	CHECK_CONTAINS(talk("{\"execute\":\"echo\"}"), "\"return\"");
	qmp_deinit(&q);
}

static void a_slow_reader_is_bounded(void)
{
	int err = 0;

	begin();
	for (int i = 0; i < 100000 && !err; i++)
		err = qmp_feed(&q, "{\"execute\":\"echo\"}", 18);
	CHECK_EQ(err, -ENOBUFS);
	CHECK(q.out.size <= QMP_OUTPUT_MAX);
	qmp_deinit(&q);
}

static void output_is_ascii(void)
{
	const char *out;

	begin();
	out = talk("{\"execute\":\"echo\",\"id\":\"\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 / \\u0000\"}");
	CHECK_CONTAINS(out, "\"id\": \"\\u00E9 \\u20AC \\uD83D\\uDE00 / \\u0000\"");
	for (; *out; out++)
		CHECK((unsigned char)*out < 0x80);
	qmp_deinit(&q);
}

static void events_come_after_negotiation(void)
{
	CHECK_EQ(qmp_init(&q, &server), 0);
	talk("");
	CHECK_EQ(qmp_event(&q, "E", json_object_new_object()), 0);
	CHECK_EQ(q.out.size, 0);
	talk("{\"execute\":\"qmp_capabilities\"}");
	CHECK_EQ(qmp_event(&q, "E", json_object_new_object()), 0);
	CHECK_CONTAINS(talk(""), "{\"event\": \"E\", \"data\": {}, \"timestamp\": {\"seconds\": ");
	qmp_deinit(&q);
}

/* Random pieces of requests: no crash, no leak, and the session can be used afterwards. */
static void random_pieces(void)
{
	static const char *const pieces[] = { "{",	 "}",	  "\"execute\"", ":",	   "\"echo\"", ",",  "[",  "]",
					      "\"id\"", "1e309", "\\",		 "\"",	   "\n",       "\xff", "null",
					      "-",	 "\xc3",  "\"arguments\"", "{}", "\x00x",    "true", " " };

	srand(3);
	begin();
	for (int i = 0; i < 200000; i++) {
		const char *piece = pieces[(size_t)rand() % (sizeof(pieces) / sizeof(pieces[0]))];

		if (qmp_feed(&q, piece, strlen(piece) + (rand() % 20 == 0)))
			break;
		qmp_sent(&q, q.out.size);
	}
	talk("\"\n"); /* a newline inside a string is an error, and then all is open again */
	CHECK_CONTAINS(talk("\n{\"execute\":\"echo\",\"id\":9}"), "\"id\": 9");
	qmp_deinit(&q);
}

CHECK_MAIN(CASE(greets_first_in_one_line), CASE(nothing_before_negotiation), CASE(a_byte_at_a_time_and_all_at_once),
	   CASE(bad_requests_get_an_error_with_their_id), CASE(goes_on_after_garbage), CASE(a_long_request_is_one_error),
	   CASE(a_deep_request_is_one_error),
	   CASE(a_slow_reader_is_bounded), CASE(output_is_ascii), CASE(events_come_after_negotiation),
	   CASE(random_pieces))
