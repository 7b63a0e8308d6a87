/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A program that sleeps in ppoll() as QEMU's main thread does, and looks whether anything about it has changed since.
 * Its file is to be named qemu-system-victim, so that the shim takes it for a QEMU.
 *
 * It obeys lines on standard input:
 *   canary N    N rounds of ppoll() for 10 ms with canaries in every register; "ok" or what has changed
 *   sleep MS    one ppoll() for MS; how long it took, in ms, and what it returned
 *   signals     how many SIGRTMIN have arrived so far
 *   mask        the signal mask, in hex
 *   spin MS     no system call for MS
 *   deep BYTES  ppoll() for 2 s that deep in the stack; "ok"
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static volatile sig_atomic_t signals;

static void count(int number)
{
	(void)number;
	signals++;
}

static double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

struct canaries {
	uint8_t vectors[32 * 64];
	uint64_t masks[8]; /* k0 to k7 */
	uint32_t mxcsr, unused;
	uint16_t x87, unused2[3];
	uint64_t general[6]; /* rbx, rbp, r12 to r15 */
	uint64_t flags;
};

/*
 * Loads all canaries, calls ppoll() of libc, and stores all registers. The ABI lets ppoll() change vector registers, but
 * its few instructions around the system call do not.
 */
#define CANARY_CALL(load, store)                                                                              \
	__asm__ volatile("push %%rbx; push %%rbp; push %%r12; push %%r13; push %%r14; push %%r15\n\t"         \
			 "push %[out]; push %[in]\n\t"                                                        \
			 "mov %[in], %%rax\n\t"                                                               \
			 "mov %[fn], %%r11\n\t" load "ldmxcsr 2112(%%rax)\n\t"                                \
			 "fldcw 2120(%%rax)\n\t"                                                              \
			 "mov 2128(%%rax), %%rbx; mov 2136(%%rax), %%rbp; mov 2144(%%rax), %%r12\n\t"         \
			 "mov 2152(%%rax), %%r13; mov 2160(%%rax), %%r14; mov 2168(%%rax), %%r15\n\t"         \
			 "xor %%edi, %%edi; xor %%esi, %%esi; mov %[ts], %%rdx; xor %%ecx, %%ecx\n\t"         \
			 "call *%%r11\n\t"                                                                    \
			 "mov 8(%%rsp), %%rax\n\t" store "stmxcsr 2112(%%rax)\n\t"                            \
			 "fnstcw 2120(%%rax)\n\t"                                                             \
			 "mov %%rbx, 2128(%%rax); mov %%rbp, 2136(%%rax); mov %%r12, 2144(%%rax)\n\t"         \
			 "mov %%r13, 2152(%%rax); mov %%r14, 2160(%%rax); mov %%r15, 2168(%%rax)\n\t"         \
			 "add $16, %%rsp\n\t"                                                                 \
			 "pop %%r15; pop %%r14; pop %%r13; pop %%r12; pop %%rbp; pop %%rbx"                   \
			 :                                                                                    \
			 : [in] "S"(in), [out] "D"(out), [ts] "d"(&ts), [fn] "c"(ppoll)                       \
			 : "rax", "r8", "r9", "r10", "r11", "memory", "cc")

#define X(op, n) op(n)
#define LOAD_YMM(n) "vmovdqu " #n "*64(%%rax), %%ymm" #n "\n\t"
#define STORE_YMM(n) "vmovdqu %%ymm" #n ", " #n "*64(%%rax)\n\t"
#define LOAD_XMM(n) "movdqu " #n "*64(%%rax), %%xmm" #n "\n\t"
#define STORE_XMM(n) "movdqu %%xmm" #n ", " #n "*64(%%rax)\n\t"
#define LOAD_ZMM(n) "vmovdqu64 " #n "*64(%%rax), %%zmm" #n "\n\t"
#define STORE_ZMM(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%%rax)\n\t"
#define LOAD_K(n) "kmovq 2048+" #n "*8(%%rax), %%k" #n "\n\t"
#define STORE_K(n) "kmovq %%k" #n ", 2048+" #n "*8(%%rax)\n\t"
#define FIRST_8(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7)
#define FIRST_16(op) FIRST_8(op) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define ALL_32(op)                                                                                                    \
	FIRST_16(op) op(16) op(17) op(18) op(19) op(20) op(21) op(22) op(23) op(24) op(25) op(26) op(27) op(28) op(29) \
		op(30) op(31)

/* Bytes of each vector register that this CPU has, and whether it has 32 of them and mask registers. */
static unsigned int width = 16;
static int avx512;

static void look_at_cpu(void)
{
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx"))
		width = 32;
	avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
	if (avx512)
		width = 64;
}

/* Vector registers that libc's ppoll() itself uses, to copy the timeout. */
static int used_by_libc[32];

