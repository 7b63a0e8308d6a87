/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Commands of ours in QEMU's own monitor.
 *
 * Theory of operation: QEMU keeps a list of its QMP commands, with a function for each, and lets anybody in the process
 * add to it. Nothing can be taken off that list again: a command can only be disabled, after which no client sees it, and
 * be enabled once more. Adding the same name a second time would not help, since the first entry is found. So what
 * is added is made to outlive the shim that added it, whose object stays mapped: QEMU gets a function that jumps
 * through a pointer, and a name that lies beside that pointer. A later shim in the same process asks QEMU for the command's name,
 * finds the pointer there, and has it lead to itself.
 *
 * All of this happens on QEMU's main thread, under its big lock: in a bottom half, or in a command that QEMU runs. These
 * are no coroutine commands, so QEMU leaves the coroutine for them, and not allowed out of band, so no other thread runs them.
 * (An out-of-band command on another thread may read the list while we add to it: QEMU fills an entry first, and links it last.)
 *
 * Arguments and replies go by way of JSON text, so that what QEMU makes of objects is known to QEMU alone, and the commands
 * are those of the control socket.
 *
 * Prototypes are those of QEMU 4.2 to 11.1 (include/qapi/qmp/dispatch.h, later include/qapi/qmp-registry.h, and
 * include/qapi/error.h, include/qapi/qmp/qjson.h, qstring.h). An argument more than an older QEMU expects costs nothing.
 */
#include "monitor.h"

#include "lookup.h"

#include <errno.h>
#include <json-c/json.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct QDict QDict;
typedef struct QObject QObject;
typedef struct QString QString;
typedef struct Error Error;
typedef struct QmpCommand QmpCommand;
typedef struct QmpCommandList QmpCommandList;
typedef struct { char *str; } GString; /* it begins so */
typedef void qmp_command_fn(QDict *, QObject **, Error **);

static struct {
	QmpCommandList *qmp_commands;
	void (*qmp_register_command)(QmpCommandList *, const char *, qmp_command_fn *, int options,
				     uint64_t features); /* the last one from 6.2 */
	const QmpCommand *(*qmp_find_command)(const QmpCommandList *, const char *);
	const char *(*qmp_command_name)(const QmpCommand *);
	void (*qmp_disable_command)(QmpCommandList *, const char *, const char *reason); /* the last one from 6.1 */
	void (*qmp_enable_command)(QmpCommandList *, const char *);
	void *(*qobject_to_json)(const QObject *); /* a GString from 6.0, before a QString */
	void *json_writer_start_object; /* from 6.0 */
	void (*g_string_free)(GString *, int);
	const char *(*qstring_get_str)(const QString *);
	void (*qdict_put_obj)(QDict *, const char *, void *);
	void (*qdict_del)(QDict *, const char *);
	QObject *(*qobject_from_json)(const char *, Error **);
	void (*error_setg_internal)(Error **, const char *src, int line, const char *func, const char *fmt, ...);
} sym;

/*
 * What QEMU has of a command. Later versions of the shim look for just this in the memory of this one: it must never change.
 */
struct entry {
	char name[32]; /* what QEMU keeps a pointer to */
	char mark[16];
	qmp_command_fn *_Atomic run; /* of the shim that serves now, or served last */
};

#define MARK "ramlock-monitor" /* with its end, as long as the member */

enum { SET, QUERY, COMMANDS };
enum { NESTING_MAX = 1024 + 8 }; /* what QEMU takes itself */

static struct entry own[COMMANDS] = {
	[SET] = { .name = "set_ram_minguarantee", .mark = MARK },
	[QUERY] = { .name = "query-ram-minguarantee", .mark = MARK },
};

/* The entries that QEMU has: our own, or those of a shim that was here before; NULL: not offered. With `serving`. */
static struct entry *entries[COMMANDS];

