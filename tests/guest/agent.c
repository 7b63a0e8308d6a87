/*
 * The guest agent: answers one-line commands on a serial port, for tests that look at the VM from inside.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Theory of operation: single-threaded but for `clockgap`, `patrol` and `feel`. A line comes in, one line goes out: "ok ..." or
 * "error ...". The pattern that `touch` writes tells page from page and round from round, so that a page that
 * was lost (zero), swapped with another or left old is seen by `verify`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define STRIDE 512UL /* one word in each 512 bytes: eight in a page, quick enough under emulation */
#define MAX_CPUS 64

/* What the agent holds between commands. */
struct agent {
	FILE *in;
	FILE *out;
	unsigned char *mem; /* the touched memory, NULL when there is none */
	size_t size;
	uint64_t round; /* the round of writing that `verify` expects */
};

/* One thread of `clockgap`, bound to one CPU. */
struct gap {
	pthread_t thread;
	int cpu;
	double seconds;
	double longest;
};

__attribute__((format(printf, 2, 3))) static void reply(struct agent *c, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vfprintf(c->out, format, args);
	va_end(args);
	fputc('\n', c->out);
	fflush(c->out);
}

static double now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t pattern(size_t offset, uint64_t round)
{
	return (offset + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ round << 56;
}

static void fill(struct agent *c)
{
	c->round++;
	for (size_t i = 0; i < c->size; i += STRIDE)
		*(volatile uint64_t *)(c->mem + i) = pattern(i, c->round);
}

/* Returns the offset of the first wrong word, or the size when all is well. */
static size_t first_wrong(const struct agent *c)
{
	size_t i;

	for (i = 0; i < c->size; i += STRIDE)
		if (*(volatile uint64_t *)(c->mem + i) != pattern(i, c->round))
			break;
	return i < c->size ? i : c->size;
}

static void do_free(struct agent *c)
{
	if (c->mem)
		munmap(c->mem, c->size);
	c->mem = NULL;
	c->size = 0;
}

static void do_touch(struct agent *c, const char *arg)
{
	size_t size = strtoull(arg, NULL, 0) & ~(PAGE - 1);
	void *mem;

	do_free(c);
	if (!size) {
		reply(c, "error touch needs a size of at least a page");
		return;
	}
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED) {
		reply(c, "error mmap: %s", strerror(errno));
		return;
	}
	c->mem = mem;
	c->size = size;
	fill(c);
	reply(c, "ok %zu", size);
}

static void do_verify(struct agent *c)
{
	size_t wrong = first_wrong(c);

	if (wrong < c->size)
		reply(c, "error wrong at offset %zu: %#" PRIx64 ", expected %#" PRIx64, wrong,
		      *(volatile uint64_t *)(c->mem + wrong), pattern(wrong, c->round));
	else
		reply(c, "ok %zu", c->size);
}

/* Verifies and rewrites everything for that many seconds: the guest's writes race with whatever the host does. */
static void do_churn(struct agent *c, const char *arg)
{
	double end = now(CLOCK_MONOTONIC) + strtod(arg, NULL);
	unsigned int rounds = 0;

	do {
		if (first_wrong(c) < c->size) {
			do_verify(c);
			return;
		}
		fill(c);
		rounds++;
	} while (now(CLOCK_MONOTONIC) < end);
	reply(c, "ok %u", rounds);
}

