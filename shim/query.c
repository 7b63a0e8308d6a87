/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The commands that tell: of the guarantee, of guest RAM, of the shim. */
#include "commands_inside.h"
#include "monitor.h"

#include <unistd.h>

static struct json_object *block_object(const struct ram_block *b)
{
	struct json_object *o = json_object_new_object();

	add_string(o, "id", b->id);
	add_size(o, "host", b->host.start);
	add_size(o, "size", range_size(b->host));
	add_size(o, "page-size", b->page_size);
	add_string(o, "backing", backing_name(b->backing));
	return o;
}

static void add_waiting(struct json_object *o, const struct commands *c)
{
	if (c->symbols)
		add_reason(o, "waiting", "starting", "the VM is still being set up");
	else
		add_reason(o, "waiting", "no-symbols",
			   "this QEMU does not export its symbols, so guest RAM has to be found from outside: "
			   "run `ramlock set` or `ramlock status` for it");
}

/* Adds the sum of @losses as @key. */
static void add_losses(struct json_object *o, const char *key, const struct losses *losses)
{
	uint64_t sum = 0;

	for (int i = 0; i < LOSS_COUNT; i++)
		sum += losses->bytes[i];
	add_size(o, key, sum);
}

static void add_step_times(struct json_object *o, const struct step_times *t)
{
	struct json_object *times = json_object_new_object(), *buckets = json_object_new_array();

	add_size(times, "count", t->count);
	add_size(times, "sum-us", t->sum_ns / 1000);
	for (size_t i = 0; i < STEP_TIMES; i++)
		json_object_array_add(buckets, json_object_new_uint64(t->buckets[i]));
	add(times, "buckets", buckets);
	add(o, "step-times", times);
}

void query_ram_minguarantee(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct locker_status *s = &c->status;
	struct json_object *o = json_object_new_object(), *blocks = json_object_new_array();

	(void)arguments;
	c->look_now(c->opaque, false);
	read_status(c);
	add_size(o, "requested", s->requested);
	add_bool(o, "all", s->wish.all);
	add_size(o, "locked", s->locked);
	add_size(o, "armed", s->armed);
	add_size(o, "foreign", s->foreign);
	add_string(o, "state", locker_state_name(s->state));
	add_size(o, "ram", s->ram);
	if (s->left_out)
		add_size(o, "left-out", s->left_out);
	add_string(o, "order", order_name(s->wish.order));
	add_bool(o, "prefault", s->wish.prefault);
	add_size(o, "hold-budget", s->wish.hold_budget_us);
	add_size(o, "threads", s->wish.threads);
	add_size(o, "host-reserve", s->host_reserve);
	add_bool(o, "cgroups-seen", s->cgroups_seen);
	add_size(o, "generation", s->generation);
	for (size_t i = 0; i < s->n_blocks; i++) {
		struct json_object *block = block_object(&s->blocks[i].block);

		add_size(block, "locked", s->blocks[i].locked);
		json_object_array_add(blocks, block);
	}
	add(o, "blocks", blocks);
	add_string(o, "source", c->symbols ? "qemu" : "controller");
	add_size(o, "step-max-us", s->step_max_us);
	add_size(o, "step-p99-us", s->step_p99_us);
	add_step_times(o, &s->step_times);
	add_size(o, "rate", s->rate);
	if (s->state == LOCKER_LOCKING || s->state == LOCKER_UNLOCKING)
		add_size(o, "eta-s", s->eta_s);
	add_size(o, "extents", s->extents);
	add_bool(o, "follow-discards", s->follows);
	add_size(o, "given-back", s->given_back);
	add_losses(o, "lost", &s->lost);
	add_losses(o, "repaired", &s->repaired);
	add_size(o, "gap-filled", s->filled);
	if (s->memlock_limit != UINT64_MAX)
		add_size(o, "memlock-limit", s->memlock_limit);
	if (s->state == LOCKER_SHORT)
		add_reason(o, "short", shortage_name(s->shortage), s->short_text);
	if (s->state == LOCKER_WAITING)
		add_waiting(o, c);
	if (s->launch_error[0])
		add_string(o, "launch-error", s->launch_error);
	r->value = o;
}

void query_ram_blocks(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	struct json_object *blocks = json_object_new_array();

	(void)arguments;
	c->look_now(c->opaque, false);
	locker_query(c->locker, &c->status);
	for (size_t i = 0; i < c->status.n_blocks; i++) {
		struct json_object *block = block_object(&c->status.blocks[i].block);

		add_string(block, "source", c->symbols ? "qemu" : "controller");
		json_object_array_add(blocks, block);
	}
	r->value = blocks;
}

void query_version(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	(void)c, (void)arguments;
	r->value = qmp_version();
}

void query_ramlock(struct commands *c, struct json_object *arguments, struct qmp_reply *r)
{
	(void)arguments;
	r->value = json_object_new_object();
	add_string(r->value, "version", RAMLOCK_VERSION);
	add_size(r->value, "pid", (uint64_t)getpid());
	add_size(r->value, "base", c->base);
	add_string(r->value, "entry", c->injected ? "injected" : "preloaded");
	add_string(r->value, "monitor", monitor_state());
	if (c->injected)
		add_size(r->value, "started-ns", *c->started_ns);
}