static pthread_mutex_t serving = PTHREAD_MUTEX_INITIALIZER; /* a command runs within it, so that one can wait for that */
static const struct qmp_server *server; /* NULL: the commands are not wanted */
static bool exported; /* this QEMU has all that is needed */

static enum { OFF, WAITING, ON, NOT_EXPORTED, TAKEN, STATES } state; /* with `serving` */

void monitor_init(bool usable)
{
	LOOK_UP(qmp_commands);
	LOOK_UP(qmp_register_command);
	LOOK_UP(qmp_find_command);
	LOOK_UP(qmp_command_name);
	LOOK_UP(qmp_disable_command);
	LOOK_UP(qmp_enable_command);
	LOOK_UP(qobject_to_json);
	LOOK_UP(json_writer_start_object);
	LOOK_UP(g_string_free);
	LOOK_UP(qstring_get_str);
	LOOK_UP(qdict_put_obj);
	LOOK_UP(qdict_del);
	LOOK_UP(qobject_from_json);
	LOOK_UP(error_setg_internal);
	exported = usable && sym.qmp_commands && sym.qmp_register_command && sym.qmp_find_command && sym.qmp_command_name &&
		   sym.qmp_disable_command && sym.qmp_enable_command && sym.qobject_to_json && sym.qobject_from_json &&
		   sym.error_setg_internal &&
		   (sym.json_writer_start_object ? sym.g_string_free != NULL :
					       sym.qstring_get_str && sym.qdict_put_obj && sym.qdict_del);
}

/* ---- A command; on QEMU's main thread ---- */

/* Returns NULL for what is no JSON to json-c. */
static struct json_object *parse(const char *text)
{
	struct json_tokener *tokener = json_tokener_new_ex(NESTING_MAX);
	struct json_object *o;

	if (!tokener)
		return NULL;
	o = json_tokener_parse_ex(tokener, text, -1);
	json_tokener_free(tokener);
	return o;
}

static struct json_object *from_qemu(QDict *arguments)
{
	static const char key[] = "";
	struct json_object *o;
	void *text = sym.qobject_to_json((const QObject *)arguments); /* a QDict begins with its QObject */

	if (sym.json_writer_start_object) {
		o = parse(((GString *)text)->str);
		sym.g_string_free(text, 1);
		return o;
	}
	o = parse(sym.qstring_get_str(text));
	/* The way to let go of an object without knowing what is in it: by a dictionary. */
	sym.qdict_put_obj(arguments, key, text);
	sym.qdict_del(arguments, key);
	return o;
}

static void run(int i, QDict *arguments, QObject **ret, Error **errp)
{
	struct json_object *o = from_qemu(arguments);
	struct qmp_reply reply = { 0 };

	pthread_mutex_lock(&serving);
	if (!server)
		qmp_fail(&reply, NULL, "the shim is leaving");
	else if (!json_object_is_type(o, json_type_object))
		qmp_fail(&reply, NULL, "the arguments cannot be read");
	else
		server->run(server->opaque, own[i].name, o, &reply);
	pthread_mutex_unlock(&serving);
	if (reply.value)
		*ret = sym.qobject_from_json(json_object_to_json_string_ext(reply.value, JSON_C_TO_STRING_PLAIN), NULL);
	else
		sym.error_setg_internal(errp, __FILE__, __LINE__, __func__, "%s", reply.desc);
	json_object_put(reply.value);
	json_object_put(o);
}

static void run_set(QDict *arguments, QObject **ret, Error **errp)
{
	run(SET, arguments, ret, errp);
}

static void run_query(QDict *arguments, QObject **ret, Error **errp)
{
	run(QUERY, arguments, ret, errp);
}

static qmp_command_fn *const runs[COMMANDS] = { [SET] = run_set, [QUERY] = run_query };

/* What QEMU calls, also when another shim has taken our place. */