static void *gap_main(void *opaque)
{
	struct gap *gap = opaque;
	double begin, last, t;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(gap->cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
	begin = last = now(CLOCK_MONOTONIC);
	do {
		t = now(CLOCK_MONOTONIC);
		if (t - last > gap->longest)
			gap->longest = t - last;
		last = t;
	} while (t - begin < gap->seconds);
	return NULL;
}

/* The longest time that some CPU of the guest stood still, in seconds. */
static void do_clockgap(struct agent *c, const char *arg)
{
	static struct gap gaps[MAX_CPUS];
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	double longest = 0;

	if (cpus > MAX_CPUS)
		cpus = MAX_CPUS;
	for (int i = 0; i < cpus; i++) {
		gaps[i] = (struct gap){ .cpu = i, .seconds = strtod(arg, NULL) };
		if (pthread_create(&gaps[i].thread, NULL, gap_main, &gaps[i])) {
			cpus = i;
			break;
		}
	}
	for (int i = 0; i < cpus; i++) {
		pthread_join(gaps[i].thread, NULL);
		if (gaps[i].longest > longest)
			longest = gaps[i].longest;
	}
	reply(c, "ok %.6f", longest);
}

/* One thread of `patrol`: every n-th page is its own. */
struct guard {
	pthread_t thread;
	unsigned char *mem;
	size_t size, first, step;
	_Atomic uint64_t rounds, wrong, where;
};

static struct guard guards[MAX_CPUS];
static long n_guards;

/* Verifies what was written in the round before, and writes the next, for ever. */
static void *guard_main(void *opaque)
{
	struct guard *g = opaque;

	for (uint64_t round = 0;; round++) {
		for (size_t page = g->first; page < g->size; page += g->step)
			for (size_t i = page; i < page + PAGE; i += STRIDE) {
				volatile uint64_t *word = (volatile uint64_t *)(g->mem + i);

				if (round && *word != pattern(i, round)) {
					g->where = i;
					g->wrong++;
				}
				*word = pattern(i, round + 1);
			}
		g->rounds++;
	}
	return NULL;
}

/* Sets a thread for each CPU to verify and rewrite so many bytes until the end of the guest. */
static void do_patrol(struct agent *c, const char *arg)
{
	size_t size = strtoull(arg, NULL, 0) & ~(PAGE - 1);
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned char *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED || n_guards) {
		reply(c, "error patrol: %s", n_guards ? "on its way already" : strerror(errno));
		return;
	}
	if (cpus > MAX_CPUS)
		cpus = MAX_CPUS;
	for (; n_guards < cpus; n_guards++) {
		struct guard *g = &guards[n_guards];

		*g = (struct guard){ .mem = mem, .size = size, .first = (size_t)n_guards * PAGE, .step = (size_t)cpus * PAGE };
		if (pthread_create(&g->thread, NULL, guard_main, g))
			break;
	}
	reply(c, n_guards == cpus ? "ok %ld" : "error patrol: only %ld threads", n_guards);
}

/* Rounds of the slowest thread of `patrol`, words that were wrong, and the offset of one of these. */
static void do_report(struct agent *c)
{
	uint64_t rounds = UINT64_MAX, wrong = 0, where = 0;

	for (long i = 0; i < n_guards; i++) {
		if (guards[i].rounds < rounds)
			rounds = guards[i].rounds;
		wrong += guards[i].wrong;
		if (guards[i].wrong)
			where = guards[i].where;
	}
	reply(c, "ok %" PRIu64 " %" PRIu64 " %" PRIu64, n_guards ? rounds : 0, wrong, where);
}

/*
 * `feel` and `felt`: a thread that looks at the clock without a pause, and in each millisecond touches a page. For each
 * millisecond it keeps the longest gap between two looks, and how long the touch took.
 */
#define FEEL_PAGES 4096UL
#define FEEL_MAX 120000

static struct {
	pthread_t thread;
	unsigned char *mem;
	_Atomic int stop;
	size_t n, page;
	float gaps[FEEL_MAX], touches[FEEL_MAX]; /* seconds */
} feeling;

static void *feel_main(void *unused)
{
	double last = now(CLOCK_MONOTONIC), window = last + 1e-3, longest = 0, t;

	(void)unused;
	while (!feeling.stop) {
		t = now(CLOCK_MONOTONIC);
		if (t - last > longest)
			longest = t - last;
		last = t;
		if (t < window || feeling.n >= FEEL_MAX)
			continue;
		((volatile unsigned char *)feeling.mem)[feeling.page * PAGE] = 1;
		feeling.page = (feeling.page + 1) % FEEL_PAGES;
		last = now(CLOCK_MONOTONIC);
		feeling.touches[feeling.n] = (float)(last - t);
		feeling.gaps[feeling.n++] = (float)longest;
		longest = 0;
		window = last + 1e-3;
	}
	return NULL;
}