/* Returns 0, or -1 with the reason printed. With @learn it only notes what libc changes. */
static int canary_round(unsigned int seed, int learn)
{
	static struct canaries a, b;
	struct canaries *in = &a, *out = &b;
	struct timespec ts = { .tv_nsec = 10 * 1000 * 1000 };

	for (size_t i = 0; i < sizeof(a.vectors); i++)
		a.vectors[i] = (uint8_t)(seed * 31 + i * 7 + (i >> 6));
	for (size_t i = 0; i < 8; i++)
		a.masks[i] = 0x0123456789abcdefULL * (seed + i + 1);
	for (size_t i = 0; i < 6; i++)
		a.general[i] = 0xfedcba9876543210ULL * (seed + i + 1);
	a.mxcsr = 0x1f80 | (seed % 4) << 13; /* the rounding mode */
	a.x87 = (uint16_t)(0x037f | (seed % 4) << 10);
	memset(&b, 0, sizeof(b));
	if (avx512)
		CANARY_CALL(ALL_32(LOAD_ZMM) FIRST_8(LOAD_K), ALL_32(STORE_ZMM) FIRST_8(STORE_K));
	else if (width == 32)
		CANARY_CALL(FIRST_16(LOAD_YMM), FIRST_16(STORE_YMM));
	else
		CANARY_CALL(FIRST_16(LOAD_XMM), FIRST_16(STORE_XMM));
	for (unsigned int r = 0; r < (avx512 ? 32U : 16U); r++)
		if (memcmp(a.vectors + r * 64, b.vectors + r * 64, width)) {
			used_by_libc[r] |= learn;
			if (used_by_libc[r])
				continue;
			printf("vector register %u has changed\n", r);
			return -1;
		}
	if (avx512 && memcmp(a.masks, b.masks, sizeof(a.masks))) {
		printf("a mask register has changed\n");
		return -1;
	}
	if (memcmp(a.general, b.general, sizeof(a.general)) || a.mxcsr != b.mxcsr || a.x87 != b.x87) {
		printf("a general or control register has changed\n");
		return -1;
	}
	return 0;
}

static void canary(unsigned int rounds)
{
	for (unsigned int i = 0; i < rounds; i++)
		if (canary_round(i, 0))
			return;
	printf("ok %u bit\n", width * 8);
}

static void sleep_for(double ms)
{
	struct timespec ts = { (time_t)(ms / 1000), (long)((uint64_t)ms % 1000 * 1000000) };
	double begun = now_ms();
	int result, error;

	errno = 4711;
	result = ppoll(NULL, 0, &ts, NULL);
	error = errno;
	printf("%.3f %d %d\n", now_ms() - begun, result, error);
}

static void spin(double ms)
{
	double end = now_ms() + ms;

	/* now_ms() makes no system call: it reads the clock in the vdso. */
	while (now_ms() < end)
		;
	printf("ok\n");
}

static void __attribute__((noinline)) touch(void)
{
	volatile char room[24 << 10];

	for (size_t i = 0; i < sizeof(room); i += 1024)
		room[i] = 1;
}

static void __attribute__((noinline)) deep(size_t size)
{
	volatile char *room = alloca(size);
	struct timespec ts = { .tv_sec = 2 };

	for (size_t i = size; i > 0; i--)
		room[i - 1] = 1;
	touch(); /* the frame of an injection lies in stack that was used before */
	ppoll(NULL, 0, &ts, NULL);
	printf("ok\n");
}

static void show_mask(void)
{
	sigset_t mask;
	unsigned long long bits = 0;

	sigprocmask(SIG_SETMASK, NULL, &mask);
	for (int n = 1; n < 64; n++)
		bits |= (unsigned long long)sigismember(&mask, n) << n;
	printf("%llx\n", bits);
}

int main(void)
{
	char line[64];
	struct sigaction action = { .sa_handler = count, .sa_flags = SA_RESTART };
	sigset_t some;

	look_at_cpu();
	canary_round(1, 1);
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGRTMIN, &action, NULL);
	sigemptyset(&some);
	sigaddset(&some, SIGUSR2);
	sigprocmask(SIG_BLOCK, &some, NULL);
	for (;;) {
		struct pollfd input = { .fd = 0, .events = POLLIN };

		/* Parked here, for ever if need be, when nothing is asked. */
		if (ppoll(&input, 1, NULL, NULL) < 0)
			continue;
		if (!fgets(line, sizeof(line), stdin))
			return 0;
		if (!strncmp(line, "canary ", 7))
			canary((unsigned int)atoi(line + 7));
		else if (!strncmp(line, "sleep ", 6))
			sleep_for(atof(line + 6));
		else if (!strncmp(line, "spin ", 5))
			spin(atof(line + 5));
		else if (!strncmp(line, "deep ", 5))
			deep((size_t)atol(line + 5));
		else if (!strncmp(line, "signals", 7))
			printf("%d\n", (int)signals);
		else if (!strncmp(line, "mask", 4))
			show_mask();
	}
}