static void enter_set(QDict *arguments, QObject **ret, Error **errp)
{
	atomic_load(&own[SET].run)(arguments, ret, errp);
}

static void enter_query(QDict *arguments, QObject **ret, Error **errp)
{
	atomic_load(&own[QUERY].run)(arguments, ret, errp);
}

static qmp_command_fn *const enters[COMMANDS] = { [SET] = enter_set, [QUERY] = enter_query };

/* ---- The list; in bottom halves ---- */

/* Whether all of @entry is mapped: it need not be an entry of ours at all. */
static bool is_mapped(const struct entry *entry)
{
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)entry / page * page;

	return !msync((void *)start, (uintptr_t)(entry + 1) - start, MS_ASYNC);
}

/* The entry of a shim that has @name as its name, or NULL when that is QEMU's own. */
static struct entry *find_entry(const char *name)
{
	struct entry *entry = (struct entry *)(void *)(uintptr_t)name;

	_Static_assert(offsetof(struct entry, name) == 0, "the name is the entry's address");
	if ((uintptr_t)entry % _Alignof(struct entry) || !is_mapped(entry) || memcmp(entry->mark, MARK, sizeof(MARK)))
		return NULL;
	return entry;
}

/* Returns 0, or -EEXIST when QEMU has such a command by itself: then nothing has changed. */
static int offer(void)
{
	struct entry *found[COMMANDS] = { NULL };

	for (int i = 0; i < COMMANDS; i++) {
		const QmpCommand *command = sym.qmp_find_command(sym.qmp_commands, own[i].name);

		if (command && !(found[i] = find_entry(sym.qmp_command_name(command))))
			return -EEXIST;
	}
	for (int i = 0; i < COMMANDS; i++) {
		entries[i] = found[i] ? found[i] : &own[i];
		atomic_store(&entries[i]->run, runs[i]);
		if (found[i])
			sym.qmp_enable_command(sym.qmp_commands, own[i].name);
		else
			sym.qmp_register_command(sym.qmp_commands, own[i].name, enters[i], 0, 0);
	}
	return 0;
}

/* Unless another shim in this process has the commands by now. */
static void withdraw(void)
{
	for (int i = 0; i < COMMANDS; i++)
		if (entries[i] && atomic_load(&entries[i]->run) == runs[i]) {
			sym.qmp_disable_command(sym.qmp_commands, own[i].name, "ramlock has left this VM");
			entries[i] = NULL;
		}
}

void monitor_settle(void)
{
	pthread_mutex_lock(&serving);
	if (!server)
		withdraw();
	else if (state == WAITING)
		state = offer() ? TAKEN : ON;
	pthread_mutex_unlock(&serving);
}

int monitor_want(const struct qmp_server *s)
{
	int err;

	pthread_mutex_lock(&serving);
	server = exported ? s : NULL;
	if (!s)
		state = OFF;
	else if (!exported)
		state = NOT_EXPORTED;
	else if (state != ON && state != TAKEN)
		state = WAITING;
	err = state == NOT_EXPORTED ? -ENOSYS : state == TAKEN ? -EEXIST : 0;
	pthread_mutex_unlock(&serving);
	return err;
}

bool monitor_is_offered(void)
{
	bool offered = false;

	pthread_mutex_lock(&serving);
	for (int i = 0; i < COMMANDS; i++)
		offered |= entries[i] && atomic_load(&entries[i]->run) == runs[i];
	pthread_mutex_unlock(&serving);
	return offered;
}

const char *monitor_state(void)
{
	static const char *const names[] = {
		[OFF] = "off", [WAITING] = "waiting", [ON] = "on", [NOT_EXPORTED] = "not-exported", [TAKEN] = "taken",
	};
	const char *name;

	_Static_assert(sizeof(names) / sizeof(names[0]) == STATES, "a name for each state");
	pthread_mutex_lock(&serving);
	name = names[state];
	pthread_mutex_unlock(&serving);
	return name;
}