/* Where the pages are in the guest's memory: "ok FRAME+COUNT ...", in pages. What they hold is of no matter to anybody. */
static void do_where(struct agent *c)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t first = 0, count = 0, entry;

	if (!feeling.mem) {
		feeling.mem = mmap(NULL, FEEL_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		mlock(feeling.mem, FEEL_PAGES * PAGE);
	}
	fprintf(c->out, "ok");
	for (size_t i = 0; i < FEEL_PAGES; i++) {
		if (pread(fd, &entry, sizeof(entry), (off_t)(((uintptr_t)feeling.mem / PAGE + i) * sizeof(entry))) < 0)
			break;
		entry &= (UINT64_C(1) << 55) - 1;
		if (count && entry == first + count) {
			count++;
			continue;
		}
		if (count)
			fprintf(c->out, " %" PRIu64 "+%" PRIu64, first, count);
		first = entry;
		count = 1;
	}
	close(fd);
	reply(c, " %" PRIu64 "+%" PRIu64, first, count);
}

static void do_feel(struct agent *c)
{
	if (!feeling.mem) {
		reply(c, "error ask where first");
		return;
	}
	feeling.n = 0;
	feeling.page = 0;
	feeling.stop = 0;
	if (pthread_create(&feeling.thread, NULL, feel_main, NULL))
		reply(c, "error no thread");
	else
		reply(c, "ok");
}

static int compare(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

/* "count longest,next,...": the highest fiftieth, which is all that percentiles need. */
static void tell(struct agent *c, float *samples)
{
	qsort(samples, feeling.n, sizeof(samples[0]), compare);
	fprintf(c->out, " %zu ", feeling.n);
	for (size_t i = 0; i < feeling.n / 50 + 1 && i < feeling.n; i++)
		fprintf(c->out, "%s%.7f", i ? "," : "", (double)samples[feeling.n - 1 - i]);
}

static void do_felt(struct agent *c)
{
	feeling.stop = 1;
	pthread_join(feeling.thread, NULL);
	fprintf(c->out, "ok");
	tell(c, feeling.gaps);
	tell(c, feeling.touches);
	reply(c, "%s", "");
}

static void run(struct agent *c, char *line)
{
	const char *verb = strtok(line, " \t\r\n");
	const char *arg = strtok(NULL, " \t\r\n");

	if (!verb)
		return;
	if (!arg)
		arg = "0";
	if (!strcmp(verb, "hello"))
		reply(c, "ok ramlock-guest");
	else if (!strcmp(verb, "uptime"))
		reply(c, "ok %.3f", now(CLOCK_BOOTTIME));
	else if (!strcmp(verb, "cpus"))
		reply(c, "ok %ld", sysconf(_SC_NPROCESSORS_ONLN));
	else if (!strcmp(verb, "memory"))
		reply(c, "ok %ld", sysconf(_SC_PHYS_PAGES) * (long)PAGE);
	else if (!strcmp(verb, "touch"))
		do_touch(c, arg);
	else if (!strcmp(verb, "verify"))
		do_verify(c);
	else if (!strcmp(verb, "churn"))
		do_churn(c, arg);
	else if (!strcmp(verb, "free")) {
		do_free(c);
		reply(c, "ok 0");
	} else if (!strcmp(verb, "clockgap"))
		do_clockgap(c, arg);
	else if (!strcmp(verb, "patrol"))
		do_patrol(c, arg);
	else if (!strcmp(verb, "where"))
		do_where(c);
	else if (!strcmp(verb, "feel"))
		do_feel(c);
	else if (!strcmp(verb, "felt"))
		do_felt(c);
	else if (!strcmp(verb, "report"))
		do_report(c);
	else if (!strcmp(verb, "poweroff")) {
		reply(c, "ok bye");
		tcdrain(fileno(c->out));
		reboot(RB_POWER_OFF);
	} else
		reply(c, "error unknown command %s", verb);
}

int main(int argc, char **argv)
{
	struct agent c = { 0 };
	struct termios tty;
	char line[256];
	int fd;

	if (argc != 2) {
		fprintf(stderr, "usage: agent TTY\n");
		return 2;
	}
	fd = open(argv[1], O_RDWR | O_NOCTTY);
	if (fd < 0 || tcgetattr(fd, &tty) < 0) {
		perror(argv[1]);
		return 1;
	}
	cfmakeraw(&tty);
	tcsetattr(fd, TCSANOW, &tty);
	c.in = fdopen(fd, "r");
	c.out = fdopen(dup(fd), "w");
	if (!c.in || !c.out)
		return 1;
	reply(&c, "ok ready");
	while (fgets(line, sizeof(line), c.in))
		run(&c, line);
	return 1;
}
